"""What one layer of one micro-batch costs under each strategy: seconds, bytes kept, bytes held for a moment.

Contract: `predict` is a pure function of (strategy, batch, length, documents) with the same result on every rank that
has the same `fingerprint()`. The analytical model divides closed forms by a cluster's rates: latency and bandwidth for
each collective, one after the other, with no overlap. Calibrated, each quantity of a strategy is instead
c0 closed form + c1 + c2 tokens + c3 pairs with c >= 0, which can only grow with the length; of time all four, as far as
the number of sizes can tell them apart, of kept bytes the last three, of transient ones the first.

Not covered: overlap of communication with compute, other than what a calibration has seen.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field, replace
from typing import Any, Protocol

from megatron_ext.sequence_parallel import closed_forms, memory_forms
from megatron_ext.sequence_parallel.closed_forms import PARTS, PHASES, Event
from megatron_ext.sequence_parallel.cluster import Cluster
from megatron_ext.sequence_parallel.layer_shape import LayerShape
from megatron_ext.sequence_parallel.least_squares import fit_relative
from megatron_ext.sequence_parallel.profile import Measurement

Documents = tuple[int, ...]
QUANTITIES = ("seconds", "kept_bytes", "transient_bytes")

WRONG_SHAPE = 0.05
"""Relative error at a measured length beyond which the closed form, scaled, is not trusted for others."""


@dataclass(frozen=True)
class Cost:
    """Of one layer and one micro-batch, forward and backward."""

    seconds: float
    kept_bytes: int
    """Held from forward to backward."""
    transient_bytes: int
    """The most on top of that while the layer runs."""


class CostModel(Protocol):
    """What a planner asks."""

    shape: LayerShape

    def predict(self, strategy: str, batch: int, length: int, documents: Documents | None = None) -> Cost: ...

    def fingerprint(self) -> str: ...


def pairs_of(batch: int, length: int, documents: Documents | None = None) -> int:
    """(query, key) pairs of a micro-batch without a mask; packed documents do not see one another."""
    if documents is None:
        return batch * length**2
    if sum(documents) != length:
        raise ValueError(
            f"documents hold {sum(documents)} tokens of {length}; allowed: their sum is the length"
        )
    return batch * sum(document**2 for document in documents)


@dataclass(frozen=True)
class Fit:
    """How one quantity of one strategy is predicted: non-negative coefficients of the closed form and of powers."""

    prior: float
    constant: float = 0.0
    tokens: float = 0.0
    pairs: float = 0.0

    def value(self, tokens: int, pairs: int, prior: float) -> float:
        return self.prior * prior + self.constant + self.tokens * tokens + self.pairs * pairs


_UNCALIBRATED = Fit(1.0)


@dataclass(frozen=True)
class AnalyticalModel:
    """Closed forms over a cluster's rates, or what a calibration put in their place."""

    shape: LayerShape
    cluster: Cluster
    fits: Mapping[tuple[str, str], Fit] = field(default_factory=dict)
    """By strategy and quantity."""

    def predict(self, strategy: str, batch: int, length: int, documents: Documents | None = None) -> Cost:
        tokens, pairs = batch * length, pairs_of(batch, length, documents)
        local = -(-tokens // self.shape.group_size)

        def value(quantity: str) -> float:
            fit = self.fits.get((strategy, quantity), _UNCALIBRATED)
            prior = _PRIORS[quantity](self, strategy, local, pairs) if fit.prior else 0.0
            return fit.value(tokens, pairs, prior)

        return Cost(value("seconds"), round(value("kept_bytes")), round(value("transient_bytes")))

    def calibrated(self, measurements: Iterable[Measurement]) -> AnalyticalModel:
        """This model with a fit for each strategy that was measured; the others keep the closed forms."""
        rows: dict[str, list[Measurement]] = defaultdict(list)
        for row in measurements:
            rows[row.strategy].append(row)
        prior = replace(self, fits={})
        fits = {
            (strategy, quantity): _fit(prior, of_strategy, quantity)
            for strategy, of_strategy in sorted(rows.items())
            for quantity in QUANTITIES
        }
        return replace(self, fits={**self.fits, **fits})

    def fingerprint(self) -> str:
        """Equal on two ranks: they predict, and so plan, alike."""
        return digest_of(
            {
                "kind": "analytical",
                "shape": self.shape.to_json(),
                "cluster": self.cluster.to_json(),
                "fits": [[*key, *astuple(fit)] for key, fit in sorted(self.fits.items())],
            }
        )


def _fit_seconds(columns: list[tuple[float, float, int, int]], values: list[float], sizes: int) -> Fit:
    """One or two sizes scale the closed form, three add a constant. That is enough where the closed form has the
    machine's shape; where it is `WRONG_SHAPE` off, as many terms as the sizes can tell apart, whichever fit best."""
    if sizes < 3:
        return Fit(*fit_relative([column[:1] for column in columns], values))
    fit = Fit(*fit_relative([column[:2] for column in columns], values))
    if sizes < 5 and all(
        abs(fit.value(tokens, pairs, prior) / value - 1) <= WRONG_SHAPE
        for (prior, _, tokens, pairs), value in zip(columns, values, strict=True)
    ):
        return fit
    return Fit(*fit_relative(columns, values, most=sizes - 1))


def digest_of(content: Any) -> str:
    """sha256 over canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _fit(prior: AnalyticalModel, rows: list[Measurement], quantity: str) -> Fit:
    values = [max(float(getattr(row, quantity)), 1e-12) for row in rows]
    priors = [float(getattr(prior.predict(row.strategy, row.batch, row.length), quantity)) for row in rows]
    columns = [(known, 1.0, row.tokens, row.pairs) for known, row in zip(priors, rows, strict=True)]
    sizes = len({(row.tokens, row.pairs) for row in rows})
    if quantity == "kept_bytes" and sizes >= 3:  # a polynomial, of which three sizes say all
        powers = [(1.0, row.tokens, row.pairs) for row in rows]
        return Fit(0.0, *fit_relative(powers, values))
    if quantity == "transient_bytes":
        # the largest of several terms: right where memory matters, at the longest
        longest = max(range(len(rows)), key=lambda place: (rows[place].pairs, rows[place].tokens))
        return Fit(values[longest] / priors[longest])
    return _fit_seconds(columns, values, sizes)


# -- the prior --------------------------------------------------------------------------------------------------------


def collective_seconds(event: Event, group_size: int, cluster: Cluster) -> float:
    """Latency and bandwidth; ring algorithms pay p - 1 latencies, messages and switched exchanges one."""
    steps = 1 if event.kind in ("send", "all_to_all", "exchange") else group_size - 1
    element = event.bytes / event.elements
    moved = closed_forms.wire_elements(event, group_size) * element
    return steps * cluster.link_latency + moved / cluster.link_bandwidth


def _seconds(model: AnalyticalModel, strategy: str, tokens: int, pairs: int) -> float:
    shape, cluster = model.shape, model.cluster
    events = closed_forms.all_collectives(shape, strategy, tokens)
    sent = sum(collective_seconds(event, shape.group_size, cluster) for event in events)
    linears = sum(
        closed_forms.gemm_flops(shape, strategy, part, phase, tokens) for part in PARTS for phase in PHASES
    )
    attention = sum(closed_forms.attention_flops(shape, strategy, phase, pairs) for phase in PHASES)
    launched = closed_forms.kernel_launches(shape, strategy) * cluster.launch_seconds
    touched = closed_forms.touched_elements(shape, strategy, tokens) * shape.element_bytes
    computed = (
        linears / cluster.gemm_flops
        + attention / cluster.attention_flops
        + touched / cluster.memory_bandwidth
    )
    return sent + max(computed, launched)


def _kept_bytes(model: AnalyticalModel, strategy: str, tokens: int, pairs: int) -> float:
    return memory_forms.kept_bytes(model.shape, strategy, tokens, pairs)


def _transient_bytes(model: AnalyticalModel, strategy: str, tokens: int, pairs: int) -> float:
    return memory_forms.transient_bytes(model.shape, strategy, tokens, pairs)


_PRIORS = {"seconds": _seconds, "kept_bytes": _kept_bytes, "transient_bytes": _transient_bytes}
