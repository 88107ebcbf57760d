"""What layers that carry a state from token to token have in common: two projections with adapters, a convolution over
the last tokens, and rows of a micro-batch that each begin with an empty state. Plain PyTorch, also on a GPU."""

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from megatron_lora.lora.model_spec import ModelSizes
from megatron_lora.policy.megatron.head_exchange import HeadExchange
from megatron_lora.policy.row_grid import RowGrid, even_grid

# Groups of heads: all that a rank has.
ALL = slice(None)


class Weight(nn.Module):
    """A weight under a module's name, with a bias or not. split: each tensor-parallel rank has a part of its own; else
    all have the same, and see a part of the heads."""

    def __init__(self, *shape: int, dtype: torch.dtype, device: Any, bias: bool = False, split: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(shape[0], dtype=dtype, device=device)) if bias else None
        for parameter in self.parameters():
            _mark(parameter, split)


def _mark(parameter: Any, split: bool) -> None:
    """For Megatron's gradient norm, and for the sum of gradients over ranks, in full fine-tuning."""
    if split:
        parameter.tensor_model_parallel = True
    else:
        parameter.sum_gradient_over = ("tp",)


@dataclass(frozen=True)
class Carried:
    """What rows leave for their next tokens. tail [rows, kernel - 1, channels]: what the convolution sees of their last
    tokens. state [rows, ...] fp32: of the recurrence."""

    tail: Tensor
    state: Tensor


class RecurrentMixer(MegatronModule, ABC):
    """A mixer in the place of attention. A tensor-parallel rank has some of its groups of heads (key heads), whose rows
    of in_proj lie one after the other.

    extra: rows of in_proj a value head beyond the channels of the convolution and the gates. conv_bias: whether the
    convolution has a bias. cache: keeps what rows carry while the model answers.
    """

    extra: int
    conv_bias: bool
    cache: Any = None

    def __init__(
        self, config: Any, submodules: Any, layer_number: int, sizes: ModelSizes, pg_collection: Any, **_: Any
    ):
        super().__init__(config)
        tp, self.cp = pg_collection.tp, getattr(pg_collection, "cp", None)
        self.layer_number = layer_number
        self.groups = sizes.linear_key_heads // tp.size()
        self.heads = sizes.linear_value_heads // sizes.linear_key_heads
        self.key_dim, self.value_dim = sizes.linear_key_dim, sizes.linear_value_dim
        self.kernel = sizes.linear_kernel
        inner = sizes.linear_value_heads * sizes.linear_value_dim
        channels = 2 * sizes.linear_key_heads * sizes.linear_key_dim + inner
        common = {"config": config, "bias": False, "is_expert": False, "tp_group": tp}
        self.in_proj: Any = build_module(
            submodules.linear_qkv,
            sizes.hidden_size,
            channels + inner + self.extra * sizes.linear_value_heads,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            **common,
        )
        self.of: dict[str, Any] = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.channels, self.inner = channels // tp.size(), inner // tp.size()
        self.rows_of_group = (channels + inner) // sizes.linear_key_heads + self.extra * self.heads
        self.conv1d = Weight(self.channels, 1, self.kernel, **self.of, bias=self.conv_bias)
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
        numbers = nn.Parameter(torch.empty(self.groups * self.heads, dtype=torch.float32, device=self.of["device"]))
        _mark(numbers, split=True)
        return numbers

    def forward(self, hidden_states: Tensor, *_: Any, packed_seq_params: Any = None, **__: Any) -> tuple[Tensor, Any]:
        """hidden_states [tokens, rows, hidden], with `packed_seq_params` one row of packed ones -> the same. Under
        context parallelism: this rank's tokens of it."""
        mixed, _bias = self.in_proj(hidden_states)
        tokens, batch = mixed.shape[:2]
        flat = mixed.view(tokens * batch, self.groups, -1)
        if self.cache is not None:
            out = self.cache.advance(self, flat)
        elif packed_seq_params is None:
            out, _carried = self.mix(flat, even_grid(batch, tokens, mixed.device))
        else:
            out = self._mix_packed(flat, packed_seq_params)
        return self.out_proj(out.reshape(tokens, batch, -1))

    def _mix_packed(self, mixed: Tensor, packed: Any) -> Tensor:
        """`mix` of packed rows, [tokens, groups, ...]: each context-parallel rank mixes all tokens for some groups."""
        exchange = HeadExchange(self.cp, packed.cu_seqlens_q)
        of_heads = exchange.to_heads(mixed)
        tokens, number = of_heads.shape[:2]
        grid = packed.grid.of(packed.cu_seqlens_q, tokens)
        out, _carried = self.mix(of_heads, grid, groups=exchange.groups(self.groups))
        return exchange.to_tokens(out.reshape(tokens, number, -1))

    def mix(
        self,
        mixed: Tensor,
        grid: RowGrid,
        before: Carried | None = None,
        *,
        keeps: bool = False,
        groups: slice = ALL,
    ) -> tuple[Tensor, Carried | None]:
        """mixed [tokens, groups, rows of a group] -> ([tokens, ...] for out_proj, what the rows carry on).

        before: what they carry from earlier tokens, None for nothing. keeps: whether what they carry on is wanted.
        groups: which of this rank's are mixed.
        """
        channels = self.channels_of(mixed)[grid.places]
        rows, width = len(channels), channels.shape[-1]
        tail = channels.new_zeros(rows, self.kernel - 1, width) if before is None else before.tail
        channels = torch.cat([tail, channels], 1)
        weight, bias = self._convolution(groups)
        convolved = F.silu(F.conv1d(channels.transpose(1, 2), weight, bias, groups=width)).transpose(1, 2)
        state = None if before is None else before.state
        out, state = self.recur(mixed, convolved, grid, state, keeps, groups)
        if not keeps:
            return out, None
        last = grid.lengths[:, None] + torch.arange(self.kernel - 1, device=channels.device)
        tail = channels.gather(1, last[..., None].expand(-1, -1, width))
        return out, Carried(tail, state)

    def _convolution(self, groups: slice) -> tuple[Tensor, Tensor | None]:
        """Its weight and bias, of the channels of some groups."""
        weight, bias = self.conv1d.weight, self.conv1d.bias
        if groups == ALL:
            return weight, bias
        whose = torch.arange(self.groups, device=weight.device)[None, :, None]
        whose = self.channels_of(whose.expand(1, -1, self.rows_of_group))[0]
        chosen = ((whose >= groups.start) & (whose < groups.stop)).nonzero().squeeze(1)
        return weight[chosen], None if bias is None else bias[chosen]

    def of_groups(self, numbers: Tensor, groups: slice) -> Tensor:
        """Of a number for each head (or feature) of this rank, group by group, those of some groups."""
        return numbers.view(self.groups, -1)[groups].flatten()

    @abstractmethod
    def channels_of(self, mixed: Tensor) -> Tensor:
        """[tokens, groups, rows of a group] -> [tokens, channels], what the convolution mixes."""

    @abstractmethod
    def recur(
        self, mixed: Tensor, convolved: Tensor, grid: RowGrid, state: Tensor | None, keeps: bool, groups: slice
    ) -> tuple[Tensor, Any]:
        """mixed as above, convolved [rows, longest, channels], the state that rows begin with (None: an empty one) ->
        ([tokens, ...] for out_proj, the state that rows end with; any where it is not kept). groups: as for `mix`."""

    @abstractmethod
    def state_shape(self) -> tuple[int, ...]:
        """Of one row's state."""

    def row_bytes(self) -> int:
        """What one row carries."""
        state = torch.Size(self.state_shape()).numel() * torch.float32.itemsize
        return state + (self.kernel - 1) * self.channels * self.of["dtype"].itemsize


def mixer_spec(mixer: type[RecurrentMixer], attention: ModuleSpec, sizes: ModelSizes) -> ModuleSpec:
    """The specification of a mixer, of the linears that an attention's has."""
    return ModuleSpec(module=mixer, params={"sizes": sizes}, submodules=copy.copy(attention.submodules))


def is_attention(spec: Any) -> bool:
    """Whether a layer's specification has attention with keys there: no mixer of this kind, and not nothing."""
    module: Any = spec.module if isinstance(spec, ModuleSpec) else None
    return module is not None and not issubclass(module, RecurrentMixer)
