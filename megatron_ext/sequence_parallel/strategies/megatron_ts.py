"""Tensor parallelism with Megatron's sequence parallelism, in the form that the other strategies have.

While training, a layer that uses this strategy runs Megatron-core's own code, untouched. This is the same computation
and the same communication as a pair of functions: for profiling on tensors that are nobody's parameters, for packed
sequences where Megatron's local attention refuses them, and as a yardstick. (arXiv 2205.05198, section 4.2.2.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..attention import Attention, Pattern, Walk
from ..collectives import AllGather, ReduceScatter, start_all_gather, start_reduce_scatter
from ..key_values import Own
from ..layout import whole
from ..linears import fused_gradients_begin_anew
from .layer import (
    AttentionLayer,
    AttentionWeights,
    FeedForwardLayer,
    FeedForwardWeights,
    Strategy,
    draw_seed,
    keys_beside_values,
)


class GatheredInputLinear(torch.autograd.Function):
    """[s / p, b, k] x shard [n / p, k] -> [s, b, n / p]. The gathered input is freed and gathered again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Tensor, group: Any) -> Tensor:
        ctx.save_for_backward(x, shard)
        ctx.group, ctx.weight = group, shard
        return start_all_gather(x, group).wait() @ shard.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, shard = ctx.saved_tensors
        gathering = start_all_gather(x, ctx.group) if ctx.needs_input_grad[1] else None
        reducing = start_reduce_scatter(grad @ shard, ctx.group)
        grad_shard = None
        if gathering:
            fused_gradients_begin_anew(ctx.weight)
            grad_shard = grad.flatten(0, 1).t() @ gathering.wait().flatten(0, 1)
        return reducing.wait(), grad_shard, None


class PartialLinear(torch.autograd.Function):
    """[s, b, k / p] x shard [n, k / p] -> [s, b, n], this rank's part of a sum over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Tensor) -> Tensor:
        ctx.save_for_backward(x, shard)
        ctx.weight = shard
        return x @ shard.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, shard = ctx.saved_tensors
        grad_shard = None
        if ctx.needs_input_grad[1]:
            fused_gradients_begin_anew(ctx.weight)
            grad_shard = grad.flatten(0, 1).t() @ x.flatten(0, 1)
        return grad @ shard, grad_shard


def attention(x: Tensor, weights: AttentionWeights, layer: AttentionLayer, pattern: Pattern) -> Tensor:
    group, size = layer.group, layer.group.size()
    mixed = GatheredInputLinear.apply(x, weights.qkv, group)
    if weights.qkv_bias is not None:
        mixed = mixed + weights.qkv_bias
    q, k, v = layer.split(mixed, size) if layer.num_kv_heads % size == 0 else _shared_keys(mixed, layer)
    spans = whole(q.shape[0])
    q, k = layer.transform(q, k, spans, layer.norm_weights)
    walk = Walk(pattern, spans, Own(spans), draw_seed(pattern, group.rank()))
    out = Attention.apply(q, keys_beside_values(k, v), walk)
    return ReduceScatter.apply(PartialLinear.apply(out.flatten(2), weights.proj), group)


def _shared_keys(mixed: Tensor, layer: AttentionLayer) -> tuple[Tensor, Tensor, Tensor]:
    """With fewer KV heads than ranks a shard ends inside a group: features are gathered, a rank takes its heads."""
    size, rank = layer.group.size(), layer.group.rank()
    q, k, v = layer.split(AllGather.apply(mixed.movedim(-1, 0), layer.group).movedim(0, -1))
    heads, used = layer.num_heads // size, rank * layer.num_kv_heads // size
    return q.narrow(2, rank * heads, heads), k.narrow(2, used, 1), v.narrow(2, used, 1)


def feed_forward(x: Tensor, weights: FeedForwardWeights, layer: FeedForwardLayer) -> Tensor:
    hidden = GatheredInputLinear.apply(x, weights.fc1, layer.group)
    if weights.fc1_bias is not None:
        hidden = hidden + weights.fc1_bias
    return ReduceScatter.apply(PartialLinear.apply(layer.activation(hidden), weights.fc2), layer.group)


MEGATRON_TS = Strategy(attention, feed_forward)
