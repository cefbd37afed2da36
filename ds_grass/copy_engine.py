"""What moves optimizer state between host and device, and the count of it. The seam for a native engine.

Contract: three effects, each in one method. `fetch` brings bytes from the host into a device buffer, `stash`
copies them home, `wait` makes the host wait for one of them. `CopyEngine` does them with plain synchronous
copies, which is right for every device and real work on a CPU that plays the device; `CudaCopyEngine`
enqueues them on two side streams, one a direction, and orders them by events. Another engine overrides the
few methods below the line, or these three. The stream that is current when `acquire`, `stash` or `release` is
called is the one that uses the buffer.

Not covered: what is moved and when (`state_store`, `device_slots`), and host memory (`host_memory`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from ds_grass import ops

Ticket = torch.cuda.Event | None
"""Passed once the work it stands for is done; None has passed already."""

Pairs = Sequence[tuple[Tensor, Tensor]]
"""(destination, source) of each copy: uint8 (rows, width) for transfers; see `ops.transfer_`."""

Work = Callable[[], None]
"""Enqueues copies on the current stream."""

_CHUNK_NUMEL = 1 << 23  # elements; bounds the staging copy of `copy_to_host` to 32 MiB


class Counters(TypedDict):
    """Bytes moved and held, seconds and calls since the store was made. May be read at any time."""

    bytes_to_device: int
    bytes_to_host: int
    device_bytes: int
    """Held on the device now: resident states or slots."""
    device_bytes_peak: int
    host_bytes: int
    """Length of all host arenas now, touched or not."""
    wait_seconds: float
    """Time in which the host waited for transfers."""
    fetches: int
    stashes: int


@dataclass(eq=False)
class DeviceBuffer:
    """Device memory, uint8 (nbytes,), with the tickets that say when it may be read and when overwritten."""

    memory: Tensor
    ready: Ticket = None
    """What was last fetched or filled has arrived."""
    idle: Ticket = None
    """Nobody reads or writes the memory any more, apart from the copy behind `ready`."""


class CopyEngine:
    """The effects, as synchronous copies. `counters` adds up the sizes of the tensors copied and held."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.counters = Counters(
            bytes_to_device=0,
            bytes_to_host=0,
            device_bytes=0,
            device_bytes_peak=0,
            host_bytes=0,
            wait_seconds=0.0,
            fetches=0,
            stashes=0,
        )

    @property
    def pin_device(self) -> torch.device | None:
        """The device for which host memory should be pinned; None when pinning gains nothing."""
        return None

    def allocate(self, nbytes: int) -> DeviceBuffer:
        """Device memory of `nbytes`, contents undefined."""
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        held = self.counters["device_bytes"] + nbytes
        self.counters["device_bytes"] = held
        self.counters["device_bytes_peak"] = max(self.counters["device_bytes_peak"], held)
        # The allocator may hand out memory that kernels still use, ordered before us on the current stream
        # only: the mark keeps the copy streams behind them.
        return DeviceBuffer(memory, idle=self._mark())

    def free(self, buffer: DeviceBuffer) -> None:
        """Give the memory back, after the host has waited for all that uses it on any of the streams."""
        for ticket in (buffer.ready, buffer.idle, self._mark()):
            self.wait(ticket)
        self.counters["device_bytes"] -= buffer.memory.nbytes
        buffer.memory = torch.empty(0, dtype=torch.uint8)

    def fetch(self, buffer: DeviceBuffer, pairs: Pairs, after: Ticket) -> Ticket:
        """Copy from the host into `buffer` once it is idle and `after` has passed. Does not block."""
        buffer.ready = self._copy_in(lambda: _transfer(pairs), (buffer.idle, after))
        self.counters["fetches"] += 1
        self.counters["bytes_to_device"] += sum(source.nbytes for _, source in pairs)
        return buffer.ready

    def fill(self, buffer: DeviceBuffer, zeros: Sequence[Tensor], copies: Pairs) -> None:
        """Set `zeros` and make `copies`, (part, source) of equal shapes, once `buffer`, which holds both, is idle.

        The sources are device tensors, any dtype, made on the current stream.
        """
        buffer.ready = self._copy_in(lambda: _fill(zeros, copies), (buffer.idle, self._mark()))

    def acquire(self, buffer: DeviceBuffer) -> None:
        """What follows on the current stream sees the buffer's contents."""
        self._order(buffer.ready)

    def release(self, buffer: DeviceBuffer) -> None:
        """The current stream is done with the buffer: what was enqueued so far is all that uses it."""
        buffer.idle = self._mark()

    def stash(self, buffer: DeviceBuffer, pairs: Pairs) -> Ticket:
        """Copy to the host what the current stream has made of `buffer` so far. Does not block."""
        buffer.idle = self._copy_out(lambda: _transfer(pairs), (buffer.ready, self._mark()))
        self.counters["stashes"] += 1
        self.counters["bytes_to_host"] += sum(source.nbytes for _, source in pairs)
        return buffer.idle

    def wait(self, ticket: Ticket) -> None:
        """The host waits until `ticket` has passed."""
        if ticket is not None:
            with self._timed():
                ticket.synchronize()

    def synchronize(self) -> None:
        """The host waits for every copy home enqueued so far."""
        with self._timed():
            self._drain()

    def download(self, host: Tensor, source: Tensor) -> None:
        """Copy a device tensor, any dtype, into `host`; the host waits. Done once in a unit's life."""
        with self._timed():
            copy_to_host(host, source)
        self.counters["bytes_to_host"] += source.nbytes

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.counters["wait_seconds"] += time.perf_counter() - start

    # -- what an engine for another kind of device overrides -------------------------------------------------

    def _drain(self) -> None:
        """The host waits for all copies out."""

    def _mark(self) -> Ticket:
        """Passed once what is enqueued on the current stream by now is done."""
        return None

    def _order(self, ticket: Ticket) -> None:
        """What follows on the current stream runs after `ticket`. Does not block the host."""

    def _copy_in(self, work: Work, after: Iterable[Ticket]) -> Ticket:
        """Do the work that writes device memory, behind the tickets."""
        work()
        return None

    def _copy_out(self, work: Work, after: Iterable[Ticket]) -> Ticket:
        """Do the work that writes host memory, behind the tickets."""
        work()
        return None


class CudaCopyEngine(CopyEngine):
    """One stream into the device, one out of it. Each runs in order: a later event covers earlier copies.

    Copies are asynchronous from and to pinned memory; with pageable memory CUDA makes the call wait, which is
    slower and stays right.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        super().__init__(torch.device("cuda", index))
        self._in = torch.cuda.Stream(self.device)
        self._out = torch.cuda.Stream(self.device)

    @property
    def pin_device(self) -> torch.device | None:
        return self.device

    def fill(self, buffer: DeviceBuffer, zeros: Sequence[Tensor], copies: Pairs) -> None:
        super().fill(buffer, zeros, copies)
        for _, source in copies:
            # The caller may drop the source at once: its memory must not be reused before the inward stream
            # has read it.
            source.record_stream(self._in)

    def _drain(self) -> None:
        self._out.synchronize()  # every copy home enqueued so far is in host memory

    def _mark(self) -> Ticket:
        return torch.cuda.current_stream(self.device).record_event()

    def _order(self, ticket: Ticket) -> None:
        if ticket is not None:
            torch.cuda.current_stream(self.device).wait_event(ticket)

    def _copy_in(self, work: Work, after: Iterable[Ticket]) -> Ticket:
        return _enqueue(self._in, work, after)

    def _copy_out(self, work: Work, after: Iterable[Ticket]) -> Ticket:
        return _enqueue(self._out, work, after)


def make_engine(device: torch.device) -> CopyEngine:
    """The engine for `device`."""
    return CudaCopyEngine(device) if device.type == "cuda" else CopyEngine(device)


def copy_to_host(host: Tensor, source: Tensor) -> None:
    """Copy 1-D `source`, any device and dtype, into the host tensor `host`, casting on the host.

    In chunks: a copy that casts between devices would first make the cast tensor whole on the device.
    """
    for start in range(0, source.numel(), _CHUNK_NUMEL):
        chunk = slice(start, start + _CHUNK_NUMEL)
        host[chunk].copy_(source[chunk].to("cpu"))


def _enqueue(stream: torch.cuda.Stream, work: Work, after: Iterable[Ticket]) -> Ticket:
    """The work on `stream` behind the tickets `after`; the event says that all of it is done."""
    for ticket in after:
        if ticket is not None:
            stream.wait_event(ticket)  # the copies below start only when the ticket has passed
    with torch.cuda.stream(stream):
        work()
    return stream.record_event()


def _transfer(pairs: Pairs) -> None:
    for destination, source in pairs:
        ops.transfer_(destination, source)


def _fill(zeros: Sequence[Tensor], copies: Pairs) -> None:
    for part in zeros:
        part.zero_()
    for part, source in copies:
        part.copy_(source)
