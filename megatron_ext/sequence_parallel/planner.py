"""Which strategy each layer runs for a micro-batch: a table of costs and a budget -> the fastest plan that fits.

Contract: pure and exact. Kept bytes add up over layers and of the transient ones the largest counts, so for layers that
are alike only the number of each strategy matters, not the order (the paper searches lists). See `choose_counts`.
Deterministic: ranks with the same costs and budget, asked in the same order, hold the same plan.

Not covered: seconds that a change of strategy between layers would cost (there is none to pay: no weight moves).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megatron_ext.sequence_parallel.choice import Choice, LayerClass, choose_counts, choose_one, evaluate
from megatron_ext.sequence_parallel.cost_model import Cost, CostModel, Documents
from megatron_ext.sequence_parallel.layer_shape import LayerShape
from megatron_ext.sequence_parallel.names import STRATEGIES
from megatron_ext.sequence_parallel.recomputed import recomputed_cost

CACHED_SIZES = 4096
"""Micro-batch sizes after which the caches start anew: documents could make every one a new one."""


@dataclass(frozen=True)
class Plan:
    """One strategy for each layer of a model chunk."""

    names: tuple[str, ...]
    seconds: float
    """Predicted, of all layers, forward and backward."""
    peak_bytes: int
    """Predicted, of all layers' activations."""
    fits: bool
    """False: nothing does, and this is the plan with the least memory."""

    def digest(self) -> str:
        """Twelve hex digits to compare between ranks: what would be run, not the predictions."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(f"{self.fits}:{','.join(self.names)}".encode()).hexdigest()[:12]


@dataclass(frozen=True)
class LayerKind:
    """Layers that are alike, by their places in the model chunk."""

    model: CostModel
    layers: tuple[int, ...]
    strategies: tuple[str, ...] = STRATEGIES
    """Allowed; one: it is fixed."""
    recomputed_together: int = 0
    """Layers that the script recomputes at once, 0: none. See :mod:`.recomputed`."""


class Planner:
    """Plans for one model chunk. Costs, plans and what a kept plan costs are remembered for each micro-batch size."""

    def __init__(
        self,
        kinds: Sequence[LayerKind],
        budget_bytes: int,
        *,
        granularity: Literal["layer", "model"] = "layer",
        smoothing: float = 0.02,
        outside_bytes: Callable[[int, int], int] = lambda batch, length: 0,
    ):
        """`budget_bytes`: for activations. `outside_bytes` of (batch, length): held outside the layers while all that
        they keep is there, such as logits; like a transient, only the largest counts."""
        self.kinds, self.budget_bytes = tuple(kinds), budget_bytes
        self.granularity, self.smoothing, self._outside_bytes = granularity, smoothing, outside_bytes
        self.num_layers = sum(len(kind.layers) for kind in self.kinds)
        if sorted(layer for kind in self.kinds for layer in kind.layers) != list(range(self.num_layers)):
            raise ValueError("kinds must name every layer from 0 once; give each layer's place to one kind")
        self.previous: Plan | None = None
        self._classes: dict[tuple, tuple[LayerClass, ...]] = {}
        self._plans: dict[tuple, Plan] = {}
        self._kept: dict[tuple, Plan] = {}

    def plan(self, batch: int, length: int, documents: Documents | None = None) -> Plan:
        """The best plan, or the previous call's where it still fits and costs less than `smoothing` more."""
        key = (batch, length, documents)
        best = self.best(batch, length, documents)
        previous = self.previous
        if previous is not None and best.fits and previous.names != best.names:
            again = self._kept.get((key, previous.names))
            if again is None:
                again = self._kept[key, previous.names] = self._of_names(key, previous.names)
            if again.fits and again.seconds < (1 + self.smoothing) * best.seconds:
                best = again
        self.previous = best
        return best

    def best(self, batch: int, length: int, documents: Documents | None = None) -> Plan:
        """A pure function of the micro-batch's size. ValueError where some layers can run none of their strategies."""
        key = (batch, length, documents)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= CACHED_SIZES:
                for cache in (self._plans, self._classes, self._kept):
                    cache.clear()
            classes = self.classes(batch, length, documents)
            choose = choose_counts if self.granularity == "layer" else choose_one
            plan = self._plans[key] = self._plan_of(classes, choose(classes, self.budget_bytes))
        return plan

    def classes(self, batch: int, length: int, documents: Documents | None = None) -> tuple[LayerClass, ...]:
        """The table of costs that the decision is made from."""
        key = (batch, length, documents)
        if key not in self._classes:
            outside = self._outside_bytes(batch, length)
            self._classes[key] = tuple(
                LayerClass(len(kind.layers), _costs(kind, batch, length, documents, outside))
                for kind in self.kinds
            )
        return self._classes[key]

    def _plan_of(self, classes: Sequence[LayerClass], choice: Choice) -> Plan:
        names = [""] * self.num_layers
        for kind, layers, counts in zip(self.kinds, classes, choice.counts, strict=True):
            for layer, name in zip(kind.layers, in_order(layers.costs, counts), strict=True):
                names[layer] = name
        return Plan(tuple(names), choice.seconds, choice.peak_bytes, choice.fits)

    def _of_names(self, key: tuple, names: tuple[str, ...]) -> Plan:
        """What a plan made for another size costs at this one; it does not fit where a strategy can't run."""
        classes = self.classes(*key)
        counts = []
        for kind, layers in zip(self.kinds, classes, strict=True):
            used = [names[layer] for layer in kind.layers]
            if not set(used) <= set(layers.costs):
                return Plan(names, float("inf"), 0, False)
            counts.append({name: used.count(name) for name in sorted(set(used))})
        choice = evaluate(classes, counts, self.budget_bytes)
        return Plan(names, choice.seconds, choice.peak_bytes, choice.fits)


def runnable(shape: LayerShape, strategies: Sequence[str], batch: int, length: int) -> list[str]:
    """Those that can run these sizes; ValueError with each one's reason where none can."""
    obstacles = {name: shape.obstacle(name, batch, length) for name in strategies}
    able = [name for name, obstacle in obstacles.items() if obstacle is None]
    if not able:
        raise ValueError(
            f"no strategy of {', '.join(strategies)} can run {batch} x {length} tokens: "
            + "; ".join(filter(None, obstacles.values()))
        )
    return able


def in_order(costs: Mapping[str, Cost], counts: Mapping[str, int]) -> list[str]:
    """Names of layers that are alike, the largest transient first.

    Layer l peaks at what layers up to l keep plus its own transient. Of two neighbours the second peaks on top of what
    both keep whichever comes first, so the one with the smaller transient belongs there.
    """
    ordered = sorted(
        counts,
        key=lambda name: (-costs[name].transient_bytes, -costs[name].kept_bytes, STRATEGIES.index(name)),
    )
    return [name for name in ordered for _ in range(counts[name])]


def _costs(
    kind: LayerKind, batch: int, length: int, documents: Documents | None, outside: int
) -> dict[str, Cost]:
    able = runnable(kind.model.shape, kind.strategies, batch, length)
    costs = {name: kind.model.predict(name, batch, length, documents) for name in able}
    if together := kind.recomputed_together:
        shape = kind.model.shape
        costs = {name: recomputed_cost(cost, shape, batch * length, together) for name, cost in costs.items()}
    return {
        name: Cost(cost.seconds, cost.kept_bytes, max(cost.transient_bytes, outside))
        for name, cost in costs.items()
    }
