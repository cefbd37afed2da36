"""``megatron_ext plan``: what each strategy would take over the length, and which plan would be chosen; no GPU needed.

Contract: everything is predicted, and says so: closed forms over a described cluster's rates, or a saved profile where
megatron_ext.sequence_parallel.cost_model.load names one. The planner is the one that a job runs.
Not covered: pipelines (`--layers` plans the layers of one stage, for one micro-batch in flight), recomputation,
fragmentation, and whatever the script itself keeps on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_ext.described_job import Job
from megatron_ext.sequence_parallel.cost_model import AnalyticalModel, Cost, CostModel
from megatron_ext.sequence_parallel.forest import ForestModel
from megatron_ext.sequence_parallel.planner import LayerKind, Plan, Planner
from megatron_ext.sequence_parallel.profile import load_profile
from megatron_ext.telemetry import layers_by_strategy, runs_of

_CURVE_POINTS = 121
_LONGEST = 2**26
"""Tokens beyond which no longest length is looked for."""


@dataclass(frozen=True)
class Point:
    """One length: what each strategy alone would take, and the plan."""

    length: int
    costs: Mapping[str, Cost]
    """Of one layer; those that can run it."""
    peaks: Mapping[str, int]
    """Bytes of a rank at the peak, states included, if all layers ran the strategy."""
    plan: Plan | None
    reason: str = ""
    """Why there is no plan."""


@dataclass(frozen=True)
class Crossover:
    """Everything that a table, a picture or a JSON document is made of."""

    job: Job
    source: str
    """Where the times come from."""
    points: tuple[Point, ...]
    """The lengths that were asked for."""
    curve: tuple[Point, ...]
    """Many more between the first and the last."""
    longest: Mapping[str, int]
    """Longest length that fits, by strategy for all layers, and for "the plan"; 0 where none does."""

    @property
    def stretches(self) -> list[tuple[int, int, str]]:
        """(first length, last length, what the plan is made of), along the curve."""
        found: list[tuple[int, int, str]] = []
        for point in self.curve:
            made_of = _made_of(point)
            if found and found[-1][2] == made_of:
                found[-1] = found[-1][0], point.length, made_of
            else:
                found.append((point.length, point.length, made_of))
        return found


def make_crossover(job: Job, lengths: Sequence[int]) -> Crossover:
    """Plan `job` for each of `lengths` (tokens) and for many between them."""
    model, source = _cost_model(job)
    block = job.config.sequence_parallel
    planner = Planner(
        [LayerKind(model, tuple(range(job.num_layers)), job.strategies)],
        job.limit_bytes - job.state_bytes,
        granularity=block.granularity,
        smoothing=0.0,  # a table has no order in which its lengths come
        outside_bytes=job.outside_bytes,
    )
    longest = {
        name: _longest(job, lambda length, name=name: _fits(job, model, name, length))
        for name in job.strategies
    }
    longest["the plan"] = _longest(job, lambda length: planner.best(job.micro_batch, length).fits)
    return Crossover(
        job=job,
        source=source,
        points=tuple(_point(job, model, planner, length) for length in sorted(set(lengths))),
        curve=tuple(_point(job, model, planner, length) for length in _between(job, lengths)),
        longest=longest,
    )


def title(crossover: Crossover) -> str:
    """One line of what was planned."""
    job = crossover.job
    return (
        f"predicted: {job.num_layers} layers of {job.model.name} on {job.cluster.name}, tensor parallel "
        f"{job.group_size}, micro-batch {job.micro_batch}"
    )


def document(crossover: Crossover) -> dict[str, Any]:
    """The numbers as one JSON document."""
    job = crossover.job
    return {
        "predicted": True,
        "source": crossover.source,
        "model": asdict(job.model),
        "cluster": job.cluster.to_json(),
        "tp": job.group_size,
        "dp": job.data_parallel,
        "micro_batch": job.micro_batch,
        "num_layers": job.num_layers,
        "limit_bytes": job.limit_bytes,
        "state_bytes": job.state_bytes,
        "refused": job.refused,
        "longest": dict(crossover.longest),
        "stretches": [list(stretch) for stretch in crossover.stretches],
        "lengths": [_point_facts(job, point) for point in crossover.points],
    }


def _point_facts(job: Job, point: Point) -> dict[str, Any]:
    plan = point.plan
    return {
        "length": point.length,
        "layer_seconds": {name: cost.seconds for name, cost in point.costs.items()},
        "peak_bytes_alone": dict(point.peaks),
        "plan": runs_of(plan.names) if plan else None,
        "layers": layers_by_strategy(plan.names) if plan else {},
        "seconds": plan.seconds if plan else None,
        "peak_bytes": job.state_bytes + plan.peak_bytes if plan else None,
        "fits": bool(plan and plan.fits),
        "reason": point.reason,
    }


def _cost_model(job: Job) -> tuple[CostModel, str]:
    block = job.config.sequence_parallel.cost_model
    prior = AnalyticalModel(job.shape, job.cluster)
    if block.load is None:
        if block.kind == "forest":
            raise ValueError(
                'megatron_ext.sequence_parallel.cost_model.kind is "forest", which is made of measurements; allowed '
                'without a device: a file of them in "load", or "analytical"; write "kind": "analytical"'
            )
        return prior, f"closed forms over the rates of {job.cluster.name}"
    profile = load_profile(block.load, job.shape, "megatron_ext.sequence_parallel.cost_model.load")
    source = f"{block.kind}, measurements of {block.load}"
    if block.kind == "forest":
        return ForestModel(job.shape, profile.measurements), source
    return prior.calibrated(profile.measurements), source


def _point(job: Job, model: CostModel, planner: Planner, length: int) -> Point:
    able = [name for name in job.strategies if job.shape.obstacle(name, job.micro_batch, length) is None]
    costs = {name: model.predict(name, job.micro_batch, length) for name in able}
    peaks = {name: _peak(job, cost, length) for name, cost in costs.items()}
    try:
        return Point(length, costs, peaks, planner.best(job.micro_batch, length))
    except ValueError as error:  # no strategy can run this length
        return Point(length, costs, peaks, None, str(error))


def _peak(job: Job, cost: Cost, length: int) -> int:
    transient = max(cost.transient_bytes, job.outside_bytes(job.micro_batch, length))
    return job.state_bytes + job.num_layers * cost.kept_bytes + transient


def _fits(job: Job, model: CostModel, name: str, length: int) -> bool:
    return _peak(job, model.predict(name, job.micro_batch, length), length) <= job.limit_bytes


def _step(job: Job) -> int:
    """Lengths that every strategy can run are its multiples."""
    return 2 * job.group_size


def _longest(job: Job, fits: Callable[[int], bool]) -> int:
    """The longest length that fits; memory only grows with the length."""
    step = _step(job)
    low, high = 0, _LONGEST // step + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


def _between(job: Job, lengths: Sequence[int]) -> list[int]:
    """About evenly spaced on a logarithmic axis."""
    step, first, last = _step(job), min(lengths), max(lengths)
    ratio = (last / first) ** (1 / (_CURVE_POINTS - 1))
    return sorted({max(round(first * ratio**index / step), 1) * step for index in range(_CURVE_POINTS)})


def _made_of(point: Point) -> str:
    if point.plan is None:
        return "nothing runs"
    return " + ".join(sorted(set(point.plan.names))) if point.plan.fits else "nothing fits"
