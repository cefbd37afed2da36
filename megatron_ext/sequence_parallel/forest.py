"""The paper's cost model as an option: a forest inside the profiled range, a polynomial beyond it (its section on the
hybrid cost model: 50 trees of depth 10, seed 42; degree 1 to 3 by Akaike's criterion).

Contract: one forest for each strategy and quantity, over (tokens, pairs), so that batches and packed documents are
covered; monotone in both by the forest's own constraint and by polynomials without negative coefficients. Saved as its
measurements and fitted anew when loaded, which is deterministic.

Beside the paper: of bytes the larger of forest and polynomial counts everywhere, because a stair that is too low would
end in an out-of-memory error.

Not covered: a strategy without measurements is refused. A forest is a staircase: with eight profiled lengths it misses
the time of others by half, and the calibrated closed forms are the better model. The paper profiles every length of its
data.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from megatron_ext.sequence_parallel.cost_model import QUANTITIES, Cost, Documents, digest_of, pairs_of
from megatron_ext.sequence_parallel.layer_shape import LayerShape
from megatron_ext.sequence_parallel.least_squares import fit_relative, relative_error
from megatron_ext.sequence_parallel.profile import Measurement

TREES, DEPTH, SEED = 50, 10, 42
DEGREES = (1, 2, 3)


class ForestModel:
    """Fitted when made: about a tenth of a second for each strategy."""

    def __init__(self, shape: LayerShape, measurements: Iterable[Measurement]):
        self.shape, self.measurements = shape, tuple(measurements)
        self._version, regressor = _scikit_learn()
        rows: dict[str, list[Measurement]] = defaultdict(list)
        for row in self.measurements:
            rows[row.strategy].append(row)
        self._ranges = {
            name: (max(r.tokens for r in of), max(r.pairs for r in of)) for name, of in rows.items()
        }
        self._curves = {
            (name, quantity): _Curve(of, quantity, regressor)
            for name, of in rows.items()
            for quantity in QUANTITIES
        }

    def predict(self, strategy: str, batch: int, length: int, documents: Documents | None = None) -> Cost:
        if strategy not in self._ranges:
            raise ValueError(
                f"strategy {strategy!r} has no measurements; allowed with cost_model.kind forest: "
                f"{', '.join(sorted(self._ranges))}; profile it, leave it out, or use analytical"
            )
        tokens, pairs = batch * length, pairs_of(batch, length, documents)
        most_tokens, most_pairs = self._ranges[strategy]
        beyond = tokens > most_tokens or pairs > most_pairs
        seconds, kept, transient = (
            self._curves[strategy, quantity].value(tokens, pairs, beyond) for quantity in QUANTITIES
        )
        return Cost(seconds, round(kept), round(transient))

    def fingerprint(self) -> str:
        """Equal on two ranks: they fit the same model, with the same version of scikit-learn."""
        return digest_of(
            {
                "kind": "forest",
                "scikit-learn": self._version,
                "shape": self.shape.to_json(),
                "measurements": [asdict(row) for row in self.measurements],
            }
        )


class _Curve:
    """One quantity of one strategy."""

    def __init__(self, rows: list[Measurement], quantity: str, regressor: Any):
        values = [max(float(getattr(row, quantity)), 1e-12) for row in rows]
        fitted = regressor(
            n_estimators=TREES, max_depth=DEPTH, random_state=SEED, n_jobs=1, monotonic_cst=[1, 1]
        ).fit([(row.tokens, row.pairs) for row in rows], values)
        self._trees = [_Tree(estimator.tree_) for estimator in fitted.estimators_]
        self._polynomial = _best_polynomial(rows, values)
        self._timed = quantity == "seconds"

    def value(self, tokens: int, pairs: int, beyond: bool) -> float:
        place = (float(np.float32(tokens)), float(np.float32(pairs)))  # as scikit-learn compares
        inside = math.fsum(tree.value(place) for tree in self._trees) / len(self._trees)
        if not beyond and self._timed:
            return inside
        powers = _powers(tokens, pairs)
        return max(inside, sum(c * x for c, x in zip(self._polynomial, powers, strict=False)))


class _Tree:
    """A fitted tree as lists: asked for one point, a hundred times quicker than scikit-learn's `predict`."""

    def __init__(self, tree: Any):
        self._left, self._right = tree.children_left.tolist(), tree.children_right.tolist()
        self._feature, self._threshold = tree.feature.tolist(), tree.threshold.tolist()
        self._value = tree.value[:, 0, 0].tolist()

    def value(self, place: tuple[float, float]) -> float:
        node = 0
        while self._left[node] != -1:
            inside = place[self._feature[node]] <= self._threshold[node]
            node = self._left[node] if inside else self._right[node]
        return self._value[node]


def _powers(tokens: int, pairs: int) -> tuple[float, ...]:
    """1, s, s^2 and s^3 of one unpacked sequence; sums over sequences of the first three otherwise."""
    return 1.0, float(tokens), float(pairs), float(pairs) * tokens


def _best_polynomial(rows: list[Measurement], values: list[float]) -> tuple[float, ...]:
    """Of those degrees that the number of measurements can tell apart, the one with the least AIC."""
    fits = []
    for degree in DEGREES:
        columns = [_powers(row.tokens, row.pairs)[: degree + 1] for row in rows]
        fit = fit_relative(columns, values)
        error = max(relative_error(columns, values, fit), 1e-18)
        criterion = len(rows) * math.log(error / len(rows)) + 2 * (degree + 1)
        if degree == DEGREES[0] or degree + 1 < len(rows):
            fits.append((criterion, degree, fit))
    return min(fits)[2]


def _scikit_learn() -> tuple[str, Any]:
    try:
        from sklearn import __version__
        from sklearn.ensemble import RandomForestRegressor
    except ImportError as error:
        raise ImportError(
            f"cost_model.kind is forest, which needs scikit-learn ({error}); "
            "pip install scikit-learn, or use analytical"
        ) from None
    return __version__, RandomForestRegressor
