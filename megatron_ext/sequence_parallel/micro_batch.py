"""The plan of the micro-batch that is running, and how it reaches layers, also when they are run again in backward.

A plan belongs to a micro-batch, not to a moment: with pipeline parallelism and activation recomputation a layer is run
again in backward, when newer micro-batches have been planned, and must then do what it did first. So the plan is set
while a transformer block runs forward, and Megatron's ``tensor_parallel.checkpoint`` takes it along with the function
that it will run again.

The current micro-batch is one variable of the module, not of a thread: PyTorch runs backward, and so recomputation, in
threads of its own while the thread that called it waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .host import rotary
from .layout import Spans


@dataclass
class MicroBatch:
    """One run of one transformer block: the strategy of each of its layers, and facts that they share."""

    block: Any
    """The switch of the block that is running: layers of another block are none of ours."""
    names: tuple[str, ...]
    """Strategy of each layer of the block."""
    batch: int
    length: int
    documents: tuple[int, ...] | None = None
    """Boundaries of packed documents."""
    recomputing: bool = False
    calls: Counter = field(default_factory=Counter)
    """("forward" or "recomputed", strategy) -> how many attention layers ran so."""
    run: Any = None
    """The stopwatch's, where runs are timed."""
    _seen: tuple[Tensor, int, bool] | None = None
    _rows: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def is_causal(self, mask: Tensor) -> bool:
        """Whether an explicit mask [.., s, s] is the causal one; looked at once for all layers."""
        if self._seen is not None:
            seen, version, answer = self._seen
            if seen.data_ptr() == mask.data_ptr() and version == mask._version and seen.shape == mask.shape:
                return answer
        causal = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu_(1)
        answer = bool((mask == causal).all())
        self._seen = mask, mask._version, answer
        return answer

    def rows_of(self, table: Tensor, spans: Spans) -> Tensor:
        """The rows of a table of rotary angles for some tokens; cut out once for all layers, which share them."""
        key = (table.data_ptr(), table.shape, spans)
        if key not in self._rows:
            restarts = rotary.restarts_of(self.documents, table)
            self._check_positions(table, restarts)
            self._rows[key] = (
                table,
                rotary.rows_of(table, spans, restarts),
            )  # the table: its address must stay its own
        return self._rows[key][1]

    def _check_positions(self, table: Tensor, restarts: tuple[int, ...] | None) -> None:
        """On every rank alike, before one of them misses rows that others have."""
        edges = restarts or (0, self.length)
        longest = max(stop - start for start, stop in zip(edges, edges[1:], strict=False))
        if table.shape[0] < longest:
            raise ValueError(
                f"rotary_pos_emb has {table.shape[0]} positions but a sequence of this micro-batch has {longest} "
                "tokens; make the table as long as the longest"
            )


_current: MicroBatch | None = None


def current() -> MicroBatch | None:
    """What is running, None outside of a block."""
    return _current


@contextmanager
def running(micro_batch: MicroBatch | None) -> Iterator[None]:
    """Make it the current one inside."""
    global _current
    before, _current = _current, micro_batch
    try:
        yield
    finally:
        _current = before


class Replayed:
    """A function to be checkpointed, with the micro-batch that it belongs to: its second run is recomputation."""

    def __init__(self, function: Callable[..., Any], micro_batch: MicroBatch):
        self._function, self._micro_batch = function, micro_batch
        self._runs = 0

    def __call__(self, *args: Any) -> Any:
        self._runs += 1
        micro_batch = self._micro_batch
        before = micro_batch.recomputing
        micro_batch.recomputing = before or self._runs > 1
        try:
            with running(micro_batch):
                return self._function(*args)
        finally:
            micro_batch.recomputing = before


def capturing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's ``tensor_parallel.checkpoint``, taking the current micro-batch along."""

    def checkpoint(function: Callable[..., Any], distribute_saved_activations: bool, *args: Any) -> Any:
        if _current is not None:
            function = Replayed(function, _current)
        return original(function, distribute_saved_activations, *args)

    checkpoint.__wrapped__ = original
    return checkpoint
