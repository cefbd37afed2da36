"""UlyssesZ: weights are gathered; an all-to-all turns all heads of some tokens into some heads of all tokens and back.

DeepSpeed-Ulysses (arXiv 2309.14509) on weights that stay sharded along the same group. With fewer KV heads than ranks a
KV head is sent to every rank whose queries use it; their gradients add up on the way back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import Attention, Pattern, Walk
from ..collectives import AllToAll
from ..key_values import Own
from ..layout import whole
from ..linears import ColumnLinear, RowLinear
from .gathered import feed_forward
from .layer import AttentionLayer, AttentionWeights, Strategy, draw_seed, keys_beside_values


def attention(x: Tensor, weights: AttentionWeights, layer: AttentionLayer, pattern: Pattern) -> Tensor:
    group, size = layer.group, layer.group.size()
    if layer.num_kv_heads % size == 0:
        # A rank's share of the features is what its own shard of the weight would have computed: cut, send, done.
        mixed = ColumnLinear.apply(x, weights.qkv, group)
        mixed = _to_heads(mixed.unflatten(-1, (size, -1)).movedim(-2, 0), group)
        if weights.qkv_bias is not None:
            mixed = mixed + weights.qkv_bias
        q, k, v = layer.split(mixed, size)
    else:
        q, k, v = _with_shared_keys(x, weights, layer)
    spans = whole(q.shape[0])
    q, k = layer.transform(q, k, spans, layer.norm_weights)
    walk = Walk(pattern, spans, Own(spans), draw_seed(pattern, group.rank()))
    out = Attention.apply(q, keys_beside_values(k, v), walk)
    return RowLinear.apply(_to_tokens(out.flatten(2), group), weights.proj, group)


def _with_shared_keys(
    x: Tensor, weights: AttentionWeights, layer: AttentionLayer
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of this rank's heads with the one KV head that they use, for all tokens."""
    from .gathered import project_all_heads

    size = layer.group.size()
    q, k, v = project_all_heads(x, weights, layer)
    users = size // layer.num_kv_heads
    parts = [
        q.unflatten(2, (size, -1)),
        *(t.repeat_interleave(users, dim=2).unsqueeze(3) for t in (k, v)),
    ]
    heads = torch.cat(parts, dim=3)  # [s / p, b, p, n / p + 2, d]
    mine = _to_heads(heads.flatten(3).movedim(2, 0), layer.group)
    return mine.unflatten(-1, (-1, layer.head_dim)).split((layer.num_heads // size, 1, 1), dim=2)


def _to_heads(parts: Tensor, group: object) -> Tensor:
    """[p, s / p, b, c], one part for each rank -> [s, b, c]."""
    return AllToAll.apply(parts, group).flatten(0, 1)


def _to_tokens(x: Tensor, group: object) -> Tensor:
    """[s, b, c] -> [s / p, b, p * c]."""
    parts = AllToAll.apply(x.unflatten(0, (group.size(), -1)), group)
    return parts.permute(1, 2, 0, 3).flatten(2)


ULYSSES = Strategy(attention, feed_forward)
