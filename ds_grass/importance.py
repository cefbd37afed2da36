"""Importance of a block: how it is measured, averaged over a window of steps, and folded into what is known.

Contract: numbers in, numbers out. The squared norms that come in are those of the gradient that the optimizer
would see: unscaled, summed over micro-batches, averaged over data-parallel ranks, before clipping. Reducing
them over ranks and detecting non-finite values is done by the caller.

Another measure is one function of the shape of `Measure`, given to the controller as `measure=`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol


class Measure(Protocol):
    """What one step says about one block: finite, at least 0, comparable between blocks of different size."""

    def __call__(self, squared_norm: float, numel: int) -> float: ...


def root_mean_square(squared_norm: float, numel: int) -> float:
    """Root mean square of a block's gradient, `sqrt(||g||^2 / N)`: one term of the paper's mean gradient
    norm.

    `squared_norm` is `||g||^2` over all parameters of the block, `numel` their unsharded number N.
    """
    assert numel > 0, "a block without parameters has no importance"
    return math.sqrt(squared_norm / numel)


class Window:
    """Running mean of one measure per block, over the steps in which that block was active.

    Blocks differ in how many values they have: a mean is over a block's own steps, not over the window's
    length.
    """

    def __init__(self, num_blocks: int) -> None:
        self._sums = [0.0] * num_blocks
        self._counts = [0] * num_blocks

    def add(self, block: int, value: float) -> None:
        """Record the measure of `block` in one step."""
        assert 0 <= value < math.inf, f"block {block} measured {value}; such a step must be skipped"
        self._sums[block] += value
        self._counts[block] += 1

    def mean(self, block: int) -> float | None:
        """Mean over the steps in which `block` was active; None if there was none."""
        return self._sums[block] / self._counts[block] if self._counts[block] else None

    def means(self) -> tuple[float | None, ...]:
        """`mean` of every block, in block order."""
        return tuple(self.mean(block) for block in range(len(self._counts)))

    def clear(self) -> None:
        """Begin a new window."""
        self._sums = [0.0] * len(self._sums)
        self._counts = [0] * len(self._counts)

    def state_dict(self) -> dict[str, list]:
        """Plain lists; they pass through JSON unchanged."""
        return {"sums": list(self._sums), "counts": list(self._counts)}

    def load_state_dict(self, state: dict[str, list]) -> None:
        """Continue a saved window. ValueError if it is of another number of blocks."""
        if not len(state["sums"]) == len(state["counts"]) == len(self._sums):
            raise ValueError(
                f"the saved window holds {len(state['sums'])} sums and {len(state['counts'])} counts "
                f"but there are {len(self._sums)} blocks; load the state of the same model"
            )
        self._sums = [float(value) for value in state["sums"]]
        self._counts = [int(count) for count in state["counts"]]


def blend(old: Sequence[float | None], window: Window, alpha: float) -> list[float | None]:
    """Fold a window into the known importance: `alpha * window + (1 - alpha) * old` per block.

    Blocks that the window did not measure keep their value in every bit (the paper's rule for frozen layers).
    None is a block that was never measured: its first window becomes its value.
    """
    new = list(old)
    for block, mean in enumerate(window.means()):
        if mean is not None:
            before = old[block]
            new[block] = mean if before is None else alpha * mean + (1 - alpha) * before
    return new


def complete(known: Sequence[float | None]) -> list[float]:
    """Known importance with every block that was never measured just above the largest; all 1 if none was.

    So a start without probing is uniform, stays on the scale of the model's gradients, and leads to a
    measurement of each block: `top_k` visits them all before it returns to one, `grass` draws them like the
    most important.
    """
    values = [value for value in known if value is not None]
    stand_in = math.nextafter(max(values), math.inf) if values else 1.0
    return [stand_in if value is None else value for value in known]
