"""Step time of a pipeline, composed from the times of its stages: the schedule run on paper.

Contract: pure. Every stage runs its passes in the order of :mod:`megatron_ext.recompute.schedule`, each as soon as the
stage is free and what it needs has come: a forward the output of the virtual stage before it, a backward the gradient
of the one after it. Recomputation is part of a backward pass and starts when the gradient is there, as in Megatron.
A time that comes from here is composed, not measured end to end.

Not covered: the optimizer, the reduction of gradients, contention of messages with computation, and messages that
Megatron sends together (interleaved without `overlap_p2p_comm` sends a forward's output after the backward in turn
with it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megatron_ext.recompute.schedule import Pass, Pipeline, passes


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one micro-batch through one chunk of one stage."""

    forward: float
    backward: float
    """Without recomputation."""
    recompute: float | tuple[float, ...] = 0.0
    """Run right before the backward. A tuple is taken in turn by micro-batches 0, 1, ... and again from its start: a
    layer that is recomputed for some micro-batches of each window."""

    def recompute_of(self, micro_batch: int) -> float:
        if isinstance(self.recompute, tuple):
            return self.recompute[micro_batch % len(self.recompute)]
        return self.recompute


@dataclass(frozen=True)
class Interval:
    """A stage is busy from `start` to `end`, in seconds from the beginning of the step."""

    kind: Literal["forward", "recompute", "backward"]
    micro_batch: int
    chunk: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """One step."""

    seconds: float
    """From the first forward to the end of the last backward of any stage."""
    intervals: tuple[tuple[Interval, ...], ...]
    """By stage, in time; a recompute stands there only where it takes time."""

    @cached_property
    def idle_shares(self) -> tuple[float, ...]:
        """By stage: the part of the step in which it waits."""
        busy = (sum(interval.end - interval.start for interval in stage) for stage in self.intervals)
        return tuple(1 - spent / self.seconds if self.seconds else 0.0 for spent in busy)


def compose(pipeline: Pipeline, times: Sequence[Sequence[StageTimes]], *, latency: float = 0.0) -> Timeline:
    """Run `pipeline` with `times[stage][chunk]`. `latency`: seconds of a message from one stage to the next."""
    given = [len(row) for row in times]
    if given != [pipeline.chunks] * pipeline.stages:
        raise ValueError(
            f"times has {given} chunks by stage; the pipeline has {pipeline.stages} stages of {pipeline.chunks} chunks"
        )
    run = _Run(pipeline, times, latency)
    while run.advance():
        pass
    assert not any(run.left(stage) for stage in range(pipeline.stages)), "the schedule waits for itself"
    seconds = max(run.free)
    return Timeline(seconds, tuple(map(tuple, run.intervals)))


class _Run:
    """How far each stage has come. A pass is placed once what it needs is placed: the order of placing does not matter
    for the times, so no clock is needed."""

    def __init__(self, pipeline: Pipeline, times: Sequence[Sequence[StageTimes]], latency: float) -> None:
        self.pipeline = pipeline
        self.times = times
        self.latency = latency
        self.orders = [passes(pipeline, stage) for stage in range(pipeline.stages)]
        self.placed = [0] * pipeline.stages
        self.free = [0.0] * pipeline.stages
        self.intervals: list[list[Interval]] = [[] for _ in range(pipeline.stages)]
        self.ended: dict[tuple[str, int, int], float] = {}
        """By kind, micro-batch and virtual stage."""

    def left(self, stage: int) -> int:
        return len(self.orders[stage]) - self.placed[stage]

    def advance(self) -> bool:
        """Place all passes that can be placed, stage by stage; whether there was one."""
        before = sum(self.placed)
        for stage, order in enumerate(self.orders):
            while self.left(stage):
                current = order[self.placed[stage]]
                ready = self._ready(current, stage)
                if ready is None:
                    break
                self._place(current, stage, max(ready, self.free[stage]))
        return sum(self.placed) > before

    def _ready(self, current: Pass, stage: int) -> float | None:
        """When what the pass needs has come; None while that is not known."""
        here = self._virtual_stage(current, stage)
        if current.kind == "forward":
            if here == 0:
                return 0.0
            end = self.ended.get(("forward", current.micro_batch, here - 1))
        elif here == self.pipeline.virtual_stages - 1:
            return self.ended.get(("forward", current.micro_batch, here))
        else:
            end = self.ended.get(("backward", current.micro_batch, here + 1))
        return None if end is None else end + self.latency

    def _place(self, current: Pass, stage: int, start: float) -> None:
        times = self.times[stage][current.chunk]
        parts = [("forward", times.forward)]
        if current.kind == "backward":
            parts = [("recompute", times.recompute_of(current.micro_batch)), ("backward", times.backward)]
        for kind, seconds in parts:
            if kind != "recompute" or seconds:
                interval = Interval(kind, current.micro_batch, current.chunk, start, start + seconds)
                self.intervals[stage].append(interval)
                start = interval.end
        self.free[stage] = start
        self.placed[stage] += 1
        self.ended[(current.kind, current.micro_batch, self._virtual_stage(current, stage))] = start

    def _virtual_stage(self, current: Pass, stage: int) -> int:
        return current.chunk * self.pipeline.stages + stage
