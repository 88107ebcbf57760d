"""The slice of each adapter factor that a tensor-parallel rank holds: one table, from which both directions follow.

| what a factor's axis runs along | column-parallel linear | row-parallel linear |
|---|---|---|
| `in` (A's columns) | whole | split, as W's columns |
| `out` (B's rows) | split, as W's rows | whole; B's rows split under `a2a_experimental` |
| `rank` | whole | whole |

A replicated linear (latent attention's down projections) and its factors are whole on every rank. W's rows on a rank:
qkv is contiguous by query groups; fc1 is [gate of the rank; up of the rank]; output_layer is contiguous over the padded
vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_lora.errors import UserError
from megatron_lora.lora.layout import FACTORS, FactorKey, ModelSpec
from megatron_lora.lora.model_spec import Parallel


@dataclass(frozen=True)
class Piece:
    """`length` consecutive indices: from `local_start` in the rank's slice, from `global_start` in the full factor."""

    local_start: int
    global_start: int
    length: int


@dataclass(frozen=True)
class Placement:
    """How a rank's slice lies in the full factor: the split axis (None: the whole factor on every rank), the slice's
    size along it, and its pieces. Local indices in no piece are vocabulary padding."""

    axis: int | None
    local_size: int
    pieces: tuple[Piece, ...]


def placement(
    factor: FactorKey,
    kind: str,
    shapes: ModelSpec,
    tp_rank: int,
    tp_size: int,
    *,
    a2a: bool = False,
    padded_vocab_size: int | None = None,
) -> Placement:
    """Where the slice of `tp_rank` lies. a2a: row-parallel B is split too. padded_vocab_size: rows of the output layer
    over all ranks, by default the vocabulary itself. Raises UserError where the TP size does not divide."""
    linear = shapes.linear(kind)
    axis = split_axis(factor, linear.parallel, a2a=a2a)
    if axis is None:
        return Placement(None, 0, ())
    if linear.parallel == "row":
        size = linear.in_features if FACTORS[factor].axes[axis] == "in" else linear.out_features
        return _even_placement(axis, size, 1, tp_rank, tp_size)
    if kind == "output_layer":
        return _vocabulary_placement(
            axis, shapes.vocab_size, padded_vocab_size or linear.out_features, tp_rank, tp_size
        )
    if linear.interleaved:
        _divide("query groups", linear.groups, tp_size)
    parts = 1 if linear.interleaved else len(linear.parts)
    return _even_placement(axis, linear.out_features, parts, tp_rank, tp_size)


def split_axis(factor: FactorKey, parallel: Parallel, *, a2a: bool = False) -> int | None:
    """The axis of a factor that is split over TP with its linear; None where every rank holds the whole factor."""
    if parallel == "replicated":
        return None
    split = "out" if parallel == "column" or (a2a and factor == "B") else "in"
    axes = FACTORS[factor].axes
    return axes.index(split) if split in axes else None


def shard(
    tensor: Tensor,
    factor: FactorKey,
    kind: str,
    tp_rank: int,
    tp_size: int,
    shapes: ModelSpec,
    a2a: bool = False,
    padded_vocab_size: int | None = None,
) -> Tensor:
    """The slice of `tp_rank`, contiguous and in memory of its own; vocabulary padding is zero."""
    place = placement(factor, kind, shapes, tp_rank, tp_size, a2a=a2a, padded_vocab_size=padded_vocab_size)
    if place.axis is None:
        return tensor.clone()
    size = list(tensor.shape)
    size[place.axis] = place.local_size
    local = tensor.new_zeros(size)
    for piece in place.pieces:
        source = tensor.narrow(place.axis, piece.global_start, piece.length)
        local.narrow(place.axis, piece.local_start, piece.length).copy_(source)
    return local


def unshard(
    shards: Sequence[Tensor],
    factor: FactorKey,
    kind: str,
    shapes: ModelSpec,
    a2a: bool = False,
) -> Tensor:
    """The full factor from all ranks' slices, in rank order; vocabulary padding is cut off."""
    tp_size = len(shards)
    padded = None
    if kind == "output_layer" and "out" in FACTORS[factor].axes:
        padded = sum(local.shape[FACTORS[factor].axes.index("out")] for local in shards)
    places = [
        placement(factor, kind, shapes, rank, tp_size, a2a=a2a, padded_vocab_size=padded) for rank in range(tp_size)
    ]
    axis = places[0].axis
    if axis is None:
        return shards[0].clone()
    size = list(shards[0].shape)
    size[axis] = sum(piece.length for place in places for piece in place.pieces)
    full = shards[0].new_empty(size)
    for local, place in zip(shards, places, strict=True):
        for piece in place.pieces:
            source = local.narrow(axis, piece.local_start, piece.length)
            full.narrow(axis, piece.global_start, piece.length).copy_(source)
    return full


def _divide(what: str, count: int, tp_size: int) -> int:
    if count % tp_size:
        divisors = [size for size in range(1, count + 1) if count % size == 0]
        raise UserError(
            f"tensor_model_parallel_size={tp_size} does not divide the model's {count} {what}; "
            f"use one of {', '.join(map(str, divisors))}"
        )
    return count // tp_size


def _even_placement(axis: int, size: int, parts: int, tp_rank: int, tp_size: int) -> Placement:
    """`parts` equal parts stacked, each of them split over the ranks."""
    part = size // parts
    length = _divide("features of a linear", part, tp_size)
    pieces = tuple(Piece(i * length, i * part + tp_rank * length, length) for i in range(parts))
    return Placement(axis, parts * length, pieces)


def _vocabulary_placement(axis: int, vocab_size: int, padded: int, tp_rank: int, tp_size: int) -> Placement:
    local_size = _divide("rows of the padded vocabulary", padded, tp_size)
    start = tp_rank * local_size
    length = min(start + local_size, vocab_size) - start
    return Placement(axis, local_size, (Piece(0, start, length),) if length > 0 else ())
