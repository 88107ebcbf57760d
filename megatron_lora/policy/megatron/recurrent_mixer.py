"""What layers that carry a state from token to token have in common: two projections with adapters, a convolution over
the last tokens, and rows of a micro-batch that each begin with an empty state. Plain PyTorch, also on a GPU."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from megatron_lora.lora.model_spec import ModelSizes


class Weight(nn.Module):
    """A frozen weight under a module's name, with a bias or not."""

    def __init__(self, *shape: int, dtype: torch.dtype, device: Any, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(shape[0], dtype=dtype, device=device)) if bias else None


class RecurrentMixer(MegatronModule):
    """A mixer in the place of attention. A tensor-parallel rank has some of its groups of heads (key heads), whose rows
    of in_proj lie one after the other.

    rows: of in_proj. inner: features that out_proj gets. channels: that the convolution mixes. conv_bias: whether that
    has a bias. All are the whole model's.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any,
        layer_number: int,
        sizes: ModelSizes,
        tp: Any,
        *,
        rows: int,
        inner: int,
        channels: int,
        conv_bias: bool,
    ):
        super().__init__(config)
        self.layer_number = layer_number
        self.groups = sizes.linear_key_heads // tp.size()
        self.heads = sizes.linear_value_heads // sizes.linear_key_heads
        self.kernel = sizes.linear_kernel
        common = {"config": config, "bias": False, "is_expert": False, "tp_group": tp}
        self.in_proj: Any = build_module(
            submodules.linear_qkv,
            sizes.hidden_size,
            rows,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            **common,
        )
        self.of: dict[str, Any] = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.conv1d = Weight(channels // tp.size(), 1, self.kernel, **self.of, bias=conv_bias)
        # Decays are computed in fp32 whatever the model's precision, and files may hold these in it.
        self.A_log, self.dt_bias = self.of_heads(), self.of_heads()
        self.out_proj: Any = build_module(
            submodules.linear_proj,
            inner,
            sizes.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="fc2",
            **common,
        )

    def of_heads(self) -> nn.Parameter:
        """A number for each head of this rank, in fp32."""
        return nn.Parameter(torch.empty(self.groups * self.heads, dtype=torch.float32, device=self.of["device"]))

    def forward(self, hidden_states: Tensor, *_: Any, packed_seq_params: Any = None, **__: Any) -> tuple[Tensor, Any]:
        """hidden_states [tokens, rows, hidden], with `packed_seq_params` one row of packed ones -> the same."""
        mixed, _bias = self.in_proj(hidden_states)
        tokens, batch = mixed.shape[:2]
        # What lies behind a row's end comes after all of it, and is not read back.
        places, back = row_places(tokens, batch, packed_seq_params, mixed.device)
        out = self.mix(mixed.view(tokens * batch, self.groups, -1), places, back)
        return self.out_proj(out.reshape(tokens, batch, -1))

    def mix(self, mixed: Tensor, places: Tensor, back: Tensor) -> Tensor:
        """mixed [tokens, groups, rows of a group], places and back as `row_places` gives them -> what out_proj gets."""
        raise NotImplementedError

    def convolved(self, channels: Tensor) -> Tensor:
        """[rows, longest, channels]: each channel mixed over the last tokens, and its SiLU."""
        padded = F.pad(channels.transpose(1, 2), (self.kernel - 1, 0))
        return F.silu(F.conv1d(padded, self.conv1d.weight, self.conv1d.bias, groups=padded.shape[1])).transpose(1, 2)


def row_places(tokens: int, batch: int, packed: Any, device: Any) -> tuple[Tensor, Tensor]:
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


def mixer_spec(mixer: type[RecurrentMixer], attention: ModuleSpec, sizes: ModelSizes) -> ModuleSpec:
    """The specification of a mixer, of the linears that an attention's has."""
    return ModuleSpec(module=mixer, params={"sizes": sizes}, submodules=copy.copy(attention.submodules))


def is_attention(spec: Any) -> bool:
    """Whether a layer's specification has attention with keys there: no mixer of this kind, and not nothing."""
    module: Any = spec.module if isinstance(spec, ModuleSpec) else None
    return module is not None and not issubclass(module, RecurrentMixer)
