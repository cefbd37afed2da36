"""Seconds and bytes of one run of a block, forward and backward, without making the host wait.

On a GPU pairs of events are read when they have passed, at a later micro-batch; on a CPU it is the clock. Forward ends
with the block's forward, backward begins with the gradient of its output and ends with that of its input; what runs in
between, other micro-batches of a pipeline, is not counted.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import device_peak

Finished = Callable[[float, "int | None"], None]


class Stopwatch:
    """Measures runs that have a backward; what is over is handed out by :meth:`poll`."""

    def __init__(self) -> None:
        self._over: deque[Run] = deque()

    def start(self, device: torch.device, finished: Finished) -> Run:
        """A run begins; `finished` gets its seconds, and bytes of a new peak on top of what was there, or None."""
        return Run(device, finished, self._over)

    def poll(self) -> None:
        """Hand out runs that are over, in order."""
        while self._over and self._over[0].has_passed():
            self._over.popleft().hand_out()


class Run:
    """One run of a block."""

    def __init__(self, device: torch.device, finished: Finished, over: deque[Run]):
        self._device, self._finished, self._over = device, finished, over
        self._marks = [_mark(device)]
        self._peak_before, self._held = _peak(device), _held(device)
        self._peak_bytes: int | None = None

    def forward_ended(self, block_input: Tensor, output: Tensor) -> None:
        """Forward is over; watch for backward where there will be one."""
        self._marks.append(_mark(self._device))
        if output.requires_grad and block_input.requires_grad:
            output.register_hook(self._backward_begins)
            block_input.register_hook(self._backward_ended)

    def has_passed(self) -> bool:
        """Whether its last event has: only then can they be read."""
        return self._device.type != "cuda" or self._marks[-1].query()

    def hand_out(self) -> None:
        first, second, third, fourth = self._marks
        self._finished(_between(first, second) + _between(third, fourth), self._peak_bytes)

    def _backward_begins(self, grad: Tensor) -> None:
        if len(self._marks) == 2:
            self._marks.append(_mark(self._device))

    def _backward_ended(self, grad: Tensor) -> None:
        if len(self._marks) == 3:
            self._marks.append(_mark(self._device))
            peak = _peak(self._device)
            if peak > self._peak_before:  # only a new peak is known to be this micro-batch's
                self._peak_bytes = peak - self._held
            self._over.append(self)


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: Any, second: Any) -> float:
    return second - first if isinstance(first, float) else first.elapsed_time(second) / 1e3


def _peak(device: torch.device) -> int:
    return device_peak.peak_bytes(device) if device.type == "cuda" else 0


def _held(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
