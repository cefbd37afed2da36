"""Attention in which queries stay on the rank of their token and keys and values come to them.

Shared by context parallelism and ring attention, which differ only in how keys and values come. Under a causal mask
tokens are put in zigzag order at the entrance and back at the exit, so that all ranks see the same number of pairs:
two exchanges of the layer's input size instead of one of queries, keys and values and one of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..attention import Attention, Pattern, Walk
from ..collectives import Exchange
from ..key_values import KeyValues
from ..layout import Spans, can_zigzag, contiguous, zigzag
from ..linears import RowLinear
from .gathered import project_all_heads
from .layer import AttentionLayer, AttentionWeights, draw_seed, keys_beside_values


def order(pattern: Pattern, group: Any, length: int) -> tuple[bool, Callable[[int], Spans]]:
    """Whether tokens are exchanged, and which tokens each rank then holds."""
    size = group.size()
    if size > 1 and pattern.causal and can_zigzag(length, size):
        return True, lambda rank: zigzag(rank, size, length)
    return False, lambda rank: contiguous(rank, size, length)


def local_attention(
    x: Tensor,
    weights: AttentionWeights,
    layer: AttentionLayer,
    pattern: Pattern,
    key_values: Callable[[Any, Callable[[int], Spans]], KeyValues],
) -> Tensor:
    group = layer.group
    exchanged, spans_of = order(pattern, group, x.shape[0] * group.size())
    if exchanged:
        x = Exchange.apply(x, group, True)
    mine = spans_of(group.rank())
    q, k, v = project_all_heads(x, weights, layer)
    del x
    q, k = layer.transform(q, k, mine, layer.norm_weights)
    walk = Walk(pattern, mine, key_values(group, spans_of), draw_seed(pattern, group.rank()))
    out = Attention.apply(q, keys_beside_values(k, v), walk)
    y = RowLinear.apply(out.flatten(2), weights.proj, group)
    return Exchange.apply(y, group, False) if exchanged else y
