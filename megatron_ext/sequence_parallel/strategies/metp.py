"""METP: no rank ever holds more than two shards of a weight; the work walks over the shards.

Attention: rank after rank broadcasts its shard of the QKV and output weights; for the heads of that shard all ranks
project their tokens and run ring attention, and add the shard's part of the output. Feed-forward: the shards travel
around the ring, and each adds its part. Backward walks the same way, projects queries, keys and values and the hidden
features once more instead of having kept them, and sends weight gradients to the rank that owns the shard. Kept are the
input, the attention's output and its log-sum-exp: the least of all strategies, for the most messages.

("Memory-efficient tensor parallelism", FITEE 26(5), 2025, doi 10.1631/FITEE.2400602; TSP, arXiv 2604.26294, is close.)
A shard of QKV must hold whole KV groups: the number of KV heads must divide by the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..attention import Pattern, Walk, attention_backward, attention_forward
from ..collectives import Exchange, Pending, start_broadcast, start_reduce, start_shift
from ..key_values import Ring
from ..layout import Spans
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
from .local_queries import order

Shard = tuple[Tensor | None, ...]
"""The weights that travel together; None for a bias that is not there."""


def attention(x: Tensor, weights: AttentionWeights, layer: AttentionLayer, pattern: Pattern) -> Tensor:
    group = layer.group
    exchanged, spans_of = order(pattern, group, x.shape[0] * group.size())
    if exchanged:
        x = Exchange.apply(x, group, True)
    call = _Call(layer, pattern, spans_of, draw_seed(pattern, group.rank()))
    y = _WalkedAttention.apply(x, *weights, call, *layer.norm_weights)
    return Exchange.apply(y, group, False) if exchanged else y


def feed_forward(x: Tensor, weights: FeedForwardWeights, layer: FeedForwardLayer) -> Tensor:
    return _WalkedFeedForward.apply(x, *weights, layer)


class _Call(NamedTuple):
    layer: AttentionLayer
    pattern: Pattern
    spans_of: Callable[[int], Spans]
    seed: int

    def project(
        self, x: Tensor, qkv: Tensor, bias: Tensor | None, norm_weights: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Queries, and keys beside values, of this rank's tokens for the heads of one shard."""
        group = self.layer.group
        mixed = x @ qkv.t()
        if bias is not None:
            mixed = mixed + bias
        q, k, v = self.layer.split(mixed, group.size())
        q, k = self.layer.transform(q, k, self.spans_of(group.rank()), norm_weights)
        return q, keys_beside_values(k, v)

    def walk(self, owner: int) -> Walk:
        group = self.layer.group
        return Walk(
            self.pattern,
            self.spans_of(group.rank()),
            Ring(group, self.spans_of),
            self.seed + owner * 1_000_000_007,
        )


class _WalkedAttention(torch.autograd.Function):
    """x [s / p, b, h] in the order of the ring, and the shards -> [s / p, b, h]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, qkv: Tensor, bias: Tensor | None, proj: Tensor, call: _Call, *norms: Tensor
    ) -> Tensor:
        kept, y = [], x.new_zeros(x.shape)
        for owner, shard in _broadcast_in_turn((qkv, bias, proj), call.layer.group):
            q, kv = call.project(x, shard[0], shard[1], norms)
            out, lse = attention_forward(q, kv, call.walk(owner))
            del q, kv
            _rows(y).addmm_(_rows(out.flatten(2)), shard[2].t())
            kept += [out, lse]
        ctx.save_for_backward(x, qkv, bias, proj, *norms, *kept)
        ctx.call, ctx.weights, ctx.num_norms = call, (qkv, bias, proj), len(norms)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *shards = ctx.saved_tensors[:4]
        norms = ctx.saved_tensors[4 : 4 + ctx.num_norms]
        kept = ctx.saved_tensors[4 + ctx.num_norms :]
        call, group = ctx.call, ctx.call.layer.group
        trained = any(ctx.needs_input_grad[1:4])
        grad_x = x.new_zeros(x.shape)
        grad_norms = [torch.zeros_like(norm) for norm in norms]
        sending = _Returning(group)
        for owner, (qkv, bias, proj) in _broadcast_in_turn(tuple(shards), group):
            out, lse = kept[2 * owner : 2 * owner + 2]
            inputs = [x, qkv] + [bias] * (bias is not None) + list(norms)
            with torch.enable_grad():
                leaves = [tensor.detach().requires_grad_() for tensor in inputs]
                rest = leaves[2:]
                leaf_bias = rest.pop(0) if bias is not None else None
                q, kv = call.project(leaves[0], leaves[1], leaf_bias, tuple(rest))
            grad_out = (grad @ proj).unflatten(-1, out.shape[2:])
            walk = call.walk(owner)
            grad_q, grad_kv = attention_backward(grad_out, q.detach(), kv.detach(), out, lse, walk)
            grads = list(torch.autograd.grad((q, kv), leaves, (grad_q.to(q.dtype), grad_kv.to(kv.dtype))))
            del q, kv, grad_q, grad_kv, grad_out, leaves
            grad_x += grads[0]
            for total, part in zip(grad_norms, grads[len(grads) - len(norms) :], strict=True):
                total += part
            if trained:
                grad_proj = _rows(grad).t() @ _rows(out.flatten(2))
                sending.send(owner, (grads[1], grads[2] if bias is not None else None, grad_proj))
        grads_of_shard = sending.mine(shards) if trained else (None, None, None)
        _hand_over(ctx.weights)
        return grad_x, *grads_of_shard, None, *grad_norms


class _WalkedFeedForward(torch.autograd.Function):
    """x [s / p, b, h] and the shards -> [s / p, b, h]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, fc1: Tensor, bias: Tensor | None, fc2: Tensor, layer: FeedForwardLayer
    ) -> Tensor:
        y = x.new_zeros(x.shape)
        for shard in _passed_round((fc1, bias, fc2), layer.group):
            active = layer.activation(_hidden(x, shard))
            _rows(y).addmm_(_rows(active), shard[2].t())
        ctx.save_for_backward(x, fc1, bias, fc2)
        ctx.layer, ctx.weights = layer, (fc1, bias, fc2)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *shards = ctx.saved_tensors
        group, trained = ctx.layer.group, any(ctx.needs_input_grad[1:4])
        grad_x = x.new_zeros(x.shape)
        travelling: Pending | None = None
        for shard in _passed_round(tuple(shards), group):
            hidden = _hidden(x, shard).requires_grad_()
            with torch.enable_grad():
                active = ctx.layer.activation(hidden)
            (grad_hidden,) = torch.autograd.grad(active, hidden, grad @ shard[2])
            _rows(grad_x).addmm_(_rows(grad_hidden), shard[0])
            if trained:
                grad_bias = None if shard[1] is None else _rows(grad_hidden).sum(0)
                grad_fc1 = _rows(grad_hidden).t() @ _rows(x)
                packed = _pack((grad_fc1, grad_bias, _rows(grad).t() @ _rows(active.detach())))
                if travelling:
                    packed += travelling.wait()  # what the ranks before have added for this shard
                travelling = start_shift(packed, group)
        grads_of_shard = _unpack(travelling.wait(), shards) if travelling else (None, None, None)
        _hand_over(ctx.weights)
        return grad_x, *grads_of_shard, None


def _hidden(x: Tensor, shard: Shard) -> Tensor:
    hidden = x @ shard[0].t()
    return hidden if shard[1] is None else hidden.add_(shard[1])


def _broadcast_in_turn(shard: Shard, group: Any) -> Iterator[tuple[int, Shard]]:
    """The shards of rank 0, 1, ..., on all ranks; the next one arrives while one is used."""

    def start(owner: int) -> Pending:
        mine = owner == group.rank()
        size = sum(tensor.numel() for tensor in shard if tensor is not None)
        return start_broadcast(_pack(shard) if mine else shard[0].new_empty(size), owner, group)

    arriving = start(0)
    for owner in range(group.size()):
        current = arriving.wait()
        if owner + 1 < group.size():
            arriving = start(owner + 1)
        yield owner, _unpack(current, shard)


def _passed_round(shard: Shard, group: Any) -> Iterator[Shard]:
    """This rank's shards, then those of the rank before, ..., each transfer under the use of the one before it."""
    packed = _pack(shard)
    for step in range(group.size()):
        following = start_shift(packed, group) if step + 1 < group.size() else None
        yield _unpack(packed, shard)
        if following:
            packed = following.wait()


class _Returning:
    """Gradients of shards on their way to their owners, two at a time."""

    def __init__(self, group: Any):
        self._group, self._mine = group, None
        self._flying: Pending | None = None

    def send(self, owner: int, grads: Shard) -> None:
        packed = _pack(grads)
        if self._flying:
            self._flying.wait()  # at most one reduction under way beside the packed gradient of this shard
        self._flying = start_reduce(packed, owner, self._group)
        if owner == self._group.rank():
            self._mine = packed

    def mine(self, like: list[Tensor | None]) -> Shard:
        if self._flying:
            self._flying.wait()
        return _unpack(self._mine, like)


def _rows(tensor: Tensor) -> Tensor:
    """[..., k] -> [tokens, k]; a view of what is contiguous."""
    return tensor.reshape(-1, tensor.shape[-1])


def _pack(shard: Shard) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in shard if tensor is not None])


def _unpack(packed: Tensor, like: Any) -> Shard:
    """Views of `packed` with the shapes of `like`."""
    parts, start = [], 0
    for tensor in like:
        if tensor is None:
            parts.append(None)
            continue
        parts.append(packed[start : start + tensor.numel()].view(tensor.shape))
        start += tensor.numel()
    return tuple(parts)


def _hand_over(weights: Shard) -> None:
    for weight in weights:
        if weight is not None:
            fused_gradients_begin_anew(weight)


METP = Strategy(attention, feed_forward)
