"""What was measured at one size, at another: in proportion to what the closed forms say of both.

A layer keeps so many bytes a token, and where attention writes its scores out, so many a pair of tokens
(:mod:`megatron_ext.sequence_parallel.memory_forms`). What is recomputed in full keeps its input. Of a layer that the
closed forms do not know (one with latent attention), the two parts are not told apart: it gets the larger growth of
both, which is never too little, whether the size grows or shrinks. Contract: pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..sequence_parallel.layer_shape import LayerShape
from ..sequence_parallel.memory_forms import kept_bytes
from .plan import FULL, parse_choice
from .probe import Measured


@dataclass(frozen=True)
class Size:
    """One micro-batch: `length` tokens a sequence before it is cut."""

    batch: int
    length: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def pairs(self) -> int:
        return self.batch * self.length**2

    def covers(self, other: Size) -> bool:
        """Whether nothing that a micro-batch of size `other` keeps is more."""
        return other.tokens <= self.tokens and other.pairs <= self.pairs

    def joined(self, other: Size) -> Size:
        """A size that covers both: many short sequences have more tokens, few long ones more pairs."""
        if self.covers(other) or other.covers(self):
            return self if self.covers(other) else other
        tokens, pairs = max(self.tokens, other.tokens), max(self.pairs, other.pairs)
        return Size.covering(tokens, pairs, max(self.batch, other.batch))

    @classmethod
    def covering(cls, tokens: int, pairs: int, most_batch: int) -> Size:
        """The least of so many tokens and pairs or more, in no more than `most_batch` sequences."""
        candidates = [
            cls(batch, max(-(-tokens // batch), math.isqrt(-(-pairs // batch) - 1) + 1))
            for batch in range(1, most_batch + 1)
        ]
        return min(candidates, key=lambda size: (size.tokens, size.pairs))


def scaled(
    measured: Measured,
    shape: LayerShape | None,
    strategy: str,
    before: Size,
    after: Size,
    *,
    writes_scores: bool = True,
) -> Measured:
    """The measurement of size `before`, for `after`. `writes_scores`: of a layer without a shape."""
    if before == after:
        return measured
    tokens = after.tokens / before.tokens
    if shape is not None:
        whole = _form(shape, strategy, after) / _form(shape, strategy, before)
    else:
        whole = max(tokens, after.pairs / before.pairs) if writes_scores else tokens
    if measured.choice == FULL:
        kept, transient = tokens, whole
    elif "core_attn" in parse_choice(measured.choice):
        kept, transient = tokens, whole
    else:
        kept, transient = whole, whole
    return replace(
        measured,
        kept_bytes=round(measured.kept_bytes * kept),
        transient_bytes=round(measured.transient_bytes * transient),
        forward_seconds=measured.forward_seconds * whole,
        backward_seconds=measured.backward_seconds * whole,
    )


def _form(shape: LayerShape, strategy: str, size: Size) -> int:
    return kept_bytes(shape, strategy, -(-size.tokens // shape.group_size), size.pairs)
