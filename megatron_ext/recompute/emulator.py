"""One pipeline stage at a time on one device: the passes that a rank of the pipeline would run, in its order.

A stage's chunks run under their plans through :mod:`.layer_loop`. What other stages would send is random: activations
before a forward, gradients before a backward. What Megatron-core's schedule frees is freed: the output of a chunk once
it would have been sent, the graph of a micro-batch with its backward; what its loop holds is held: the gradient that
was sent last, until the next takes its place. So the peak of each stage of any pipeline is measured, and the times of
its passes, which :func:`.timeline.compose` puts together to a step: composed, not measured end to end.

Contract: weights stay as they are and gradients are added up in ``grad``; plans and hooks are taken out again. Chunks
are ``GPTModel``, those of the first and the last virtual stage with ``pre_process`` and ``post_process``. Not covered:
buckets, reductions and the optimizer, activations that arrive before they are needed, and what is computed again
without a module (``moe_act``), whose time counts as backward.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from . import layer_loop
from .layer_loop import LayerLoop
from .plan import ChunkPlan
from .schedule import Pass, Pipeline, passes
from .timeline import StageTimes


@dataclass(frozen=True)
class PeakCounter:
    """Who counts the bytes of the device."""

    reset: Callable[[], None]
    """Lets the peak begin again at what is alive."""
    read: Callable[[], int]
    """The most bytes that were alive since."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch, [b, s] each; every one is given the same."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Emulated:
    """What one stage held and took."""

    static_bytes: int
    """Before the first pass: weights, gradients, whatever else lives on the device."""
    peak_bytes: int
    """With those."""
    times: tuple[StageTimes, ...]
    """By chunk, medians over the micro-batches. Recomputation is what modules run inside of backward passes; by
    micro-batch of the window where a layer is shared."""


def on_gpu(device: torch.device) -> PeakCounter:
    """PyTorch's counters."""
    return PeakCounter(
        lambda: torch.cuda.reset_peak_memory_stats(device), lambda: torch.cuda.max_memory_allocated(device)
    )


def emulate(
    chunks: Sequence[nn.Module],
    plans: Sequence[ChunkPlan],
    pipeline: Pipeline,
    stage: int,
    batch: Batch,
    counter: PeakCounter,
    clock: Callable[[], float] = time.perf_counter,
) -> Emulated:
    """Run one step of `stage`, after a pass of each chunk that leaves gradients and the tables that chunks keep.

    `clock`: in seconds; on a CPU that others use too, one of this process alone.
    """
    if not len(chunks) == len(plans) == pipeline.chunks:
        raise ValueError(
            f"{len(chunks)} chunks and {len(plans)} plans for a stage of {pipeline.chunks} chunks; give one of each "
            "for every chunk"
        )
    with _planned(chunks, plans) as loops, torch.enable_grad():
        first = _Stage(chunks, pipeline, batch, clock)
        for number in range(len(chunks)):
            first.run(Pass("forward", 0, number))
            first.run(Pass("backward", 0, number))
        del first
        for loop in loops:
            loop.number = 0  # a share is counted from the first micro-batch of the step
        running = _Stage(chunks, pipeline, batch, clock)
        counter.reset()
        static_bytes = counter.read()
        for current in passes(pipeline, stage):
            running.run(current)
        peak_bytes = counter.read()
    return Emulated(
        static_bytes, peak_bytes, tuple(running.times(number, plan) for number, plan in enumerate(plans))
    )


@contextmanager
def _planned(chunks: Sequence[nn.Module], plans: Sequence[ChunkPlan]) -> Iterator[list[LayerLoop]]:
    loops = [layer_loop.attach(chunk.decoder) for chunk in chunks]
    try:
        for loop, plan in zip(loops, plans, strict=True):
            loop.plan = plan
        yield loops
    finally:
        for chunk in chunks:
            layer_loop.detach(chunk.decoder)
            chunk.set_input_tensor(None)  # the last one that came in


class _Stage:
    """The open micro-batches of a stage, and how long its passes took."""

    def __init__(
        self, chunks: Sequence[nn.Module], pipeline: Pipeline, batch: Batch, clock: Callable[[], float]
    ):
        self._chunks, self._batch, self._clock = chunks, batch, clock
        self._device = batch.tokens.device
        self._micro_batches = pipeline.micro_batches
        self._open: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        """(chunk, micro-batch) -> what came in, and what went out, which has no storage any more."""
        self._sent: Tensor | None = None
        self._seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
        """By kind and chunk, for each micro-batch in turn."""

    def times(self, chunk: int, plan: ChunkPlan) -> StageTimes:
        again = self._seconds["recompute", chunk]
        share = plan.share
        recompute: float | tuple[float, ...] = median(again)
        if share is not None:
            alike = [
                [seconds for number, seconds in enumerate(again) if share.holds(number) == holds]
                for holds in (False, True)
            ]
            recompute = tuple(median(alike[share.holds(number)] or again) for number in range(share.window))
        return StageTimes(
            median(self._seconds["forward", chunk]), median(self._seconds["backward", chunk]), recompute
        )

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # what was started before has ended
        return self._clock()

    def run(self, current: Pass) -> None:
        if current.kind == "forward":
            self._forward(self._chunks[current.chunk], current)
        else:
            self._backward(self._chunks[current.chunk], current)

    def _forward(self, chunk: nn.Module, current: Pass) -> None:
        from megatron.core.pipeline_parallel.schedules import deallocate_output_tensor

        came = None if chunk.pre_process else random_message(chunk, self._batch).requires_grad_()
        start = self._now()
        out = forward_of(chunk, came, self._batch)
        if chunk.post_process:
            out /= self._micro_batches
        self._seconds["forward", current.chunk].append(self._now() - start)
        self._open[current.chunk, current.micro_batch] = came, out
        deallocate_output_tensor(out, True)

    def _backward(self, chunk: nn.Module, current: Pass) -> None:
        from megatron.core.pipeline_parallel.schedules import custom_backward

        came, out = self._open.pop((current.chunk, current.micro_batch))
        gradient = None if chunk.post_process else random_message(chunk, self._batch)
        start = self._now()
        with _modules_timed(self._device, self._clock) as seconds_of_modules:
            custom_backward(out, gradient)
        taken = self._now() - start
        again = seconds_of_modules()
        self._seconds["recompute", current.chunk].append(again)
        self._seconds["backward", current.chunk].append(taken - again)
        self._sent = None if came is None else came.grad


def forward_of(chunk: nn.Module, came: Tensor | None, batch: Batch) -> Tensor:
    """The chunk's output, of the last one the mean loss. `came`: [s / tp, b, h], None where tokens are embedded."""
    chunk.set_input_tensor(came)
    if not chunk.post_process:
        return chunk(batch.tokens, batch.positions, None)
    return chunk(batch.tokens, batch.positions, None, labels=batch.labels).mean()


def random_message(chunk: nn.Module, batch: Batch) -> Tensor:
    """In the place of what a neighbour sends: [s / tp, b, h]."""
    config = chunk.config
    rows, length = batch.tokens.shape
    cut = config.tensor_model_parallel_size if config.sequence_parallel else 1
    shape = length // cut, rows, config.hidden_size
    return torch.randn(shape, dtype=config.params_dtype, device=batch.tokens.device)


@contextmanager
def _modules_timed(device: torch.device, clock: Callable[[], float]) -> Iterator[Callable[[], float]]:
    """Inside, modules are timed, those in others with them. The result is called when the device has come to the end.

    On a GPU events are recorded, which nothing waits for.
    """
    marks: list[Any] = []
    depth = 0

    def mark() -> Any:
        if device.type != "cuda":
            return clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def starts(*_: Any) -> None:
        nonlocal depth
        if depth == 0:
            marks.append(mark())
        depth += 1

    def ends(*_: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            marks.append(mark())

    def seconds() -> float:
        pairs = zip(marks[::2], marks[1::2], strict=True)
        if device.type != "cuda":
            return sum(end - start for start, end in pairs)
        return sum(start.elapsed_time(end) for start, end in pairs) / 1e3

    hooks = register_module_forward_pre_hook(starts), register_module_forward_hook(ends)
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()
