"""What another setting would give, and the largest `active_layers` that fits.

Contract: every figure is a replay of that setting, not a scaling of this one. More active blocks never take less
memory, so the largest that fits is found by halving. Where nothing fits, what is given up comes in a fixed order, the
cheapest for learning first: recomputation, moments in bf16, everything outside the blocks at rest, no masters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ds_grass.plan.budget import Budget, Limits, Planner
from ds_grass.plan.job import PlannedJob


@dataclass(frozen=True)
class Alternative:
    """One row of the table: what is changed, and what it then costs."""

    change: str
    budget: Budget


@dataclass(frozen=True)
class Advice:
    """What to write: `budget` with the largest active_layers that fits; None when nothing does."""

    budget: Budget | None
    given_up: tuple[str, ...]
    """What had to change besides active_layers, in words."""


def floor(planner: Planner, job: PlannedJob) -> Budget:
    """The least that this batch can be trained with: one block, its states passing through in bf16, no masters."""
    job = _drop_masters(_rest_outer(job.activating(1)).with_states(mode="stream", dtype="bf16"))
    return planner.budget(replace(job, checkpointing=planner.rank(job).can_recompute))


def alternatives(planner: Planner, base: Budget) -> Iterator[Alternative]:
    """Settings that differ from `base` in one thing, each replayed at the draw that was the most expensive there."""
    rank = planner.rank(base.job)
    for change, job in _changes(base, len(rank.layout.blocks), can_recompute=rank.can_recompute):
        yield Alternative(change, planner.budget(job, draws=(base.worst_draw,)))


def advise(planner: Planner, base: Budget, job: PlannedJob) -> Advice:
    """The largest active_layers for `job` within the limits, giving up what must be. `base` is its budget."""
    given_up: list[str] = []
    draws = (base.worst_draw,)
    found = _largest_that_fits(planner, job, draws)
    for step in _LADDER:
        if found is not None:
            break
        changed = step.give_up(job)
        if changed == job or (changed.checkpointing and not planner.rank(job).can_recompute):
            continue
        short = shortfall(planner.limits, planner.budget(job.activating(1), draws=draws))
        if not set(step.relieves) & set(short):
            continue
        job = changed
        given_up.append(step.name)
        found = _largest_that_fits(planner, job, draws)
    return Advice(found, tuple(given_up))


def _largest_that_fits(planner: Planner, job: PlannedJob, draws: tuple[str, ...]) -> Budget | None:
    """The budget with the most active blocks within the limits, at any draw; None when even one is too many."""

    def fitting(count: int, at: tuple[str, ...] | None = draws) -> Budget | None:
        budget = planner.budget(job.activating(count), draws=at)
        return budget if planner.limits.hold(budget) else None

    low, high = 0, len(planner.rank(job).layout.blocks)
    middle = 1  # often even one does not fit
    while low < high:
        if fitting(middle):
            low = middle
        else:
            high = middle - 1
        middle = min(4 * middle, high) if middle < 4 and low else (low + high + 1) // 2
    while low > 0:
        budget = fitting(low, None)
        if budget:
            return budget
        low -= 1  # another draw takes more than the one that was looked at
    return None


def grass_block(job: PlannedJob) -> dict:
    """The block as it is to be written: active_layers, and every key that is not at its default."""
    keys = job.grass.model_dump(exclude_defaults=True)
    return {
        "active_layers": job.grass.active_layers,
        **{k: v for k, v in keys.items() if k != "active_layers"},
    }


def as_json(job: PlannedJob) -> str:
    """The exact lines for ds_config.json."""
    return json.dumps({"grass": grass_block(job)}, indent=2)


def _changes(base: Budget, num_blocks: int, *, can_recompute: bool) -> Iterator[tuple[str, PlannedJob]]:
    job, given = base.job, base.job.grass
    for count in sorted({1, 2, 4, 8, 16, num_blocks} - {given.active_layers}):
        if count <= num_blocks:
            yield f"active_layers {count}", job.activating(count)
    for mode in ("stream", "resident"):
        if mode != given.states.mode:
            yield f"states.mode {mode}", job.with_states(mode=mode)
    other = "bf16" if given.states.dtype == "fp32" else "fp32"
    yield f"states.dtype {other}", job.with_states(dtype=other)
    if job.dtype == "bf16":
        other_masters = not given.states.master_weights
        yield (
            f"states.master_weights {str(other_masters).lower()}",
            job.with_states(master_weights=other_masters),
        )
    for outer in ("always", "never"):
        if outer != given.outer:
            yield f"outer {outer}", job.with_grass(outer=outer)
    if can_recompute:
        switched = "off" if job.checkpointing else "on"
        yield f"checkpointing {switched}", replace(job, checkpointing=not job.checkpointing)
    if job.ranks > 1:
        for stage in (1, 2, 3):
            if stage != (job.stage or 1):
                yield f"ZeRO stage {stage}", replace(job, stage=stage)
    other = "fp32" if job.dtype != "fp32" else "bf16"
    yield f"training in {other}", replace(job, dtype=other, wire_dtype=other, sum_dtype=other)


def _rest_outer(job: PlannedJob) -> PlannedJob:
    return job.with_grass(outer="never")


def _drop_masters(job: PlannedJob) -> PlannedJob:
    return job.with_states(master_weights=False) if job.dtype == "bf16" else job


@dataclass(frozen=True)
class _Step:
    name: str
    relieves: tuple[str, ...]
    """As `shortfall` says it."""
    give_up: Callable[[PlannedJob], PlannedJob]


_BOTH = ("the device", "the host")
_LADDER = (
    _Step("gradient checkpointing", ("the device",), lambda job: replace(job, checkpointing=True)),
    _Step("moments in bf16", _BOTH, lambda job: job.with_states(dtype="bf16")),
    _Step("what is outside the blocks at rest", _BOTH, _rest_outer),
    _Step("no fp32 master weights", _BOTH, _drop_masters),
)


def shortfall(limits: Limits, budget: Budget) -> list[str]:
    """Which limit is passed, in words; empty when none is."""
    told = []
    if limits.device is not None and budget.peak.total_bytes > limits.device:
        told.append("the device")
    if limits.host is not None and budget.host_bytes_node > limits.host:
        told.append("the host")
    return told
