"""By how much steps went over the limit, and what plans count with for it.

A plan that left bytes of its limit free and went over all the same did not foresee both, so all later plans count with
as much more. Contract: the caller tells only of a step that ran as planned. One in which a larger micro-batch came, or
in which another plan was made, tells nothing of either plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .held import Held


class Overshoot:
    """Of one rank's steps."""

    def __init__(self, held: Held):
        self._held = held
        self.last = 0
        """Bytes by which the last step went over the limit, where the device counts and the step's plan was frozen."""
        self.unforeseen_bytes = 0
        """Held beside what plans predict. They count when sizes or pipelines grow, too: what a plan did not foresee
        grows with them."""
        self._left = 0

    def plan_leaves(self, left_bytes: int) -> None:
        """Another plan runs, which leaves so many bytes of its limit free."""
        self.last, self._left = 0, max(0, left_bytes)

    @contextmanager
    def noticed(self, ran_as_planned: Callable[[], bool]) -> Iterator[None]:
        """Around a step whose plan is frozen. Costs nothing, and sees what is higher than all since the plan was
        verified. `ran_as_planned` is asked at the end."""
        before = self._held.peak()
        yield
        peak = self._held.peak()
        is_over = peak > before and ran_as_planned()
        self.last = max(0, peak - self._held.limit()) if is_over else 0

    def count(self, over_bytes: int) -> None:
        """The most of all ranks that hold one plan, by which a step under it went over the limit.

        Without what the plan left free, it would fit the limit once more and be made again.
        """
        if over_bytes:
            self.unforeseen_bytes += self._left + over_bytes

    def forget(self) -> None:
        """Layers are measured anew."""
        self.last = self.unforeseen_bytes = 0
