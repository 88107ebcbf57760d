"""PiSSA (Meng et al. 2024): A and B start as the largest singular values of the weights, the base keeps the rest.

W = W_rest + s B_0 A_0 (eq. 3 and 4): A_0 = sqrt(S / s) V^T, B_0 = U sqrt(S / s). A block of a fused linear, whose HF
linears share one A, is decomposed as one matrix, their rows one below the other. What is trained against W_rest is
against W itself an adapter of twice the rank: s B A - s B_0 A_0 = s [B, -B_0] [A; A_0].
"""

import re
import zlib
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from megatron_lora.errors import UserError
from megatron_lora.lora.init import Factors
from megatron_lora.lora.layout import A, AdapterSpec, B, Block, ModuleLayout, features, segment_rows
from megatron_lora.lora.methods import ReadWeight
from megatron_lora.lora.peft_format import block_of, hf_linears, hf_name, segment_part

# The two factors that a start consists of; others (DoRA's magnitude) follow from the base.
STARTED = (A, B)


def num_iterations(init: str) -> int | None:
    """Of peft's names `pissa` (None: the exact decomposition) and `pissa_niter_N` (subspace iterations)."""
    found = re.fullmatch(r"pissa_niter_(\d+)", init)
    return int(found[1]) if found else None


def check_ranks(spec: AdapterSpec, key: str) -> None:
    """Raise UserError where a rank is above the number of singular values. key: the recipe's, for the message."""
    for module in spec.modules:
        for block in module.blocks:
            rows = sum(segment_rows(module.kind, spec.shapes, segment).numel() for segment in block.segments)
            most = min(rows, features(module.kind, spec.shapes)[0])
            if block.rank > most:
                raise UserError(
                    f"{key}: {module.name} ({', '.join(block.segments)}) has {most} singular values, the adapter's "
                    f"rank is {block.rank}; set dim to {most} or less"
                )


def principal_start(spec: AdapterSpec, init: str, seed: int, read: ReadWeight, dtype: torch.dtype) -> Factors:
    """The starting A and B of a module, whole, the same in every layout, rounded to the adapter's dtype: the base keeps
    what these leave. read: the base. A module's are computed when first asked for, and kept."""
    known: dict[str, dict[str, Tensor]] = {}

    def start(module: ModuleLayout) -> dict[str, Tensor]:
        if module.name not in known:
            exact = _decompose(module, spec, num_iterations(init), seed, read)
            known[module.name] = {name: value.to(dtype) for name, value in exact.items()}
        return known[module.name]

    return start


def _decompose(
    module: ModuleLayout, spec: AdapterSpec, iterations: int | None, seed: int, read: ReadWeight
) -> dict[str, Tensor]:
    a = torch.zeros(module.factor_shape(A, spec.shapes))
    b = torch.zeros(module.factor_shape(B, spec.shapes))
    for block in module.blocks:
        parts = [read(f"{hf_name(module, segment, spec.shapes)}.weight").float() for segment in block.segments]
        own_seed = zlib.crc32(f"{seed} {module.name}.{'.'.join(block.segments)}".encode())
        u, s, vt = _largest_singular(torch.cat(parts), block.rank, iterations, own_seed)
        root = (s / block.scale).sqrt()
        columns = slice(block.start, block.stop)
        a[columns] = root[:, None] * vt
        pieces = (u * root).split([part.shape[0] for part in parts])
        for segment, piece in zip(block.segments, pieces, strict=True):
            b[segment_rows(module.kind, spec.shapes, segment), columns] = piece
    return {A.name: a, B.name: b}


def _largest_singular(matrix: Tensor, rank: int, iterations: int | None, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U [out, rank], S [rank], V^T [rank, in]), each vector of V^T with its largest entry positive: a decomposition
    leaves the sign open, and every rank of a run has to take the same."""
    if iterations is None:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    else:
        # It draws from the default generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(matrix, rank, niter=iterations)
        vt = v.t()
    signs = vt.gather(1, vt.abs().argmax(1, keepdim=True)).sign()
    return u * signs.t(), s, vt * signs


def given_principal(tensors: Mapping[str, Tensor]) -> Factors:
    """The starting A and B of a module, from `<module>.<factor>` tensors."""
    return lambda module: {factor.name: tensors[f"{module.name}.{factor.name}"] for factor in STARTED}


def residual_reader(read: ReadWeight, spec: AdapterSpec, start: Factors) -> ReadWeight:
    """The base's tensors by HF name as the model holds them: weights that are adapted without s B_0 A_0, in fp32."""
    linears = hf_linears(spec.shapes)
    modules = {(module.kind, module.layer): module for module in spec.modules}

    def residual(name: str) -> Tensor:
        value = read(name)
        linear = linears.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        module = modules.get((linear.kind, linear.layer)) if linear is not None else None
        block = block_of(module, linear.segment) if module is not None and linear is not None else None
        if module is None or linear is None or block is None:
            return value
        whole = start(module)
        a, b = (segment_part(factor, module, linear.segment, whole[factor.name], spec.shapes) for factor in STARTED)
        return value.float() - (block.scale * b.float()) @ a.float()

    return residual


def against_the_base(
    spec: AdapterSpec, tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]
) -> tuple[AdapterSpec, dict[str, Tensor]]:
    """An adapter of the residual as a plain one of the base, of twice the rank: what other programs load.

    tensors, start: `<module>.<factor>` -> whole factor; of the start A and B. A scale stays what it was bit for bit.
    """
    modules, result = [], {}
    for module in spec.modules:
        own, before = spec.of_module(module, tensors), {f.name: start[f"{module.name}.{f.name}"] for f in STARTED}
        blocks: list[Block] = []
        a_rows, b_columns = [], []
        for block in module.blocks:
            rows = slice(block.start, block.stop)
            a_rows += [own[A.name][rows], before[A.name][rows].to(own[A.name])]
            b_columns += [own[B.name][:, rows], -before[B.name][:, rows].to(own[B.name])]
            first, rank = 2 * block.start, 2 * block.rank
            blocks.append(Block(block.segments, first, first + rank, block.scale, block.scale * rank))
        modules.append(replace(module, blocks=tuple(blocks)))
        whole = own | {A.name: torch.cat(a_rows), B.name: torch.cat(b_columns, 1)}
        result |= {f"{module.name}.{name}": value for name, value in whole.items()}
    result |= {name: tensors[name] for name in spec.saved}
    settings = {key: value for key, value in spec.settings.items() if key != "init_lora_weights"}
    return replace(spec, modules=modules, residual=False, settings=settings), result
