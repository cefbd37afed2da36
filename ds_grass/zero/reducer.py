"""Gradients on their way from autograd to this rank's shards.

As backward hands over a parameter's gradient it is copied into its unit's flat buffer and freed, so no more than the
units in flight ever hold full gradients. A unit is reduced (one reduce-scatter) when its gradients and all units
before it in the fixed order are there; what is left when backward ends is flushed, zero-filled where no gradient
came. So every rank issues the same collectives in the same order, whatever its data leaves unused.

`measured_at_once` (probing): nobody adds to a shard, so a late gradient is noted and let go, and a unit without one is
passed over as soon as two behind it are complete; else what follows it would pile up, the whole model's gradients.

With `partitioned` (stages 2 and 3) every micro-batch is reduced and its shard added up. Without (stages 0 and 1) full
buffers add up locally and are reduced at the accumulation boundary.

Not covered: the norm, clipping and the update; see `core.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from ds_grass.units import Unit
from ds_grass.zero.shards import ShardLayout, empty_buffer


@dataclass(frozen=True)
class Averaging:
    """How gradients are scaled and sent: DeepSpeed's keys of the same names."""

    group: object
    world_size: int
    rank: int
    before: float
    """Divisor applied before the reduction."""
    after: float
    """Factor applied after it."""
    wire_dtype: torch.dtype
    """dtype on the wire (communication_data_type)."""
    sum_dtype: torch.dtype
    """dtype in which micro-batches add up (gradient accumulation dtype)."""

    @classmethod
    def resolve(cls, *, group: object, postscale: bool, predivide_factor: float, average: bool,
                wire_dtype: torch.dtype, sum_dtype: torch.dtype) -> Averaging:  # fmt: skip
        """From DeepSpeed's keys; sequence-parallel ranks see parts of one sample, so they add up, not average."""
        from deepspeed import comm as dist
        from deepspeed.utils import groups

        world_size = dist.get_world_size(group)
        mean_of = world_size / groups._get_sequence_parallel_world_size()
        before, after = mean_of, 1.0  # dividing first keeps fp16 sums in range
        if not average:
            before = 1.0
        elif postscale and predivide_factor != 1.0:
            before, after = predivide_factor, predivide_factor / mean_of
        return cls(group, world_size, dist.get_rank(group), before, after, wire_dtype, sum_dtype)


@dataclass
class Filling:
    """A unit's buffer while its gradients arrive."""

    buffer: Tensor
    written: set[int] = field(default_factory=set)
    """Parameters that hold a gradient of this accumulation window."""
    arrived: set[int] = field(default_factory=set)
    """Parameters that came in the backward now running."""


class GradientReducer:
    """Collects, reduces and keeps the gradient shards of the active units."""

    def __init__(
        self,
        layouts: Mapping[int, ShardLayout],
        averaging: Averaging,
        *,
        partitioned: bool,
        at_boundary: Callable[[], bool],
        device: torch.device,
        stream: object | None = None,
        on_reduced: Callable[[int], None] = lambda key: None,
    ):
        self.layouts = layouts
        self.averaging = averaging
        self.partitioned = partitioned
        self.at_boundary = at_boundary
        self.device = device
        self.stream = stream
        self.on_reduced = on_reduced
        self.shards: dict[int, Tensor] = {}
        """Unit key -> this rank's accumulated gradient shard, 1-D in `sum_dtype`."""
        self.counters = {"reduced_units": 0, "zero_filled_units": 0, "late_gradients": 0}
        self._order: list[int] = []
        self._place: dict[int, tuple[int, int]] = {}
        self._sizes: dict[int, int] = {}
        self._filling: dict[int, Filling] = {}
        self._late: dict[int, Filling | None] = {}
        self._launched: set[int] = set()
        self._next = 0
        self._measured_at_once = False

    def activate(self, units: Sequence[Unit], *, measured_at_once: bool = False) -> None:
        """Take these units' gradients from now on, reduced in this order. Call between optimizer steps."""
        self.clear()
        self._measured_at_once = measured_at_once
        self._order = [unit.key for unit in units]
        self._place = {id(param): (unit.key, i) for unit in units for i, param in enumerate(unit.params)}
        self._sizes = {unit.key: len(unit.params) for unit in units}

    @property
    def order(self) -> tuple[int, ...]:
        """Keys of the active units in the fixed order."""
        return tuple(self._order)

    @property
    def holds_gradients(self) -> bool:
        """Whether any gradient came since the last step."""
        return bool(self.shards or self._filling)

    @property
    def late_units(self) -> tuple[int, ...]:
        """Active units of which a gradient came on this rank after they had been reduced."""
        return tuple(key for key in self._order if key in self._late)

    @torch.no_grad()
    def start_round(self) -> None:
        """A backward pass begins: readiness is counted anew, sums stay."""
        for key, filling in self._filling.items():
            if key not in self._launched:
                filling.arrived.clear()

    @torch.no_grad()
    def arrived(self, param: Parameter) -> None:
        """Take over `param.grad` and free it; reduce the units that are ready."""
        grad, place = param.grad, self._place.get(id(param))
        param.grad = None
        if place is None or grad is None:
            return
        key, index = place
        if key in self._launched:
            # A reentrant segment ran again after its unit was sent. Whether that happened differs between ranks, so
            # it waits for the boundary, where the ranks tell each other.
            self.counters["late_gradients"] += 1
            if self._measured_at_once:
                self._late[key] = None
            else:
                self._store(self._late, key, index, grad)
            return
        filling = self._store(self._filling, key, index, grad)
        filling.arrived.add(index)
        if len(filling.arrived) == self._sizes[key]:
            self._launch_ready()

    @torch.no_grad()
    def flush(self) -> None:
        """Backward has ended: reduce what is left, in order, zero-filled where no gradient came."""
        for key in self._order[self._next :]:
            self._launch(key)
        self._next = 0
        self._launched.clear()
        if self.stream is not None:
            # Guarantees that whoever reads a shard on the current stream sees the finished sum.
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    @torch.no_grad()
    def reduce_late(self, keys: Sequence[int]) -> None:
        """Add late gradients of these units to their shards; every rank calls it with the same keys."""
        for key in keys:
            filling = self._late.pop(key, None)
            self._accumulate(key, self._reduce(key, self._filled(key, filling)))

    def clear(self) -> None:
        """Drop every gradient."""
        self.shards.clear()
        self._filling.clear()
        self._late.clear()
        self._launched.clear()
        self._next = 0

    def _store(self, fillings: dict[int, Filling | None], key: int, index: int, grad: Tensor) -> Filling:
        filling = fillings.get(key)
        if filling is None:
            dtype = self.averaging.wire_dtype if self.partitioned else self.averaging.sum_dtype
            filling = fillings[key] = Filling(empty_buffer(self.layouts[key], dtype, self.device))
        self.layouts[key].store(filling.buffer, index, grad, accumulate=index in filling.written)
        filling.written.add(index)
        return filling

    def _launch_ready(self) -> None:
        if not (self.partitioned or self.at_boundary()):
            return
        while self._next < len(self._order):
            key = self._order[self._next]
            if not self._is_complete(key) and not self._is_passed_over():
                return
            self._launch(key)
            self._next += 1

    def _is_complete(self, key: int) -> bool:
        filling = self._filling.get(key)
        return filling is not None and len(filling.arrived) == self._sizes[key]

    def _is_passed_over(self) -> bool:
        """Whether backward is through with the next unit, by all signs; `late_units` tells if it was not."""
        behind = self._order[self._next + 1 :]
        return self._measured_at_once and sum(map(self._is_complete, behind)) >= 2

    def _launch(self, key: int) -> None:
        buffer = self._filled(key, self._filling.pop(key, None))
        with self._on_stream(buffer):
            self._accumulate(key, self._reduce(key, buffer))
            self._launched.add(key)
            self.counters["reduced_units"] += 1
            self.on_reduced(key)

    @contextmanager
    def _on_stream(self, buffer: Tensor) -> Iterator[None]:
        if self.stream is None:
            yield
            return
        # Guarantees that the copies into the buffer, made on the stream that runs backward, are done; and that memory
        # freed there and reused here is no longer read.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield
        buffer.record_stream(self.stream)  # its memory is not reused before the reduction has read it

    def _filled(self, key: int, filling: Filling | None) -> Tensor:
        layout = self.layouts[key]
        if filling is None:
            self.counters["zero_filled_units"] += 1
            filling = Filling(empty_buffer(layout, self.averaging.wire_dtype, self.device))
        for index in range(self._sizes[key]):
            if index not in filling.written:
                layout.clear(filling.buffer, index)
        layout.clear_padding(filling.buffer)
        return filling.buffer

    def _reduce(self, key: int, buffer: Tensor) -> Tensor:
        how, numel = self.averaging, self.layouts[key].shard_numel
        if how.world_size == 1:
            scale = how.after / how.before
            return buffer if scale == 1.0 else buffer.mul_(scale)
        buffer = buffer.to(how.wire_dtype)
        if how.before != 1.0:
            buffer.div_(how.before)
        shard = torch.empty(numel, dtype=buffer.dtype, device=buffer.device)
        self._reduce_scatter(shard, buffer)
        return shard if how.after == 1.0 else shard.mul_(how.after)

    def _reduce_scatter(self, shard: Tensor, buffer: Tensor) -> None:
        """Sum `buffer` over the ranks, each its slice. `ds_grass plan` replays everything else without DeepSpeed."""
        from deepspeed import comm as dist

        dist.reduce_scatter_tensor(shard, buffer, group=self.averaging.group)

    def _accumulate(self, key: int, shard: Tensor) -> None:
        total = self.shards.get(key)
        if total is None:
            self.shards[key] = shard.to(self.averaging.sum_dtype)
        else:
            total.add_(shard)
