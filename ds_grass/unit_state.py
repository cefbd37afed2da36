"""The optimizer state of one unit: how its parts lie in one range of bytes, and its home on the host.

Contract: a range holds [master | exp_avg | exp_avg_sq] of `numel` elements, each part 64-byte aligned, the
master (float32) only where the unit has one. Host arena and device buffer have the same layout, so a whole
unit moves in a single copy.

Not covered: when a unit moves (`state_store`), and by what (`copy_engine`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ds_grass.copy_engine import CopyEngine, DeviceBuffer, Pairs, Ticket
from ds_grass.host_memory import ALIGNMENT, HostArena


class StateParts(NamedTuple):
    """Views, each (numel,): master float32 or None, moments in the store's dtype."""

    master: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass(frozen=True)
class StateLayout:
    """Byte offsets of the parts of a state of `numel` elements."""

    numel: int
    master: bool
    moment_dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Length of the range, gaps between the parts included."""
        return self._offsets()[2] + self.numel * self.moment_dtype.itemsize

    def sized(self, numel: int) -> StateLayout:
        """The same parts for another number of elements."""
        return replace(self, numel=numel)

    def parts(self, memory: Tensor) -> StateParts:
        """The parts inside `memory`, uint8 of at least `nbytes`."""
        return self.parts_of(lambda start, nbytes: memory[start : start + nbytes])

    def parts_of(self, take: Callable[[int, int], Tensor]) -> StateParts:
        """The parts, each made of what `take(start, nbytes)` returns: uint8 (nbytes,)."""
        master, exp_avg, exp_avg_sq = self._offsets()
        moment_bytes = self.numel * self.moment_dtype.itemsize
        return StateParts(
            take(master, 4 * self.numel).view(torch.float32) if self.master else None,
            take(exp_avg, moment_bytes).view(self.moment_dtype),
            take(exp_avg_sq, moment_bytes).view(self.moment_dtype),
        )

    def row_groups(self, memory: Tensor, start: int, stop: int) -> list[Tensor]:
        """Elements start to stop of each part inside `memory`: parts of one dtype as rows of bytes (parts, width)."""
        master, exp_avg, exp_avg_sq = self._offsets()
        size = self.moment_dtype.itemsize
        if self.master and size != 4:
            groups = [(master, 1, 4), (exp_avg, 2, size)]
        else:
            groups = [(master, 2 + self.master, size)]  # without a master the moments begin there
        pitch = exp_avg_sq - exp_avg
        return [
            _rows(memory, first + start * itemsize, parts, pitch, (stop - start) * itemsize)
            for first, parts, itemsize in groups
        ]

    def _offsets(self) -> tuple[int, int, int]:
        exp_avg = _aligned(4 * self.numel * self.master)
        return 0, exp_avg, exp_avg + _aligned(self.numel * self.moment_dtype.itemsize)


@dataclass(eq=False)
class UnitState:
    """One unit. It was never drawn while `arena` is None.

    While `buffer` is set the device holds the valid state, otherwise the arena does, once `home` has passed.
    """

    key: int
    layout: StateLayout
    weights: Callable[[], Tensor]
    arena: HostArena | None = None
    buffer: DeviceBuffer | None = None
    fetched: Ticket = None
    """Passed once the last copy out of the arena is done."""
    home: Ticket = None
    """Passed once the last copy into the arena is done."""

    @property
    def numel(self) -> int:
        return self.layout.numel

    def host_parts(self) -> StateParts:
        return self.layout.parts(self.arena.memory)

    def saved_parts(self) -> StateParts:
        """The host's parts, each in a storage of its own length; the same memory."""
        return self.layout.parts_of(self.arena.slice)

    def device_parts(self) -> StateParts:
        return self.layout.parts(self.buffer.memory)

    def allocate_home(self, engine: CopyEngine, pin: bool) -> None:
        """Make the arena: zero moments, and a master still to be written."""
        self.arena = HostArena(self.layout.nbytes, pin_device=engine.pin_device if pin else None)
        engine.counters["host_bytes"] += self.arena.nbytes

    def free_home(self, engine: CopyEngine) -> None:
        """Drop the arena, after the copies from and to it."""
        if self.arena is not None:
            self.settle(engine)
            engine.counters["host_bytes"] -= self.arena.nbytes
            self.arena.free()
            self.arena = None

    def write_first_master(self, engine: CopyEngine) -> None:
        """The host's master becomes the unit's weights as they are now."""
        if self.layout.master:
            engine.download(self.host_parts().master, self._current_weights())

    def fill_first_state(self, engine: CopyEngine) -> None:
        """The device buffer becomes the state of a new unit; nothing passes through the host."""
        parts = self.device_parts()
        copies = [(parts.master, self._current_weights())] if self.layout.master else []
        engine.fill(self.buffer, [parts.exp_avg, parts.exp_avg_sq], copies)

    def fetch(self, engine: CopyEngine, buffer: DeviceBuffer, start: int, stop: int) -> None:
        """Bring elements start to stop into `buffer`, once their last copy home is done."""
        self.fetched = engine.fetch(buffer, self._pairs(buffer, start, stop), after=self.home)

    def stash(self, engine: CopyEngine, buffer: DeviceBuffer, start: int, stop: int) -> None:
        """Send elements start to stop home from `buffer`."""
        pairs = [(host, device) for device, host in self._pairs(buffer, start, stop)]
        self.home = engine.stash(buffer, pairs)

    def settle(self, engine: CopyEngine) -> None:
        """The host waits until no copy reads or writes the arena."""
        engine.wait(self.fetched)
        engine.wait(self.home)

    def _pairs(self, buffer: DeviceBuffer, start: int, stop: int) -> Pairs:
        """(device, host) rows of elements start to stop; the device side lies at the buffer's beginning.

        A whole unit is one row, the few bytes between its parts included. In a slice, parts of one dtype are the rows
        of one copy.
        """
        if stop - start == self.numel:
            return [(_row(buffer.memory[: self.layout.nbytes]), _row(self.arena.memory))]
        device = self.layout.sized(stop - start).row_groups(buffer.memory, 0, stop - start)
        return list(zip(device, self.layout.row_groups(self.arena.memory, start, stop), strict=True))

    def _current_weights(self) -> Tensor:
        weights = self.weights().detach()
        assert weights.shape == (self.numel,), (
            f"unit {self.key} of {self.numel}: weights {tuple(weights.shape)}"
        )
        return weights


def _row(memory: Tensor) -> Tensor:
    return memory.view(1, -1)


def _rows(memory: Tensor, start: int, count: int, pitch: int, width: int) -> Tensor:
    """`count` rows of `width` bytes, `pitch` bytes from one to the next; the first begins at byte `start`."""
    return memory.as_strided((count, width), (pitch, 1), memory.storage_offset() + start)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
