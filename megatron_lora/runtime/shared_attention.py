"""Attention where rows share a prefix, in one flash-attention kernel on a GPU; both backends call it.

Each segment of queries attends to keys of its own choice (`data.batch.SharedKeys`), which are gathered for it: the keys
and values of a prefix stand in the kernel's input once for each row that follows it. Where queries are grouped they are
small beside the hidden states, and what is saved for the backward pass is not gathered.
"""

from typing import Any

import torch
from torch import Tensor

LARGEST_HEAD_DIM = 256


def shared_attention(
    query: Tensor, key: Tensor, value: Tensor, shared: Any, scale: float | None, window: int | None
) -> Tensor:
    """query [T, heads, d], key and value [T, groups, d] in bfloat16 or float16 on a GPU -> [T, heads, d].

    shared: `data.batch.SharedKeys`. window: tokens that a token sees, itself included; None: all.
    """
    return _SharedAttention.apply(query, key, value, shared, scale, window)  # type: ignore[return-value]


class _SharedAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, shared: Any, scale: float | None, window: int | None
    ) -> Tensor:
        import torch.nn.attention.varlen  # registers the operators

        ctx.shared, ctx.scale, ctx.window = shared, scale, [-1 if window is None else window - 1, 0]
        query = query.contiguous()
        keys, values = (_gathered(x, shared.index, query.shape[1]) for x in (key, value))
        out, lse, state = torch.ops.torch_attn._varlen_attn(query, keys, values, *_layout(ctx))
        ctx.save_for_backward(query, key, value, out, lse, state)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, lse, state = ctx.saved_tensors
        keys, values = (_gathered(x, ctx.shared.index, query.shape[1]) for x in (key, value))
        *layout, is_causal, scale, window = _layout(ctx)
        dquery, dkeys, dvalues = torch.ops.torch_attn._varlen_attn_backward(
            grad.contiguous(), query, keys, values, out, lse, *layout, is_causal, state, scale, window
        )
        dkey, dvalue = (_summed(d, ctx.shared.index, key) for d in (dkeys, dvalues))
        return dquery, dkey, dvalue, None, None, None


def _layout(ctx: Any) -> tuple[Any, ...]:
    shared = ctx.shared
    sizes = (shared.cu_queries, shared.cu_keys, shared.max_queries, shared.max_keys)
    return *sizes, ctx.window == [-1, 0], ctx.scale, ctx.window


def _gathered(x: Tensor, index: Tensor, heads: int) -> Tensor:
    """[T, groups, d] -> [K, heads, d]: the keys that each segment sees, one for each query head."""
    return x.index_select(0, index).repeat_interleave(heads // x.shape[1], 1)


def _summed(grad: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """The gradient [K, heads, d] of `_gathered`, summed over all that read a key: like `like` [T, groups, d]."""
    by_group = grad.view(grad.shape[0], like.shape[1], -1, grad.shape[2]).sum(2, dtype=torch.float32)
    total = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    return total.index_add_(0, index, by_group).to(like.dtype)
