"""A worker's check of both backends at once: twenty steps of each algorithm on each, in one process group, and the
second half of them again from a checkpoint of the other backend."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.data.batch import Row
from megatron_lora.objectives.dpo import DPOConfig, DPOObjective
from megatron_lora.objectives.grpo import GRPOObjective
from megatron_lora.objectives.grpo_config import GRPOConfig
from megatron_lora.objectives.sft import SFTObjective
from megatron_lora.policy.dtensor.policy import DTensorPolicy
from megatron_lora.policy.interface import Policy, StepResult
from megatron_lora.policy.megatron.policy import MegatronPolicy
from megatron_lora.policy.other_adapter import other_adapter
from megatron_lora.runtime.world import init_dtensor_world, init_megatron_world
from megatron_lora.trainers.dpo import with_reference
from tests.distributed.megatron_build import forget_kernels, leave_groups
from tests.support.models import SIZES, save_model
from tests.support.reference import make_rows, save_adapter

NUM_STEPS, HALF, ROWS_A_STEP = 20, 10, 8
DPO_BETA = 0.1
YARN = {
    "rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "rope_theta": 1000},
    "max_position_embeddings": 64,
}
TP2 = {"tensor_parallel_size": 2}
MEGATRON_TP2 = {"tensor_model_parallel_size": 2}
# World size -> (dtensor_cfg, megatron_cfg): one of each backend's ways to spread over that many ranks.
LAYOUTS: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {
    1: ({}, {}),
    2: (TP2, MEGATRON_TP2 | {"sequence_parallel": True}),
    4: (TP2, MEGATRON_TP2 | {"pipeline_model_parallel_size": 2}),
}


@dataclass(frozen=True)
class Algorithm:
    """run: takes a policy and a step's number, and trains that step. full: the whole model trains. drawn: the adapter
    starts from the seed instead of a folder. adapter: more of both backends' adapter section. exchanged: its
    checkpoints are taken over. reference_weights: where full fine-tuning keeps its start; "": it keeps none.
    reference_policy: what the KL term measures from. overrides: of the base's config.json."""

    run: Callable[[Policy, int], StepResult]
    family: str = "qwen3"
    full: bool = False
    drawn: bool = False
    adapter: dict[str, Any] = field(default_factory=dict)
    exchanged: bool = False
    reference_weights: str = ""
    reference_policy: str = "start"
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def has_reference(self) -> bool:
        return not self.full or bool(self.reference_weights)


def rows_of(step: int, count: int = ROWS_A_STEP) -> list[Row]:
    return make_rows(count, SIZES["vocab_size"], seed=step)


def sft_step(policy: Policy, step: int) -> StepResult:
    return policy.train_step([[row] for row in rows_of(step)], SFTObjective())


def pairs_of(step: int) -> list[list[Row]]:
    rows = rows_of(step, 2 * ROWS_A_STEP)
    return [list(pair) for pair in zip(rows[::2], rows[1::2], strict=True)]


def dpo_step(policy: Policy, step: int) -> StepResult:
    objective = DPOObjective(DPOConfig(sft_loss_weight=0.1))
    return policy.train_step(with_reference(policy, pairs_of(step)), objective)


def plain_dpo_step(policy: Policy, step: int) -> StepResult:
    """DPO's own loss alone, as transformers is asked for it."""
    objective = DPOObjective(DPOConfig(reference_policy_kl_penalty=DPO_BETA))
    return policy.train_step(with_reference(policy, pairs_of(step)), objective)


def grpo_step(policy: Policy, step: int) -> StepResult:
    """Fixed answers with fixed advantages; the old policy is the one before the last even step, so that ratios move."""
    rollout = getattr(policy, "rollout", None)
    if step % 2 == 0:
        rows = rows_of(step)
        old = policy.score(rows)
        with policy.reference():
            reference = policy.score(rows)
        generator = torch.Generator().manual_seed(step)
        advantages = torch.randn(len(rows), generator=generator).tolist()
        rollout = [
            replace(
                row,
                token_fields={
                    "advantages": torch.full((len(row),), advantages[number]),
                    "old_logps": old[number],
                    "rollout_logps": old[number],
                    "reference_logps": reference[number],
                },
            )
            for number, row in enumerate(rows)
        ]
        policy.rollout = rollout  # type: ignore[attr-defined]
    assert rollout is not None
    objective = GRPOObjective(GRPOConfig(reference_policy_kl_penalty=0.05))
    with policy.sampling(0.9):
        return policy.train_step([[row] for row in rollout], objective)


ALGORITHMS = {
    "sft": Algorithm(sft_step, drawn=True, exchanged=True),
    "dpo": Algorithm(dpo_step, reference_policy="base"),
    "grpo": Algorithm(grpo_step),
    "dora": Algorithm(sft_step, "qwen2", drawn=True, adapter={"type": "dora", "lora_plus_ratio": 2.0}, exchanged=True),
    "full": Algorithm(sft_step, family="qwen2", full=True, exchanged=True),
    "full_dpo": Algorithm(plain_dpo_step, family="qwen2", full=True, exchanged=True, reference_weights="cpu"),
    "full_grpo": Algorithm(grpo_step, full=True, reference_weights="device", overrides=YARN),
}


# Whose policies are also asked as the base with another adapter: one that began at B zero, one from a folder.
WITH_ANOTHER = ("sft", "grpo")


def policy_config(folder: Path, algorithm: Algorithm, world_size: int, megatron: bool) -> PolicyConfig:
    """One recipe for both backends: only `megatron_cfg.enabled` differs."""
    dtensor_cfg, megatron_cfg = LAYOUTS[world_size]
    init_adapter = None if algorithm.full or algorithm.drawn else str(folder / f"{algorithm.family}_adapter")
    adapter = {"enabled": not algorithm.full, "init_adapter": init_adapter, "dim": 4, "alpha": 8} | algorithm.adapter
    lora_cfg = adapter | {"use_triton": dtensor_cfg == {}}
    return PolicyConfig.model_validate(
        {
            "model_name": str(folder / algorithm.family),
            "precision": "float32",
            "train_global_batch_size": ROWS_A_STEP,
            "train_micro_batch_size": 2,
            "max_total_sequence_length": 64,
            "reference_weights": algorithm.reference_weights or "cpu",
            "reference_policy": algorithm.reference_policy,
            "hf_config_overrides": algorithm.overrides,
            "dtensor_cfg": dtensor_cfg | {"lora_cfg": lora_cfg},
            "megatron_cfg": megatron_cfg
            | {
                "enabled": megatron,
                "peft": adapter,
                "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "weight_decay": 0.1, "adam_eps": 1e-8},
                "scheduler": {"lr_decay_style": "cosine", "lr_warmup_iters": 2},
            },
        }
    )


@contextmanager
def built_policy(config: PolicyConfig, *, keeps_start: bool = False) -> Iterator[Policy]:
    """A policy of the backend that the recipe selects, in process groups of its own."""
    backend, join = (
        (MegatronPolicy, init_megatron_world) if config.backend == "megatron" else (DTensorPolicy, init_dtensor_world)
    )
    world = join(config, 0)
    # Tensors this small only wait for more threads.
    torch.set_num_threads(1)
    yield backend(config, world, pad_token_id=0, seed=0, num_steps=NUM_STEPS, keeps_start=keeps_start)
    if config.backend == "megatron":
        forget_kernels()
        # DTensor keeps its meshes' groups for operations that it has planned before; Megatron's are made anew.
        leave_groups()


def train(policy: Policy, algorithm: Algorithm, saved: Path | None = None) -> dict[str, Any]:
    """All steps, a checkpoint after the first half of them; or the second half from a checkpoint that is there."""
    resumes = saved is not None and saved.is_dir()
    if saved is not None and resumes:
        policy.load(saved / "weights", saved / "optimizer")
    found: dict[str, Any] = {"losses": [], "grad_norms": [], "learning_rates": [], "metrics": [], "at_reference": []}
    for step in range(HALF if resumes else 0, NUM_STEPS):
        if algorithm.has_reference and step == 0:
            found["at_reference"].append(policy.at_reference())
        if step == HALF and saved is not None and not resumes:
            policy.save(saved / "weights", saved / "optimizer")
        result = algorithm.run(policy, step)
        found["losses"].append(result.loss)
        found["grad_norms"].append(result.grad_norm)
        found["learning_rates"].append(result.learning_rate)
        found["metrics"].append(result.metrics)
    if algorithm.has_reference:
        found["at_reference"].append(policy.at_reference())
        before = policy.score(rows_of(0))
        with policy.reference():
            found["reference"] = policy.score(rows_of(0))
        found["moved_by_reference"] = max(
            float((one - other).abs().max()) for one, other in zip(before, policy.score(rows_of(0)), strict=True)
        )
    return found


def score_with_another(policy: Policy, config: PolicyConfig, other: Path) -> dict[str, Any]:
    """Scores with another adapter on the base, after training; and how far those of the policy are moved by it."""
    before = policy.score(rows_of(0))
    policy.keep_other(other_adapter(config, str(other), "teacher.adapter"))
    with policy.other():
        found = policy.score(rows_of(0))
    pairs = zip(before, policy.score(rows_of(0)), strict=True)
    return {"other": found, "moved_by_other": max(float((one - two).abs().max()) for one, two in pairs)}


def folder_of(shared_folder: Path | str, size: int) -> Path:
    """Bases, adapters and checkpoints, below the folder that a worker leaves its results in."""
    return Path(shared_folder) / f"backends_{size}"


def build(folder: Path) -> None:
    """Bases and adapters."""
    for family in {algorithm.family for algorithm in ALGORITHMS.values()}:
        save_adapter(save_model(folder / family, family), folder / f"{family}_adapter")
    config = save_adapter(folder / "qwen3", folder / "qwen3_other", seed=5) / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 20}))


def backends(case: dict[str, Any]) -> dict[str, Any]:
    """`<algorithm>_<backend>`, with `_start` or `_resumed` behind it -> what `train` found."""
    size = case["ranks"]
    folder = folder_of(case["shared_folder"], size)
    if dist.get_rank() == 0:
        build(folder)
    dist.barrier()
    found: dict[str, Any] = {}
    # Megatron first: its groups are ended, which DTensor's plans would not survive.
    for backend in ("megatron", "dtensor"):
        for name, algorithm in ALGORITHMS.items():
            config = policy_config(folder, algorithm, size, backend == "megatron")
            with built_policy(config, keeps_start=bool(algorithm.reference_weights)) as policy:
                if algorithm.drawn:
                    found[f"{name}_{backend}_start"] = policy.adapter()
                saved = folder / "saved" / f"{name}_{backend}"
                found[f"{name}_{backend}"] = train(policy, algorithm, saved if algorithm.exchanged else None)
                if name in WITH_ANOTHER:
                    found[f"{name}_{backend}"] |= score_with_another(
                        policy, config, folder / f"{algorithm.family}_other"
                    )
    for backend, other in (("dtensor", "megatron"), ("megatron", "dtensor")):
        for name, algorithm in ALGORITHMS.items():
            if algorithm.exchanged:
                config = policy_config(folder, algorithm, size, backend == "megatron")
                with built_policy(config, keeps_start=bool(algorithm.reference_weights)) as policy:
                    saved = folder / "saved" / f"{name}_{other}"
                    found[f"{name}_{backend}_resumed"] = train(policy, algorithm, saved)
    return found


CHECKS = {"backends": backends}
