"""The most bytes of a stage under a plan, layer by layer through each backward, and plans that use all of it.

The solver counts a layer's transient on top of all that its micro-batch keeps. That is safe, but a layer's backward
runs when later layers are freed: recomputing the first layers of a chunk costs next to nothing on top. Here the
backward of each layer stands for itself, and what is gained is given back to the solver as a higher limit, as long as
the true peak stays under the true one. Contract: pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .solver import Solution, solve
from .stage_memory import ChunkLayers, Fraction, Names, Option, StageProblem, recompute_seconds

STEPS = 12
"""Halvings of what is given back; the last one is a four-thousandth of it."""


def peak_in_order(problem: StageProblem, options: Names, fraction: Fraction | None = None) -> int:
    """As :func:`.stage_memory.peak_bytes`, without what is freed by then."""
    most = 0
    for heavy in (True, False) if fraction is not None else (True,):
        rows = [_row(problem, number, names, fraction, heavy) for number, names in enumerate(options)]
        kept = [
            chunk.outside_bytes + sum(option.kept_bytes for option in row)
            for chunk, row in zip(problem.chunks, rows, strict=True)
        ]
        for corner in problem.corners:
            held = sum(count * size for count, size in zip(corner.open, kept, strict=True))
            if fraction is not None:
                held = _held_with(problem, options, fraction, corner.open, heavy, corner.running)
            running = corner.running
            most = max(most, held + _on_top(problem.chunks[running], rows[running]))
    return problem.static_bytes + most


def _row(
    problem: StageProblem, chunk: int, names: Sequence[str], fraction: Fraction | None, heavy: bool
) -> list[Option]:
    """What the layers of the micro-batch that runs backward do."""
    row = [layer[name] for layer, name in zip(problem.chunks[chunk].classes, names, strict=True)]
    if fraction is not None and fraction.chunk == chunk and not heavy:
        row[fraction.layer] = problem.chunks[chunk].classes[fraction.layer][fraction.option]
    return row


def _held_with(
    problem: StageProblem,
    options: Names,
    fraction: Fraction,
    open_passes: Sequence[int],
    heavy: bool,
    running: int,
) -> int:
    """Bytes kept by all open micro-batches; the one that runs does the heavier or the lighter of both."""
    held = 0
    for number, (chunk, names, count) in enumerate(zip(problem.chunks, options, open_passes, strict=True)):
        kept = [layer[name].kept_bytes for layer, name in zip(chunk.classes, names, strict=True)]
        held += count * (chunk.outside_bytes + sum(kept))
        if number == fraction.chunk:
            light = chunk.classes[fraction.layer][fraction.option].kept_bytes
            heavy_passes = min(count, problem.window[number] - fraction.micro_batches)
            if number == running and not heavy:
                heavy_passes = min(heavy_passes, count - 1)
            held -= (count - heavy_passes) * (kept[fraction.layer] - light)
    return held


def _on_top(chunk: ChunkLayers, row: Sequence[Option]) -> int:
    """The most that one micro-batch's backward holds above what it kept."""
    freed, most = chunk.outside_bytes if chunk.outside_goes_first else 0, chunk.outside_transient_bytes
    for option in reversed(row):
        most = max(most, option.transient_bytes - freed)
        freed += option.kept_bytes
    return most


def solve_in_order(problem: StageProblem) -> Solution:
    """The fastest plan found whose peak in order is within the limit; its `peak_bytes` is that one. Not always the
    fastest there is. If none is found, `fits` is false, and :func:`least_in_order` does not fit either."""
    best = _in_order(problem, solve(problem))
    low = 0
    high = max(
        [
            option.transient_bytes
            for chunk in problem.chunks
            for kind in chunk.classes
            for option in kind.options
        ],
        default=0,
    )
    for _ in range(STEPS):
        if best.seconds == 0 and best.fits:
            return best
        middle = (low + high + 1) // 2
        solution = solve(replace(problem, limit_bytes=problem.limit_bytes + middle))
        found = _in_order(problem, solution)
        if found.fits and (not best.fits or found.seconds < best.seconds):
            best = found
        if found.fits or not solution.fits:  # not even the solver had enough
            low = middle
        else:
            high = middle
    found = [_relaxed(problem, start) for start in (best, least_in_order(problem)) if start.fits]
    return min(found, key=lambda solution: solution.seconds, default=best)


def least_in_order(problem: StageProblem) -> Solution:
    """Close to the least memory that a plan can do with: of every layer the least is kept, but where the last layers of
    a chunk need more to run again than they keep."""
    names = [[min(kind.options, key=_leanness).name for kind in chunk.classes] for chunk in problem.chunks]
    for number, chunk in enumerate(problem.chunks):
        for layer in reversed(range(len(chunk.classes))):
            peaks = []
            for option in sorted(chunk.classes[layer].options, key=_leanness):
                names[number][layer] = option.name
                peaks.append((peak_in_order(problem, names), len(peaks), option.name))
            names[number][layer] = min(peaks)[-1]
    return _in_order(problem, _solution(problem, names, None))


def _relaxed(problem: StageProblem, solution: Solution) -> Solution:
    """Layers moved to faster options one by one, the last of each chunk first, while the peak allows it."""
    names, fraction = [list(row) for row in solution.options], solution.fraction
    for number, chunk in enumerate(problem.chunks):
        for layer in reversed(range(len(chunk.classes))):
            if fraction is not None and (fraction.chunk, fraction.layer) == (number, layer):
                continue
            kind, name = chunk.classes[layer], names[number][layer]
            faster = [option for option in kind.options if option.seconds < kind[name].seconds]
            for option in sorted(faster, key=lambda option: option.seconds):
                names[number][layer] = option.name
                if peak_in_order(problem, names, fraction) <= problem.limit_bytes:
                    break
                names[number][layer] = name
    return _in_order(problem, replace(_solution(problem, names, fraction), gap_seconds=solution.gap_seconds))


def _leanness(option: Option) -> tuple[int, float]:
    return option.kept_bytes, option.seconds


def _solution(problem: StageProblem, names: Names, fraction: Fraction | None) -> Solution:
    seconds = recompute_seconds(problem, names, fraction)
    return Solution(tuple(map(tuple, names)), fraction, seconds, 0, False)


def _in_order(problem: StageProblem, solution: Solution) -> Solution:
    """With its peak in order."""
    peak = peak_in_order(problem, solution.options, solution.fraction)
    return replace(solution, peak_bytes=peak, fits=peak <= problem.limit_bytes)
