"""How much switching is worth on a simulated machine: regret, gains, lengths, switches.

Contract: pure; one case is a truth (not the planner's model), a number of layers, a memory limit and a list of
lengths. The planner is calibrated on at most eight profiled lengths of the truth, with measurement noise, or on those
that a job profiles while its sequences come, and is then charged what its plans cost in the truth. The oracle decides
on the truth itself, for each length, under the same limit; regret is the planner's time over the oracle's. Every figure
is simulated.

Not covered: the optimizer's step, time between micro-batches, real fragmentation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from megatron_ext.sequence_parallel.choice import Choice, LayerClass, choose_counts, evaluate
from megatron_ext.sequence_parallel.cost_model import CostModel
from megatron_ext.sequence_parallel.memory_forms import logits_bytes
from megatron_ext.sequence_parallel.planner import LayerKind, Planner
from megatron_ext.sequence_parallel.profile import Measurement
from megatron_ext.sequence_parallel.profile_sizes import REACH, first_lengths, more_lengths
from megatron_ext.sequence_parallel.truths import Truth

K = 1024
EDGES = (K // 2, 4 * K, 8 * K, 16 * K, 32 * K, 64 * K, 128 * K)
GRAIN = 512
"""Lengths are padded to a multiple of this, as the paper's are."""
PROFILED = 8
"""Lengths that a planner sees."""


@dataclass(frozen=True)
class Distribution:
    """Share of sequences in the buckets that `EDGES` begin, and the longest; table of the ParaDySe paper, section 4."""

    name: str
    shares: tuple[float, ...]
    longest: int
    vocabulary: int

    def draw(self, count: int, seed: int) -> list[int]:
        """Lengths, uniform in their logarithm within a bucket (the paper gives no more)."""
        generator = np.random.default_rng(seed)
        bounds = np.log([*EDGES, self.longest])
        buckets = generator.choice(len(EDGES), size=count, p=np.asarray(self.shares) / sum(self.shares))
        drawn = np.exp(generator.uniform(bounds[buckets], bounds[buckets + 1]))
        return [math.ceil(length / GRAIN) * GRAIN for length in drawn]


def profiled_lengths(longest: int, count: int = PROFILED) -> list[int]:
    """From 1K to the longest of the data, in equal ratios: a single layer of it fits where all layers might not."""
    return [round(length / GRAIN) * GRAIN for length in np.geomspace(K, longest, count)]


DISTRIBUTIONS = {
    "GitHubCode": Distribution("GitHubCode", (65.7, 14.5, 9.8, 5.1, 2.7, 1.1, 1.1), 309 * K, 50304),
    "GRCh38": Distribution("GRCh38", (3.5, 26.4, 28.7, 21.2, 11.9, 5.5, 1.9), 624 * K, 128),
}


@dataclass(frozen=True)
class Case:
    """One simulated job."""

    truth: Truth
    layers: int
    limit_bytes: int
    """For activations, of one device."""
    vocabulary: int
    replicas: int = 1
    accumulation: int = 4
    """Micro-batches of a replica in a step; only with several replicas, which then wait for the slowest."""
    profile_noise: float = 0.02

    def outside_bytes(self, batch: int, length: int) -> int:
        shape = self.truth.shape
        return logits_bytes(batch * length // shape.group_size, self.vocabulary, shape.element_bytes)

    def classes(self, length: int) -> tuple[LayerClass, ...]:
        """The truth's table of costs."""
        outside = self.outside_bytes(1, length)
        costs = {name: self.truth.cost(name, length) for name in self.truth.strategies}
        table = {n: replace(c, transient_bytes=max(c.transient_bytes, outside)) for n, c in costs.items()}
        return (LayerClass(self.layers, table),)

    def charged(self, length: int, counts: dict[str, int]) -> Choice:
        return evaluate(self.classes(length), (counts,), self.limit_bytes)

    def single(self, name: str) -> Callable[[int], Choice]:
        return lambda length: self.charged(length, {name: self.layers})

    def oracle(self, length: int) -> Choice:
        return choose_counts(self.classes(length), self.limit_bytes, math.inf if self.layers <= 32 else 10**5)

    def profile(self, lengths: Sequence[int], seed: int = 1) -> list[Measurement]:
        """What a run of one layer would have measured."""
        generator = np.random.default_rng(seed)
        rows = []
        for name in self.truth.strategies:
            for length in lengths:
                cost = self.truth.cost(name, length)
                seconds = cost.seconds * math.exp(generator.normal(0.0, self.profile_noise))
                rows.append(Measurement(name, 1, length, seconds, cost.kept_bytes, cost.transient_bytes))
        return rows

    def planner(self, model: CostModel, granularity: str = "layer", smoothing: float = 0.02) -> Planner:
        kind = LayerKind(model, tuple(range(self.layers)), self.truth.strategies)
        return Planner(
            [kind],
            self.limit_bytes,
            granularity=granularity,
            smoothing=smoothing,
            outside_bytes=self.outside_bytes,
        )


@dataclass(frozen=True)
class Run:
    """A policy over a list of lengths: what each sequence cost in the truth."""

    case: Case
    lengths: tuple[int, ...]
    choices: tuple[Choice, ...]

    @cached_property
    def trained(self) -> np.ndarray:
        """Which sequences fitted."""
        return np.array([choice.fits for choice in self.choices])

    def seconds(self, where: np.ndarray) -> float:
        """Wall-clock time of the sequences `where`; several replicas wait for the slowest in each step."""
        each = np.array([choice.seconds for choice in self.choices])[where]
        if self.case.replicas == 1:
            return float(each.sum())
        step = self.case.replicas * self.case.accumulation
        padded = np.zeros(-(-len(each) // step) * step)
        padded[: len(each)] = each
        return float(padded.reshape(-1, self.case.accumulation, self.case.replicas).sum(1).max(1).sum())

    @property
    def switches(self) -> int:
        """Changes from one sequence's plan to the next's."""
        return sum(a.counts != b.counts for a, b in zip(self.choices, self.choices[1:], strict=False))


def run(case: Case, lengths: Sequence[int], policy: Callable[[int], Choice]) -> Run:
    """`policy` is asked in the order of `lengths`."""
    return Run(case, tuple(lengths), tuple(policy(length) for length in lengths))


def planned(case: Case, planner: Planner) -> Callable[[int], Choice]:
    """A policy: the planner's plan, charged what it costs in the truth."""

    def policy(length: int) -> Choice:
        names = planner.plan(1, length).names
        return case.charged(length, {name: names.count(name) for name in set(names)})

    return policy


class Growing:
    """A policy: plans of a job that begins with nothing, and profiles what it has to while its sequences come."""

    def __init__(self, case: Case, model_of: Callable[[Sequence[Measurement]], CostModel], seed: int = 1):
        self._case, self._model_of, self._seed = case, model_of, seed
        self._rows: list[Measurement] = []
        self._planner: Planner | None = None
        self._reach = 0
        self.profiled: list[int] = []
        """Lengths, as they came."""

    def __call__(self, length: int) -> Choice:
        ranks = self._case.truth.shape.group_size
        if self._planner is None:
            self._profile(first_lengths(length, ranks))
        elif length > self._reach:
            self._profile(more_lengths(length, ranks, self._reach))
        assert self._planner is not None
        return planned(self._case, self._planner)(length)

    def _profile(self, lengths: list[int]) -> None:
        self._rows += self._case.profile(lengths, self._seed + len(self.profiled))
        self.profiled += lengths
        previous = self._planner.previous if self._planner else None
        self._planner = self._case.planner(self._model_of(self._rows))
        self._planner.previous = previous
        self._reach = REACH * lengths[0]


def longest(fits: Callable[[int], bool], most: int = 4096 * K) -> int:
    """The longest length up to `most`, of those that are multiples of `GRAIN`, by bisection: costs grow with it."""
    low, high = 0, most // GRAIN
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * GRAIN) else (low, middle - 1)
    return low * GRAIN
