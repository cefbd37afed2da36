"""How long the package's own calls took, for a benchmark to report their share of a step."""

from __future__ import annotations

import time


class OwnTime:
    """Adds up the seconds between entering and leaving; entering again inside counts once.

    Put around the package's own bookkeeping, it lets a benchmark report its share of a step. It measures the
    host's time, work that was queued on a device is not waited for, and serves one thread at a time.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0
        self._depth = 0
        self._entered = 0.0

    def __enter__(self) -> OwnTime:
        if self._depth == 0:
            self._entered = time.perf_counter()
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._entered
            self.calls += 1

    def reset(self) -> None:
        """Start counting from zero; not while entered."""
        assert self._depth == 0, "reset inside the measured time"
        self.seconds, self.calls = 0.0, 0
