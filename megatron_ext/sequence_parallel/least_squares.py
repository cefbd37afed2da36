"""Fits with non-negative coefficients, weighted for relative error.

Contract: exact for the few columns that cost models have (every set of positive coefficients is tried), deterministic,
and rounded to nine digits, so that ranks whose linear algebra differs in the last bits predict the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

DIGITS = 9


def fit_relative(
    columns: Sequence[Sequence[float]], values: Sequence[float], most: int | None = None
) -> tuple[float, ...]:
    """Coefficients c >= 0 with the least sum of ((c . x - y) / y)^2; rows of `columns` are the x of each y.

    At most `most` of them are above zero; None: any number.
    """
    scaled = np.asarray(columns, dtype=np.float64) / np.asarray(values, dtype=np.float64)[:, None]
    norms = np.linalg.norm(scaled, axis=0)
    norms[norms == 0] = 1.0
    solution = _non_negative(scaled / norms, np.ones(len(scaled)), most or len(norms)) / norms
    return tuple(float(f"{value:.{DIGITS}g}") for value in solution)


def relative_error(
    columns: Sequence[Sequence[float]], values: Sequence[float], fit: Sequence[float]
) -> float:
    """Sum of squares of the relative errors."""
    predicted = np.asarray(columns, dtype=np.float64) @ np.asarray(fit)
    return float(np.sum((predicted / np.asarray(values, dtype=np.float64) - 1) ** 2))


def _non_negative(matrix: np.ndarray, target: np.ndarray, most: int) -> np.ndarray:
    """The best of the least-squares solutions on every subset of columns that come out non-negative."""
    count = matrix.shape[1]
    best, least = np.zeros(count), float(target @ target)
    for size in range(1, min(count, most) + 1):
        for chosen in map(list, combinations(range(count), size)):
            part = np.linalg.lstsq(matrix[:, chosen], target, rcond=None)[0]
            residual = matrix[:, chosen] @ part - target
            if part.min() >= 0 and residual @ residual < least - 1e-12:
                best, least = np.zeros(count), float(residual @ residual)
                best[chosen] = part
    return best
