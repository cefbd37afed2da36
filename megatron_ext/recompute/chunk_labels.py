"""All ways to run one chunk that may be part of the best plan of its stage, at given prices of memory.

A label's excess is what its seconds and priced bytes exceed those of the chunk's cheapest plan by. Layers of a class
are added one at a time; of states with as many layers, one that keeps no less and takes no less time than another goes.
Mixed labels, in which one layer changes between micro-batches, are made of the same states with one layer fewer.

Contract: pure; of the labels with an excess within the limit only those are left out that another one, which is not,
equals or beats in seconds and at every corner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

from megatron_ext.recompute.stage_bound import Chunk, Prices, cheapest
from megatron_ext.recompute.stage_memory import Option, heavy_passes


@dataclass(frozen=True)
class Mixed:
    """A layer of a group that runs `light` for some micro-batches of each window, else `heavy`."""

    group: int
    heavy: Option
    light: Option
    micro_batches: int

    def seconds(self, window: int) -> float:
        """The mean."""
        share = self.micro_batches / window
        return self.heavy.seconds * (1 - share) + self.light.seconds * share

    def usage(self, chunk: Chunk) -> list[int]:
        """Bytes kept at each corner."""
        heavy = [heavy_passes(o, chunk.window, self.micro_batches) for o in chunk.open]
        more = self.heavy.kept_bytes - self.light.kept_bytes
        return [o * self.light.kept_bytes + h * more for o, h in zip(chunk.open, heavy, strict=True)]


@dataclass(frozen=True)
class Label:
    """A way to run a chunk."""

    excess: float
    seconds: float
    usage: tuple[int, ...]
    """Bytes at each corner."""
    picks: tuple[tuple[Option, ...], ...]
    """By group; one fewer than it has layers where one is mixed."""
    mixed: Mixed | None = None


_State = tuple[int, float, float, tuple]
"""Kept bytes, seconds, excess; options of a group, or of each group."""


def label_of(chunk: Chunk, picks: Sequence[Sequence[Option]], mixed: Mixed | None = None) -> Label:
    """Without its excess, which depends on prices."""
    options = [option for row in picks for option in row]
    seconds, kept = sum(o.seconds for o in options), sum(o.kept_bytes for o in options)
    used = options if mixed is None else [*options, mixed.heavy, mixed.light]
    usage = chunk.usage(kept, max([chunk.caps[0], *(option.transient_bytes for option in used)]))
    if mixed is not None:
        seconds += mixed.seconds(chunk.window)
        usage = tuple(map(sum, zip(usage, mixed.usage(chunk), strict=True)))
    return Label(0.0, seconds, usage, tuple(map(tuple, picks)), mixed)


def labels_of(
    chunk: Chunk, prices: Prices, limit: float, *, fractional: bool, spend: Callable[[int], None]
) -> list[Label]:
    """Those with an excess up to `limit`, the least first; `spend` is told how many states are looked at."""
    kept_price, cap_price = prices.of_chunk(chunk)
    base, _ = cheapest(chunk, kept_price, cap_price)
    found: list[Label] = []
    stairs: list[tuple[int, float]] = []  # kept bytes and seconds of labels with smaller transients
    for number, cap in enumerate(chunk.caps):
        at_cap = _AtCap(chunk, prices, number, limit, base, spend)
        if at_cap.left < 0:
            continue
        for kept, seconds, excess, picks in at_cap.joined([fronts[-1] for fronts in at_cap.fronts]):
            if not at_cap.reached_by(picks) or any(k <= kept and s <= seconds for k, s in stairs):
                continue
            stairs.append((kept, seconds))
            found.append(Label(at_cap.floor + excess, seconds, chunk.usage(kept, cap), picks))
        if fractional:
            found.extend(at_cap.mixed())
    return sorted(found, key=attrgetter("excess"))


class _AtCap:
    """Labels of a chunk whose largest transient is one of its caps."""

    def __init__(
        self,
        chunk: Chunk,
        prices: Prices,
        number: int,
        limit: float,
        base: float,
        spend: Callable[[int], None],
    ):
        self.chunk, self.prices, self.number, self.spend = chunk, prices, number, spend
        self.cap = chunk.caps[number]
        self.kept_price, cap_price = prices.of_chunk(chunk)
        self.allowed = chunk.allowed_at(number)
        self.least = [min(map(self._value, options)) for options in self.allowed]
        shared = sum(value * group.count for value, group in zip(self.least, chunk.groups, strict=True))
        self.floor = max(0.0, self.cap * cap_price + shared - base)
        """Excess of the cheapest label."""
        self.left = limit - self.floor
        self.fronts = [self._fronts(number) for number in range(len(chunk.groups))] if self.left >= 0 else []
        """By group, then by number of layers."""

    def _value(self, option: Option) -> float:
        return option.seconds + self.kept_price * option.kept_bytes

    def _fronts(self, group: int) -> list[list[_State]]:
        steps = [(self._value(option) - self.least[group], option) for option in self.allowed[group]]
        steps = [step for step in steps if step[0] <= self.left]
        fronts: list[list[_State]] = [[(0, 0.0, 0.0, ())]]
        for _ in range(self.chunk.groups[group].count):
            self.spend(len(fronts[-1]) * len(steps))
            fronts.append(
                self._front(
                    (kept + option.kept_bytes, seconds + option.seconds, excess + more, (*picks, option))
                    for kept, seconds, excess, picks in fronts[-1]
                    for more, option in steps
                    if excess + more <= self.left
                )
            )
        return fronts

    def _front(self, states: Iterator[_State]) -> list[_State]:
        """Those that no other equals or beats in both bytes and seconds, the leanest first."""
        ordered = sorted(states, key=lambda state: state[:2])
        front: list[_State] = []
        for state in ordered:
            if not front or state[1] < front[-1][1]:
                front.append(state)
        return front

    def joined(self, fronts: Sequence[list[_State]]) -> list[_State]:
        """States of all groups together."""
        states: list[_State] = [(0, 0.0, 0.0, ())]
        for front in fronts:
            self.spend(len(states) * len(front))
            states = self._front(
                (kept + k, seconds + s, excess + e, (*picks, p))
                for kept, seconds, excess, picks in states
                for k, s, e, p in front
                if excess + e <= self.left
            )
        return states

    def reached_by(self, picks: Sequence[Sequence[Option]], *more: Option) -> bool:
        """False if a smaller cap would do: there the label is found with less excess."""
        used = [option for options in (*picks, more) for option in options]
        return self.number == 0 or any(option.transient_bytes == self.cap for option in used)

    def mixed(self) -> Iterator[Label]:
        for group in range(len(self.chunk.groups)):
            items = list(self._mixed_layers(group))
            if not items:
                continue
            rest = self.joined([f[-2] if g == group else f[-1] for g, f in enumerate(self.fronts)])
            self.spend(len(rest) * len(items))
            for more, mean, usage, item in items:
                for kept, seconds, excess, picks in rest:
                    if excess + more <= self.left and self.reached_by(picks, item.heavy, item.light):
                        used = tuple(map(sum, zip(self.chunk.usage(kept, self.cap), usage, strict=True)))
                        yield Label(self.floor + excess + more, seconds + mean, used, picks, item)

    def _mixed_layers(self, group: int) -> Iterator[tuple[float, float, list[int], Mixed]]:
        """Excess, mean seconds and usage of one layer that runs two options, of which neither beats the other."""
        window, opens, least = self.chunk.window, self.chunk.open, self.least[group]
        for count in range(1, window):
            paid = sum(
                price * heavy_passes(o, window, count)
                for price, o in zip(self.prices.by_corner, opens, strict=True)
            )
            for heavy in self.allowed[group]:
                for light in self.allowed[group]:
                    more = heavy.kept_bytes - light.kept_bytes
                    if more <= 0 or light.seconds <= heavy.seconds:
                        continue
                    mixed = Mixed(group, heavy, light, count)
                    mean = mixed.seconds(window)
                    excess = mean + self.kept_price * light.kept_bytes + paid * more - least
                    if excess <= self.left:
                        yield excess, mean, mixed.usage(self.chunk), mixed
