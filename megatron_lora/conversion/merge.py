"""An adapter merged into a base model's files, one tensor at a time."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_lora.conversion.experts import packed_views
from megatron_lora.conversion.shard_writer import check_shards, write_shards
from megatron_lora.conversion.weight_source import WeightSource
from megatron_lora.errors import UserError
from megatron_lora.lora.layout import AdapterSpec
from megatron_lora.lora.merge import Target, merge_targets
from megatron_lora.lora.model_spec import LinearSpec
from megatron_lora.lora.packed_experts import packed_name
from megatron_lora.lora.peft_format import hf_linears, segment_features

# Rows of a weight are merged in pieces of about this many elements, so that the fp32 temporaries stay small.
CHUNK_ELEMENTS = 1 << 20
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass
class MergeReport:
    """How much of each update d the target dtype lost: |round(W + d) - round(W) - d| / |d|, Frobenius norms.

    0: nothing, 1: as if there were no update.
    """

    error_squares: dict[str, float] = field(default_factory=dict)
    delta_squares: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, error: Tensor, delta: Tensor) -> None:
        """Some rows of one linear."""
        self.error_squares[name] = self.error_squares.get(name, 0.0) + float(error.norm()) ** 2
        self.delta_squares[name] = self.delta_squares.get(name, 0.0) + float(delta.norm()) ** 2

    @property
    def overall(self) -> float:
        return _ratio(sum(self.error_squares.values()), sum(self.delta_squares.values()))

    @property
    def worst(self) -> tuple[str, float]:
        """(HF linear, what it lost)."""
        ratios = {name: _ratio(self.error_squares[name], self.delta_squares[name]) for name in self.error_squares}
        name = max(ratios, key=lambda key: ratios[key])
        return name, ratios[name]

    def __str__(self) -> str:
        name, lost = self.worst
        return f"rounding cost {self.overall:.3%} of the update (relative norm), at worst {lost:.3%} in {name}"


def _ratio(error_square: float, delta_square: float) -> float:
    return math.sqrt(error_square / delta_square) if delta_square else 0.0


class Merger:
    """Merges an adapter into a base's tensors as they stream by.

    dtype: of the written floating-point tensors; None keeps each tensor's own.
    """

    def __init__(
        self, spec: AdapterSpec, factors: dict[str, Tensor], base: WeightSource, dtype: torch.dtype | None = None
    ):
        """Raises UserError where the base lacks an adapted weight or has it in another shape."""
        self.spec, self.factors, self.base, self.dtype = spec, factors, base, dtype
        self.report = MergeReport()
        # Name of a tensor of all experts -> the linear that it is; their parts are among the targets.
        self.packed: dict[str, LinearSpec] = {}
        # Tensors of the base that merging changes.
        self.adapted: set[str] = set()
        self.targets = self._find_targets()

    def _find_targets(self) -> dict[str, Target]:
        """HF linear -> what adapts it; notes the tensors that they are, or are a part of."""
        linears = hf_linears(self.spec.shapes)
        targets = merge_targets(self.spec)
        for name in targets:
            whole = self.spec.shapes.linear(linears[name].kind)
            layer = linears[name].layer
            if whole.packed and layer is not None:
                self.packed[packed_name(whole, layer)] = whole
                continue
            inputs, outputs = segment_features(linears[name], self.spec.shapes)
            self._check_entry(f"{name}.weight", (outputs, inputs))
        for name, whole in self.packed.items():
            self._check_entry(name, (whole.experts, whole.in_features, whole.out_features))
        for name, shape in self.spec.saved.items():
            if name not in self.base.entries or tuple(self.base.entries[name].shape) != tuple(shape):
                raise UserError(f"{self.base.folder} has no {name} of shape {tuple(shape)}, which the adapter replaces")
        return targets

    def _check_entry(self, name: str, shape: tuple[int, ...]) -> None:
        self.adapted.add(name)
        if name not in self.base.entries:
            raise UserError(f"{self.base.folder} lacks {name}, which the adapter adapts; is it the right base?")
        if self.base.entries[name].shape != shape:
            raise UserError(
                f"{name} in {self.base.folder} has shape {self.base.entries[name].shape}, the adapter is for {shape}"
            )

    def target_dtype(self, name: str) -> torch.dtype:
        stored = self.base.entries[name].dtype
        if name in self.adapted and stored not in FLOATS:
            raise UserError(f"{name} in {self.base.folder} is stored as {stored}; merge into an unquantized base")
        return self.dtype if self.dtype is not None and stored in FLOATS else stored

    def merged(self, name: str) -> Tensor:
        """One tensor of the merged model. Raises UserError where it is not finite."""
        if name in self.spec.saved:
            return self.factors[name].to(self.target_dtype(name))
        weight = self.base.read(name)
        dtype = self.target_dtype(name)
        if name not in self.adapted:
            return weight.to(dtype)
        result = torch.empty(weight.shape, dtype=dtype)
        if name in self.packed:
            pairs = (packed_views(self.packed[name], name, tensor) for tensor in (weight, result))
            for (linear, before), (_, after) in zip(*pairs, strict=True):
                self._merge(linear, before, after)
        else:
            self._merge(name.removesuffix(".weight"), weight, result)
        if not torch.isfinite(result).all():
            raise UserError(f"merged {name} is not finite; the adapter or the base holds NaN or infinity in it")
        return result

    def _merge(self, linear: str, weight: Tensor, result: Tensor) -> None:
        """Write the merged weight of one linear [out, in] into `result`."""
        update = self.targets[linear].weight_update(self.factors)
        rows = max(1, CHUNK_ELEMENTS // weight.shape[1])
        for start in range(0, weight.shape[0], rows):
            chunk = slice(start, start + rows)
            delta = update.of_rows(weight, chunk)
            result[chunk] = weight[chunk].float() + delta
            error = (result[chunk].float() - weight[chunk].to(result.dtype).float()).sub_(delta)
            self.report.add(linear, error, delta)

    def write(self, out: Path, metadata: dict[str, str], *, show_progress: bool = True) -> None:
        """Write all shards under the base's own file names, and the index if there are several files; look at what lies
        there. Raises RuntimeError where it is not what it should be."""
        described = {name: (self.target_dtype(name), entry.shape) for name, entry in self.base.entries.items()}
        write_shards(
            out,
            self.base,
            described,
            self.merged,
            title="merging",
            metadata=metadata,
            show_progress=show_progress,
        )
        check_shards(out, self.base, described)
