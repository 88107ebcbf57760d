"""Runs cases in a process group of their own: `python -m tests.gpu.worker FOLDER CASE...`, also under torchrun.

A case writes what it measured, or its traceback, to FOLDER/<case>.json; the tests compare. Every case runs on CPUs as
well, where the native layers stand in for Transformer Engine.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from megatron_lora.config.schema import PolicyConfig
from megatron_lora.data.batch import Row
from megatron_lora.objectives.sft import SFTObjective
from megatron_lora.rollout.generator import SamplingOptions
from megatron_lora.rollout.refit import PROBE_PROMPTS, RefitMode, Refitter
from megatron_lora.rollout.vllm_engine import merge_only_reason
from megatron_lora.runtime.world import init_distributed, init_dtensor_world, init_megatron_world
from tests.support.grouped import grouped_numbers
from tests.support.models import save_model
from tests.support.reference import (
    DELTA_TARGETS,
    EXPERTS,
    MAMBA_TARGETS,
    TARGETS,
    make_rows,
    save_adapter,
    token_logps,
    train,
)

VOCAB = 509
SIZES = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": VOCAB, "max_position_embeddings": 512}
STEPS, ROWS, LONGEST = 10, 6, 120
RATES = {"float32": 1e-2, "bfloat16": 1e-3}
# Sizes that vLLM's kernels take: whole blocks of 16.
DELTA_SIZES = {"linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
MAMBA_SIZES = {
    "ssm_state_size": 16,
    "mamba_head_dim": 32,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
}
# Families with adapters of their own, beside the options of their config and the learning rate of both precisions.
OWN: dict[str, tuple[list[str], dict[str, Any], float]] = {
    "gpt_oss": (TARGETS[:4], {"head_dim": 64, "sliding_window": 32}, 2e-4),
    "qwen3_next": (
        DELTA_TARGETS,
        DELTA_SIZES | {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
        2e-4,
    ),
    "qwen3_5": (DELTA_TARGETS, DELTA_SIZES, 2e-4),
    "nemotron_h": (MAMBA_TARGETS, MAMBA_SIZES, 2e-4),
}
# Mean |trainer - engine| over random answers, nats.
ROLLOUT_TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "recompute": {"activation_checkpointing": True},
    "tp2": {"tensor_model_parallel_size": 2},
    "sp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "dp2": {},
    "ep2": {"expert_model_parallel_size": 2},
    "etp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 2},
}

DTENSOR: dict[str, dict[str, Any]] = {
    "one": {},
    "plain": {"lora_cfg": {"use_triton": False}},
    "compile": {"compile": True},
    "offload": {"cpu_offload": True},
    "recompute": {"activation_checkpointing": True},
    "tp2": {"tensor_parallel_size": 2},
    "sp2": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "dp2": {},
    "dp2_offload": {"cpu_offload": True},
    "tp2_offload": {"tensor_parallel_size": 2, "cpu_offload": True},
}


def steps() -> list[list[Row]]:
    return [make_rows(ROWS, VOCAB, seed=seed, longest=LONGEST) for seed in range(STEPS)]


def prepare(folder: Path) -> None:
    """Models and adapters that the cases start from."""
    for family in ("llama2", "qwen2", "gemma3"):
        model = save_model(folder / family, family, **SIZES)
        save_adapter(model, folder / f"{family}-adapter")
    # vLLM's product of experts on a CPU takes multiples of 32.
    model = save_model(folder / "qwen3_moe", "qwen3_moe", **SIZES, moe_intermediate_size=64)
    save_adapter(model, folder / "qwen3_moe-adapter", targets=TARGETS[:4], parameters=EXPERTS)
    for family, (targets, options, _) in OWN.items():
        model = save_model(folder / family, family, **SIZES | options)
        save_adapter(model, folder / f"{family}-adapter", targets=targets)


def rate_of(family: str, precision: str) -> float:
    return OWN[family][2] if family in OWN else RATES[precision]


def make_policy(
    folder: Path, family: str, precision: str, layout: str, *, lora: bool = True, rate: float = 0.0, **policy: Any
) -> Any:
    """A MegatronPolicy on the family's model, from its adapter. rate: learning rate, 0 for the precision's own."""
    adapter = str(folder / f"{family}-adapter") if lora else None
    settings = common_settings(folder, family, precision, rate)
    settings["megatron_cfg"] |= policy.pop("megatron_cfg", {})
    settings |= policy
    settings["megatron_cfg"] |= {"enabled": True, "peft": {"enabled": lora, "init_adapter": adapter}} | LAYOUTS[layout]
    config = PolicyConfig.model_validate(settings)
    world = init_megatron_world(config, 0)
    from megatron_lora.policy.megatron.policy import MegatronPolicy

    return MegatronPolicy(config, world, pad_token_id=0, seed=0, num_steps=STEPS)


def make_dtensor_policy(folder: Path, family: str, precision: str, option: str, **policy: Any) -> Any:
    """A DTensorPolicy on the family's model, from its adapter."""
    options = dict(DTENSOR[option])
    lora = {"enabled": True, "init_adapter": str(folder / f"{family}-adapter"), **options.pop("lora_cfg", {})}
    settings = common_settings(folder, family, precision, 0.0) | policy
    config = PolicyConfig.model_validate(settings | {"dtensor_cfg": {"lora_cfg": lora, **options}})
    world = init_dtensor_world(config, 0)
    from megatron_lora.policy.dtensor.policy import DTensorPolicy

    return DTensorPolicy(config, world, pad_token_id=0, seed=0, num_steps=STEPS)


def common_settings(folder: Path, family: str, precision: str, rate: float) -> dict[str, Any]:
    return {
        "model_name": str(folder / family),
        "precision": precision,
        "train_global_batch_size": ROWS,
        "train_micro_batch_size": 2,
        "max_total_sequence_length": 2 * LONGEST,
        "megatron_cfg": {
            "optimizer": {"lr": rate or rate_of(family, precision), "weight_decay": 0.1},
            "use_fused_linear_logprobs": True,
            "fused_linear_logprobs_chunk_size": 64,
        },
    }


def losses(policy: Any, rows: list[list[Row]]) -> list[float]:
    return [policy.train_step([[row] for row in batch], SFTObjective()).loss for batch in rows]


def train_case(folder: Path, family: str, precision: str, layout: str, lora: str = "lora") -> dict[str, Any]:
    """Ten steps here and in transformers + peft (fp32, CPU). lora: `lora`, or `full` for full fine-tuning."""
    adapted = lora == "lora"
    rate = rate_of(family, precision) if adapted else RATES[precision] / 10
    ours = losses(make_policy(folder, family, precision, layout, lora=adapted, rate=rate), steps())
    reference = train(folder / family, folder / f"{family}-adapter" if adapted else None, steps(), lr=rate)
    return {"ours": ours, "reference": reference.losses}


def dtensor_case(folder: Path, family: str, precision: str, option: str) -> dict[str, Any]:
    """Ten steps on the other backend and in transformers + peft (fp32, CPU), and the adapters that both end with."""
    policy = make_dtensor_policy(folder, family, precision, option)
    ours = losses(policy, steps())
    reference = train(folder / family, folder / f"{family}-adapter", steps(), lr=rate_of(family, precision))
    found = policy.adapter().tensors
    merged = dict(policy.hf_weights())
    largest = max(float(value.abs().max()) for value in reference.adapter.values())
    difference = max(float((found[name].cpu() - value).abs().max()) for name, value in reference.adapter.items())
    return {
        "ours": ours,
        "reference": reference.losses,
        "adapter_difference": difference / largest,
        "merged": len(merged),
        "device": str({value.device.type for value in merged.values()}),
    }


def rollout_case(folder: Path, family: str, precision: str, layout: str, engine: str) -> dict[str, Any]:
    """Answers by `engine` (`vllm` or `native`) after a training step: their log-probabilities beside the trainer's,
    after each way of refitting and after a sleep; whether draws follow their seed."""
    tp = LAYOUTS[layout].get("tensor_model_parallel_size", 1)
    cfg = {"tensor_parallel_size": tp, "enforce_eager": True, "gpu_memory_utilization": 0.3}
    generation = {"vllm_cfg": cfg | {"max_model_len": 2 * LONGEST}}
    policy = make_policy(folder, family, precision, layout, generation=generation)
    merge_only = engine == "vllm" and merge_only_reason(policy.config, policy.world) is not None
    generator = _native(policy) if engine == "native" else _vllm(policy, merge_only)
    generator.start()
    modes: tuple[RefitMode, ...] = ("merge", "merge") if merge_only else ("adapter", "merge", "adapter")
    prompts = [row.input_ids.tolist() for row in make_rows(PROBE_PROMPTS, VOCAB, seed=6, longest=LONGEST)]
    refitter = Refitter(policy, generator, modes[0], prompts=prompts, max_length=2 * LONGEST)
    refitter.measure_base(has_adapter=True)
    refitter.refit(0)
    losses(policy, steps()[:1])
    found: dict[str, Any] = {"errors": {}, "tolerance": ROLLOUT_TOLERANCES[precision], "bytes": {}}
    for version, mode in enumerate(modes, start=1):
        refitter.mode = mode
        found["bytes"][mode] = refitter.refit(version).bytes
        generator.sleep()
        generator.wake()
        found["errors"][f"{version}-{mode}"] = _rollout_error(policy, _answers(generator, seed=1))
    texts = [[sample.completion_ids for sample in _answers(generator, seed=seed)] for seed in (2, 2, 3)]
    found["same_seed"], found["other_seed"] = texts[0] == texts[1], texts[0] == texts[2]
    generator.close()
    return found


def replay_case(folder: Path, family: str, precision: str, layout: str) -> dict[str, Any]:
    """Trainer and vLLM on vLLM's answers (mean difference, nats) at the experts that it reports, at the trainer's own
    and at others, and the part of the reported that are not the trainer's own."""
    cfg = {"tensor_parallel_size": 1, "enforce_eager": True, "gpu_memory_utilization": 0.3}
    generation = {"vllm_cfg": cfg | {"max_model_len": 2 * LONGEST}}
    policy = make_policy(folder, family, precision, layout, generation=generation, router_replay={"enabled": True})
    generator = _vllm(policy, True)
    generator.start()
    generator.load_weights(policy.hf_weights(), 0)
    samples = _answers(generator, seed=1)
    generator.close()
    reported = [sample.routed_experts for sample in samples]
    last = policy.shapes.num_experts - 1
    found: dict[str, Any] = {
        "reported": _rollout_error(policy, samples, reported),
        "own": _rollout_error(policy, samples),
        "others": _rollout_error(policy, samples, [torch.where(own < 0, own, last - own) for own in reported]),
    }
    rows = _rows(samples, reported)
    found["mismatch"] = policy.train_step([[row] for row in rows], SFTObjective()).metrics["routing_mismatch"]
    return found


def _native(policy: Any) -> Any:
    from megatron_lora.rollout.native import NativeGenerator

    return NativeGenerator(policy, None)


def _vllm(policy: Any, merge_only: bool) -> Any:
    from megatron_lora.rollout.vllm import VllmGenerator

    return VllmGenerator(policy.config, policy.world, None, None if merge_only else policy.adapter())


def _answers(generator: Any, seed: int) -> Any:
    prompts = [row.input_ids[:40].tolist() for row in make_rows(4, VOCAB, seed=5, longest=LONGEST)]
    return generator.generate(prompts, 4, SamplingOptions(max_new_tokens=24, temperature=1.0, seed=seed))


def _rows(samples: Any, experts: Any = None) -> list[Row]:
    ids = [torch.tensor(sample.prompt_ids + sample.completion_ids) for sample in samples]
    return [
        Row(input_ids=row, target_mask=torch.arange(len(row)) > 0, routed_experts=own)
        for row, own in zip(ids, experts or [None] * len(ids), strict=True)
    ]


def _rollout_error(policy: Any, samples: Any, experts: Any = None) -> float:
    """Mean |trainer - engine| over the sampled tokens, nats. experts: that tokens go to, None: the trainer's own."""
    scores = policy.score(_rows(samples, experts))
    pairs = zip(scores, samples, strict=True)
    return float(torch.cat([score[-len(s.logprobs) :] - s.logprobs for score, s in pairs]).abs().mean())


def packing_case(folder: Path, family: str, precision: str) -> dict[str, Any]:
    """The same steps with rows packed otherwise."""
    plain = losses(make_policy(folder, family, precision, "one"), steps())
    packing: dict[str, Any] = {"sequence_packing": {"enabled": True, "train_mb_tokens": 3 * LONGEST}}
    return {"ours": losses(make_policy(folder, family, precision, "one", **packing), steps()), "reference": plain}


def shared_case(folder: Path, family: str, precision: str, backend: str) -> dict[str, Any]:
    """Gradient norms and old log-probabilities with what rows share sent through the model once, and whole."""
    found = {}
    packing = {"enabled": True, "train_mb_tokens": 4 * LONGEST}
    for shared in (True, False):
        if backend == "dtensor":
            policy = make_dtensor_policy(
                folder, family, precision, "one", shared_prefix=shared, sequence_packing=packing
            )
        else:
            policy = make_policy(folder, family, precision, "one", shared_prefix=shared, sequence_packing=packing)
        found[shared] = grouped_numbers(policy, ahead=not shared, scale=8)
    ours, whole = found[True], found[False]
    return {
        "ours": ours["grad_norms"],
        "reference": whole["grad_norms"],
        "old_difference": float((ours["old"] - whole["old"]).abs().mean()),
        "tokens": ours["grpo_tokens"] / whole["grpo_tokens"],
    }


def graphs_case(folder: Path, family: str, precision: str, rows: str) -> dict[str, Any]:
    """Three times the same batches, recorded and replayed as CUDA graphs and run kernel by kernel. rows: `plain`, or
    `shared` for GRPO and DPO whose rows share prefixes and whose reference has its own graphs."""
    found: dict[str, Any] = {}
    packing = {"enabled": True, "train_mb_tokens": 4 * LONGEST}
    for implementation in ("local", "none"):
        options = {"megatron_cfg": {"cuda_graph_impl": implementation}, "sequence_packing": packing}
        policy = make_policy(folder, family, precision, "one", rate=1e-4, shared_prefix=rows == "shared", **options)
        if rows == "plain":
            numbers = losses(policy, 3 * steps()[:4])
        else:
            numbers = [value for _ in range(3) for value in grouped_numbers(policy, ahead=False, scale=8)["grad_norms"]]
        found[implementation] = numbers
        found["graphs"] = len(policy.engine.graphs._graphs) if implementation == "local" else found["graphs"]
    scored = [torch.cat(policy.score(steps()[0])) for _ in range(3)]
    assert all(torch.equal(scored[0], again) for again in scored), "a replay gives other numbers"
    return {"ours": found["local"], "reference": found["none"], "graphs": found["graphs"]}


def inputs_case(folder: Path, family: str, precision: str) -> dict[str, Any]:
    """Twelve steps with the inputs of adapted linears computed again, kernel by kernel and as CUDA graphs, and kept."""
    again = {"recompute_adapter_inputs": ["layernorm", "activation"]}
    options = {
        "ours": again | {"cuda_graph_impl": "none"},
        "graphs": again | {"cuda_graph_impl": None if precision == "float32" else "local"},
        "reference": {"recompute_adapter_inputs": [], "cuda_graph_impl": "none"},
    }
    found: dict[str, Any] = {}
    packing = {"enabled": True, "train_mb_tokens": 4 * LONGEST}
    for name, keys in options.items():
        policy = make_policy(folder, family, precision, "one", rate=1e-4, megatron_cfg=keys, sequence_packing=packing)
        found[name] = losses(policy, 3 * steps()[:4])
    return found


def fp8_case(folder: Path, family: str, form: str) -> dict[str, Any]:
    """Ten steps over the base in FP8, as CUDA graphs and kernel by kernel, and over it in bfloat16; how far apart the
    log-probabilities at the start are, and merged weights at the end from the base's own plus the adapter's."""
    rows = make_rows(8, VOCAB, seed=11, longest=LONGEST)
    fp8 = {"fp8_cfg": {"enabled": True, "fp8": form}}
    options = {"graphs": fp8 | {"cuda_graph_impl": "local"}, "ours": fp8, "reference": {}}
    found: dict[str, Any] = {}
    scores = {}
    for name, keys in options.items():
        policy = make_policy(folder, family, "bfloat16", "one", megatron_cfg={"cuda_graph_impl": "none"} | keys)
        scores[name] = torch.cat(policy.score(rows))
        found[name] = losses(policy, steps())
        if name == "ours":
            merged = {name: value.clone() for name, value in policy.hf_weights()}
            frozen = dict(policy.hf_weights(merged=False))
            found["moved"] = max(float((value - frozen[name]).abs().max()) for name, value in merged.items())
            wrong = [name for name, value in policy.base.weights.entries.items() if not _same(policy, frozen, name)]
            found["not_the_base"] = wrong
    found["logprob_error"] = float((scores["ours"] - scores["reference"]).abs().mean())
    found["graphs_error"] = float((scores["graphs"] - scores["ours"]).abs().max())
    return found


def _same(policy: Any, weights: dict[str, torch.Tensor], name: str) -> bool:
    """Whether a tensor under its HF name is that of the base's folder."""
    return torch.equal(weights[name].cpu(), policy.base.weights.read(name).to(torch.bfloat16))


def logprobs_case(folder: Path, family: str, precision: str) -> dict[str, Any]:
    """Mean absolute error of token log-probabilities against fp32, here and in transformers at the same precision."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    rows = make_rows(8, VOCAB, seed=11, longest=LONGEST)
    policy = make_policy(folder, family, precision, "one")
    ours = policy.score(rows)
    device = policy.world.device

    def peer(dtype: torch.dtype) -> list[torch.Tensor]:
        base = AutoModelForCausalLM.from_pretrained(folder / family, dtype=dtype, attn_implementation="eager")
        model = PeftModel.from_pretrained(base, folder / f"{family}-adapter", autocast_adapter_dtype=False)
        model = model.to(device=device, dtype=dtype)  # type: ignore[call-overload]
        with torch.no_grad():
            moved = [Row(row.input_ids.to(device), row.target_mask.to(device)) for row in rows]
            return [token_logps(model, row).cpu() for row in moved]  # type: ignore[arg-type]

    exact = torch.cat(peer(torch.float32))
    theirs = torch.cat(peer(getattr(torch, precision)))
    mine = torch.cat([value[1:] for value in ours])
    return {"ours": float((mine - exact).abs().mean()), "theirs": float((theirs - exact).abs().mean())}


def resume_case(folder: Path, family: str, precision: str) -> dict[str, Any]:
    """Save after five steps, load into a fresh policy, go on: against a run that never stopped."""
    rows, place = steps(), folder / f"resume-{family}-{precision}"
    policy = make_policy(folder, family, precision, "one")
    losses(policy, rows[:5])
    policy.save(place / "weights", place / "optimizer")
    whole = losses(policy, rows[5:])
    fresh = make_policy(folder, family, precision, "one")
    fresh.load(place / "weights", place / "optimizer")
    return {"ours": losses(fresh, rows[5:]), "reference": whole}


CASES = {
    "train": train_case,
    "packing": packing_case,
    "shared": shared_case,
    "graphs": graphs_case,
    "inputs": inputs_case,
    "logprobs": logprobs_case,
    "fp8": fp8_case,
    "resume": resume_case,
    "dtensor": dtensor_case,
    "rollout": rollout_case,
    "replay": replay_case,
}


def run_case(folder: Path, case: str) -> dict[str, Any]:
    """case: `<kind>.<argument>.<argument>...`, such as `train.qwen2.bfloat16.one`."""
    kind, *arguments = case.split(".")
    try:
        return CASES[kind](folder, *arguments)
    except Exception:  # reported by the test of this case; the others still run
        return {"error": traceback.format_exc()}


def main() -> None:
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    world = init_distributed()
    if world.is_main and not (folder / "ready").exists():
        prepare(folder)
        (folder / "ready").touch()
    torch.distributed.barrier()
    failed = False
    for case in cases:
        result = run_case(folder, case)
        failed |= "error" in result
        if world.is_main or "error" in result:
            name = case if world.is_main else f"{case}.rank{world.rank}"
            (folder / f"{name}.json").write_text(json.dumps(result))
        if failed and world.size > 1:
            # The other ranks wait in a collective that never comes; torchrun ends them.
            os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
