"""Device slots through which states pass in stream mode.

Contract: at most `count` slots, made when first needed and kept. Pieces come in in the order of update, into
whatever slots are free, while earlier pieces are still being updated or on their way home. A slot is filled
again only after its copy home is done, by an event on the copy stream: no call blocks the host. There is
always a slot for the piece whose turn it is: if all hold pieces that come later, the one that comes last is
dropped and fetched again in its turn.

Not covered: resident states (`state_store`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ds_grass.copy_engine import CopyEngine, DeviceBuffer
from ds_grass.unit_state import StateLayout, StateParts, UnitState


class Span(NamedTuple):
    """Elements start to stop of a unit: what one slot takes at a time."""

    unit: UnitState
    start: int
    stop: int

    def parts(self, slot: DeviceBuffer) -> StateParts:
        """The tensors, each (stop - start,), in the slot that holds this span."""
        return self.unit.layout.sized(self.stop - self.start).parts(slot.memory)


class SlotPool:
    """A slot is free, or holds a span that has been fetched ahead, or is with the consumer of `stream`."""

    def __init__(self, engine: CopyEngine, count: int, slot_numel: int) -> None:
        assert min(count, slot_numel) >= 1, f"{count} slots of {slot_numel} elements"
        self._engine = engine
        self._count = count
        self._slot_numel = slot_numel
        self._slot_bytes = 0
        self._slots: list[DeviceBuffer] = []
        self._free: deque[DeviceBuffer] = deque()
        self._ahead: dict[Span, DeviceBuffer] = {}

    @property
    def final_bytes(self) -> int:
        """Bytes of all slots once they are made."""
        return self._count * self._slot_bytes

    def fit(self, layout: StateLayout) -> None:
        """Make sure that a slot can take any span of a unit with this layout; slots that are too small go."""
        slice_bytes = layout.sized(min(layout.numel, self._slot_numel)).nbytes
        if slice_bytes > self._slot_bytes:
            self.clear()
            self._slot_bytes = slice_bytes

    def spans(self, units: Sequence[UnitState]) -> list[Span]:
        """The units in slices of at most a slot, in order; an empty unit is one empty span."""
        size = self._slot_numel
        return [
            Span(unit, start, min(start + size, unit.numel))
            for unit in units
            for start in range(0, max(unit.numel, 1), size)
        ]

    def prefetch(self, spans: Sequence[Span]) -> None:
        """Start fetching those not fetched yet, in order, until no slot is free."""
        for span in spans:
            if span in self._ahead:
                continue
            slot = self._take()
            if slot is None:
                return
            span.unit.fetch(self._engine, slot, span.start, span.stop)
            self._ahead[span] = slot

    def stream(self, spans: Sequence[Span]) -> Iterator[tuple[Span, DeviceBuffer]]:
        """Each span in its slot, in order; going on sends it home. Later ones come in meanwhile."""
        for index, span in enumerate(spans):
            if span not in self._ahead:
                self._make_room(spans[index:])
            self.prefetch(spans[index : index + self._count])
            slot = self._ahead.pop(span)
            # The consumer's stream starts on the piece only when it has arrived; the host goes on.
            self._engine.acquire(slot)
            try:
                yield span, slot
            finally:
                span.unit.stash(self._engine, slot, span.start, span.stop)
                self._free.append(slot)

    def drop(self, unit: UnitState) -> None:
        """Forget what was fetched ahead of `unit`: it leaves the active set, or its home changes."""
        for span in [span for span in self._ahead if span.unit is unit]:
            self._free.append(self._ahead.pop(span))

    def clear(self) -> None:
        """Free all slots; the host waits for their transfers."""
        assert len(self._free) + len(self._ahead) == len(self._slots), "a slot is still with its consumer"
        for slot in self._slots:
            self._engine.free(slot)
        self._slots.clear()
        self._free.clear()
        self._ahead.clear()

    def _take(self) -> DeviceBuffer | None:
        """A free slot, the one idle for longest first, or a new one; None when all are taken."""
        if self._free:
            return self._free.popleft()
        if len(self._slots) == self._count:
            return None
        self._slots.append(self._engine.allocate(self._slot_bytes))
        return self._slots[-1]

    def _make_room(self, upcoming: Sequence[Span]) -> None:
        """If all slots hold spans fetched ahead, drop the one that comes last in `upcoming`, or never."""
        if self._free or len(self._slots) < self._count:
            return
        turn = {span: position for position, span in enumerate(upcoming)}
        last = max(self._ahead, key=lambda span: turn.get(span, len(turn)))
        self._free.append(self._ahead.pop(last))
