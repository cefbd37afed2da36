"""Whether moving a few layers between pipeline stages would win more than recomputation alone can.

Stages with a heavy head, or with room to spare, can take fewer or more layers than an equal cut gives them; AdaPipe
(Sun et al., ASPLOS 2024) chooses both at once. Here the layout is only advised: changing it needs a new job, since
Megatron-core builds its stages from `pipeline_model_parallel_layout`.

Contract: pure. The caller says what a layout costs once its recomputation is solved; the search looks at layouts a few
moves of one layer away. Predicted seconds are as good as the caller's times.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Advice:
    """A layout that wins, with its own best recomputation."""

    layers: tuple[int, ...]
    """By virtual stage, in the order in which a micro-batch passes them (chunk 0 of all stages first)."""
    seconds: float
    """Predicted for a step."""
    current_seconds: float
    """With the present layout; infinite where no plan fits it."""
    layout: str
    """For Megatron's `pipeline_model_parallel_layout` (`--pipeline-model-parallel-layout`)."""

    @property
    def gain(self) -> float:
        """How many times as fast."""
        return self.current_seconds / self.seconds


def advise(
    layers: Sequence[int],
    plan_seconds: Callable[[tuple[int, ...]], float],
    *,
    most_moved: int = 3,
    beam: int = 8,
    least_gain: float = 1.005,
    mtp_layers: int = 0,
) -> Advice | None:
    """The best layout within `most_moved` layers of the present one; None where none is `least_gain` times as fast.

    `layers`: decoder layers by virtual stage. `plan_seconds`: predicted seconds of a step with a layout and the best
    plan that fits it, infinite where none fits; called once for each layout, about `most_moved * beam * stages ** 2`
    times at most. `mtp_layers`: of the last virtual stage, only for the string. Each stage keeps a layer at least. Of
    layouts that are equally fast, the one with fewer layers moved.
    """
    if not layers or min(layers) < 0:
        raise ValueError(f"layers is {list(layers)}; give 0 or more decoder layers for each virtual stage")
    current = tuple(layers)
    seconds = {current: plan_seconds(current)}
    best = current
    front = [current]
    for _ in range(most_moved):
        # several layouts go on, since one move alone may win nothing: two stages may be the slowest together
        fresh = sorted({shifted for layout in front for shifted in one_moved(layout)} - seconds.keys())
        seconds |= {layout: plan_seconds(layout) for layout in fresh}
        front = heapq.nsmallest(beam, fresh, key=seconds.__getitem__)
        if front and seconds[front[0]] < seconds[best] * (1 - 1e-9):
            best = front[0]
    if math.isinf(seconds[best]) or seconds[current] < seconds[best] * least_gain:
        return None
    return Advice(best, seconds[best], seconds[current], layout_string(best, mtp_layers))


def one_moved(layers: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All layouts with one layer on another stage; the giving stage keeps one at least."""
    for giver, given in enumerate(layers):
        if given < 2:
            continue
        for taker in range(len(layers)):
            if taker != giver:
                yield tuple(n + (i == taker) - (i == giver) for i, n in enumerate(layers))


def layout_string(layers: Sequence[int], mtp_layers: int = 0) -> str:
    """Megatron's grammar: `|` between virtual stages, E embedding, t decoder layer, m MTP layer, L loss; `*n` repeats.

    For example `Et*8|t*8|t*9|t*7L`. Embedding and loss stand where an equal cut has them, on the first and last stage.
    """
    last = len(layers) - 1
    return "|".join(
        ("E" if stage == 0 else "")
        + _repeated("t", count)
        + (_repeated("m", mtp_layers) + "L" if stage == last else "")
        for stage, count in enumerate(layers)
    )


def _repeated(letter: str, count: int) -> str:
    return f"{letter}*{count}" if count > 1 else letter * count
