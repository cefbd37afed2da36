"""What a strategy is given: shards of a layer's weights, and what of the layer is not a weight.

Every strategy is a pair of functions with one signature:

    attention(x, weights, layer, walk_pattern) -> y
    feed_forward(x, weights, layer) -> y

`x` and `y` are [s / p, b, h], this rank's run of tokens after the norm and before bias and residual, exactly where
Megatron's own linears begin and end. They differ in what they communicate and keep, never in the result, and read the
same shards, so that any layer of any micro-batch may use any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention import Pattern
from ..layout import Spans


class AttentionWeights(NamedTuple):
    """Shards as Megatron stores them; rows of `qkv` are (queries.., key, value) of one KV group after another."""

    qkv: Tensor
    """[(n + 2 g) d / p, h]"""
    qkv_bias: Tensor | None
    proj: Tensor
    """[h, n d / p]"""


class FeedForwardWeights(NamedTuple):
    """Shards as Megatron stores them; gated: each rank has its rows of the gate above its rows of the other half."""

    fc1: Tensor
    """[f / p, h], gated [2 f / p, h]"""
    fc1_bias: Tensor | None
    fc2: Tensor
    """[h, f / p]"""


Transform = Callable[[Tensor, Tensor, Spans, tuple[Tensor, ...]], tuple[Tensor, Tensor]]
"""Norms and rotary embedding: (q [s, b, n, d], k [s, b, g, d], the tokens they are, norm weights) -> the same two."""


@dataclass(frozen=True)
class AttentionLayer:
    """The numbers of a layer's attention, and what happens to queries and keys between projection and softmax."""

    group: Any
    """The tensor-parallel process group."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    transform: Transform
    norm_weights: tuple[Tensor, ...] = ()
    """Parameters that `transform` uses. Handed over apart so that METP can differentiate it again in backward."""
    changes_queries: bool = True
    """Whether `transform` makes new tensors: rotary embedding or norms."""

    def split(self, mixed: Tensor, ranks: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Projected features [s, b, (n + 2 g) d / ranks] -> q [s, b, n / ranks, d], k and v [s, b, g / ranks, d]."""
        queries = self.num_heads // self.num_kv_heads
        grouped = mixed.unflatten(-1, (self.num_kv_heads // ranks, queries + 2, self.head_dim))
        q, k, v = grouped.split((queries, 1, 1), dim=3)
        q = q.flatten(2, 3)
        if not self.changes_queries:
            q = q.contiguous()  # where it is a view it would keep keys and values alive beside their copy
        return q, k.squeeze(3), v.squeeze(3)


@dataclass(frozen=True)
class FeedForwardLayer:
    """What happens between the two linears of a feed-forward layer."""

    group: Any
    gated: bool
    activation: Callable[[Tensor], Tensor]
    """Gated: [..., 2 m] -> [..., m], of (gate, other half) along the last dimension; else elementwise."""


class Strategy(NamedTuple):
    """The two functions of one strategy."""

    attention: Callable[[Tensor, AttentionWeights, AttentionLayer, Pattern], Tensor]
    feed_forward: Callable[[Tensor, FeedForwardWeights, FeedForwardLayer], Tensor]


def keys_beside_values(k: Tensor, v: Tensor) -> Tensor:
    """[s, b, g, 2 d]: one tensor to communicate, and one that keeps nothing else alive."""
    return torch.cat((k, v), -1)


def draw_seed(pattern: Pattern, rank: int) -> int:
    """A seed for attention dropout, different on every rank; 0, without drawing, where there is none.

    Drawn from the CPU's generator, which activation recomputation puts back as it puts back the device's.
    """
    if not pattern.dropout:
        return 0
    return int(torch.randint(2**40, ()).item()) * 1024 + rank
