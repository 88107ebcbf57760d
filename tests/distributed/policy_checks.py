"""What a worker can be asked about the numbers of a policy of either backend: training, checkpoints, what is kept."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_lora.conversion.adapter_checkpoint import read_adapter, read_start, write_start
from megatron_lora.data.batch import MicroBatch, Row
from megatron_lora.data.fixed_shape import fixed_shape, stretched
from megatron_lora.errors import UserError
from megatron_lora.lora.peft_format import to_hf
from megatron_lora.lora.principal import against_the_base
from megatron_lora.objectives.distillation import CandidatesObjective
from megatron_lora.objectives.sft import SFTObjective
from megatron_lora.policy.backend import BackendPolicy
from megatron_lora.policy.heads import MostLikely
from tests.distributed.build import build_policy, keys_of
from tests.distributed.cases import case_rows, scored_rows, training_rows
from tests.support.cached_norms import scores_after_changes
from tests.support.candidates import FORWARD_WEIGHT, NUM_CANDIDATES, NUM_STEPS, with_candidates
from tests.support.config_sweep import sweep
from tests.support.fingerprints import fingerprints
from tests.support.grouped import grouped_numbers


def train_steps(policy: BackendPolicy, steps: Sequence[Sequence[Row]]) -> dict[str, list[Any]]:
    """Loss, gradient norm, learning rate and metrics of each update."""
    results = [policy.train_step([[row] for row in rows], SFTObjective()) for rows in steps]
    return {
        "losses": [r.loss for r in results],
        "grad_norms": [r.grad_norm for r in results],
        "learning_rates": [r.learning_rate for r in results],
        "metrics": [r.metrics for r in results],
    }


def train(case: dict[str, Any]) -> dict[str, Any]:
    """Ten steps, and the adapter (or the whole model) at the end."""
    policy = build_policy(case)
    found: dict[str, Any] = train_steps(policy, case_rows(case["family"], case["options"]))
    if policy.spec is not None:
        exported = policy.adapter()
        found |= {
            # As peft holds it, and a pair for each HF linear of the files.
            "adapter": policy.adapter("packed").tensors,
            "each": exported.tensors,
            "config": exported.config,
            "fingerprints": fingerprints(policy, exported),
        }
        if case["options"].get("merged"):
            found["merged"] = {name: value.clone().cpu() for name, value in policy.hf_weights()}
    else:
        found["weights"] = {name: value.clone().cpu() for name, value in policy.hf_weights()}
    found["dtypes"] = sorted({str(parameter.dtype) for parameter in policy._trained()})
    found["trainable"] = policy.trainable_parameters()
    return found


def checkpoint(case: dict[str, Any]) -> dict[str, Any]:
    """Three steps, a checkpoint, three steps more; then policies of other layouts go on from it.

    options.layouts: name -> the backend's keys of each policy that loads. options.asynchronous: how it is written.
    options.from_case: the case whose checkpoint is loaded instead, nothing being written.
    """
    options = case["options"]
    folder = Path(case["shared_folder"]) / f"{options.get('from_case', case['name'])}_checkpoint"
    weights, optimizer = folder / "weights", folder / "optimizer"
    found: dict[str, Any] = {"continued": {}}
    if "from_case" not in options:
        policy = build_policy(case)
        train_steps(policy, training_rows(3))
        if options.get("asynchronous"):
            with weights_written_last(weights):
                pending = policy.save(weights, optimizer, asynchronous=True)
            assert pending is not None
            found["all_written"] = pending(True)
        else:
            policy.save(weights, optimizer)
        if policy.spec is not None:
            exported = {name: value.clone() for name, value in policy.adapter().tensors.items()}
            found |= {"saved": exported, "stored": _stored(weights)}
        found["uninterrupted"] = _three_more(policy)
    for name, keys in options["layouts"].items():
        policy = build_policy(case, keys, seed=99)
        policy.load(weights, optimizer)
        found["continued"][name] = _three_more(policy)
    if options.get("other_rank"):
        other = build_policy(case | {"adapter_folder": None}, keys_of(case, {"dim": 8}))
        found["refused"] = refusal(other, weights, optimizer)
    return found


def _stored(weights: Path) -> dict[str, Any]:
    """A checkpoint's adapter under PEFT names, read in this process."""
    torch.distributed.barrier()
    spec, fused = read_adapter(weights)
    if spec.residual:
        spec, fused = against_the_base(spec, fused, read_start(weights, spec))
    return to_hf(spec, fused)[1]


@contextmanager
def weights_written_last(weights: Path) -> Iterator[None]:
    """Writers that are started here take a second longer for the weights than for the optimizer."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    write: Any = FileSystemWriterAsync.write_preloaded_data_multithread

    def slow(transforms: Any, use_msc: bool, rank: int, buckets: list[Any], results: Any) -> None:
        time.sleep(1.0 if Path(buckets[0][0]).parent == weights else 0.0)
        write(transforms, use_msc, rank, buckets, results)

    with mock.patch.object(FileSystemWriterAsync, write.__name__, staticmethod(slow)):
        yield


def _three_more(policy: BackendPolicy) -> dict[str, Any]:
    found: dict[str, Any] = train_steps(policy, training_rows(3, first=3))
    # What follows is scored in the mean over all rows: the whole model's state in one number each.
    found["scores"] = policy.score(scored_rows())
    found["adapter"] = policy.adapter().tensors if policy.spec is not None else {}
    return found


def refusal(policy: BackendPolicy, weights: Path, optimizer: Path) -> str:
    try:
        policy.load(weights, optimizer)
    except UserError as error:
        return str(error)
    return ""


def shared_prefix(case: dict[str, Any]) -> dict[str, Any]:
    """`grouped_numbers` the cheap way and the plain way. Option `stretched`: micro-batches fill fixed shapes, as CUDA
    graphs want them."""
    found = {}
    for name, shared in (("shared", True), ("whole", False)):
        policy = build_policy(case | {"policy": case["policy"] | {"shared_prefix": shared}})
        if case["options"].get("stretched"):
            run_stretched(policy)
        found[name] = grouped_numbers(policy, ahead=not shared)
    return found


def run_stretched(policy: Any) -> None:
    """Let a Megatron policy's passes take micro-batches in fixed shapes."""
    from megatron_lora.policy.megatron.schedule import forward

    engine, chunk, pad = policy.engine, policy.base.chunks[0], policy.pad_token_id

    class Stretched:
        def logps(self, batch: MicroBatch, _: Any) -> torch.Tensor:
            return forward(engine, chunk, stretched(batch, fixed_shape(batch), pad))[: batch.targets.numel()]

    engine.graphs = Stretched()


def kind(case: dict[str, Any]) -> dict[str, Any]:
    """`train`, and what the model is then and as loaded from a checkpoint whose start is another than its own."""
    policy = build_policy(case)
    found: dict[str, Any] = train_steps(policy, case_rows(case["family"], case["options"]))
    exported = policy.adapter()
    found |= {"adapter": exported.tensors, "config": exported.config, "fingerprints": fingerprints(policy, exported)}
    found["trained"] = _as_it_is(policy)
    if policy.spec is not None and policy.spec.residual:
        weights = Path(case["shared_folder"]) / f"{case['name']}_start"
        policy.save(weights, None)
        torch.distributed.barrier()
        stored = read_start(weights, policy.spec)
        start = {name: value * (1.3 if "lora_A" in name else 1.0) for name, value in stored.items()}
        torch.distributed.barrier()
        if policy.world.is_main:
            write_start(weights, start)
        torch.distributed.barrier()
        other = build_policy(case)
        other.load(weights, None)
        found["other_start"] = _as_it_is(other)
        pairs = zip(found["other_start"]["scores"], found["trained"]["scores"], strict=True)
        found["other_start"]["far"] = max(float((mine - theirs).abs().max()) for mine, theirs in pairs)
    return found


def _as_it_is(policy: BackendPolicy) -> dict[str, Any]:
    exported, rows = policy.adapter(), scored_rows()
    found: dict[str, Any] = {"exported": (exported.config, exported.tensors), "scores": policy.score(rows)}
    found["merged"] = {name: value.clone().cpu() for name, value in policy.hf_weights()}
    with policy.adapters_disabled():
        found["base"] = policy.score(rows)
    with policy.reference():
        found["reference"] = policy.score(rows)
    return found


def cached_norms(case: dict[str, Any]) -> dict[str, Any]:
    """Scores after each change of the factors, with DoRA's norms kept and with norms of each forward pass."""
    found = {}
    for kept in (True, False):
        policy = build_policy(case, keys_of(case, {"dora_cached_norms": kept}))
        out = Path(case["shared_folder"]) / f"{case['name']}_{kept}"
        found[kept] = scores_after_changes(policy, policy._linears.values(), training_rows(1)[0], scored_rows(), out)
    return found


def config_sweep(case: dict[str, Any]) -> dict[str, Any]:
    """`tests.support.config_sweep.sweep` of options.names."""

    def build(base: Path) -> BackendPolicy:
        return build_policy(case | {"base_folder": str(base)})

    names, megatron = case["options"]["names"], case["backend"] == "megatron"
    return sweep(Path(case["shared_folder"]) / case["name"], names, build, megatron=megatron)


def candidates(case: dict[str, Any]) -> dict[str, Any]:
    """What two heads give of a policy: its most likely tokens, and steps on the divergence over a teacher's."""
    policy = build_policy(case)
    found: dict[str, Any] = {"most_likely": policy.forward(scored_rows(), MostLikely(NUM_CANDIDATES))}
    found["scores"] = policy.score(scored_rows())
    objective = CandidatesObjective.of("mixed", FORWARD_WEIGHT, whole=case["options"].get("whole", False))
    results = []
    for step, rows in enumerate(training_rows(NUM_STEPS)):
        taught = with_candidates(rows, step)
        results.append(policy.train_step([[row] for row in taught], objective, keep_logps=True))
    found |= {"losses": [r.loss for r in results], "grad_norms": [r.grad_norm for r in results]}
    return found | {"logps": results[0].logps, "adapter": policy.adapter("packed").tensors}


CHECKS = {
    "candidates": candidates,
    "config_sweep": config_sweep,
    "shared_prefix": shared_prefix,
    "train": train,
    "checkpoint": checkpoint,
    "cached_norms": cached_norms,
    "kind": kind,
}
