"""One rank of the DTensor backend's tests: runs every case of its world size in one process group.

torchrun --nproc-per-node N -m tests.distributed.dtensor_worker FOLDER
"""

import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.data.batch import Row
from megatron_lora.objectives.sft import SFTObjective
from megatron_lora.policy.dtensor import adapter, optim
from megatron_lora.policy.dtensor.policy import DTensorPolicy
from megatron_lora.policy.interface import NonFiniteLoss
from megatron_lora.runtime.world import init_distributed, init_dtensor_world
from tests.distributed.megatron_case import ADAM_EPS
from tests.support.cached_norms import scores_after_changes
from tests.support.config_sweep import all_flips, sampled_flips, sweep
from tests.support.fingerprints import fingerprints
from tests.support.grouped import grouped_numbers
from tests.support.reference import make_rows

NUM_STEPS = 10
TP2: dict[str, Any] = {"tensor_parallel_size": 2}
SP2 = TP2 | {"sequence_parallel": True}
DORA: dict[str, Any] = {"lora_cfg": {"type": "dora"}}
NF4: dict[str, Any] = {"quantization": "nf4", "lora_dtype": "float32"}
RECOMPUTE = {"activation_checkpointing": True}
SAVED: dict[str, Any] = {"lora_cfg": {"modules_to_save": ["embed_tokens", "input_layernorm", "norm", "lm_head"]}}
PISSA: dict[str, Any] = {
    "lora_cfg": {"init_adapter": None, "init_lora_weights": "pissa", "type": "canonical_lora", "dim": 4, "alpha": 8}
}
PISSA_SAVED = {"lora_cfg": PISSA["lora_cfg"] | SAVED["lora_cfg"]}
DROPS = {"init_adapter": None, "dropout": 0.3}

# name -> (world size, family, dtensor_cfg, what to do)
TRAIN: dict[str, tuple[int, str, dict[str, Any]]] = {
    "one": (1, "llama3", {}),
    "one_peft_forward": (1, "llama3", {"lora_cfg": {"use_triton": False}}),
    "one_packed": (1, "qwen3", {"packed": True}),
    "one_recompute": (1, "qwen3", {"activation_checkpointing": True}),
    "one_offload": (1, "qwen3", {"cpu_offload": True}),
    "one_gemma": (1, "gemma3", {"packed": True}),
    "one_experts": (1, "qwen3_moe", {"packed": True}),
    "one_head": (1, "llama3_head", {}),
    "one_full": (1, "qwen2", {"full": True}),
    "one_dora": (1, "llama3_dora", DORA),
    "one_dora_peft_forward": (1, "llama3_dora", {"lora_cfg": {"type": "dora", "use_triton": False}}),
    "one_dora_compiled": (1, "llama3_dora", DORA | {"compile": True}),
    "one_dora_compiled_recompute": (1, "llama3_dora", DORA | {"compile": True, "activation_checkpointing": True}),
    "one_dora_recompute": (1, "qwen2_dora", DORA | {"activation_checkpointing": True}),
    "one_saved": (1, "llama3_saved", SAVED),
    "tp_saved": (2, "llama3_saved", TP2 | SAVED),
    "sp_saved": (2, "llama3_saved", SP2 | SAVED),
    "dp_dora": (2, "llama3_dora", DORA),
    "tp_dora": (2, "llama3_dora", TP2 | DORA),
    "sp_dora": (2, "qwen2_dora", SP2 | DORA),
    "one_nf4": (1, "qwen3_even_nf4", {"lora_cfg": NF4}),
    "one_nf4_peft_forward": (1, "qwen3_even_nf4", {"lora_cfg": NF4 | {"use_triton": False}}),
    "one_nf4_dora_recompute": (1, "qwen3_even_nf4_dora", {"lora_cfg": NF4 | DORA["lora_cfg"]} | RECOMPUTE),
    "one_nf4_dora_compiled": (1, "qwen3_even_nf4_dora", {"lora_cfg": NF4 | DORA["lora_cfg"], "compile": True}),
    "dp_nf4": (2, "qwen3_even_nf4", {"lora_cfg": NF4}),
    "tp_nf4": (2, "qwen3_even_nf4", TP2 | {"lora_cfg": NF4}),
    "sp_nf4_dora": (2, "qwen3_even_nf4_dora", SP2 | {"lora_cfg": NF4 | DORA["lora_cfg"]}),
    "dp": (2, "llama3", {}),
    "dp_full": (2, "qwen3", {"full": True}),
    "tp": (2, "qwen3", TP2),
    "tp_packed": (2, "gemma3", TP2 | {"packed": True}),
    "tp_recompute": (2, "qwen3", TP2 | {"activation_checkpointing": True}),
    "tp_head": (2, "llama3_head", TP2),
    "tp_tied": (2, "qwen2", TP2),
    "tp_full": (2, "qwen3", TP2 | {"full": True}),
    "tp_tied_full": (2, "qwen2", TP2 | {"full": True}),
    "sp": (2, "qwen3", SP2),
    "sp_tied": (2, "qwen2", SP2),
    "sp_gemma": (2, "gemma3", SP2 | {"packed": True}),
    "sp_head": (2, "llama3_head", SP2),
    "sp_full": (2, "qwen3", SP2 | {"full": True}),
    "sp_tied_full": (2, "qwen2", SP2 | {"full": True}),
    "tp_biases": (2, "llama_biases", TP2),
    "sp_biases_full": (2, "llama_biases", SP2 | {"full": True}),
    "tp_dp": (4, "qwen3", TP2),
    "sp_dp_packed": (4, "llama3", SP2 | {"packed": True}),
    "tp_dp_full": (4, "qwen3", TP2 | {"full": True}),
    "dp4": (4, "qwen2", {}),
}


def make_policy(folder: Path, family: str, options: dict[str, Any], **changes: Any) -> DTensorPolicy:
    """options: `policy.dtensor_cfg`, plus `packed` and `full`."""
    options = dict(options)
    full, packed = options.pop("full", False), options.pop("packed", False)
    lora = {"enabled": not full, "init_adapter": None if full else str(folder / f"{family}_adapter")}
    lora |= options.pop("lora_cfg", {})
    settings: dict[str, Any] = {
        "model_name": str(folder / base_of(family)),
        "precision": "float32",
        "train_global_batch_size": 6,
        "train_micro_batch_size": 2,
        "max_total_sequence_length": 64,
        "sequence_packing": {"enabled": packed, "train_mb_tokens": 64},
        "dtensor_cfg": options | {"lora_cfg": lora},
        "megatron_cfg": {
            # Chunks that do not divide the tokens.
            "fused_linear_logprobs_chunk_size": 24,
            "optimizer": {
                "lr": learning_rate(family, full),
                "weight_decay": 0.1,
                "adam_beta2": 0.98,
                "adam_eps": adam_eps(family),
            },
            "scheduler": {"lr_decay_style": "constant"},
        },
    }
    config = PolicyConfig(**settings | changes)
    return DTensorPolicy(config, init_dtensor_world(config, 0), pad_token_id=0, seed=0, num_steps=NUM_STEPS)


def base_of(family: str) -> str:
    """The model's folder; a family may end in the kind of adapter on it."""
    return family.removesuffix("_head").removesuffix("_dora").removesuffix("_nf4").removesuffix("_saved")


def truth_of(family: str) -> str:
    """The folder of the values that are computed with: a base that is held in 4 bits is another."""
    return f"{base_of(family)}_dequantized" if "_nf4" in family else base_of(family)


def learning_rate(family: str, full: bool) -> float:
    if "_nf4" in family:
        return 2e-3  # over 4-bit values some of DoRA's magnitudes have gradients near zero
    return 1e-3 if full else 1e-2


def adam_eps(family: str) -> float:
    """Above the rounding of gradients near zero where a family has some (see megatron_case.ADAM_EPS)."""
    return ADAM_EPS.get(family, 1e-8)


def steps() -> list[list[Row]]:
    return [make_rows(6, 101, seed=seed) for seed in range(NUM_STEPS)]


def train(policy: DTensorPolicy, batches: list[list[Row]]) -> dict[str, Any]:
    results = [policy.train_step([[row] for row in rows], SFTObjective()) for rows in batches]
    return {
        "losses": [result.loss for result in results],
        "grad_norms": [result.grad_norm for result in results],
        "learning_rates": [result.learning_rate for result in results],
        "weights": policy.adapter().tensors if policy.spec is not None else dict(policy.hf_weights()),
        "fingerprints": fingerprints(policy, policy.adapter()) if policy.spec is not None else [],
    }


def resume(folder: Path, name: str, family: str, options: dict[str, Any]) -> dict[str, Any]:
    """Six steps in one go; and three, saved, loaded by a new policy, three more."""
    batches = steps()
    straight = train(make_policy(folder, family, options), batches[:6])
    first = make_policy(folder, family, options)
    train(first, batches[:3])
    weights, optimizer = folder / "saved" / name / "weights", folder / "saved" / name / "optimizer"
    first.save(weights, optimizer)
    saved = first.adapter().tensors if first.spec is not None else dict(first.hf_weights())
    second = make_policy(folder, family, options)
    second.load(weights, optimizer)
    return {"straight": straight, "resumed": train(second, batches[3:6]), "saved": saved}


def other_layout(folder: Path, name: str, family: str, options: dict[str, Any]) -> dict[str, Any]:
    """Three more steps from the checkpoint that the resume case `name` left on another layout."""
    policy = make_policy(folder, family, options)
    policy.load(folder / "saved" / name / "weights", folder / "saved" / name / "optimizer")
    return train(policy, steps()[3:6])


def scores(folder: Path, family: str, options: dict[str, Any]) -> dict[str, Any]:
    policy = make_policy(folder, family, options)
    rows = make_rows(5, 101, seed=8)
    adapted = policy.score(rows)
    with policy.adapters_disabled():
        base = policy.score(rows)
    with policy.sampling(0.5):
        sharp = policy.score(rows)
    with policy.sampling(0.5, top_k=30, top_p=0.6):
        cut = policy.score(rows)
    loss, _ = policy.evaluate([[row] for row in rows], SFTObjective())
    merged = dict(policy.hf_weights())
    again = policy.score(rows)
    found = {"adapted": adapted, "base": base, "sharp": sharp, "cut": cut, "again": again, "merged": merged}
    prompt = rows[0].input_ids[:5].tolist()
    answer = policy.most_likely(prompt, 9, ())
    found |= {"answer": answer, "ended": policy.most_likely(prompt, 9, answer[3:4])}
    return found | {"loss": loss, "poisoned": poisoned(policy, rows)}


def poisoned(policy: DTensorPolicy, rows: list[Row]) -> str:
    """What is said where the model's numbers are none."""
    weight = optim.local_part(policy.base.hf.model.norm.weight.detach())
    before = weight.clone()
    try:
        weight.fill_(float("nan"))
        policy.score([replace(row, index=5 + number) for number, row in enumerate(rows)])
    except NonFiniteLoss as failure:
        return str(failure)
    finally:
        weight.copy_(before)
    return ""


def shared_prefix(folder: Path, family: str, options: dict[str, Any]) -> dict[str, Any]:
    """`grouped_numbers` the cheap way and the plain way."""
    packing = {"sequence_packing": {"enabled": True, "train_mb_tokens": 96}}
    return {
        name: grouped_numbers(make_policy(folder, family, options, shared_prefix=shared, **packing), ahead=not shared)
        for name, shared in (("shared", True), ("whole", False))
    }


def dropout(folder: Path, options: dict[str, Any], position: str) -> dict[str, Any]:
    """The same three steps, kept and recomputed; the loss without dropout."""
    lora = {"lora_cfg": DROPS | {"dropout_position": position} | options.get("lora_cfg", {})}
    kept = make_policy(folder, "qwen3", options | lora)
    recomputed = make_policy(folder, "qwen3", options | lora | {"activation_checkpointing": True})
    batches = steps()
    result = {}
    for name, policy in (("kept", kept), ("recomputed", recomputed)):
        torch.manual_seed(5 + policy.world.dp_rank)
        result[name] = train(policy, batches[:3])
    groups = [[row] for row in batches[3]]
    result["evaluated"] = [kept.evaluate(groups, SFTObjective())[0] for _ in range(2)]
    result["trained"] = [kept.train_step(groups, SFTObjective()).loss]
    return result


def compiled(folder: Path) -> dict[str, Any]:
    return train(make_policy(folder, "qwen3", {"compile": True}), steps()[:3])


def bfloat16(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    policy = make_policy(folder, "qwen3", options, precision="bfloat16")
    result = train(policy, steps())
    result["dtypes"] = sorted({str(parameter.dtype) for parameter in policy.trained})
    return result


def named_optimizer(folder: Path) -> dict[str, Any]:
    """`policy.optimizer` and `policy.scheduler` in NeMo RL's shape."""
    policy = make_policy(
        folder,
        "llama3",
        {},
        optimizer={"name": "torch.optim.AdamW", "kwargs": {"lr": 1e-2, "weight_decay": 0.1, "betas": [0.9, 0.98]}},
        scheduler=[
            {"name": "torch.optim.lr_scheduler.LinearLR", "kwargs": {"start_factor": 0.1, "total_iters": 4}},
            {"name": "torch.optim.lr_scheduler.ConstantLR", "kwargs": {"factor": 1.0, "total_iters": 100}},
            {"milestones": [4]},
        ],
    )
    return train(policy, steps()[:6])


def cached_norms(folder: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Scores after each change of the factors, with DoRA's norms kept and with norms of each forward pass."""
    found = {}
    for kept in (True, False):
        lora = {"lora_cfg": {"type": "dora", "dora_cached_norms": kept}}
        policy = make_policy(folder, "llama3_dora", options | lora)
        linears = adapter.adapted_linears(policy.base.hf).values()
        out = folder / "saved" / f"norms_{name}_{kept}"
        found[str(kept)] = scores_after_changes(policy, linears, steps()[0], make_rows(5, 101, seed=8), out)
    return found


def config_sweep(folder: Path, names: list[str]) -> dict[str, Any]:
    return sweep(
        folder / "sweep", names, lambda base: make_policy(base.parent, base.name, {"full": True}), megatron=False
    )


def pissa(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """`train` of an adapter of the base's residual, what is exported, and scores with and without it."""
    policy = make_policy(folder, "llama3", options | PISSA)
    rows = make_rows(5, 101, seed=8)
    start = policy.score(rows)
    found = train(policy, steps()) | {"config": policy.adapter().config, "start": start, "adapted": policy.score(rows)}
    with policy.reference():
        found["reference"] = policy.score(rows)
    return found | {"merged": dict(policy.hf_weights())}


OTHERS: dict[str, tuple[int, Any]] = {
    "resume_one": (1, lambda f: resume(f, "one", "qwen3", {"lora_cfg": DROPS})),
    "resume_full": (1, lambda f: resume(f, "full", "qwen2", {"full": True})),
    "scores_one": (1, lambda f: scores(f, "llama3", {})),
    "scores_unlike": (1, lambda f: scores(f, "llama3", {"lora_cfg": {"init_adapter": str(f / "unlike_adapter")}})),
    "dropout_pre": (1, lambda f: dropout(f, {}, "pre")),
    "dropout_post": (1, lambda f: dropout(f, {}, "post")),
    "dropout_peft_forward": (1, lambda f: dropout(f, {"lora_cfg": {"use_triton": False}}, "post")),
    "compiled": (1, compiled),
    "bfloat16": (1, lambda f: bfloat16(f, {})),
    "bfloat16_full": (1, lambda f: bfloat16(f, {"full": True})),
    "named_optimizer": (1, named_optimizer),
    "config_sweep": (1, lambda f: config_sweep(f, sampled_flips())),
    "config_sweep_all": (1, lambda f: config_sweep(f, list(all_flips()))),
    "shared_one": (1, lambda f: shared_prefix(f, "gemma3", {"activation_checkpointing": True})),
    "shared_sp": (2, lambda f: shared_prefix(f, "qwen3", SP2)),
    "shared_head": (2, lambda f: shared_prefix(f, "llama3_head", TP2)),
    "shared_dp": (2, lambda f: shared_prefix(f, "llama3", {})),
    "pissa_one": (1, lambda f: pissa(f, {})),
    "pissa_tp": (2, lambda f: pissa(f, TP2)),
    "resume_pissa_saved": (2, lambda f: resume(f, "pissa_saved", "llama3", TP2 | PISSA_SAVED)),
    "norms_one": (1, lambda f: cached_norms(f, "one", {"compile": True, "activation_checkpointing": True})),
    "norms_tp": (2, lambda f: cached_norms(f, "tp", TP2)),
    "resume_tp": (2, lambda f: resume(f, "tp", "qwen3", TP2)),
    "resume_dp_full": (2, lambda f: resume(f, "dp_full", "qwen2", {"full": True})),
    "tp_to_dp": (2, lambda f: other_layout(f, "tp", "qwen3", {})),
    "dp_full_to_tp": (2, lambda f: other_layout(f, "dp_full", "qwen2", TP2 | {"full": True})),
    "scores_tp": (2, lambda f: scores(f, "llama3", TP2)),
    "scores_unlike_tp": (
        2,
        lambda f: scores(f, "llama3", SP2 | {"lora_cfg": {"init_adapter": str(f / "unlike_adapter")}}),
    ),
    "dropout_tp_pre": (2, lambda f: dropout(f, TP2, "pre")),
    "dropout_tp_post": (2, lambda f: dropout(f, SP2, "post")),
    "bfloat16_tp": (2, lambda f: bfloat16(f, TP2)),
    "resume_tp_dp": (4, lambda f: resume(f, "tp_dp", "qwen3", TP2 | {"full": True})),
}


def run_case(folder: Path, name: str) -> dict[str, Any]:
    if name in TRAIN:
        _, family, options = TRAIN[name]
        return train(make_policy(folder, family, options), steps())
    return OTHERS[name][1](folder)


def main(folder: Path, wanted: list[str]) -> None:
    world = init_distributed()
    cases = {name: size for name, (size, *_) in {**TRAIN, **OTHERS}.items()}
    for name, size in cases.items():
        if size != world.size or (wanted and name not in wanted):
            continue
        try:
            result = run_case(folder, name)
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
            # The other ranks may be waiting: the cases that follow cannot run.
            if world.size > 1:
                torch.save(result, folder / f"{name}.rank{world.rank}.pt")
                raise
        torch.save(result, folder / f"{name}.rank{world.rank}.pt")
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
