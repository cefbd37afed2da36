"""How wrong a cost model is on lengths that it has not seen.

Contract: each interior length of a strategy is left out in turn, the model is made from the rest and asked for it. The
first and last length are never left out: extrapolation is another question. The mean absolute percentage error (MAPE)
of time and of memory is reported for each strategy, with a sentence where it is more than what we promise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_ext.sequence_parallel.cost_model import Cost, CostModel
from megatron_ext.sequence_parallel.profile import Measurement

TIME_LIMIT, MEMORY_LIMIT = 0.10, 0.05
WORSE = 1.25
"""Times an error that was told. Times of a profile differ by this from one to the next on a busy machine."""


@dataclass(frozen=True)
class HeldOutError:
    """Of one strategy, as shares; memory is kept and transient bytes together."""

    strategy: str
    time: float
    memory: float
    lengths: int
    """How many were left out; 0: too few were measured to say anything."""

    @property
    def warning(self) -> str | None:
        if not self.lengths:
            return f"{self.strategy}: fewer than three lengths were profiled, so nothing is known about the error"
        said = [
            f"{what} by {100 * error:.1f} % (promised: {100 * limit:.0f} %)"
            for what, error, limit in (("time", self.time, TIME_LIMIT), ("memory", self.memory, MEMORY_LIMIT))
            if error > limit
        ]
        if not said:
            return None
        return f"{self.strategy}: unseen lengths are missed in {' and '.join(said)}; profile more lengths"

    def is_worse_than(self, told: HeldOutError | None) -> bool:
        """Whether it is news to who was told that one."""
        if told is None:
            return True
        return (self.time > TIME_LIMIT and self.time > WORSE * told.time) or (
            self.memory > MEMORY_LIMIT and self.memory > WORSE * told.memory
        )


def held_out_error(
    model_factory: Callable[[Sequence[Measurement]], CostModel], measurements: Sequence[Measurement]
) -> dict[str, HeldOutError]:
    """By strategy. `model_factory` makes a model from measurements, as `AnalyticalModel.calibrated` does."""
    rows: dict[str, list[Measurement]] = {}
    for row in measurements:
        rows.setdefault(row.strategy, []).append(row)
    return {strategy: _of_strategy(model_factory, strategy, of) for strategy, of in rows.items()}


def _of_strategy(
    model_factory: Callable[[Sequence[Measurement]], CostModel], strategy: str, rows: list[Measurement]
) -> HeldOutError:
    lengths = sorted({row.length for row in rows})[1:-1]
    misses = []
    for length in lengths:
        model = model_factory([row for row in rows if row.length != length])
        misses += [
            _miss(model.predict(strategy, row.batch, row.length), row) for row in rows if row.length == length
        ]
    if not misses:
        return HeldOutError(strategy, 0.0, 0.0, 0)
    time, memory = (sum(values) / len(misses) for values in zip(*misses, strict=True))
    return HeldOutError(strategy, time, memory, len(lengths))


def _miss(predicted: Cost, row: Measurement) -> tuple[float, float]:
    measured = row.kept_bytes + row.transient_bytes
    time = abs(predicted.seconds / row.seconds - 1)
    return time, abs((predicted.kept_bytes + predicted.transient_bytes) / measured - 1) if measured else 0.0
