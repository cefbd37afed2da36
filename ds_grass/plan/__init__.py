"""`ds_grass plan`: what a job will hold and move, before it is launched; without a device, and without memory.

`model` builds the network on the meta device, `job` reads ds_config, `replay` runs a step of one rank, with `gathering`
in the place of DeepSpeed's stage 3 and `ledger` counting, `budget` puts a setting's numbers together, `advice`
compares settings, `table` and `picture` show them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ds_grass.plan.advice import Advice, Alternative, advise, alternatives, floor
from ds_grass.plan.budget import Budget, Limits, Planner
from ds_grass.plan.job import PlannedJob
from ds_grass.plan.ledger import Moment

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """Everything that a table, a picture or a JSON document is made of."""

    model: Any
    """The Hugging Face config."""
    shape: ModelShape
    limits: Limits
    base: Budget
    floor: Budget
    alternatives: tuple[Alternative, ...]
    advice: Advice | None
    """None where no limit was given."""
    history: tuple[Moment, ...]
    """Of the most expensive training step, change by change."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ModelShape:
    """Elements, unsharded, and where the blocks are."""

    numel: int
    block_numels: tuple[int, ...]
    outer_numel: int
    """Outside the blocks, trained or not."""
    lists: tuple[str, ...]
    probe_steps: int


def make_plan(
    config: Any,
    job: PlannedJob,
    limits: Limits,
    notes: list[str],
    say: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Plan `job` and its neighbours. `say` is told what is being replayed. ValueError for what the job would refuse."""
    planner = Planner(config, limits, say)
    base = planner.budget(job)
    shape, history = _shape(planner, base), _history(planner, base)
    return Plan(
        model=config,
        shape=shape,
        limits=limits,
        base=base,
        advice=advise(planner, base, job) if (limits.device or limits.host) else None,
        alternatives=tuple(alternatives(planner, base)),
        floor=floor(planner, job),
        history=history,
        notes=tuple(notes),
    )


def _shape(planner: Planner, base: Budget) -> ModelShape:
    rank = planner.rank(base.job)
    blocks = tuple(block.numel for block in rank.layout.blocks)
    numel = sum(param.numel() for param in rank.model.parameters())
    probe_steps = base.job.grass.probe_steps_for(len(blocks), base.job.accumulation)
    return ModelShape(numel, blocks, numel - sum(blocks), rank.layout.lists, probe_steps)


def _history(planner: Planner, base: Budget) -> tuple[Moment, ...]:
    rank = planner.rank(base.job)
    blocks = planner.draws(rank, base.job)[base.worst_draw]
    rank.train(blocks, base.job.grass.states, history=True)
    return tuple(rank.ledger.history)
