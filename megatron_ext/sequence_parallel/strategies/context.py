"""Context parallelism with gathered weights: queries stay, keys and values of all tokens are all-gathered.

One collective each way, and no ring to keep full: fewer, larger messages than :mod:`.ring`, more memory while a layer
runs. (The all-gather form of Llama 3's context parallelism, arXiv 2407.21783, section 3.3.2.)
"""

from __future__ import annotations

from torch import Tensor

from ..attention import Pattern
from ..key_values import Gathered
from .gathered import feed_forward
from .layer import AttentionLayer, AttentionWeights, Strategy
from .local_queries import local_attention


def attention(x: Tensor, weights: AttentionWeights, layer: AttentionLayer, pattern: Pattern) -> Tensor:
    return local_attention(x, weights, layer, pattern, Gathered)


CONTEXT = Strategy(attention, feed_forward)
