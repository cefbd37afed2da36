"""Where the optimizer state of each unit lives, and how it comes to the device and goes home.

Contract: a unit is `numel` elements of one rank: master weights (float32; only where asked), `exp_avg`,
`exp_avg_sq` and a step count. The host keeps every unit that was ever drawn; the device holds the units of
the active set (mode "resident") or a few slots (mode "stream"), never more than the active set and one unit.
The modes differ in where bytes are, not in any bit of the numbers. On CUDA all copies are asynchronous and
ordered by events; on another device the same code makes the same copies at once.

State is written through the pieces, through `restore`, and through what `view` returns until the next call
that moves the unit. All calls come from the stream that computes the updates, `prefetch` from any.

Not covered: the update itself (`adam`, `ops`), which units are active (`controller`), how units are sharded
(`zero`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ds_grass.copy_engine import CopyEngine, Counters, copy_to_host, make_engine
from ds_grass.device_slots import SlotPool
from ds_grass.resident_states import ResidentStates
from ds_grass.unit_state import StateLayout, StateParts, UnitState

Mode = Literal["resident", "stream"]


class Piece(NamedTuple):
    """Elements start to stop of unit `key` on the device, each (stop - start,), to be updated in place."""

    key: int
    start: int
    stop: int
    master: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor


class HostState(NamedTuple):
    """A whole unit on the host, each tensor (numel,): its arena's memory, good until the unit moves again."""

    master: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int


class StateStore:
    """States of the units of one engine. `steps`: each unit's Adam step count, kept by whoever updates it."""

    def __init__(
        self,
        *,
        device: torch.device,
        moment_dtype: torch.dtype,
        pin_memory: bool,
        buffers: int,
        slot_numel: int,
        mode: Mode,
        engine: CopyEngine | None = None,
    ) -> None:
        """`buffers` slots of `slot_numel` elements serve stream mode; `engine` replaces what moves bytes."""
        self.moment_dtype = moment_dtype
        self.steps: dict[int, int] = {}
        self._engine = engine or make_engine(device)
        self._pin_memory = pin_memory
        self._slots = SlotPool(self._engine, buffers, slot_numel)
        self._resident = ResidentStates(self._engine, pin_memory)
        self._mode = _checked_mode(mode)
        self._units: dict[int, UnitState] = {}
        self._active: list[int] = []
        self._iterating = False

    @property
    def mode(self) -> Mode:
        return self._mode

    @property
    def active(self) -> tuple[int, ...]:
        return tuple(self._active)

    @property
    def counters(self) -> Counters:
        return self._engine.counters

    def add(self, key: int, numel: int, weights: Callable[[], Tensor], master: bool) -> None:
        """Make a unit known; nothing is allocated. `weights()`: its weights on the device, (numel,)."""
        assert key not in self._units, f"unit {key} was added before"
        unit = UnitState(key, StateLayout(numel, master, self.moment_dtype), weights)
        self._units[key] = unit
        self.steps[key] = 0
        self._slots.fit(unit.layout)

    @property
    def final_host_bytes(self) -> int:
        """Bytes on this rank's host once every unit was drawn."""
        return sum(unit.layout.nbytes for unit in self._units.values())

    def device_bytes_resident(self, keys: Sequence[int]) -> int:
        """Bytes on the device while these units are resident."""
        return sum(self._units[key].layout.nbytes for key in keys)

    def device_bytes_planned(self, keys: Sequence[int]) -> int:
        """Bytes on the device for states while these units are active, in the present mode."""
        return self.device_bytes_resident(keys) if self._mode == "resident" else self._slots.final_bytes

    def has_master(self, key: int) -> bool:
        """Whether the unit keeps master weights apart from its weights."""
        return self._units[key].layout.master

    def ensure(self, key: int) -> None:
        """Make the unit's home now, as if it had been drawn: zero moments and a master from its weights."""
        unit = self._units[key]
        if unit.arena is None:
            unit.allocate_home(self._engine, self._pin_memory)
            unit.write_first_master(self._engine)

    def has_state(self, key: int) -> bool:
        """Whether the unit was ever drawn or restored."""
        return self._units[key].arena is not None

    def activate(self, keys: Sequence[int]) -> None:
        """Let `keys` be the active set. A unit drawn for the first time gets its home and first values."""
        assert not self._iterating, "the active set changes between steps"
        assert len(set(keys)) == len(keys), keys
        leaving = [self._units[key] for key in self._active if key not in keys]
        entering = [self._units[key] for key in keys if key not in self._active]
        self._active = list(keys)
        if self._mode == "resident":
            self._resident.swap(leaving, entering)
            return
        for unit in leaving:
            self._slots.drop(unit)
        for unit in entering:
            self.ensure(unit.key)

    def prefetch(self, keys: Sequence[int]) -> None:
        """Stream: start fetching pieces of active units, in this order, into free slots. Never blocks."""
        units = self._active_units(keys)
        if self._mode == "stream":
            self._slots.prefetch(self._slots.spans(units))

    def pieces(self, keys: Sequence[int], then: Container[int] | None = None) -> Iterator[Piece]:
        """The states of active units in the order of update.

        `then`: the units that will be active after this step, where that is known; the others, if resident, start for
        home each as soon as it is updated.

        Each piece is updated in place on the current stream before the iterator is advanced, which sends it
        home (stream). When it is exhausted, or closed, all copies home are enqueued; see `synchronize`.
        """
        units = self._active_units(keys)
        assert not self._iterating, "one iteration at a time"
        self._iterating = True
        try:
            yield from self._streamed(units) if self._mode == "stream" else self._whole_units(units, then)
        finally:
            self._iterating = False

    def synchronize(self) -> None:
        """The host waits until every copy home is done."""
        self._engine.synchronize()

    def view(self, key: int, name: Literal["master", "exp_avg", "exp_avg_sq"]) -> Tensor | None:
        """The valid tensor of a whole unit, (numel,): on the device while resident there, else on the host.

        None when the unit was never drawn, or has no master.
        """
        unit = self._units[key]
        if unit.arena is None:
            return None
        if unit.buffer is not None:
            self._engine.acquire(unit.buffer)  # the caller's stream reads only what has arrived
            return getattr(unit.device_parts(), name)
        self._slots.drop(unit)  # the caller may write
        unit.settle(self._engine)
        return getattr(unit.host_parts(), name)

    def home(self, key: int) -> HostState | None:
        """The unit on the host, brought up to date; None when it was never drawn. For checkpoints."""
        unit = self._units[key]
        if unit.arena is None:
            return None
        self._resident.send_home(unit)
        unit.settle(self._engine)
        return HostState(*unit.saved_parts(), self.steps[key])

    def reserve(self, keys: Iterable[int]) -> list[int]:
        """Make homes for units that have none, to be restored next; returns their keys. RuntimeError, and none."""
        made: list[int] = []
        try:
            for key in keys:
                if not self.has_state(key):
                    self._units[key].allocate_home(self._engine, self._pin_memory)
                    made.append(key)
        except RuntimeError:
            self.release(made)
            raise
        return made

    def release(self, keys: Iterable[int]) -> None:
        """Give back homes that were reserved and not restored."""
        for key in keys:
            self._units[key].free_home(self._engine)

    def restore(
        self, key: int, master: Tensor | None, exp_avg: Tensor, exp_avg_sq: Tensor, step: int
    ) -> None:
        """Set a unit's state from a checkpoint: tensors (numel,), any device, cast to the store's dtypes.

        A master that is None starts from the weights; a unit without one ignores it. Wrong shape: ValueError.
        """
        assert not self._iterating
        unit, given = self._units[key], StateParts(master, exp_avg, exp_avg_sq)
        for name, tensor in given._asdict().items():
            if tensor is not None and tensor.shape != (unit.numel,):
                raise ValueError(
                    f"checkpoint: {name} of unit {key} has shape {tuple(tensor.shape)}, but this rank's "
                    f"shard has ({unit.numel},); load one of the same model and number of ranks, or a "
                    "universal one"
                )
        if unit.arena is None:
            unit.allocate_home(self._engine, self._pin_memory)
        self._slots.drop(unit)
        unit.settle(self._engine)
        if master is None:
            unit.write_first_master(self._engine)
        for host, tensor in zip(unit.host_parts(), given, strict=True):
            if host is not None and tensor is not None:
                copy_to_host(host, tensor.detach())
        self.steps[key] = step
        self._resident.refresh(unit)

    def forget(self, key: int) -> None:
        """Back to never drawn, and out of the active set."""
        assert not self._iterating
        unit = self._units[key]
        self._active = [other for other in self._active if other != key]
        self._slots.drop(unit)
        self._resident.free(unit)
        unit.free_home(self._engine)
        self.steps[key] = 0

    def set_mode(self, mode: Mode) -> None:
        """Switch between steps. The host waits: slots are freed before units come in, or units go first."""
        assert not self._iterating
        if _checked_mode(mode) == self._mode:
            return
        self._mode = mode
        active = self._active_units(self._active)
        if mode == "resident":
            self._slots.clear()
            self._resident.swap([], active)
        else:
            self._resident.swap(active, [])

    def close(self) -> None:
        """Wait for all transfers and give back all memory. The store can't be used any more; idempotent."""
        self._slots.clear()
        for unit in self._units.values():
            self._resident.free(unit)
            unit.free_home(self._engine)
        self._units.clear()
        self._active.clear()

    def _whole_units(self, units: Iterable[UnitState], then: Container[int] | None) -> Iterator[Piece]:
        self._resident.keep_all()
        for unit in units:
            self._engine.acquire(unit.buffer)  # the update starts only when the unit has arrived
            yield Piece(unit.key, 0, unit.numel, *unit.device_parts())
            if then is not None and unit.key not in then:
                self._resident.send_ahead(unit)

    def _streamed(self, units: Sequence[UnitState]) -> Iterator[Piece]:
        for span, slot in self._slots.stream(self._slots.spans(units)):
            yield Piece(span.unit.key, span.start, span.stop, *span.parts(slot))

    def _active_units(self, keys: Iterable[int]) -> list[UnitState]:
        inactive = [key for key in keys if key not in self._active]
        assert not inactive, f"units {inactive} are not in the active set"
        return [self._units[key] for key in keys]


def _checked_mode(mode: Mode) -> Mode:
    assert mode in ("resident", "stream"), mode
    return mode
