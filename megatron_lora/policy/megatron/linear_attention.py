"""Linear attention: the gated delta net (Yang et al. 2024, arXiv 2412.06464) of Qwen3-Next and Qwen3.5.

Megatron-Core's own module wants kernels that are not there on a CPU and takes no packed rows without them. This one is
plain PyTorch over Megatron-Core's chunked rule, and each row of a micro-batch begins with an empty state.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.ssm.gated_delta_net import torch_chunk_gated_delta_rule
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from megatron_lora.lora.model_spec import ModelSizes

L2_EPS = 1e-6  # transformers' `l2norm`


class _Weight(nn.Module):
    """A frozen weight under a module's name."""

    def __init__(self, *shape: int, dtype: torch.dtype, device: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))


class DeltaAttention(MegatronModule):
    """The mixer of one layer. in_proj's rows lie key head by key head: query, key, values, gates of the output, and of
    each of its value heads a strength and a decay; a tensor-parallel rank has some of the key heads."""

    def __init__(
        self, config: Any, submodules: Any, layer_number: int, sizes: ModelSizes, pg_collection: Any, **_: Any
    ):
        super().__init__(config)
        self.layer_number = layer_number
        tp: Any = pg_collection.tp
        self.key_heads = sizes.linear_key_heads // tp.size()
        self.values = sizes.linear_value_heads // sizes.linear_key_heads
        self.key_dim, self.value_dim, self.kernel = sizes.linear_key_dim, sizes.linear_value_dim, sizes.linear_kernel
        value = sizes.linear_value_heads * sizes.linear_value_dim
        mixed = 2 * sizes.linear_key_heads * sizes.linear_key_dim + value
        common = {"config": config, "bias": False, "is_expert": False, "tp_group": tp}
        self.in_proj: Any = build_module(
            submodules.linear_qkv,
            sizes.hidden_size,
            mixed + value + 2 * sizes.linear_value_heads,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            **common,
        )
        of = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.conv1d = _Weight(mixed // tp.size(), 1, self.kernel, **of)
        # Decays are computed in fp32 whatever the model's precision, and files may hold these in it.
        heads = self.key_heads * self.values
        self.A_log = nn.Parameter(torch.empty(heads, dtype=torch.float32, device=of["device"]))
        self.dt_bias = nn.Parameter(torch.empty(heads, dtype=torch.float32, device=of["device"]))
        self.out_norm = _Weight(self.value_dim, **of)
        self.out_proj: Any = build_module(
            submodules.linear_proj,
            value,
            sizes.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="fc2",
            **common,
        )

    def forward(self, hidden_states: Tensor, *_: Any, packed_seq_params: Any = None, **__: Any) -> tuple[Tensor, Any]:
        """hidden_states [tokens, rows, hidden], with `packed_seq_params` one row of packed ones -> the same."""
        mixed, _bias = self.in_proj(hidden_states)
        tokens, batch = mixed.shape[:2]
        mixed = mixed.view(tokens * batch, self.key_heads, -1)
        values = self.values * self.value_dim
        query, key, value, gate, strength, decay = mixed.split(
            [self.key_dim, self.key_dim, values, values, self.values, self.values], -1
        )
        # What lies behind a row's end comes after all of it, and is not read back.
        places, back = _rows(tokens, batch, packed_seq_params, mixed.device)
        qkv = torch.cat([part.flatten(1) for part in (query, key, value)], -1)[places]
        query, key, value = self._convolved(qkv)
        beta = strength.flatten(1).sigmoid()[places]
        g = -self.A_log.exp() * F.softplus(decay.flatten(1).float() + self.dt_bias)
        mixer: Any = torch_chunk_gated_delta_rule
        out, _state = mixer(query, key, value, g=g[places], beta=beta)
        out = self._normed(out.flatten(0, 1)[back], gate.reshape(tokens * batch, -1, self.value_dim))
        return self.out_proj(out.reshape(tokens, batch, -1))

    def _convolved(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[rows, longest, channels] -> queries, keys (both of length 1, for each value head) and values
        [rows, longest, value heads, features]."""
        padded = F.pad(qkv.transpose(1, 2), (self.kernel - 1, 0))
        mixed = F.silu(F.conv1d(padded, self.conv1d.weight, groups=padded.shape[1])).transpose(1, 2)
        keys = self.key_heads * self.key_dim
        query, key, value = mixed.split([keys, keys, mixed.shape[-1] - 2 * keys], -1)
        query, key = (_normalized(part.unflatten(-1, (self.key_heads, self.key_dim))) for part in (query, key))
        query, key = (part.repeat_interleave(self.values, 2) for part in (query, key))
        return query, key, value.unflatten(-1, (-1, self.value_dim))

    def _normed(self, x: Tensor, gate: Tensor) -> Tensor:
        """RMSNorm of each head, times the gate's SiLU."""
        normed = F.rms_norm(x.float(), (self.value_dim,), eps=self.config.layernorm_epsilon).to(x.dtype)
        return (self.out_norm.weight * normed * F.silu(gate.float())).to(x.dtype)


def _normalized(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def _rows(tokens: int, batch: int, packed: Any, device: Any) -> tuple[Tensor, Tensor]:
    """places [rows, longest]: of [tokens, batch] flattened, the place of each row's tokens (beyond its end any). back
    [tokens * batch]: of [rows, longest] flattened, the place of each token."""
    if packed is None:
        places = torch.arange(tokens * batch, device=device).view(tokens, batch).t()
        return places, torch.arange(tokens * batch, device=device).view(batch, tokens).t().reshape(-1)
    bounds = packed.cu_seqlens_q.long()
    lengths = bounds.diff()
    longest = int(lengths.max())
    offsets = torch.arange(longest, device=device)
    places = (bounds[:-1, None] + offsets).clamp(max=tokens - 1)
    back = (torch.arange(lengths.numel(), device=device)[:, None] * longest + offsets)[offsets < lengths[:, None]]
    # Tokens behind the last row fill the micro-batch up.
    return places, F.pad(back, (0, tokens - back.numel()))


def delta_spec(attention: ModuleSpec, sizes: ModelSizes) -> ModuleSpec:
    """The specification of the mixer, of the linears that an attention's has."""
    return ModuleSpec(module=DeltaAttention, params={"sizes": sizes}, submodules=copy.copy(attention.submodules))
