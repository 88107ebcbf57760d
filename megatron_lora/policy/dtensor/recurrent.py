"""Layers of transformers' models that carry a state from token to token, over packed rows: each row begins with an
empty state. Between layers rows lie one after the other; such a layer's mixer gets them one below the other."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lora.lora.model_spec import ModelSpec
from megatron_lora.policy.dtensor.attention import Packing
from megatron_lora.policy.state_space import mamba2


def keep_rows_apart(hf: Any, shapes: ModelSpec) -> None:
    """Let the mixers of a transformers model see each row of a micro-batch alone; Mamba's, where its kernels are not
    installed, are computed as on the Megatron backend."""
    for number in shapes.linear_layers:
        layer = hf.model.layers[number]
        mixer = layer.mixer if shapes.mixers else layer.linear_attn
        if shapes.mixers:
            # Step sizes have no lower limit in the kernels; and transformers' own takes gigabytes a thousand tokens.
            mixer.torch_forward = partial(_mamba, mixer)
        apart = _RowsApart(mixer.forward)
        mixer.forward = apart
        layer.register_forward_pre_hook(apart.take_packing, with_kwargs=True)


class _RowsApart:
    """A mixer's forward pass. The layer gets `packing` as an argument, and not every mixer does."""

    def __init__(self, forward: Callable[..., Tensor]):
        self.forward = forward
        self.packing: Packing | None = None

    def take_packing(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.packing = kwargs["packing"]

    @torch.compiler.disable
    def __call__(self, hidden_states: Tensor, **_: Any) -> Tensor:
        """[1, T, h] -> [1, T, h]."""
        assert self.packing is not None and self.packing.shared_keys is None
        grid = self.packing.grid.of(self.packing.cu_seqlens, hidden_states.shape[1])
        out = self.forward(hidden_states[0][grid.places])
        return out.flatten(0, 1)[grid.back].unsqueeze(0)


def _mamba(mixer: Any, hidden: Tensor, *_: Any) -> Tensor:
    """transformers' `NemotronHMamba2Mixer` of whole rows [rows, longest, h], with the chunked scan."""
    mixed = mixer.in_proj(hidden)
    gate, channels, step = mixed.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], -1)
    convolved = mixer.act(mixer.conv1d(channels.transpose(1, 2))[..., : hidden.shape[1]]).transpose(1, 2)
    steps = F.softplus(step.float() + mixer.dt_bias.float())
    groups, state = mixer.n_groups, mixer.ssm_state_size
    out, _state = mamba2(convolved.float(), steps, mixer.A_log, mixer.D, groups=groups, state=state)
    return mixer.out_proj(mixer.norm(out.flatten(2), gate).to(hidden.dtype))
