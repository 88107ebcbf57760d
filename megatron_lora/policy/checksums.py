"""Checksums of weights that do not depend on how tensor parallelism cut them: shards' checksums add up to the whole's.
A trainer takes them of its own parts, a rollout engine of its own, and nothing has to be gathered to compare the two.

A checksum is the sum, modulo 2^64, of each element's bits times an odd number for its row and one for its column in
the whole tensor. Zeros add nothing, so padding (vLLM keeps adapters in slots of the largest rank) does not count.
"""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

MODULUS = 1 << 64
# Odd multipliers from the golden ratio and Knuth's MMIX generator, as signed 64-bit numbers.
ROW_FACTOR, ROW_OFFSET = -7046029254386353131, 6364136223846793005
COLUMN_FACTOR, COLUMN_OFFSET = 2862933555777941757, 3037000493
INTEGER_OF = {2: torch.int16, 4: torch.int32}

# (tensor's name, first row, first column) -> checksum of the piece that starts there.
Pieces = dict[tuple[str, int, int], Tensor]


class DifferentCopies(RuntimeError):
    """Two ranks hold different values of what is one piece."""


def checksum(piece: Tensor, first_row: int = 0, first_column: int = 0) -> Tensor:
    """Scalar int64 checksum of a 2-D piece (fp32, bf16 or fp16) that starts there in the whole tensor."""
    bits = piece.contiguous().view(INTEGER_OF[piece.element_size()]).to(torch.int64)
    rows = torch.arange(first_row, first_row + piece.shape[0], device=piece.device, dtype=torch.int64)
    columns = torch.arange(first_column, first_column + piece.shape[1], device=piece.device, dtype=torch.int64)
    row_weights = (rows * ROW_FACTOR + ROW_OFFSET) | 1
    column_weights = (columns * COLUMN_FACTOR + COLUMN_OFFSET) | 1
    return ((bits * column_weights).sum(1) * row_weights).sum()


def to_numbers(pieces: Pieces) -> dict[tuple[str, int, int], int]:
    """The checksums as Python numbers, with one transfer from the device."""
    if not pieces:
        return {}
    values = torch.stack(list(pieces.values())).tolist()
    return dict(zip(pieces, values, strict=True))


def join_ranks(parts: Iterable[Mapping[tuple[str, int, int], int]]) -> dict[str, int]:
    """The pieces of all ranks that hold a model together as whole tensors' checksums. A piece that several ranks hold
    counts once.

    Raises DifferentCopies where two ranks' copies of one piece differ.
    """
    seen: dict[tuple[str, int, int], int] = {}
    for part in parts:
        for key, value in part.items():
            if seen.setdefault(key, value) != value:
                raise DifferentCopies(f"two ranks hold different copies of {key[0]}")
    totals: dict[str, int] = {}
    for (name, _, _), value in seen.items():
        totals[name] = (totals.get(name, 0) + value) % MODULUS
    return totals


def digest(kind: str, totals: Mapping[str, int]) -> str:
    """`<kind>:<16 hex digits>` of all non-zero checksums."""
    text = "\n".join(f"{name} {value % MODULUS}" for name, value in sorted(totals.items()) if value % MODULUS)
    return f"{kind}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"
