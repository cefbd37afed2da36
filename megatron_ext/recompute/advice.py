"""Would a job be faster with its layers on other stages? From what its stages told of themselves.

Every layout is planned as the job was: each stage solved under its limit with the layers it would have, the step
composed from the times of all stages. Seconds outside of layers (embedding, head, loss) stay where they are, and their
backward is taken to be twice their forward. Contract: pure. Not covered: stages of several classes of layers, which are
all taken to be of the stage's most frequent one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

from .layout_advice import Advice, advise
from .schedule import Pipeline
from .stage import problem_of
from .stage_memory import LayerClass, Option
from .stage_peak import solve_in_order
from .stage_plan import StagePlan
from .timeline import StageTimes, Timeline, compose

BACKWARD_OVER_FORWARD = 2.0
"""Of what is outside of layers: matrices, multiplied once in forward and twice in backward."""


def composed(stages: Sequence[StagePlan]) -> Timeline | None:
    """One step as it runs now; None where a stage was not measured."""
    if any(stage.forward_seconds is None for stage in stages):
        return None
    return compose(Pipeline(**stages[0].pipeline), [_times(stage) for stage in stages])


def _times(stage: StagePlan) -> list[StageTimes]:
    assert stage.forward_seconds is not None
    assert stage.backward_seconds is not None
    assert stage.recompute_seconds is not None
    outside = stage.outside_seconds or (0.0,) * len(stage.forward_seconds)
    return [
        StageTimes(forward + more, backward + BACKWARD_OVER_FORWARD * more, again)
        for forward, backward, again, more in zip(
            stage.forward_seconds, stage.backward_seconds, stage.recompute_seconds, outside, strict=True
        )
    ]


def layout_advice(stages: Sequence[StagePlan]) -> Advice | None:
    """A layout that is faster; None where none is, where there is one stage, or where a stage was not measured."""
    if len(stages) == 1 or any(stage.layer_options is None for stage in stages):
        return None
    pipeline = Pipeline(**stages[0].pipeline)
    count = len(stages)

    @cache
    def times(number: int, layers: tuple[int, ...]) -> tuple[StageTimes, ...] | None:
        return _times_with(stages[number], pipeline, layers)

    def plan_seconds(layout: tuple[int, ...]) -> float:
        planned = [times(number, layout[number::count]) for number in range(count)]
        if any(found is None for found in planned):
            return math.inf
        return compose(pipeline, [list(found) for found in planned if found is not None]).seconds

    layers = [
        len(stages[place % count].chunks[place // count]["layers"])
        for place in range(pipeline.virtual_stages)
    ]
    return advise(layers, plan_seconds)


def _times_with(
    stage: StagePlan, pipeline: Pipeline, layers: tuple[int, ...]
) -> tuple[StageTimes, ...] | None:
    """Of a stage with so many layers on each chunk, with its best plan; None where nothing fits."""
    assert stage.layer_options is not None
    assert stage.forward_seconds is not None
    assert stage.backward_seconds is not None
    kind = LayerClass("layer", tuple(Option(**option) for option in stage.layer_options))
    before = [len(chunk["layers"]) for chunk in stage.chunks]
    there = (stage.static_bytes or 0) + (stage.unforeseen_bytes or 0)
    static = there + (sum(layers) - sum(before)) * (stage.layer_static_bytes or 0)
    outside_bytes = stage.outside_bytes or (0,) * len(layers)
    problem = problem_of(
        pipeline,
        stage.stage,
        [["layer"] * count for count in layers],
        {"layer": kind},
        outside_bytes,
        static,
        stage.limit_bytes,
    )
    solution = solve_in_order(problem)
    if not solution.fits:
        return None
    # A chunk of the job has at least one layer, whose share is what a layer takes.
    forward = sum(stage.forward_seconds) / max(1, sum(before))
    backward = sum(stage.backward_seconds) / max(1, sum(before))
    outside = stage.outside_seconds or (0.0,) * len(layers)
    again = solution.seconds / max(1, sum(layers))
    return tuple(
        StageTimes(count * forward + more, count * backward + BACKWARD_OVER_FORWARD * more, count * again)
        for count, more in zip(layers, outside, strict=True)
    )
