"""Frozen linears over 4-bit weights in a transformers model.

Their weights are no parameters: FSDP leaves them alone, so every data-parallel rank holds its tensor-parallel part
whole. Inputs and outputs are DTensors where the model is split, as those of the linears that they replace.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Shard

from megatron_lora.conversion.four_bit_folder import FourBitFolder, QuantizedWeights
from megatron_lora.lora.arithmetic import TensorParallel, frozen_column_parallel
from megatron_lora.lora.base_weight import BaseWeight
from megatron_lora.lora.four_bit import FourBitWeight

ALONE = TensorParallel(group=None, size=1, rank=0, sequence_parallel=False)


class FourBitLinear(nn.Module):
    """Takes the place of a transformers linear, and its bias. `hold` gives it its weight.

    base_weight: this tensor-parallel rank's part. split: how it lies over the ranks; None: whole.
    """

    base_weight: BaseWeight
    bias: nn.Parameter | None
    split: Placement | None = None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in] -> x W^T + bias [..., out]."""
        y = _product(self, x)
        return y if bias is None else y + bias

    def hold(
        self,
        weights: FourBitFolder | QuantizedWeights,
        name: str,
        split: Placement | None,
        tp: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Read the weight `name`, and keep this rank's part. tp: (rank, size)."""
        matrix = weights.read_four_bit(name)
        assert matrix is not None
        self.split = split
        if split is not None:
            (rank, size), axis = tp, 0 if split == Shard(0) else 1
            length = matrix.shape[axis] // size
            part = (rank * length, (rank + 1) * length)
            matrix = matrix.rows(slice(*part)) if axis == 0 else matrix.columns(*part)
        self.base_weight = FourBitWeight(matrix.to(device), dtype)

    def full_weight(self, mesh: DeviceMesh) -> Tensor:
        """The whole weight, made dense, on this rank's device. Collective over `mesh` where it is split."""
        local = self.base_weight.dense()
        if self.split is None:
            return local
        return DTensor.from_local(local, mesh, [self.split], run_check=False).full_tensor()


def replace_linears(model: Any, weights: FourBitFolder | QuantizedWeights) -> None:
    """Put `FourBitLinear`s without values in the place of the linears, adapted or not, that `weights` has in 4 bits."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and weight_name(path) in weights.four_bit:
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, FourBitLinear(module))


def four_bit_linears(model: nn.Module) -> dict[str, FourBitLinear]:
    """Module path -> linear."""
    return {path: module for path, module in model.named_modules() if isinstance(module, FourBitLinear)}


def weight_name(path: str) -> str:
    """The HF name of the weight of the linear at this path."""
    return f"{path.removesuffix('.base_layer')}.weight"


def _product_outside_graphs(linear: FourBitLinear, x: Tensor) -> Tensor:
    weight, column = linear.base_weight, linear.split == Shard(0)

    def local_product(local: Tensor) -> Tensor:
        y = frozen_column_parallel(local.flatten(0, -2), weight, None, ALONE)
        return y.view(*local.shape[:-1], -1)

    if not isinstance(x, DTensor):
        return local_product(x)
    # A column-parallel linear's input gradient is a sum over ranks; a row-parallel one's output is.
    local = x.to_local(grad_placements=[Partial()]) if column else x.to_local()
    layout = Shard(x.dim() - 1) if column else Partial()
    return DTensor.from_local(local_product(local), x.device_mesh, [layout], run_check=False)


# A compiled layer leaves its graph here: bitsandbytes' kernels are no part of one.
_product: Any = torch.compiler.disable(_product_outside_graphs)
