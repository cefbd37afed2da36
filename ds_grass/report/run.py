"""What a run did, as its log tells it: plain values, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

_LARGEST_COUNT = 2**53  # a step beyond it has no exact place on an axis


@dataclass(frozen=True)
class State:
    """One `draw` or `refresh` line: what trains from `step` on, why, and what it has cost so far."""

    step: int
    """Optimizer steps applied before it."""
    counters: Mapping[str, int]
    """The controller's: draws, refreshes, switches, skipped_steps, ..."""
    active: tuple[int, ...]
    importance: tuple[float, ...]
    """By block, nan where not known; empty where the line has none."""
    probabilities: tuple[float, ...]
    """By block; empty where the line has none."""
    effective_blocks: float
    visits: tuple[int, ...]
    costs: Mapping[str, float]
    """Bytes and seconds of rank 0; what moved and what it took add up over the processes of the run."""
    mode: str
    """Of the states: "resident", "stream", or empty."""


@dataclass(frozen=True)
class Run:
    """All lines of one `run_id`."""

    path: Path
    run_id: str
    facts: Mapping[str, Any]
    """The line that the run, or its last process, began with; empty where the file has none."""
    states: tuple[State, ...]
    """At least one; steps ascend."""
    resumed: tuple[int, ...]
    """Applied steps at which a new process went on; ascend."""
    skipped: tuple[int, ...]
    """Applied steps at which a step was skipped."""
    losses: tuple[tuple[int, float], ...]
    """(applied steps, loss), steps ascend; empty where no line carries a loss."""
    times: tuple[datetime, ...]
    """Of the first and the last line; empty where they cannot be read."""
    broken_lines: int
    """Lines of the file, of whichever run, that could not be used."""

    @property
    def num_blocks(self) -> int:
        """Blocks that take part in the draw."""
        return len(self.states[0].visits)

    @property
    def last(self) -> State:
        """The newest state."""
        return self.states[-1]

    @property
    def edges(self) -> tuple[int, ...]:
        """Steps at which the periods of `states` begin, and the end of the last: planned, not yet logged."""
        begins = [state.step for state in self.states]
        seen = max([begins[-1], *self.skipped, *(step for step, _ in self.losses)])
        return (*begins, max(begins[-1] + self._planned_period(), seen))

    @property
    def is_known(self) -> tuple[bool, ...]:
        """By period: whether what was drawn at its begin is what trained until its end."""
        draws = [state.counters.get("draws", 0) for state in self.states]
        steps_on = [later - earlier for earlier, later in zip(draws, draws[1:], strict=False)]
        return (*(0 <= jump <= 1 for jump in steps_on), True)

    def cost_by_period(self, name: str) -> tuple[float, ...]:
        """What each finished period added to a cost that adds up; nan where the log does not tell."""
        values = [state.costs.get(name, math.nan) for state in self.states]
        gains = [later - earlier for earlier, later in zip(values, values[1:], strict=False)]
        return tuple(
            gain if known and gain >= 0 else math.nan
            for gain, known in zip(gains, self.is_known, strict=False)
        )

    def _planned_period(self) -> int:
        for key in ("sampling_period", "refresh_period"):
            if is_count(self.facts.get(key)) and self.facts[key] > 0:
                return self.facts[key]
        if len(self.states) > 1:
            return self.states[-1].step - self.states[-2].step
        return 1


def is_count(value: Any) -> bool:
    """Whether a value of a log can be a number of steps, blocks or parameters."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST_COUNT
