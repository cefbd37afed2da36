"""How many layers of each class run each strategy: an integer program, solved exactly in microseconds.

Minimise the sum of seconds subject to sum(kept) + max(transient) <= budget. For each value that the largest transient
may have, what is left is a multiple-choice knapsack over counts. Its linear relaxation is solved by walking each
class's lower hull of (kept, seconds) in order of slope; the multiplier found there gives every other choice a reduced
cost, and only choices whose reduced costs add up to less than the gap to the best plan known can lead to a better one.
They are tried depth first; the class that the relaxation splits is split in closed form. Bytes are integers.

Contract: pure; the result is optimal to 1e-12 of its seconds if `gap_seconds` is 0. A hundred layers whose strategies
lie on one line, to a millionth, have 10^5 plans within that millionth: the search stops at `MOST_NODES` and says what
may be left to gain. With `FEW_LAYERS` it never stops. Strategies that can't run are left out of `costs` or
have infinite seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_ext.sequence_parallel.cost_model import Cost

_TOLERANCE = 1e-12
MOST_NODES = 250
"""Of the search, for each value of the largest transient: some tenths of a millisecond."""
FEW_LAYERS = 6


@dataclass(frozen=True)
class LayerClass:
    """Layers that are alike: how many, and what one costs under each strategy that it may run."""

    count: int
    costs: Mapping[str, Cost]

    def __post_init__(self) -> None:
        if self.count < 1 or not any(math.isfinite(cost.seconds) for cost in self.costs.values()):
            raise ValueError(
                f"a class of {self.count} layers with the strategies {sorted(self.costs)}; allowed: one layer or more, "
                "and one strategy or more that can run; leave the class out, or allow another strategy"
            )


@dataclass(frozen=True)
class Choice:
    """Counts of each strategy, for each class, without zeros."""

    counts: tuple[dict[str, int], ...]
    seconds: float
    peak_bytes: int
    fits: bool
    gap_seconds: float = 0.0
    """At most so much slower than the optimum."""


def evaluate(classes: Sequence[LayerClass], counts: Sequence[Mapping[str, int]], budget_bytes: int) -> Choice:
    """What counts cost."""
    used = [
        (layers.costs[name], n)
        for layers, c in zip(classes, counts, strict=True)
        for name, n in c.items()
        if n
    ]
    seconds = math.fsum(cost.seconds * n for cost, n in used)
    peak = sum(cost.kept_bytes * n for cost, n in used) + max(cost.transient_bytes for cost, _ in used)
    clean = tuple({name: n for name, n in given.items() if n} for given in counts)
    return Choice(clean, seconds, peak, math.isfinite(seconds) and peak <= budget_bytes)


def choose_counts(classes: Sequence[LayerClass], budget_bytes: int, most_nodes: float = MOST_NODES) -> Choice:
    """The fastest counts that fit; if none do, those with the least memory, `fits` false.

    `most_nodes` infinite: optimal however long it takes.
    """
    if sum(layers.count for layers in classes) <= FEW_LAYERS:
        most_nodes = math.inf
    best: Choice | None = None
    reachable = math.inf
    leanest: list[Choice] = []
    for cap in sorted({cost.transient_bytes for layers in classes for cost in layers.costs.values()}):
        allowed = [_allowed(layers, cap) for layers in classes]
        if not all(allowed):
            continue
        knapsack = _Knapsack(classes, allowed, budget_bytes - cap, most_nodes)
        counts = knapsack.solve(best.seconds if best else math.inf)
        reachable = min(reachable, knapsack.unproven_seconds)
        if counts is not None:
            best = evaluate(classes, counts, budget_bytes)
        elif best is None:
            lean = [{options[-1][2]: layers.count} for options, layers in zip(allowed, classes, strict=True)]
            leanest.append(evaluate(classes, lean, budget_bytes))
    if best is not None:
        return replace(best, gap_seconds=max(0.0, best.seconds - reachable))
    return min(leanest, key=lambda choice: (choice.peak_bytes, choice.seconds))


def choose_one(classes: Sequence[LayerClass], budget_bytes: int) -> Choice:
    """As `choose_counts`, with one strategy for all classes but those that have a single one."""
    names = {name for layers in classes for name in layers.costs}
    choices = []
    for name in sorted(names):
        picked = [name if name in layers.costs else next(iter(layers.costs)) for layers in classes]
        if all(len(layers.costs) == 1 or name in layers.costs for layers in classes):
            counts = [{pick: layers.count} for pick, layers in zip(picked, classes, strict=True)]
            choices.append(evaluate(classes, counts, budget_bytes))
    if not choices:
        raise ValueError(
            f"no strategy of {', '.join(sorted(names))} can run in all layers; set granularity to layer, or allow more"
        )
    fitting = [choice for choice in choices if choice.fits]
    if fitting:
        return min(fitting, key=lambda choice: (choice.seconds, choice.peak_bytes))
    return min(choices, key=lambda choice: (choice.peak_bytes, choice.seconds))


_Option = tuple[float, int, str]
"""Seconds, kept bytes, name."""


def _allowed(layers: LayerClass, cap: int) -> list[_Option]:
    """Strategies with a transient of at most `cap` that no other beats in both, fastest and fattest first."""
    options = sorted(
        (cost.seconds, cost.kept_bytes, name)
        for name, cost in layers.costs.items()
        if cost.transient_bytes <= cap and math.isfinite(cost.seconds)
    )
    front: list[_Option] = []
    for option in options:
        if not front or option[1] < front[-1][1]:
            front.append(option)
    return front


class _Knapsack:
    """One value of the largest transient: minimise seconds with kept bytes within `room`."""

    def __init__(
        self, classes: Sequence[LayerClass], options: list[list[_Option]], room: int, most_nodes: float
    ):
        self.counts, self.options, self.room = [layers.count for layers in classes], options, room
        self.most_nodes = most_nodes
        self.unproven_seconds = math.inf
        """A bound below all plans, where the search stopped early."""

    def solve(self, bound: float) -> list[dict[str, int]] | None:
        """Counts that take less than `bound` seconds, or None."""
        places = [0] * len(self.options)  # where each class is on its hull: the fastest to start with
        spare = self.room - sum(o[0][1] * n for o, n in zip(self.options, self.counts, strict=True))
        seconds = math.fsum(o[0][0] * n for o, n in zip(self.options, self.counts, strict=True))
        for slope, index, slow in self._steps():
            if spare >= 0 or seconds >= bound:
                break
            fast = places[index]
            saved = (self.options[index][fast][1] - self.options[index][slow][1]) * self.counts[index]
            if spare + saved < 0:
                spare += saved
                seconds += slope * saved
                places[index] = slow
                continue
            return self._split(places, slope, index, slow, seconds + slope * -spare, bound)
        if spare < 0 or seconds >= bound:
            return None
        return [{o[place][2]: n} for o, place, n in zip(self.options, places, self.counts, strict=True)]

    def _steps(self) -> list[tuple[float, int, int]]:
        """(seconds for a byte saved, class, place after) along all hulls, the cheapest bytes first."""
        steps = []
        for index, options in enumerate(self.options):
            place, last = 0, len(options) - 1
            while place < last:
                seconds, kept, _ = options[place]
                slope, neg = min(
                    ((o[0] - seconds) / (kept - o[1]), -i) for i, o in enumerate(options) if i > place
                )
                place = -neg
                steps.append((slope, index, place))
        return sorted(steps)

    def _split(
        self, places: list[int], slope: float, index: int, slow: int, relaxed: float, bound: float
    ) -> list[dict[str, int]] | None:
        """The relaxation takes `relaxed` seconds and splits class `index` between its place and `slow`."""
        fast_option, slow_option = self.options[index][places[index]], self.options[index][slow]
        search = _Search(self, places, slope, (index, fast_option, slow_option), relaxed, bound)
        search.run()
        if search.nodes > self.most_nodes:
            self.unproven_seconds = relaxed
        return search.best


class _Search:
    """Depth first over the counts of every choice that is not the relaxation's."""

    def __init__(
        self,
        knapsack: _Knapsack,
        places: list[int],
        slope: float,
        split: tuple[int, _Option, _Option],
        relaxed: float,
        bound: float,
    ):
        self.split_index, self.fast, self.slow = split
        self.bound, self.best, self.relaxed, self.nodes = bound, None, relaxed, 0
        self.step_bytes = self.fast[1] - self.slow[1]
        self.knapsack = knapsack
        base = [options[place] for options, place in zip(knapsack.options, places, strict=True)]
        base[self.split_index] = self.slow
        self.base = base
        self.spare = knapsack.room - sum(o[1] * n for o, n in zip(base, knapsack.counts, strict=True))
        # (reduced cost, class, option, bytes more than the class's base)
        self.others = sorted(
            (
                max(0.0, option[0] - base[index][0] + slope * (option[1] - base[index][1])),
                index,
                option,
                option[1] - base[index][1],
            )
            for index, options in enumerate(knapsack.options)
            for option in options
            if option not in (base[index], self.fast if index == self.split_index else None)
        )[::-1]  # the dearest first: few of them can be used, so the tree is narrow at the root

    def run(self) -> None:
        self._visit(0, list(self.knapsack.counts), self.spare, 0.0, [])

    def _visit(
        self, number: int, left: list[int], spare: int, reduced: float, used: list[tuple[int, _Option, int]]
    ):
        """`left`: layers of each class still at its base; `spare`: bytes that they leave, which may be negative."""
        self.nodes += 1
        if self.relaxed + reduced >= self.bound * (1 - _TOLERANCE) or self.nodes > self.knapsack.most_nodes:
            return
        if number == len(self.others):
            self._finish(left, spare, used)
            return
        cost, index, option, more_bytes = self.others[number]
        for count in range(left[index] + 1):
            if self.relaxed + reduced + cost * count >= self.bound * (1 - _TOLERANCE):
                break
            left[index] -= count
            more = [*used, (index, option, count)] if count else used
            self._visit(number + 1, left, spare - more_bytes * count, reduced + cost * count, more)
            left[index] += count

    def _finish(self, left: list[int], spare: int, used: list[tuple[int, _Option, int]]) -> None:
        """As many as fit of the split class's layers run the faster of its two."""
        if spare < 0:
            return
        fast = min(left[self.split_index], spare // self.step_bytes)
        counts: list[dict[str, int]] = [{option[2]: n} for option, n in zip(self.base, left, strict=True)]
        counts[self.split_index][self.slow[2]] -= fast
        counts[self.split_index][self.fast[2]] = fast
        seconds = [option[0] * n for option, n in zip(self.base, left, strict=True)]
        for index, option, n in used:
            counts[index][option[2]] = n
            seconds.append(option[0] * n)
        total = math.fsum([*seconds, fast * (self.fast[0] - self.slow[0])])
        if total < self.bound:
            self.bound = total
            self.best = [{name: n for name, n in given.items() if n} for given in counts]
