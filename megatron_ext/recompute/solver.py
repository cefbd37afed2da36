"""The least recomputation that keeps a stage within its memory: an integer program, solved exactly in milliseconds.

Minimise the seconds of all layers' options subject to one limit for each corner of the schedule. Enumerated are all
combinations, over the chunks, of ways to run a chunk (counts of options by class, with at most one layer of the stage
that changes between micro-batches) whose seconds may be below a target, which starts at a bound below all plans
(`stage_bound`) and is raised until a plan is below it: the best of those is optimal. Pruned are ways that another of
the same chunk equals or beats in seconds, kept bytes and transient, for it can take their place in any plan;
combinations that leave too little room for the leanest completion; and those whose excess over the bound, with the
price of the room that any completion leaves unused, reaches the target, for a plan takes the sum of the three.

Contract: pure; never over the limit where any plan fits; optimal to 1e-9 of its seconds if `gap_seconds` is 0. Layers
of a class that are nearly on one line have very many plans that are nearly as good: the search stops at `MOST_NODES`
and says what may be left to gain. Where nothing fits: the least memory, and the least seconds with it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import le

from megatron_ext.recompute.chunk_labels import Label, labels_of
from megatron_ext.recompute.first_plans import filled, leanest
from megatron_ext.recompute.stage_bound import Chunk, Prices, best_prices
from megatron_ext.recompute.stage_memory import Fraction, StageProblem, peak_bytes, recompute_seconds

MOST_NODES = 100_000
"""States, labels and combinations looked at in one call: some tenths of a second."""
_TOLERANCE = 1e-12
_FIRST_STEP, _WIDER = 1 / 64, 2.0
"""The first target is so much of the slowest option above the bound; the next steps are wider."""


@dataclass(frozen=True)
class Solution:
    """The option of every layer by chunk, and what the plan costs."""

    options: tuple[tuple[str, ...], ...]
    fraction: Fraction | None
    seconds: float
    """Of recomputation, for one micro-batch over all chunks."""
    peak_bytes: int
    fits: bool
    gap_seconds: float = 0.0
    """At most so much slower than the optimum."""


def solve(problem: StageProblem, *, fractional: bool = True, most_nodes: float = MOST_NODES) -> Solution:
    """The fastest plan that fits; if none does, the fastest of those with the least memory, `fits` false.

    `fractional`: one layer of the stage may run two options. `most_nodes` infinite: optimal however long it takes.
    """
    chunks = [Chunk(problem, number) for number in range(len(problem.chunks))]
    room = [
        problem.limit_bytes
        - problem.static_bytes
        - sum(o * chunk.outside_bytes for o, chunk in zip(corner.open, problem.chunks, strict=True))
        for corner in problem.corners
    ]
    lean, excess = leanest(chunks, room)
    room = [size + max(0, excess) for size in room]
    search = _Search(room, filled(chunks, room, lean, fractional=fractional), fractional, most_nodes)
    # prices mix plans with unlike transients; one chunk alone, with few micro-batches to share one, is solved for each
    search.run([[chunk] for chunk in chunks[0].one_cap_each()] if len(chunks) == 1 else [chunks])
    options, fraction = _by_layer(problem, chunks, search.best)
    return Solution(
        options,
        fraction,
        recompute_seconds(problem, options, fraction),
        peak_bytes(problem, options, fraction),
        fits=excess <= 0,
        gap_seconds=search.gap_seconds,
    )


class _Stopped(Exception):
    """The search has looked at as much as it may."""


class _Search:
    """Every combination of chunks' labels below a target, which is raised until it is above the best plan."""

    def __init__(self, room: Sequence[int], best: list[Label], fractional: bool, most_nodes: float):
        self.room, self.best, self.fractional, self.nodes_left = room, best, fractional, most_nodes
        self.seconds = sum(label.seconds for label in best)
        self.proven = 0.0
        """No plan takes less."""

    @property
    def gap_seconds(self) -> float:
        return max(0.0, self.seconds - self.proven)

    def run(self, variants: Sequence[Sequence[Chunk]]) -> None:
        """Find the best plan; each variant of the chunks allows some of all plans."""
        priced = []
        for chunks in variants:
            start, excess = leanest(chunks, self.room)
            if excess <= 0:
                priced.append((best_prices(chunks, self.room, start), chunks))
        self.proven = min((prices.bound for prices, _ in priced), default=math.inf)
        dearest = max(
            (o.seconds for chunk in variants[0] for g in chunk.groups for o in g.options), default=0.0
        )
        step = dearest * _FIRST_STEP or 1.0
        try:
            while self.proven < self.seconds * (1 - _TOLERANCE):
                target = self.proven + step
                for prices, chunks in priced:
                    self._below(target, prices, chunks)
                self.proven, step = target, step * _WIDER
        except _Stopped:
            return
        self.proven = self.seconds

    def _below(self, target: float, prices: Prices, chunks: Sequence[Chunk]) -> None:
        """Find the best of the plans of `chunks` that take less than the target."""
        gap = min(target, self.seconds * (1 - _TOLERANCE)) - prices.bound
        if gap > 0:
            labels = [
                labels_of(chunk, prices, gap, fractional=self.fractional, spend=self.spend)
                for chunk in chunks
            ]
            if all(labels):
                _Combinations(self, prices, labels, gap).visit(0, [0] * len(self.room), 0.0, 0.0, [])

    def spend(self, nodes: int) -> None:
        self.nodes_left -= nodes
        if self.nodes_left < 0:
            raise _Stopped


class _Combinations:
    """Depth first over the chunks, those with the fewest labels first."""

    def __init__(self, search: _Search, prices: Prices, labels: Sequence[list[Label]], gap: float):
        self.search, self.prices, self.gap = search, prices, gap
        self.order = sorted(range(len(labels)), key=lambda number: len(labels[number]))
        self.labels = [labels[number] for number in self.order]
        least, most = [list(search.room)], [list(search.room)]
        for row in reversed(self.labels):
            usages = list(zip(*(label.usage for label in row), strict=True))
            least.append([r - min(at) for r, at in zip(least[-1], usages, strict=True)])
            most.append([r - max(at) for r, at in zip(most[-1], usages, strict=True)])
        self.ceiling = least[::-1]
        """By number of chunks placed: room at each corner, if all others use their least."""
        self.floor = most[::-1]
        """And if all others use their most: what is below stays unused."""
        self.seen: dict[tuple, float] = {}
        """Least seconds by what is used, and whether a layer is mixed."""
        paid = [price * size for price, size in zip(prices.by_corner, search.room, strict=True)]
        self.dearest = paid.index(max(paid))
        """The corner whose room is paid most for: the last chunk must nearly fill it."""
        self.labels[-1] = sorted(self.labels[-1], key=lambda label: label.usage[self.dearest])
        self.fills = [label.usage[self.dearest] for label in self.labels[-1]]

    def visit(self, placed: int, used: list[int], excess: float, seconds: float, trail: list[Label]) -> None:
        mixed = any(label.mixed for label in trail)
        last = placed == len(self.labels) - 1
        ceiling, floor = self.ceiling[placed + 1], self.floor[placed + 1]
        for label in self._filling(used, excess) if last else self.labels[placed]:
            total = excess + label.excess
            if total >= self.gap:
                if last:
                    continue
                break
            if mixed and label.mixed:
                continue
            after = [a + b for a, b in zip(used, label.usage, strict=True)]
            if not all(map(le, after, ceiling)) or total + self._unused(after, floor) >= self.gap:
                continue
            now = seconds + label.seconds
            if last:
                self._found(now, [*trail, label])
                continue
            key = (placed, mixed or bool(label.mixed), *after)
            if now < self.seen.get(key, math.inf):
                self.seen[key] = now
                self.visit(placed + 1, after, total, now, [*trail, label])

    def _filling(self, used: list[int], excess: float) -> list[Label]:
        """Labels of the last chunk that fit at the dearest corner and leave little of it unused."""
        room, price = self.search.room[self.dearest] - used[self.dearest], self.prices.by_corner[self.dearest]
        first = bisect_left(self.fills, room - (self.gap - excess) / price) if price else 0
        found = self.labels[-1][first : bisect_right(self.fills, room)]
        self.search.spend(1 + len(found))
        return found

    def _unused(self, used: list[int], floor: list[int]) -> float:
        """Seconds that the bound pays for room that no completion uses."""
        return sum(
            price * (most - size)
            for price, most, size in zip(self.prices.by_corner, floor, used, strict=True)
            if price and most > size
        )

    def _found(self, seconds: float, labels: list[Label]) -> None:
        if seconds < self.search.seconds:
            in_order = sorted(range(len(labels)), key=self.order.__getitem__)
            self.search.seconds, self.search.best = seconds, [labels[place] for place in in_order]
            self.gap = min(self.gap, seconds * (1 - _TOLERANCE) - self.prices.bound)


def _by_layer(
    problem: StageProblem, chunks: Sequence[Chunk], labels: Sequence[Label]
) -> tuple[tuple[tuple[str, ...], ...], Fraction | None]:
    """Of a class's layers the first keep least: what they recompute runs when later layers' bytes are freed."""
    rows, fraction = [], None
    for number, (chunk, label) in enumerate(zip(chunks, labels, strict=True)):
        names = [""] * len(problem.chunks[number].classes)
        for index, (group, picks) in enumerate(zip(chunk.groups, label.picks, strict=True)):
            ordered = [(option.kept_bytes, -option.seconds, option.name, False) for option in picks]
            mixed = label.mixed
            if mixed is not None and mixed.group == index:
                share = mixed.micro_batches / chunk.window
                kept = mixed.heavy.kept_bytes * (1 - share) + mixed.light.kept_bytes * share
                ordered.append((kept, 0.0, mixed.heavy.name, True))
            for place, (*_, name, changes) in zip(group.places, sorted(ordered), strict=True):
                names[place] = name
                if changes:
                    fraction = Fraction(number, place, mixed.light.name, mixed.micro_batches)
        rows.append(tuple(names))
    return tuple(rows), fraction
