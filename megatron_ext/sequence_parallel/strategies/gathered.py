"""What the strategies with gathered weights have in common: the feed-forward layer, and the projection of all heads.

A feed-forward layer works token by token, so gathering its weights makes it local: no token moves. (The feed-forward
of the paper's UlyssesZ and MegatronCZ, section "Functional modules".)
"""

from __future__ import annotations

from torch import Tensor

from ..collectives import AllGather
from ..linears import ColumnLinear, RowLinear
from .layer import AttentionLayer, AttentionWeights, FeedForwardLayer, FeedForwardWeights


def feed_forward(x: Tensor, weights: FeedForwardWeights, layer: FeedForwardLayer) -> Tensor:
    """Gathered shards of a gated layer come as gate, half, gate, half, ...: a dimension for the rank keeps them apart,
    and the activation leaves the order that the gathered second weight has."""
    hidden = ColumnLinear.apply(x, weights.fc1, layer.group)
    if weights.fc1_bias is not None:
        hidden = hidden + AllGather.apply(weights.fc1_bias, layer.group)
    if layer.gated:
        hidden = hidden.unflatten(-1, (layer.group.size(), -1))
    active = layer.activation(hidden)
    del hidden
    if layer.gated:
        active = active.flatten(-2)
    return RowLinear.apply(active, weights.fc2, layer.group)


def project_all_heads(
    x: Tensor, weights: AttentionWeights, layer: AttentionLayer
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of this rank's tokens, for every head."""
    mixed = ColumnLinear.apply(x, weights.qkv, layer.group)
    if weights.qkv_bias is not None:
        mixed = mixed + AllGather.apply(weights.qkv_bias, layer.group)
    return layer.split(mixed)
