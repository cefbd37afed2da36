"""The mean loss of a stretch of optimizer steps, without waiting for the device that computes it."""

from __future__ import annotations

import torch
from torch import Tensor


class LossMeter:
    """Adds up losses where they are, and is read by the host once a line of the log.

    The loss of a step is the sum of what was given to `add` in it: micro-batches come already divided by their
    number, as the engine's `backward` returns them, so the sum is what the step's gradient is the gradient of.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._is_step_open = False
        self._steps = 0

    def add(self, loss: object) -> None:
        """Count a scalar loss of the step now running. Enqueues two small kernels, and waits for nothing."""
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            return
        value = loss.detach().reshape(()).to(torch.float32, copy=True)
        self._sum = value if self._sum is None else self._sum.add_(value.to(self._sum.device))
        self._is_step_open = True

    def end_step(self) -> None:
        """An optimizer step is being made of what was added."""
        self._steps += self._is_step_open
        self._is_step_open = False

    def take(self) -> float | None:
        """Mean over the steps since it was last taken, None if none had a loss. The host waits for the device."""
        if self._steps == 0 or self._sum is None:
            return None
        mean = float(self._sum) / self._steps
        self.clear()
        return mean

    def clear(self) -> None:
        """Begin a new stretch."""
        self._sum, self._steps, self._is_step_open = None, 0, False
