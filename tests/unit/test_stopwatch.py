"""Contracts of the stopwatch: forward and backward of one run are measured, what runs between them is not."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from megatron_ext.sequence_parallel import stopwatch
from megatron_ext.sequence_parallel.stopwatch import Stopwatch

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass when the test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(stopwatch.time, "perf_counter", clock)
    return clock


class Layer(torch.autograd.Function):
    """Takes so many seconds forward, so many backward."""

    @staticmethod
    def forward(ctx, x, clock, forward_s, backward_s):
        ctx.clock, ctx.backward_s = clock, backward_s
        clock.now += forward_s
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.clock.now += ctx.backward_s
        return grad.clone(), None, None, None


def run(watch, clock, finished, forward_s=2.0, backward_s=3.0, *, head=0.0):
    """One run of a block whose input comes from an embedding and whose output goes to a head."""
    block_input = Layer.apply(torch.ones(2, requires_grad=True), clock, 0.0, 7.0)
    started = watch.start(CPU, finished)
    output = Layer.apply(block_input, clock, forward_s, backward_s)
    started.forward_ended(block_input, output)
    return Layer.apply(output, clock, head, head).sum()


def test_seconds_are_those_of_the_blocks_forward_and_backward(clock):
    watch, told = Stopwatch(), []
    loss = run(watch, clock, lambda *found: told.append(found), head=50.0)
    clock.now += 1000.0
    watch.poll()
    assert told == [], "a run without backward has been told"
    loss.backward()
    assert told == [], "told in the middle of backward"
    watch.poll()
    watch.poll()
    assert told == [(5.0, None)]


def test_runs_in_flight_are_told_in_the_order_of_their_backwards(clock):
    watch, told = Stopwatch(), []
    losses = [run(watch, clock, lambda s, _, i=i: told.append((i, s)), 1.0 + i, 10.0) for i in range(3)]
    for loss in (losses[1], losses[0], losses[2]):
        loss.backward()
    watch.poll()
    assert told == [(1, 12.0), (0, 11.0), (2, 13.0)]


def test_second_backward_over_the_same_run_is_not_told_again(clock):
    watch, told = Stopwatch(), []
    loss = run(watch, clock, lambda *found: told.append(found))
    loss.backward(retain_graph=True)
    loss.backward()
    watch.poll()
    assert told == [(5.0, None)]


def test_run_without_gradients_is_measured_by_nobody(clock):
    watch, told = Stopwatch(), []
    started = watch.start(CPU, lambda *found: told.append(found))
    x = torch.ones(2)
    started.forward_ended(x, x + 1)
    x = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        watch.start(CPU, lambda *found: told.append(found)).forward_ended(x, x + 1)
    watch.poll()
    assert told == []


def test_output_run_without_backward_is_freed_and_its_run_with_it(clock):
    gc.disable()
    try:
        watch = Stopwatch()
        loss = run(watch, clock, lambda *found: None)
        started = watch.start(CPU, lambda *found: None)
        gone = weakref.ref(started)
        x = torch.ones(2, requires_grad=True) * 1
        y = x * 2
        started.forward_ended(x, y)
        del started, x, y, loss
        assert gone() is None
    finally:
        gc.enable()


class Event:
    """An event of a GPU that passes when the test says so."""

    made: list[Event] = []

    def __init__(self, enable_timing: bool):
        assert enable_timing
        self.passed, self.at = False, None
        self.made.append(self)

    def record(self):
        self.at = float(len(self.made))

    def query(self):
        return self.passed

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


@pytest.fixture
def gpu(monkeypatch):
    """Allocated bytes and their peak, as a GPU would count them."""
    Event.made = []
    counts = {"held": 100, "peak": 500}
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: counts["peak"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: counts["held"])
    return counts


@pytest.mark.parametrize(("peak", "told_bytes"), [(500, None), (800, 700)])
def test_gpu_is_asked_only_for_what_has_passed_and_a_peak_counts_when_it_is_new(gpu, peak, told_bytes):
    watch, told = Stopwatch(), []
    x = torch.ones(2, requires_grad=True) * 1
    started = watch.start(torch.device("cuda"), lambda *found: told.append(found))
    y = x * 2
    started.forward_ended(x, y)
    gpu["held"], gpu["peak"] = 300, peak
    y.sum().backward()
    watch.poll()
    assert told == [], "the host would have waited"
    for event in Event.made:
        event.passed = True
    watch.poll()
    assert told == [(2.0, told_bytes)]
