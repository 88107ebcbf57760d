"""What a run would build or do by a recipe, each as something that can be compared."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_lora.config.loader import check_recipe
from megatron_lora.config.schema import PolicyConfig, Recipe
from megatron_lora.data.batch import Row
from megatron_lora.data.dataset import Prompt
from megatron_lora.data.loader import GroupLoader
from megatron_lora.errors import UserError
from megatron_lora.objectives.estimators import Estimator
from megatron_lora.policy.adapter_start import planned_adapter
from megatron_lora.policy.batching import BatchingOptions, divide
from megatron_lora.policy.critic import critic_policy
from megatron_lora.policy.dtensor.adapter import adapted_linears
from megatron_lora.policy.dtensor.model import build_model
from megatron_lora.policy.dtensor.optim import build_optimizer, build_schedule, clip_norm
from megatron_lora.policy.interface import StepResult
from megatron_lora.policy.layout_checks import check_layout, sequence_multiple
from megatron_lora.policy.weights_check import read_base
from megatron_lora.rollout.servers import ServerGenerator
from megatron_lora.rollout.vllm_engine import base_config, engine_arguments
from megatron_lora.runtime.world import World
from megatron_lora.trainers.checkpoint_writer import CheckpointWriter, expected_bytes
from megatron_lora.trainers.dpo import train_dpo
from megatron_lora.trainers.grpo import GRPOTrainer
from megatron_lora.trainers.loop import run_steps
from megatron_lora.trainers.plan import _layout
from megatron_lora.trainers.ppo import PPOTrainer
from megatron_lora.trainers.rollout_setup import build_prompt_loaders
from megatron_lora.trainers.rollout_validation import validate_answers
from megatron_lora.trainers.run_folder import RunFolder
from megatron_lora.trainers.session import Session
from megatron_lora.trainers.setup import Prepared, build_loaders, count_steps, count_updates
from megatron_lora.trainers.sft import train_sft

MEGATRON, PEFT, LORA = "policy.megatron_cfg", "policy.megatron_cfg.peft", "policy.dtensor_cfg.lora_cfg"
Keys = dict[str, Any]
# Algorithms whose policy draws the answers that it trains on.
DRAWING = ("grpo", "distillation")


def recipe(folder: Path, keys: Keys, algorithm: str = "sft") -> Recipe:
    content: Keys = {algorithm: {}, "data": {"train": {"data_path": "rows.jsonl"}}, "policy": {}}
    if algorithm in DRAWING:
        content["policy"]["train_global_batch_size"] = 32 if algorithm == "distillation" else 512
    for path, value in {"policy.model_name": "dense", "policy.precision": "float32", **keys}.items():
        *parents, name = path.split(".")
        section = content
        for parent in parents:
            section = section.setdefault(parent, {})
        is_folder = name in ("model_name", "init_adapter") and value is not None
        section[name] = str(folder / value) if is_folder else value
    return check_recipe(content).recipe


# What a run builds or does by a recipe, as something that can be compared.


def optimized(folder: Path, keys: Keys) -> Any:
    """Rates, decays and moments' factors of ten steps."""
    return optimizer_steps(recipe(folder, keys).policy)


def optimizer_steps(policy: PolicyConfig) -> Any:
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = build_optimizer([matrix, vector], policy, lora_plus={matrix})
    schedule = build_schedule(optimizer, policy, 10)
    seen: list[Any] = [type(optimizer).__name__, clip_norm(policy)]
    for _ in range(10):
        seen.append([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])
        optimizer.step()
        schedule.step(1)
    return seen


def criticized(folder: Path, keys: Keys) -> Any:
    """How a critic is trained."""
    keys = {"grpo.adv_estimator.name": "gae", f"{LORA}.enabled": True, "critic.optim.lr": 0.01, **keys}
    found = recipe(folder, keys, "grpo")
    assert found.critic is not None
    policy = SimpleNamespace(critic=SimpleNamespace())
    session = session_of(found, policy=policy, total_steps=1)
    trainer = PPOTrainer(session, SimpleNamespace(forever=list), None, None, shows_samples=False)
    optimizer = optimizer_steps(critic_policy(found.policy, found.critic))
    return [optimizer, trainer.value_objective.clip, trainer.warmup_steps]


def planned(folder: Path, keys: Keys) -> Any:
    """What the Megatron backend is to adapt."""
    found = planned_adapter(recipe(folder, {f"{MEGATRON}.enabled": True, f"{PEFT}.enabled": True, **keys}).policy)
    if found is None:
        return None
    spec = found.spec
    return [spec.type, spec.saved, spec.residual, found.init, spec.modules, (found.tensors or {}).keys()]


def built(folder: Path, keys: Keys) -> Any:
    """The DTensor backend's model: what trains, adapters with their values, and what is said of them."""
    policy = recipe(folder, {f"{LORA}.enabled": True, **keys}).policy
    model = build_model(policy, World.alone(), seed=1)
    adapters = {
        name: (
            linear.scaling,
            linear.dropout,
            linear.dropout_before,
            linear.fused,
            linear.keeps_derived,
            type(linear.method),
            {key: (value.dtype, float(value.detach().float().abs().sum())) for key, value in linear.factors.items()},
        )
        for name, linear in adapted_linears(model.hf).items()
    }
    whole = {
        name: (value.dtype, tuple(value.shape), float(value.detach().float().abs().sum()))
        for name, value in model.hf.named_parameters()
        if value.requires_grad
    }
    layer = model.hf.model.layers[0]
    options = (model.hf.is_gradient_checkpointing, "forward" in vars(layer), layer._get_fsdp_state()._fsdp_param_group)
    offloads = type(options[2].offload_policy).__name__
    numbers = {name: getattr(model.hf.config, name) for name in ("model_type", "rms_norm_eps")}
    stored = {name: value.dtype for name, value in model.hf.named_parameters()}
    four_bit = [type(module.base_layer).__name__ for module in adapted_linears(model.hf).values()]
    return [adapters, whole, options[:2], offloads, numbers, stored, four_bit, model.notices]


def divided(folder: Path, keys: Keys) -> Any:
    """Tokens of the micro-batches of 24 rows, in training and in scoring."""
    policy = recipe(folder, {"policy.max_total_sequence_length": 100, **keys}).policy
    rows = [Row(torch.arange(60 + n), torch.arange(60 + n) > 9, index=n) for n in range(24)]
    options = BatchingOptions(pad_token_id=0, total_multiple=sequence_multiple(policy))
    shares = [divide([[r] for r in rows], policy, options, dp_size=1, dp_rank=0, purpose=p) for p in PURPOSES]
    return [[(batch.tokens.numel(), group) for batch, group in zip(s.batches, s.groups, strict=True)] for s in shares]


PURPOSES: Any = ("training", "scoring")


def laid_out(folder: Path, keys: Keys) -> Any:
    """The layout of four ranks, or why there is none."""
    found = recipe(folder, {"policy.max_total_sequence_length": 128, **keys})
    refused = None
    try:
        check_layout(found.policy, read_base(found.policy).shapes, 4)
    except UserError as error:
        refused = str(error)
    return [_layout(found, 4), sequence_multiple(found.policy), refused]


def counted(folder: Path, keys: Keys) -> Any:
    algorithm = algorithm_of(keys)
    found = recipe(folder, keys, algorithm)
    steps = count_steps(found, batches_an_epoch=5)
    return [steps, count_updates(found, steps), found.seed]


def run(folder: Path, keys: Keys) -> Any:
    """What a run of twelve steps validates and saves."""
    algorithm = algorithm_of(keys)
    found = recipe(folder, keys, algorithm)
    done: list[Any] = []
    writer = SimpleNamespace(poll=lambda blocking: None, save=lambda step, info: done.append(("saved", step)))

    def message(text: str) -> None:
        if not text.startswith("the first step was done"):  # how long that took is another number each time
            done.append(text)

    reporter = SimpleNamespace(failure=None, message=message)
    session = session_of(found, writer=writer, reporter=reporter)

    def step() -> None:
        session.step += 1

    options: Any = getattr(found, algorithm)
    first = found.rollouts.val_start_at if found.draws_answers else -1
    run_steps(session, options, step, lambda: done.append(("validated", session.step)), first_validation=first)
    return done


def configured(folder: Path, keys: Keys) -> Any:
    """Megatron-Core's fields, as they would be on a GPU with Transformer Engine."""
    from megatron_lora.policy.megatron import model

    policy = recipe(folder, {f"{MEGATRON}.enabled": True, "policy.precision": "bfloat16", **keys}).policy
    model_fields = {"activation_func": nn.functional.silu, "window_size": None, "num_moe_experts": None}
    provider: Any = SimpleNamespace(finalize=list, **model_fields)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "have_transformer_engine", lambda: True)
        model._configure(provider, policy, on_gpu(4), shared=False)
    return {name: value for name, value in vars(provider).items() if name != "finalize"}


def on_gpu(ranks: int) -> World:
    return replace(World.alone(), device=torch.device("cuda"), size=ranks)


def engine(folder: Path, keys: Keys) -> Any:
    """Arguments of vLLM, and of the servers' client, as they would be on four GPUs."""
    urls = {"policy.generation.servers.urls": ["http://a:1"]}
    policy = recipe(folder, {**urls, **keys}, "grpo").policy
    generator = ServerGenerator(policy, World.alone(), None, folder)
    served = [generator.folder, generator.requests.at_once, [(c.url, c.timeout) for c in generator.clients]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
        arguments = engine_arguments(policy, on_gpu(4), 8, ["q_proj"], base_config(policy))
    return [arguments, policy.env_vars, served]


def advantages(folder: Path, keys: Keys) -> Any:
    grpo = recipe(folder, keys, "grpo").grpo
    assert grpo is not None
    estimator = Estimator.from_config(grpo.adv_estimator)
    found = estimator.within_groups(torch.tensor([[1.0, 0.0, 0.5], [4.0, 3.0, 3.0]])).advantages.flatten()
    rows = [Row(torch.arange(3), torch.arange(3) > 1, token_fields={"advantages": value.expand(3)}) for value in found]
    trainer: Any = SimpleNamespace(options=grpo, estimator=estimator)
    return [row.token_fields["advantages"].tolist() for row in GRPOTrainer.over_batch(trainer, rows, [True] * 6)]


def prompts_read(folder: Path, keys: Keys) -> Any:
    """The batches of a training epoch's prompts, and of a validation's."""
    algorithm = algorithm_of(keys) if algorithm_of(keys) in DRAWING else "grpo"
    found = recipe(folder, {f"{algorithm}.num_prompts_per_step": 32, **keys}, algorithm)
    rows: Any = [Prompt(torch.tensor([n]), "", "", index=n) for n in range(40)]
    train, validation = build_prompt_loaders(found, rows, rows)
    assert validation is not None
    batches = [[prompt.index for prompt in next(iter(train))]]
    return batches + [[prompt.index for prompt in prompts] for prompts in validation]


def written(folder: Path, keys: Keys) -> Any:
    """What is written of five checkpoints, and which of them stay."""
    found = recipe(folder, {"checkpointing.keep_top_k": 2, **keys})
    saved: list[Any] = []

    class Weights:
        critic = None

        def save(self, weights: Path, optimizer: Path | None, *, asynchronous: bool) -> None:
            saved.append((optimizer is not None, asynchronous))
            weights.mkdir(parents=True)

    with TemporaryDirectory(dir=folder) as place:
        run_folder = RunFolder(Path(place) / "run")
        run_folder.make()
        weights, tokenizer = Weights(), SimpleNamespace(save_pretrained=lambda path: path.mkdir(parents=True))
        writer = CheckpointWriter(found, World.alone(), run_folder, weights, tokenizer, 0)  # type: ignore[arg-type]
        metric_name = found.checkpointing.metric_name
        for step, loss in enumerate((3.0, 1.0, 2.0, 4.0, 5.0), start=1):
            # What would be under this name, by other values under another.
            metric = loss if metric_name == "val:loss" else -loss
            writer.save(step, {"step": step, "metric_name": metric_name, "metric": metric})
        return [sorted(path.name for path in run_folder.path.iterdir()), saved, expected_bytes(found, 100)]


def validated(folder: Path, keys: Keys) -> Any:
    """Rows of the batches that a validation evaluates."""
    algorithm = algorithm_of(keys)
    found = recipe(
        folder, {f"{algorithm}.val_at_start": True, f"{algorithm}.val_global_batch_size": 4, **keys}, algorithm
    )
    fields = {"reference_logps": torch.zeros(8)}
    rows = [Row(torch.arange(8), torch.arange(8) > 3, index=n, token_fields=fields) for n in range(120)]
    groups = [[row] for row in rows] if algorithm == "sft" else list(zip(rows[::2], rows[1::2], strict=True))
    data: Any = Rows(groups)
    prepared = Prepared(found, None, data, data, [], [])
    seen: list[int] = []

    def evaluate(groups: Any, objective: Any) -> tuple[float, dict[str, float]]:
        seen.append(len(groups))
        return 1.0, {}

    policy = SimpleNamespace(evaluate=evaluate, train_step=lambda *_: StepResult(1.0, {}, 1.0, 1e-4, 8, 8))
    session = session_of(found, policy=policy, interrupt=SimpleNamespace(agreed=lambda world: True))
    (train_sft if algorithm == "sft" else train_dpo)(session, *build_loaders(prepared))
    return seen


class Rows(list[Any]):
    """Groups as a data set."""

    stats = SimpleNamespace(untrained=0)

    def with_targets(self) -> "Rows":
        return self


def answered(folder: Path, keys: Keys) -> Any:
    """How many answers a validation's prompt gets."""
    asked: list[int] = []

    class Asked(Exception):
        """Enough is known."""

    class Engine:
        def generate(self, prompts: Any, count: int, **_: Any) -> Any:
            asked.append(count)
            raise Asked

    algorithm = algorithm_of(keys) if algorithm_of(keys) in DRAWING else "grpo"
    session = session_of(recipe(folder, keys, algorithm))
    loader: Any = GroupLoader([Prompt(torch.tensor([1]), "", "", index=1)], 1, shuffle=False)
    with pytest.raises(Asked):
        validate_answers(session, Engine(), None, loader)  # type: ignore[arg-type]
    return asked


def algorithm_of(keys: Keys) -> str:
    names = [key.partition(".")[0] for key in keys]
    return next((name for name in names if name in ("dpo", *DRAWING)), "sft")


def session_of(found: Recipe, **parts: Any) -> Session:
    """A session whose parts do nothing but those that are given."""
    nothing: dict[str, Any] = {name: None for name in Session.__dataclass_fields__ if not name.startswith("_")}
    idle = {
        "world": World.alone(),
        "total_steps": 12,
        "step": 0,
        "metrics": {},
        "state": {},
        "loader": SimpleNamespace(state_dict=dict),
        "reporter": SimpleNamespace(failure=None, message=lambda text: None, log=lambda *values: None),
        "interrupt": SimpleNamespace(agreed=lambda world: False),
        "folder": SimpleNamespace(path=Path("run")),
        "identity": World.alone(),  # any dataclass
        "writer": SimpleNamespace(poll=lambda blocking: None, save=lambda step, info: None),
    }
    return Session(**nothing | idle | {"recipe": found} | parts)
