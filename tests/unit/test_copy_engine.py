"""Contracts of the copy engines. CUDA's ordering is tried without CUDA: streams lag as far as they may."""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable

import pytest
import torch

from ds_grass import copy_engine
from ds_grass.copy_engine import CopyEngine, CudaCopyEngine, make_engine
from tests.state_scripts import assert_same, first_weights, new_store, play, play_plain, random_script


class Event:
    """Recorded on a stream; passed once that stream has run up to it."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.passed = stream, False

    def synchronize(self) -> None:
        while not self.passed:
            self.stream.run_one()

    def mark(self) -> None:
        self.passed = True


class Stream:
    """Work in order. An eager stream runs it at once, a lagging one only when an event forces it or by chance."""

    def __init__(self, cuda: LaggingCuda, eager: bool = False) -> None:
        self.cuda, self.eager = cuda, eager
        self.work: deque[Callable[[], None]] = deque()
        self.waited: list[Event] = []

    def push(self, work: Callable[[], None]) -> None:
        self.work.append(work)
        if self.eager:
            self.synchronize()
        self.cuda.maybe_progress()

    def run_one(self) -> None:
        self.work.popleft()()

    def wait_event(self, event: Event) -> None:
        self.waited.append(event)
        self.push(event.synchronize)

    def record_event(self) -> Event:
        event = Event(self)
        self.push(event.mark)
        return event

    def synchronize(self) -> None:
        while self.work:
            self.run_one()


class LaggingCuda:
    """The few names of `torch.cuda` that the engine uses, over streams that put off all work.

    A stream runs when somebody waits for it, so a wait that is missing shows as a copy of the wrong bytes. With
    `progress` above 0 it also runs now and then by itself. The stream that computes is eager unless told to lag.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        progress: float = 0.0,
        seed: int = 0,
        compute_lags: bool = False,
    ) -> None:
        self.progress, self.rng = progress, random.Random(seed)
        self.streams: list[Stream] = []
        self.compute = self.current = Stream(self, eager=not compute_lags)
        self.kept: list[torch.Tensor] = []
        monkeypatch.setattr(torch.cuda, "Stream", self.new_stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "stream", self.use)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.kept.append(tensor))
        monkeypatch.setattr(copy_engine, "copy_to_host", self.after_computing(copy_engine.copy_to_host))
        for name in ("_transfer", "_fill"):
            monkeypatch.setattr(copy_engine, name, self.enqueued(getattr(copy_engine, name)))

    def enqueued(self, copies: Callable[..., None]) -> Callable[..., None]:
        return lambda *arguments: self.current.push(lambda: copies(*arguments))

    def after_computing(self, download: Callable[..., None]) -> Callable[..., None]:
        """A copy that the host waits for is ordered behind the stream that computes."""

        def waiting(*arguments: torch.Tensor) -> None:
            self.compute.synchronize()
            download(*arguments)

        return waiting

    def new_stream(self, device: torch.device) -> Stream:
        self.streams.append(Stream(self))
        return self.streams[-1]

    @contextlib.contextmanager
    def use(self, stream: Stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def maybe_progress(self) -> None:
        if self.rng.random() < self.progress:
            stream = self.rng.choice([*self.streams, self.compute])
            progress, self.progress = self.progress, 0.0
            if stream.work:
                stream.run_one()
            self.progress = progress

    def engine(self) -> CudaCopyEngine:
        engine = CudaCopyEngine(torch.device("cuda"))
        engine.device = torch.device("cpu")
        return engine


@pytest.mark.parametrize("compute_lags", [False, True])
@pytest.mark.parametrize("progress", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(8))
def test_streams_that_lag_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, seed: int, progress: float, compute_lags: bool
) -> None:
    cuda = LaggingCuda(monkeypatch, progress, seed, compute_lags)
    dtype = (torch.float32, torch.bfloat16)[seed % 2]
    script, weights = random_script(seed, 80), first_weights()
    store = new_store(
        weights,
        engine=cuda.engine(),
        pin_memory=False,
        moment_dtype=dtype,
        buffers=2 + seed % 3,
        mode=("stream", "resident")[seed % 2],
    )
    played = play(script, store, weights, compute=cuda.compute.push)
    cuda.compute.synchronize()
    assert_same(played, play_plain(script, dtype))
    store.close()
    assert store.counters["device_bytes"] == store.counters["host_bytes"] == 0


def last_waits(stream: Stream) -> list[Stream]:
    """Which streams `stream` was made to wait for since the last call."""
    waited, stream.waited = stream.waited, []
    return [event.stream for event in waited]


def test_copies_are_ordered_behind_the_callers_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = LaggingCuda(monkeypatch)
    engine = cuda.engine()
    inward, outward = cuda.streams
    host = torch.ones(1, 8, dtype=torch.uint8)
    buffer = engine.allocate(8)
    pairs = [(buffer.memory.view(1, 8), host)]
    engine.fetch(buffer, pairs, after=None)
    assert last_waits(inward) == [cuda.compute]  # kernels that still use the allocator's memory
    engine.stash(buffer, pairs)
    assert last_waits(outward) == [inward, cuda.compute]  # its arrival, and the updates
    engine.fetch(buffer, pairs, after=None)
    assert last_waits(inward) == [outward]  # the copy home
    engine.release(buffer)
    engine.fetch(buffer, pairs, after=None)
    assert last_waits(inward) == [cuda.compute]  # the updates
    engine.fill(buffer, [buffer.memory], pairs)
    assert last_waits(inward) == [cuda.compute, cuda.compute]  # the updates, and what made the source
    engine.acquire(buffer)
    assert last_waits(cuda.compute) == [inward]


def test_memory_is_freed_after_all_that_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = LaggingCuda(monkeypatch)
    engine = cuda.engine()
    buffer = engine.allocate(8)
    pairs = [(buffer.memory.view(1, 8), torch.ones(1, 8, dtype=torch.uint8))]
    engine.stash(buffer, pairs)
    engine.fetch(buffer, pairs, after=None)
    marks: list[Event] = []
    monkeypatch.setattr(engine, "_mark", lambda: marks.append(Event(cuda.compute)) or marks[-1])
    monkeypatch.setattr(cuda.compute, "run_one", lambda: marks[-1].mark())
    engine.free(buffer)
    assert [event.passed for event in (buffer.ready, buffer.idle, *marks)] == [True, True, True]


def test_restore_of_a_resident_unit_is_ordered_behind_its_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = LaggingCuda(monkeypatch)
    store = new_store(first_weights(), engine=cuda.engine(), pin_memory=False, mode="resident")
    store.activate([0])
    list(store.pieces([0]))
    last_waits(cuda.streams[0])
    marks = store._units[0].buffer.idle
    store.restore(0, None, torch.ones(96), torch.ones(96), 1)
    assert last_waits(cuda.streams[0]) == [cuda.compute]
    assert store._units[0].buffer.idle is not marks


@pytest.mark.parametrize("end", ["forget", "close"])
def test_home_is_freed_after_the_copies_that_read_it(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    cuda = LaggingCuda(monkeypatch)
    store = new_store(first_weights(), engine=cuda.engine(), pin_memory=False)
    store.activate([0])
    store.prefetch([0])
    assert cuda.streams[0].work
    store.forget(0) if end == "forget" else store.close()
    assert not cuda.streams[0].work


def test_stream_mode_never_makes_the_host_wait_for_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = LaggingCuda(monkeypatch)
    weights = first_weights()
    store = new_store(weights, engine=cuda.engine(), pin_memory=False)
    store.activate([0, 5, 2])
    waited = store.counters["wait_seconds"]
    store.prefetch([0, 5, 2])
    for _ in store.pieces([0, 5, 2]):
        pass
    store.prefetch([0])
    assert store.counters["wait_seconds"] == waited
    assert any(stream.work for stream in cuda.streams)  # enqueued, not done
    store.synchronize()
    assert store.counters["wait_seconds"] > waited
    assert not cuda.streams[1].work


def test_swap_of_equal_units_never_makes_the_host_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = LaggingCuda(monkeypatch)
    weights = first_weights()
    store = new_store(weights, engine=cuda.engine(), pin_memory=False, mode="resident")
    store.activate([0, 2])
    list(store.pieces([0, 2]))
    store.activate([2, 7])
    assert store.counters["wait_seconds"] == 0
    assert cuda.streams[1].work


def test_first_state_keeps_its_sources_alive_for_the_copy_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = LaggingCuda(monkeypatch)
    weights = first_weights()
    store = new_store(weights, engine=cuda.engine(), pin_memory=False, mode="resident")
    store.activate([0])
    assert any(tensor.data_ptr() == weights[0].data_ptr() for tensor in cuda.kept)


def test_cuda_engine_asks_for_pinned_memory_of_the_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    LaggingCuda(monkeypatch)
    assert make_engine(torch.device("cuda")).pin_device == torch.device("cuda", 0)
    assert make_engine(torch.device("cuda", 3)).pin_device == torch.device("cuda", 3)
    assert make_engine(torch.device("cpu")).pin_device is None


def test_copy_to_host_casts_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_engine, "_CHUNK_NUMEL", 7)
    source = torch.randn(50).bfloat16()
    host = torch.empty(50)
    copy_engine.copy_to_host(host, source)
    assert torch.equal(host, source.float())


def test_engine_counts_what_it_copies_and_holds() -> None:
    engine = CopyEngine(torch.device("cpu"))
    buffers = [engine.allocate(64), engine.allocate(32)]
    host = torch.arange(64, dtype=torch.uint8)
    engine.fetch(buffers[0], [(buffers[0].memory.view(1, 64), host.view(1, 64))], after=None)
    engine.stash(buffers[0], [(host[:16].view(2, 8), buffers[0].memory[:16].view(2, 8))])
    engine.free(buffers[1])
    expected = dict(bytes_to_device=64, bytes_to_host=16, fetches=1, stashes=1)
    expected |= dict(device_bytes=64, device_bytes_peak=96, host_bytes=0, wait_seconds=0.0)
    assert engine.counters == expected
    assert torch.equal(buffers[0].memory, host)
