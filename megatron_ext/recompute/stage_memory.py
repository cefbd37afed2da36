"""What the layers of one pipeline stage may do, and the most bytes that a plan for them holds.

A layer runs one of its class's options: nothing recomputed, some of its modules, or the whole layer. An open
micro-batch keeps `kept_bytes` of it from forward to backward; while a chunk's backward runs, the largest of its layers'
transients comes on top. The schedule says how many micro-batches of each chunk are open at each of its corners.

Contract: pure; bytes are integers and the peak is exact for this model, which counts a transient in full even where
later layers, whose bytes are freed by then, make room for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ext.recompute.schedule import Corner

Names = Sequence[Sequence[str]]
"""The option of every layer, by chunk and layer."""


@dataclass(frozen=True)
class Option:
    """What one layer recomputes, and what that costs for one micro-batch."""

    name: str
    seconds: float
    """Of recomputation, right before backward."""
    kept_bytes: int
    """From forward to backward."""
    transient_bytes: int
    """Above what is kept, while the layer's backward runs."""

    def __post_init__(self) -> None:
        if not (0 <= self.seconds < math.inf and self.kept_bytes >= 0 and self.transient_bytes >= 0):
            raise ValueError(
                f"option {self.name!r} takes {self.seconds} seconds and {self.kept_bytes} + {self.transient_bytes} "
                "bytes; allowed: finite numbers from 0; leave out an option that can't run"
            )


@dataclass(frozen=True)
class LayerClass:
    """Layers that are alike; the first option is the one that recomputes nothing."""

    name: str
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        names = [option.name for option in self.options]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"layer class {self.name!r} has the options {names}; allowed: one or more, each name once"
            )

    def __getitem__(self, name: str) -> Option:
        for option in self.options:
            if option.name == name:
                return option
        raise ValueError(
            f"layer class {self.name!r} has no option {name!r}; use one of "
            f"{', '.join(option.name for option in self.options)}"
        )


@dataclass(frozen=True)
class ChunkLayers:
    """One virtual stage: the class of each layer, first layer first, and what is held outside the layers."""

    classes: tuple[LayerClass, ...]
    outside_bytes: int = 0
    """Kept by each open micro-batch: embedding, head."""
    outside_transient_bytes: int = 0
    """Logits and loss."""
    outside_goes_first: bool = False
    """It is a head, freed before the layers run backward; else an embedding, freed after."""


@dataclass(frozen=True)
class StageProblem:
    """Everything that a stage's plan depends on."""

    chunks: tuple[ChunkLayers, ...]
    corners: tuple[Corner, ...]
    window: tuple[int, ...]
    """Most open micro-batches of each chunk: a fraction is counted over so many in a row."""
    static_bytes: int
    limit_bytes: int

    def __post_init__(self) -> None:
        count = len(self.chunks)
        if not count or len(self.window) != count or not self.corners:
            raise ValueError(
                f"{count} chunks, {len(self.window)} windows and {len(self.corners)} corners; allowed: one chunk or "
                "more, as many windows, and one corner or more; take windows and corners from the schedule"
            )
        for corner in self.corners:
            fits = len(corner.open) == count and all(
                0 <= o <= w for o, w in zip(corner.open, self.window, strict=True)
            )
            if not fits or not 0 <= corner.running < count:
                raise ValueError(
                    f"a corner has {tuple(corner.open)} open and chunk {corner.running} running; allowed: one number "
                    f"for each of {count} chunks, at most its window {self.window}; take both from the same schedule"
                )


@dataclass(frozen=True)
class Fraction:
    """One layer that runs `option` for `micro_batches` of every window in a row, else the option of the plan."""

    chunk: int
    layer: int
    option: str
    """The one that keeps less."""
    micro_batches: int


def heavy_passes(open_passes: int, window: int, light: int) -> int:
    """Most of `open_passes` in a row that run the heavier option, where `light` of each window run the lighter."""
    return min(open_passes, window - light)


def peak_bytes(problem: StageProblem, options: Names, fraction: Fraction | None = None) -> int:
    """The most bytes at any corner."""
    picked = _picked(problem, options)
    kept = [
        chunk.outside_bytes + sum(option.kept_bytes for option in row)
        for chunk, row in zip(problem.chunks, picked, strict=True)
    ]
    transient = [
        max([chunk.outside_transient_bytes, *(option.transient_bytes for option in row)])
        for chunk, row in zip(problem.chunks, picked, strict=True)
    ]
    saved = 0
    if fraction is not None:
        heavy, light = _both(problem, picked, fraction)
        saved = heavy.kept_bytes - light.kept_bytes
        transient[fraction.chunk] = max(transient[fraction.chunk], light.transient_bytes)
    peaks = []
    for corner in problem.corners:
        held = sum(count * size for count, size in zip(corner.open, kept, strict=True))
        if fraction is not None:
            count = corner.open[fraction.chunk]
            window = problem.window[fraction.chunk]
            held -= saved * (count - heavy_passes(count, window, fraction.micro_batches))
        peaks.append(problem.static_bytes + held + transient[corner.running])
    return max(peaks)


def recompute_seconds(problem: StageProblem, options: Names, fraction: Fraction | None = None) -> float:
    """Of one micro-batch through all chunks; with a fraction, the mean over its window."""
    picked = _picked(problem, options)
    seconds = [option.seconds for row in picked for option in row]
    if fraction is not None:
        heavy, light = _both(problem, picked, fraction)
        share = fraction.micro_batches / problem.window[fraction.chunk]
        seconds.append((light.seconds - heavy.seconds) * share)
    return math.fsum(seconds)


def _picked(problem: StageProblem, options: Names) -> list[list[Option]]:
    return [
        [layer[name] for layer, name in zip(chunk.classes, names, strict=True)]
        for chunk, names in zip(problem.chunks, options, strict=True)
    ]


def _both(problem: StageProblem, picked: list[list[Option]], fraction: Fraction) -> tuple[Option, Option]:
    """The heavier and the lighter option of the layer that changes between micro-batches."""
    heavy = picked[fraction.chunk][fraction.layer]
    light = problem.chunks[fraction.chunk].classes[fraction.layer][fraction.option]
    window = problem.window[fraction.chunk]
    if light.kept_bytes > heavy.kept_bytes or not 0 < fraction.micro_batches < window:
        raise ValueError(
            f"{fraction} of a window of {window}: {light.name!r} keeps {light.kept_bytes} bytes, {heavy.name!r} "
            f"{heavy.kept_bytes}; allowed: 1 to {window - 1} micro-batches, and an option that keeps no more than the "
            "plan's; swap the two options or leave the fraction out"
        )
    return heavy, light
