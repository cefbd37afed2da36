"""Prices of memory for a stage: a bound below the seconds of every plan, which the solver's search is steered by.

A price for each corner (seconds for a byte) turns its limit into a cost, and the chunks come apart: each takes its
cheapest plan by itself. What those cost, less the prices of the room, is at most what any plan that fits takes
(Lagrange), whatever the prices. The best prices are those of a linear program over mixtures of chunk plans, solved here
by columns: a simplex step, then the cheapest plan of each chunk at its prices.

Contract: pure; the bound is valid however early the steps stop. Bytes are counted in units of the largest room.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

from megatron_ext.recompute.stage_memory import LayerClass, Option, StageProblem

MOST_STEPS = 400
"""Of the simplex method; a handful for a corner."""
_TOLERANCE = 1e-10


class Group:
    """The layers of one class in one chunk; options that another beats in all three respects are left out."""

    def __init__(self, layers: LayerClass, places: list[int]):
        self.layers, self.places, self.count = layers, places, len(places)
        self.options: list[Option] = []
        fastest_first = sorted(
            layers.options, key=lambda o: (o.seconds, o.kept_bytes, o.transient_bytes)
        )  # stable: of equal ones the first stays
        for option in fastest_first:
            if not any(
                o.kept_bytes <= option.kept_bytes and o.transient_bytes <= option.transient_bytes
                for o in self.options
            ):
                self.options.append(option)
        self.options.sort(key=lambda option: option.transient_bytes)


class Chunk:
    """A chunk's groups, what its largest transient may be, and what a byte of it weighs at each corner."""

    def __init__(self, problem: StageProblem, number: int):
        layers = problem.chunks[number]
        places: dict[LayerClass, list[int]] = {}
        for place, layer in enumerate(layers.classes):
            places.setdefault(layer, []).append(place)
        self.groups = [Group(layer, where) for layer, where in places.items()]
        self.window = problem.window[number]
        self.open = [corner.open[number] for corner in problem.corners]
        self.runs = [corner.running == number for corner in problem.corners]
        least = max([layers.outside_transient_bytes, *(g.options[0].transient_bytes for g in self.groups)])
        every = {o.transient_bytes for g in self.groups for o in g.options}
        self.caps = [least, *sorted(t for t in every if t > least)]
        self.allowed = self._allowed()
        """By group and cap: so many of the options, from the first."""

    def _allowed(self) -> list[list[int]]:
        return [
            [sum(option.transient_bytes <= cap for option in group.options) for cap in self.caps]
            for group in self.groups
        ]

    def allowed_at(self, cap: int) -> list[list[Option]]:
        """The options of each group, at a cap given by its number."""
        return [g.options[: counts[cap]] for g, counts in zip(self.groups, self.allowed, strict=True)]

    def one_cap_each(self) -> list[Chunk]:
        """The chunk again for each cap, with no other: a plan may have less than its cap, but not more."""
        chunks = []
        for cap in self.caps:
            chunk = copy(self)
            chunk.caps = [cap]
            chunk.allowed = chunk._allowed()
            chunks.append(chunk)
        return chunks

    def usage(self, kept: int, cap: int) -> tuple[int, ...]:
        """Bytes at each corner."""
        return tuple(o * kept + (cap if runs else 0) for o, runs in zip(self.open, self.runs, strict=True))


@dataclass(frozen=True)
class ChunkPlan:
    """Seconds, and bytes kept and transient, of a chunk whose groups each run one option, which are `picks`."""

    seconds: float
    kept: int
    cap: int
    picks: tuple[Option, ...]


@dataclass(frozen=True)
class Prices:
    """Seconds for a byte at each corner, and the bound that they give."""

    by_corner: tuple[float, ...]
    bound: float

    def of_chunk(self, chunk: Chunk) -> tuple[float, float]:
        """Of a byte that the chunk keeps, and of one of its transient."""
        kept = sum(price * o for price, o in zip(self.by_corner, chunk.open, strict=True))
        return kept, sum(price for price, runs in zip(self.by_corner, chunk.runs, strict=True) if runs)


def cheapest(chunk: Chunk, kept_price: float, cap_price: float) -> tuple[float, ChunkPlan]:
    """The plan of a chunk with the least seconds and priced bytes, and those."""
    values = [cap * cap_price for cap in chunk.caps]
    picked: list[list[Option]] = [[] for _ in chunk.caps]
    for group, counts in zip(chunk.groups, chunk.allowed, strict=True):
        best, best_value, seen = group.options[0], float("inf"), 0
        for number, allowed in enumerate(counts):
            for option in group.options[seen:allowed]:
                value = option.seconds + kept_price * option.kept_bytes
                if value < best_value:
                    best, best_value = option, value
            seen = allowed
            values[number] += best_value * group.count
            picked[number].append(best)
    value = min(values)
    number = values.index(value)
    picks = tuple(picked[number])
    pairs = list(zip(picks, chunk.groups, strict=True))
    seconds = sum(pick.seconds * group.count for pick, group in pairs)
    kept = sum(pick.kept_bytes * group.count for pick, group in pairs)
    return value, ChunkPlan(seconds, kept, chunk.caps[number], picks)


def best_prices(chunks: Sequence[Chunk], room: Sequence[int], start: Sequence[ChunkPlan]) -> Prices:
    """Prices with the highest bound; the plans of `start`, one for each chunk, must fit the room of all corners."""
    unit, corners = float(max(1, *room)), len(room)
    tolerance = _TOLERANCE * sum(plan.seconds for plan in start)

    def column(number: int, plan: ChunkPlan) -> list[float]:
        mixture = [float(number == other) for other in range(len(chunks))]
        return [size / unit for size in chunks[number].usage(plan.kept, plan.cap)] + mixture

    basis = _Basis(
        [size / unit for size in room],
        [column(number, plan) for number, plan in enumerate(start)],
        [plan.seconds for plan in start],
    )
    best = Prices((0.0,) * corners, sum(cheapest(chunk, 0.0, 0.0)[0] for chunk in chunks))
    for _ in range(MOST_STEPS):
        duals = basis.duals()
        dearest = max(duals[:corners])
        if dearest > tolerance:  # a negative price: the corner need not be full
            corner = duals.index(dearest)
            if not basis.enter([float(corner == row) for row in range(len(duals))], 0.0):
                break
            continue
        prices = Prices(tuple(max(0.0, -dual) / unit for dual in duals[:corners]), 0.0)
        found = [cheapest(chunk, *prices.of_chunk(chunk)) for chunk in chunks]
        paid = sum(price * size for price, size in zip(prices.by_corner, room, strict=True))
        bound = sum(value for value, _ in found) - paid
        if bound > best.bound:
            best = Prices(prices.by_corner, bound)
        gains = [duals[corners + number] - value for number, (value, _) in enumerate(found)]
        number = max(range(len(chunks)), key=gains.__getitem__)
        plan = found[number][1]
        if gains[number] <= tolerance or not basis.enter(column(number, plan), plan.seconds):
            break
    return best


class _Basis:
    """The simplex method with an explicit inverse: a row for each corner, then one for each chunk's mixture."""

    def __init__(self, room: list[float], columns: list[list[float]], seconds: list[float]):
        """Slacks at the corners, and one plan for each chunk."""
        corners, size = len(room), len(room) + len(columns)
        self.inverse = [[float(row == column) for column in range(size)] for row in range(size)]
        self.values = [*room, *(1.0 for _ in columns)]
        self.costs = [*(0.0 for _ in room), *seconds]
        for number, column in enumerate(columns):
            for row in range(corners):
                self.inverse[row][corners + number] = -column[row]
                self.values[row] -= column[row]

    def duals(self) -> list[float]:
        totals = [0.0] * len(self.costs)
        for cost, row in zip(self.costs, self.inverse, strict=True):
            if cost:
                totals = [total + cost * entry for total, entry in zip(totals, row, strict=True)]
        return totals

    def enter(self, column: list[float], cost: float) -> bool:
        """Bring a column in for the one that it drives to zero first; False if rounding leaves none."""
        entries = [(place, entry) for place, entry in enumerate(column) if entry]
        moved = [sum(entry * row[place] for place, entry in entries) for row in self.inverse]
        ratios = [
            (max(0.0, value) / by, -by, row)
            for row, (value, by) in enumerate(zip(self.values, moved, strict=True))
            if by > _TOLERANCE
        ]
        if not ratios:
            return False
        step, _, leaving = min(ratios)
        pivot = [entry / moved[leaving] for entry in self.inverse[leaving]]
        for row, by in enumerate(moved):
            if row != leaving and by:
                self.inverse[row] = [e - by * p for e, p in zip(self.inverse[row], pivot, strict=True)]
                self.values[row] -= by * step
        self.inverse[leaving], self.values[leaving], self.costs[leaving] = pivot, step, cost
        return True
