"""Contracts of the state store on a real GPU: the same bits under delayed streams, exact pinning, no hidden waits."""

from __future__ import annotations

import random
import time

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from ds_grass import host_memory
from ds_grass.copy_engine import CudaCopyEngine
from ds_grass.host_memory import HostArena
from ds_grass.state_store import StateStore
from tests.state_scripts import UNITS, first_weights, new_store, play, random_script

DEVICE = torch.device("cuda", 0)
DELAY_CYCLES = 2_000_000  # about a millisecond; the copies of the toy units take microseconds


class DelayedEngine(CudaCopyEngine):
    """Sleeps on the copy streams now and then, so that a wait that is missing shows."""

    def __init__(self, seed: int) -> None:
        super().__init__(DEVICE)
        self.rng = random.Random(seed)

    def _maybe_sleep(self, stream: torch.cuda.Stream) -> None:
        if self.rng.random() < 0.3:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(DELAY_CYCLES)

    def _copy_in(self, work, after):
        self._maybe_sleep(self._in)
        return super()._copy_in(work, after)

    def _copy_out(self, work, after):
        self._maybe_sleep(self._out)
        return super()._copy_out(work, after)


def delay_compute() -> None:
    torch.cuda._sleep(DELAY_CYCLES)


def large_store(mode: str, numel: int, **options) -> StateStore:
    """Four bf16 units of `numel` elements with masters."""
    defaults = dict(device=DEVICE, moment_dtype=torch.float32, pin_memory=True, buffers=2, slot_numel=numel)
    store = StateStore(**defaults | options, mode=mode)
    weights = torch.ones(numel, dtype=torch.bfloat16, device=DEVICE)
    for key in range(4):
        store.add(key, numel, lambda: weights, master=True)
    return store


@pytest.mark.parametrize("pin_memory", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(6))
def test_modes_and_delays_change_no_bit(seed: int, dtype: torch.dtype, pin_memory: bool) -> None:
    script = random_script(seed)
    undelayed = [event for event in script if event[0] in ("activate", "step")]
    runs = []
    for events, mode, engine, after in (
        (undelayed, "resident", None, lambda: None),
        (script, "stream", DelayedEngine(seed), delay_compute),
        (script, "resident", DelayedEngine(seed + 100), delay_compute),
    ):
        weights = first_weights(DEVICE)
        store = new_store(weights, mode=mode, engine=engine, moment_dtype=dtype, pin_memory=pin_memory)
        played = play(events, store, weights, after)
        runs.append((played[0], {key: [t if t is None else t.clone() for t in state[:3]] + [state[3]]
                                 for key, state in played[1].items()}))  # fmt: skip
        store.close()
    for weights, states in runs[1:]:
        assert states.keys() == runs[0][1].keys()
        assert all(torch.equal(weights[key], runs[0][0][key]) for key in UNITS)
        for key, expected in runs[0][1].items():
            assert states[key][3] == expected[3]
            assert all(
                a is b is None or torch.equal(a, b)
                for a, b in zip(states[key][:3], expected[:3], strict=True)
            )


def test_home_is_pinned_in_place_and_exactly() -> None:
    arena = HostArena((1 << 20) + 4096, pin_device=DEVICE)
    assert arena.pinned
    assert arena.memory.is_pinned()
    view = arena.memory
    arena.free()
    assert not view.is_pinned()


def test_registration_that_fails_leaves_no_error_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_warned_pageable", False)
    arena = HostArena(1 << 20, pin_device=DEVICE)
    assert not host_memory._register(
        arena.memory.data_ptr(), arena.nbytes, DEVICE
    )  # it is registered already
    torch.ones(1000, device=DEVICE).sum().item()
    arena.free()


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_device_holds_no_more_than_the_active_set_and_one_unit(mode: str) -> None:
    numel = 4 << 20
    store = large_store(mode, numel)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for keys in ([0, 1], [1, 2], [3, 0], [2, 1]):
        store.activate(keys)
        store.prefetch(keys)
        for piece in store.pieces(keys):
            piece.exp_avg.add_(1)
        store.home(keys[0])
    extra = torch.cuda.max_memory_allocated() - before
    assert store.counters["device_bytes_peak"] == 2 * 12 * numel
    assert extra - store.counters["device_bytes_peak"] < 1 << 20
    store.close()
    assert torch.cuda.memory_allocated() - before < 1 << 20


def test_stream_step_is_enqueued_without_waiting_for_the_device() -> None:
    numel = 1 << 20
    store = large_store("stream", numel)
    for _ in range(2):  # once to allocate the slots
        store.activate([0, 1, 2, 3])
        store.synchronize()
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin = time.perf_counter()
        start.record()
        torch.cuda._sleep(400_000_000)  # about 0.2 s in which no update can finish
        store.prefetch([0, 1, 2, 3])
        for piece in store.pieces([0, 1, 2, 3]):
            piece.exp_avg.add_(1)
        end.record()
        enqueued_ms = 1000 * (time.perf_counter() - begin)
        store.synchronize()
        end.synchronize()
    assert enqueued_ms < start.elapsed_time(end) / 2
    assert all((store.view(key, "exp_avg") == 2).all() for key in range(4))
    store.close()
