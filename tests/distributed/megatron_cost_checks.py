"""What a worker can be asked about adapters' communication, gradients and dropout."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from megatron_lora.data.packing import collate
from megatron_lora.lora.arithmetic import TensorParallel
from megatron_lora.lora.linear import LoRALinear
from megatron_lora.objectives.sft import SFTObjective
from megatron_lora.policy.megatron import schedule
from megatron_lora.policy.megatron.base_weights import global_names, stored_weights
from megatron_lora.policy.megatron.policy import MegatronPolicy
from tests.distributed.cases import scored_rows, training_rows
from tests.distributed.megatron_build import build_policy
from tests.support.adapted_linear import VARIANTS, Variant, draw, run_on_rank
from tests.support.live_memory import LiveFloats
from tests.support.recorder import Recorder, kept_for_backward


def communication(case: dict[str, Any]) -> dict[str, Any]:
    """Collectives of one micro-batch, forward and backward, with the adapters and of the frozen base alone; and the
    base's tensors that have a gradient afterwards.

    In both, the embedding's output wants a gradient: a frozen base without adapters would have no backward pass.
    """
    policy = build_policy(case)
    policy.base.chunks[0].embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    found: dict[str, Any] = {}
    for name, mode in (("adapters", nullcontext()), ("base", policy.adapters_disabled())):
        with mode, Recorder() as recorder:
            _forward_and_backward(policy)
        found[name] = recorder.collectives()
    frozen = [(n, p) for n, p in policy.base.chunks[0].named_parameters() if not p.requires_grad]
    found["num_frozen"] = len(frozen)
    found["frozen_with_gradient"] = [n for n, p in frozen if p.grad is not None or hasattr(p, "main_grad")]
    shapes = {tuple(p.shape) for n, p in frozen if n.endswith("linear.weight") or ".linear_" in n}
    with Recorder() as recorder:
        _forward_and_backward(policy)
    found["weight_shaped_products"] = [shape for shape in recorder.products() if shape in shapes]
    return found


def _forward_and_backward(policy: MegatronPolicy) -> None:
    batch = collate(scored_rows()[:3], pad_token_id=0, total_multiple=4)
    logps = schedule.forward(policy.engine, policy.chunks[0], batch)
    logps.sum().backward()


def kept(case: dict[str, Any]) -> dict[str, Any]:
    """For each set of inputs that are not kept: floats that autograd keeps of one micro-batch, each memory once, and
    the factors' gradients. Beside them how many floats the inputs of each sort are."""
    policy = build_policy(case)
    linears = [linear for linear in policy.adapted if isinstance(linear, LoRALinear)]
    made_by = {linear: "activation" if linear.parallel_kind == "row" else "layernorm" for linear in linears}
    built = sorted({made_by[linear] for linear in linears if linear.recomputes_input})
    found: dict[str, Any] = {"built": built}
    for recomputed in ((), ("layernorm",), ("activation",), ("layernorm", "activation")):
        for linear in linears:
            linear.recomputes_input = made_by[linear] in recomputed
            for held in linear.held_factors:
                held.parameter.main_grad.zero_()  # type: ignore[attr-defined]
        batch = collate(scored_rows()[:3], pad_token_id=0, total_multiple=4)
        with kept_for_backward() as tensors:
            logps = schedule.forward(policy.engine, policy.chunks[0], batch)
        logps.sum().backward()
        memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() // 4 for tensor in tensors}
        gradients = [held.parameter.main_grad.clone() for linear in linears for held in linear.held_factors]  # type: ignore[attr-defined]
        found[" ".join(recomputed)] = {"floats": sum(memory.values()), "gradients": gradients}
    size = policy.tp.size if policy.tp.sequence_parallel else 1
    widths = {linear.name: linear.base_weight().shape[1] for linear in linears}
    # The first norm's input wants no gradient, so that nothing but the adapter would keep it.
    normed = [linear for linear in linears if linear.layer_norm_weight is not None]
    later = [linear for linear in normed if linear.name != "decoder.layers.0.self_attention.linear_qkv"]
    found["layernorm_floats"] = sum(batch.tokens.numel() // size * widths[linear.name] for linear in later)
    found["activation_floats"] = sum(
        batch.tokens.numel() * width for name, width in widths.items() if name.endswith("mlp.linear_fc2")
    )
    return found


def arithmetic(case: dict[str, Any]) -> dict[str, Any]:
    """Every variant of one adapted linear over these ranks against autograd: the largest relative error of each."""
    group = torch.distributed.group.WORLD
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    found = {}
    for sequence_parallel in (False, True):
        tp = TensorParallel(group, size, rank, sequence_parallel)
        variants = [*VARIANTS]
        if sequence_parallel:
            variants += [Variant("row", dropout, blocks, all_to_all=True) for _, dropout, blocks in _row_variants()]
        for variant in variants:
            pieces = run_on_rank(variant, draw(variant), tp)
            for name, (value, wanted) in pieces.items():
                error = float((value - wanted).norm() / wanted.norm()) if value.shape == wanted.shape else float("inf")
                found[f"{variant} {'sp' if sequence_parallel else 'tp'} {name}"] = error
    return {"errors": found}


def _row_variants() -> list[tuple[str, str, bool]]:
    return [(variant.kind, variant.dropout, variant.blocks) for variant in VARIANTS if variant.kind == "row"]


def dropout(case: dict[str, Any]) -> dict[str, Any]:
    """The masks drawn in one training step, linear by linear, and the log-probabilities outside training."""
    policy = build_policy(case)
    masks: dict[str, list[Tensor]] = {}
    with _masks_recorded(masks):
        scores = policy.score(scored_rows())
        drawn_outside_training = sum(len(drawn) for drawn in masks.values())
        policy.train_step([[row] for row in training_rows(1)[0]], SFTObjective())
    return {"masks": masks, "scores": scores, "drawn_outside_training": drawn_outside_training}


@contextmanager
def _masks_recorded(masks: dict[str, list[Tensor]]) -> Iterator[None]:
    original = LoRALinear._mask

    def recorded(self: LoRALinear, *args: Any) -> Tensor:
        mask = original(self, *args)
        masks.setdefault(self.layout.name, []).append(mask.clone())
        return mask

    LoRALinear._mask = recorded  # type: ignore[method-assign]
    try:
        yield
    finally:
        LoRALinear._mask = original  # type: ignore[method-assign]


def loading(case: dict[str, Any]) -> dict[str, Any]:
    """Floating-point bytes that are alive at most while the policy is built, and what its parts take afterwards."""
    with LiveFloats() as live:
        policy = build_policy(case)
    chunk = policy.base.chunks[0]
    stored = stored_weights(chunk)
    linears = [linear for name, linear in global_names(chunk, 0).items() if ".linear_" in name and linear.dim() == 2]
    return {
        "peak": live.peak,
        "stored": sum(weight.num_bytes for weight in stored.values()),
        "dense_linears": sum(linear.nbytes for linear in linears if not linear.requires_grad),
        "dense_size": 4 * sum(math.prod(weight.shape) for weight in stored.values()),
    }


CHECKS = {
    "loading": loading,
    "kept": kept,
    "communication": communication,
    "arithmetic": arithmetic,
    "dropout": dropout,
}
