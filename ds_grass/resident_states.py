"""States that stay on the device while their unit is active: resident mode.

Contract: units are swapped one at a time. One that goes starts for home as soon as it was updated for the last
time, while the others still are (`send_ahead`). One that comes takes over the memory of one of equal size that
goes, without a wait of the host: the copy in waits for the copy home on the device's streams. Memory that
nobody takes over is freed first, after its copy home, and what is missing is allocated last, so that the
device never holds more than the larger of the old and the new set. Different sizes are not exchanged: a small
unit in a large unit's memory would hold more.

Not covered: states that only pass through (`device_slots`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from ds_grass.copy_engine import CopyEngine
from ds_grass.unit_state import UnitState


class ResidentStates:
    """Fills and empties `UnitState.buffer`, which is set exactly while a unit is resident."""

    def __init__(self, engine: CopyEngine, pin_memory: bool) -> None:
        self._engine = engine
        self._pin_memory = pin_memory
        self._gone_ahead: set[UnitState] = set()

    def send_ahead(self, unit: UnitState) -> None:
        """Send a unit home that the next `swap` will let go: it was updated for the last time."""
        self.send_home(unit)
        self._gone_ahead.add(unit)

    def keep_all(self) -> None:
        """States are about to change again: what went ahead will go once more, behind the copy that is out of date."""
        self._gone_ahead.clear()

    def swap(self, leaving: Iterable[UnitState], entering: Sequence[UnitState]) -> None:
        """Send `leaving` home and bring `entering` in."""
        takers: dict[int, list[UnitState]] = defaultdict(list)
        for unit in entering:
            takers[unit.layout.nbytes].append(unit)
        exchanges: list[tuple[UnitState, UnitState]] = []
        for old in leaving:
            same_size = takers[old.layout.nbytes]
            if same_size:
                exchanges.append((old, same_size.pop(0)))
            else:
                self._send_home_once(old)
                self.free(old)
        for old, new in exchanges:
            self._send_home_once(old)
            new.buffer, old.buffer = old.buffer, None
            self._bring_in(new)
        for new in entering:
            if new.buffer is None:
                new.buffer = self._engine.allocate(new.layout.nbytes)
                self._bring_in(new)
        self._gone_ahead.clear()

    def send_home(self, unit: UnitState) -> None:
        """Bring the unit's arena up to date; the unit stays, not to be updated before the copy is done."""
        if unit.buffer is not None:
            unit.stash(self._engine, unit.buffer, 0, unit.numel)

    def refresh(self, unit: UnitState) -> None:
        """The arena was written: bring the unit in anew if it is resident."""
        if unit.buffer is not None:
            self._engine.release(unit.buffer)  # the fetch waits for the updates enqueued so far
            unit.fetch(self._engine, unit.buffer, 0, unit.numel)

    def free(self, unit: UnitState) -> None:
        """Give the unit's device memory back; the host waits for what uses it."""
        if unit.buffer is not None:
            self._engine.free(unit.buffer)
            unit.buffer = None

    def _send_home_once(self, unit: UnitState) -> None:
        if unit not in self._gone_ahead:
            self.send_home(unit)

    def _bring_in(self, unit: UnitState) -> None:
        """Fill the unit's device memory from its home, or for the first time."""
        if unit.arena is None:
            unit.allocate_home(self._engine, self._pin_memory)
            unit.fill_first_state(self._engine)
        else:
            unit.fetch(self._engine, unit.buffer, 0, unit.numel)
