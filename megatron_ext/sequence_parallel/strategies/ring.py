"""Ring attention with gathered weights: queries stay, keys and values travel from rank to rank.

Stands for two of the paper's strategies. MegatronCZ is this, ColossalZ differs by two rings, one of keys and one of
values, and by materialised scores, which only costs memory; with an online softmax both are one ring. (Ring attention,
arXiv 2310.01889; zigzag order as in the ring of Megatron-core and Transformer Engine.)
"""

from __future__ import annotations

from torch import Tensor

from ..attention import Pattern
from ..key_values import Ring
from .gathered import feed_forward
from .layer import AttentionLayer, AttentionWeights, Strategy
from .local_queries import local_attention


def attention(x: Tensor, weights: AttentionWeights, layer: AttentionLayer, pattern: Pattern) -> Tensor:
    return local_attention(x, weights, layer, pattern, Ring)


RING = Strategy(attention, feed_forward)
