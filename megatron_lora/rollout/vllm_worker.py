"""What runs inside vLLM's worker: replacing the adapter or the weights, and reading back what it holds.

Each function is called through `LLM.collective_rpc` with the worker as its first argument. With `external_launcher`
the worker lives in this process, so tensors are handed over as they are.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor

from megatron_lora.errors import UserError
from megatron_lora.lora.families import file_name
from megatron_lora.lora.model_tables import HYBRIDS
from megatron_lora.lora.peft_format import PREFIX
from megatron_lora.policy.checksums import Pieces, checksum

ADAPTER_ID = 1
# Where a layer's linears are that are read back, and the HF linears in each; a hybrid's layer has one mixer.
PARENTS = ("self_attn", "mlp", "mixer")
READ_BACK = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
_PARTS = "|".join(part for parts in READ_BACK.values() for part in parts)
_READ_BACK_NAME = re.compile(rf"model\.layers\.\d+\.({'|'.join(PARENTS)})\.({_PARTS})\.weight")


def swap_adapter(worker: Any, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Make these factors adapter 1: HF linear -> (A [r, in], scale * B [out, r]), replacing what it was.

    Raises UserError for a linear that this vLLM model cannot adapt (vLLM itself would ignore it).
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights

    manager = _manager(worker)
    known = {part for name in manager.modules for part in _parts(manager, name)}
    unknown = sorted(set(factors) - known)
    if unknown:
        raise UserError(
            f"vLLM cannot put an adapter on {', '.join(unknown[:3])} of this model ({len(unknown)} in all); "
            "set policy.generation.refit=merge"
        )
    layers = {}
    for name, (a, b) in factors.items():
        # lora_alpha = rank and scaling 1: the scale is in B already, each linear's own.
        layers[name] = LoRALayerWeights(name, a.shape[0], a.shape[0], a, b, scaling=1)
    largest = max((a.shape[0] for a, _ in factors.values()), default=1)
    manager.remove_adapter(ADAPTER_ID)
    manager.add_adapter(LoRAModel(ADAPTER_ID, largest, layers))
    manager.activate_adapter(ADAPTER_ID)


def remove_adapter(worker: Any) -> None:
    """Answer with the base alone."""
    if worker.model_runner.lora_config is None:
        return
    manager = _manager(worker)
    manager.remove_adapter(ADAPTER_ID)
    # vLLM only forgets the slot's number, and its CPU head adds what is in the last slot to every request.
    for module in manager.modules.values():
        for slot in range(len(manager.lora_index_to_id)):
            module.reset_lora(slot)


def engine_dtype(worker: Any) -> torch.dtype:
    """The dtype that weights and adapter are held in."""
    return worker.model_config.dtype


def adapter_pieces(worker: Any) -> Pieces:
    """Checksums of the adapter in the slot that the forward pass reads, under HF PEFT names."""
    manager = _manager(worker)
    # A server counts its adapters up; the newest is the one that answers.
    newest = max((held for held in manager.lora_index_to_id if held is not None), default=None)
    if newest is None:
        return {}
    slot = manager.lora_index_to_id.index(newest)
    pieces: Pieces = {}
    for name, module in manager.modules.items():
        stacked_a, stacked_b = _as_tuple(module.lora_a_stacked), _as_tuple(module.lora_b_stacked)
        for index, part in enumerate(_parts(manager, name)):
            a, b = stacked_a[index][slot, 0], stacked_b[index][slot, 0]
            column, row = _offsets(module, index, a, b)
            pieces[f"{PREFIX}{part}.lora_A.weight", 0, column] = checksum(a, 0, column)
            pieces[f"{PREFIX}{part}.lora_B.weight", row, 0] = checksum(b, row, 0)
    return pieces


def _offsets(module: Any, index: int, a: Tensor, b: Tensor) -> tuple[int, int]:
    """(first column of this rank's part of A, first row of its part of B)."""
    from vllm.lora.layers import LogitsProcessorWithLoRA, RowParallelLinearWithLoRA

    if isinstance(module, RowParallelLinearWithLoRA):
        return module.tp_rank * a.shape[1], 0
    if isinstance(module, LogitsProcessorWithLoRA):
        return 0, 0
    shard = module.output_ids[index] if hasattr(module, "output_ids") else module.tp_rank
    return 0, shard * b.shape[0]


def _manager(worker: Any) -> Any:
    return worker.model_runner.lora_manager._adapter_manager


def _parts(manager: Any, name: str) -> list[str]:
    """The HF linears of one vLLM linear."""
    return manager.packed_modules.get(name) or [name]


def _as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def reload_weights(worker: Any, weights: Iterable[tuple[str, Tensor]] | None) -> None:
    """Replace every weight in place: HF name -> full tensor; None: the model folder's own."""
    runner = worker.model_runner
    source = _folder_weights(runner) if weights is None else weights
    runner.reload_weights(weights_iterator=_as_vllm_names(worker, source))


def _folder_weights(runner: Any) -> Iterable[tuple[str, Tensor]]:
    from vllm.model_executor.model_loader import get_model_loader

    loader: Any = get_model_loader(runner.load_config)
    return loader.get_all_weights(runner.model_config, runner.get_model())


def _as_vllm_names(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """vLLM reads the names of published files, and keeps a linear that can carry an adapter inside a wrapper, as its
    `base_layer`."""
    family = worker.model_runner.model_config.hf_config.model_type
    wrapped: set[str] = set()
    if worker.model_runner.lora_config is not None:
        manager = _manager(worker)
        # The wrapper of lm_head is around the logits processor; the head itself keeps its name.
        wrapped = {part for name in manager.modules if name != "lm_head" for part in _parts(manager, name)}
    for name, tensor in weights:
        if family not in HYBRIDS:
            name = file_name(family, name)
        module, _, leaf = name.rpartition(".")
        yield (f"{module}.base_layer.{leaf}" if module in wrapped else name), tensor


def sampled_columns(num_columns: int) -> list[int]:
    return sorted({0, num_columns // 2, num_columns - 1})


def is_read_back(name: str) -> bool:
    """Whether `weight_pieces` has this HF tensor: not of experts, which vLLM packs and has no linears for, nor of a
    recurrent mixer, whose rows vLLM divides in a way of its own."""
    return _READ_BACK_NAME.fullmatch(name) is not None


def weight_pieces(worker: Any) -> Pieces:
    """Checksums of sampled columns of every layer's linears, under HF names, read back through the linears."""
    model = worker.model_runner.get_model().model
    dtype = engine_dtype(worker)
    pieces: Pieces = {}
    for layer, block in enumerate(model.layers):
        for parent, (name, parts) in product(PARENTS, READ_BACK.items()):
            linear = getattr(getattr(block, parent, None), name, None)
            if linear is None:
                continue
            linear = getattr(linear, "base_layer", linear)
            names = [f"model.layers.{layer}.{parent}.{part}.weight" for part in parts]
            pieces |= _linear_pieces(linear, names, dtype)
    return pieces


def _linear_pieces(linear: Any, names: list[str], dtype: torch.dtype) -> Pieces:
    inputs = linear.input_size_per_partition
    first = linear.tp_rank * inputs if inputs != linear.input_size else 0
    columns = [column for column in sampled_columns(linear.input_size) if first <= column < first + inputs]
    pieces: Pieces = {}
    if not columns:
        return pieces
    values = _columns_of(linear, [column - first for column in columns], dtype)
    start = 0
    for name, (size, shard) in zip(names, _row_parts(linear), strict=True):
        for position, column in enumerate(columns):
            part = values[position, start : start + size, None]
            pieces[name, shard * size, column] = checksum(part, shard * size, column)
        start += size
    return pieces


def _columns_of(linear: Any, columns: list[int], dtype: torch.dtype) -> Tensor:
    """[columns, out on this rank]: W's columns, as the product with unit vectors where vLLM has packed W (CPUs)."""
    weight = linear.weight
    if weight.dim() == 2 and tuple(weight.shape) == (
        linear.output_size_per_partition,
        linear.input_size_per_partition,
    ):
        return weight[:, columns].t().contiguous() + 0.0
    units = torch.zeros(len(columns), linear.input_size_per_partition, dtype=dtype, device=weight.device)
    units[range(len(columns)), columns] = 1.0
    return linear.quant_method.apply(linear, units, None) + 0.0


def _row_parts(linear: Any) -> list[tuple[int, int]]:
    """(rows on this rank, this rank's shard number) of each HF linear in a vLLM linear."""
    from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

    if isinstance(linear, RowParallelLinear):
        return [(linear.output_size_per_partition, 0)]
    if isinstance(linear, QKVParallelLinear):
        head, groups = linear.head_size, linear.tp_rank // linear.num_kv_head_replicas
        return [(linear.num_heads * head, linear.tp_rank)] + [(linear.num_kv_heads * head, groups)] * 2
    return [(size, linear.tp_rank) for size in linear.output_partition_sizes]
