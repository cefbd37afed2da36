"""The largest micro-batch: the one that plans are for, and what has come since and must wait.

Contract: in a wide group (:mod:`.planning_group`) all ranks call :meth:`first` together, and :meth:`grow` with the same
size; `largest` is then the same on all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from .planning_group import largest_of_all
from .sizes import Size

logger = logging.getLogger("megatron_ext")


class LargestSize:
    """Of the micro-batches of one rank, or of its group."""

    def __init__(self) -> None:
        self.largest: Size | None = None
        """Covers all that plans are for."""
        self.waiting: Size | None = None
        """Of this rank's micro-batches that `largest` does not cover, since the last step began."""
        self._has_told = False

    @property
    def planned(self) -> Size:
        """The size that plans are for, when there is one."""
        assert self.largest is not None
        return self.largest

    def covers(self, size: Size) -> bool:
        """Whether nothing is to be done for a micro-batch of this size."""
        return self.largest is not None and self.largest.covers(size)

    def first(self, size: Size, most: Callable[..., list[int]]) -> bool:
        """The first of each rank of a wide group. Returns whether one of them has the size that covers all."""
        self.largest = largest_of_all(size, most)
        (is_somebodys,) = most(int(size == self.largest))
        return bool(is_somebodys)

    def grow(self, size: Size | None) -> bool:
        """From now on `largest` covers this, too. Returns whether that is new."""
        self.waiting = None
        if size is None or self.covers(size):
            return False
        self.largest = size if self.largest is None else self.largest.joined(size)
        return True

    def wait(self, size: Size, *, is_planned: bool) -> None:
        """Until the next step begins. `is_planned`: it runs under a plan for less, which is told once."""
        self.waiting = size if self.waiting is None else self.waiting.joined(size)
        if is_planned and not self._has_told:
            self._has_told = True
            logger.warning(
                "megatron_ext: a micro-batch of %d x %d tokens runs under a recomputation plan for %d x %d: ranks "
                "whose layers are spread plan between steps only",
                size.batch, size.length, self.planned.batch, self.planned.length,
            )  # fmt: skip

    def forget(self) -> None:
        """As if none had come."""
        self.largest = self.waiting = None
