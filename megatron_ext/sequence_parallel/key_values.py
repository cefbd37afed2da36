"""How keys and values reach the queries of a rank, and how their gradients return: the difference between strategies.

Each class is given this rank's keys and values, [s, b, g, 2 * d] with a key beside its value, and yields blocks of them
with the spans of tokens that they hold. In backward it yields a block with a tensor to add the block's gradient to, in
fp32 or wider, and ends with the complete gradient of this rank's own keys and values: other ranks' queries have used
them too.

Contract: the blocks come in an order that all ranks of the group share, so that their collectives meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .collectives import start_all_gather, start_reduce_scatter, start_shift
from .layout import Spans, join
from .tile_kernels import wide


class KeyValues(Protocol):
    def blocks(self, kv: Tensor) -> Iterator[tuple[Spans, Tensor]]:
        """Blocks of keys and values, for forward."""
        ...

    def blocks_for_backward(self, kv: Tensor, done: list[Tensor]) -> Iterator[tuple[Spans, Tensor, Tensor]]:
        """Blocks with the tensor that takes each one's gradient; at the end the gradient of `kv` is put in `done`."""
        ...


@dataclass(frozen=True)
class Own:
    """All tokens are here: nothing moves."""

    spans: Spans

    def blocks(self, kv: Tensor) -> Iterator[tuple[Spans, Tensor]]:
        yield self.spans, kv

    def blocks_for_backward(self, kv: Tensor, done: list[Tensor]) -> Iterator[tuple[Spans, Tensor, Tensor]]:
        grad = _zeros(kv)
        yield self.spans, kv, grad
        done.append(grad)


@dataclass(frozen=True)
class Gathered:
    """All-gathered in one collective, and again in backward: nothing gathered is kept between the two."""

    group: Any
    spans_of: Callable[[int], Spans]

    def blocks(self, kv: Tensor) -> Iterator[tuple[Spans, Tensor]]:
        yield self._spans(kv), start_all_gather(kv, self.group).wait()

    def blocks_for_backward(self, kv: Tensor, done: list[Tensor]) -> Iterator[tuple[Spans, Tensor, Tensor]]:
        full = start_all_gather(kv, self.group).wait()
        grad = _zeros(full)
        yield self._spans(kv), full, grad
        del full
        done.append(start_reduce_scatter(grad, self.group).wait())

    def _spans(self, kv: Tensor) -> Spans:
        """Rank after rank, as an all-gather leaves them."""
        local = kv.shape[0]
        moved = []
        for rank in range(self.group.size()):
            moved += [
                type(span)(span.start, span.stop, span.row + rank * local) for span in self.spans_of(rank)
            ]
        return join(moved)


@dataclass(frozen=True)
class Ring:
    """Passed on from rank to rank, each transfer under the compute of the block before it; gradients travel with a
    block's place in the ring and come home after p passes."""

    group: Any
    spans_of: Callable[[int], Spans]

    def blocks(self, kv: Tensor) -> Iterator[tuple[Spans, Tensor]]:
        size, rank = self.group.size(), self.group.rank()
        for step in range(size):
            following = start_shift(kv, self.group) if step < size - 1 else None
            yield self.spans_of((rank - step) % size), kv
            if following:
                kv = following.wait()

    def blocks_for_backward(self, kv: Tensor, done: list[Tensor]) -> Iterator[tuple[Spans, Tensor, Tensor]]:
        size, rank = self.group.size(), self.group.rank()
        travelling = None
        for step in range(size):
            following = start_shift(kv, self.group) if step < size - 1 else None
            grad = _zeros(kv)
            yield self.spans_of((rank - step) % size), kv, grad
            if travelling:
                grad += travelling.wait()  # what the ranks before have added for this block
            travelling = start_shift(grad, self.group)
            if following:
                kv = following.wait()
        assert travelling is not None
        done.append(travelling.wait())


def _zeros(kv: Tensor) -> Tensor:
    return torch.zeros(kv.shape, dtype=wide(kv.dtype), device=kv.device)
