"""By how much steps went over the limit, and what plans get less for it.

A plan whose step held more than the limit promised too little by that much, so the next plan gets that much less.
Contract: the caller takes off only what a step held that ran as planned. One in which a larger micro-batch came, or in
which another plan was made, tells nothing of either plan.
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
        self.taken_off = 0
        """Bytes that plans get less. They stay off when sizes or pipelines grow: what a plan did not foresee grows
        with them."""

    @contextmanager
    def noticed(self, ran_as_planned: Callable[[], bool]) -> Iterator[None]:
        """Around a step whose plan is frozen. Costs nothing, and sees what is higher than all since the plan was
        verified. `ran_as_planned` is asked at the end."""
        before = self._held.peak()
        yield
        peak = self._held.peak()
        is_over = peak > before and ran_as_planned()
        self.last = max(0, peak - self._held.limit()) if is_over else 0

    def take_off(self, over_bytes: int) -> None:
        """The most of all ranks that hold one plan."""
        self.taken_off += over_bytes

    def forget(self) -> None:
        """Layers are measured anew."""
        self.last = self.taken_off = 0
