"""What the stages of a pipeline recompute, read back from a log, and what follows from it: errors, shares, a
timeline, advice.

Contract: pure. :func:`parse_stages` takes the last `recompute_stages` event of a log, whoever wrote it, and raises
ValueError for one that does not hold together. Seconds of a step are composed from what each stage measured of its own
layers, never measured end to end; they are None where a stage's policy does not measure.
Not covered: showing it (:mod:`megatron_ext.tables`, :mod:`megatron_ext.recompute_pictures`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from megatron_ext.recompute.plan import NONE, ChunkPlan, Share
from megatron_ext.recompute.schedule import Pipeline
from megatron_ext.recompute.stage_memory import Option
from megatron_ext.recompute.stage_plan import StagePlan
from megatron_ext.recompute.timeline import Timeline

if TYPE_CHECKING:
    from megatron_ext.recompute.layout_advice import Advice

_STAGES = TypeAdapter(tuple[StagePlan, ...])
_MOST_PASSES = 200_000  # of a step, over all stages; composing them takes a second
_MOST_TRIED = (
    500_000  # passes of a step, times stages squared: some twenty times as many are composed for advice
)


@dataclass(frozen=True)
class Stages:
    """All stages of one pipeline, the first one first."""

    plans: tuple[StagePlan, ...]
    pipeline: Pipeline
    """Of the step with the most micro-batches: a stage that more of them leave as it was still tells of fewer."""

    @cached_property
    def timeline(self) -> Timeline | None:
        """One step under these plans, composed."""
        return self._composed(self.plans)

    @cached_property
    def all_recomputed_timeline(self) -> Timeline | None:
        """The same with every layer recomputed in full: each runs its forward once more."""
        return self._composed([replace(plan, recompute_seconds=plan.forward_seconds) for plan in self.plans])

    @cached_property
    def advice(self) -> Advice | None:
        """Layers on other stages with which the step would be shorter."""
        if self.timeline is None or self._passes * len(self.plans) ** 2 > _MOST_TRIED:
            return None
        from megatron_ext.recompute.advice import layout_advice  # loads PyTorch

        return layout_advice(self._of_one_pipeline(self.plans))

    @cached_property
    def recompute_shares(self) -> tuple[float, ...] | None:
        """By stage: the part of the step that goes into recomputation."""
        if self.timeline is None or not self.timeline.seconds:
            return None
        return tuple(
            sum(each.end - each.start for each in row if each.kind == "recompute") / self.timeline.seconds
            for row in self.timeline.intervals
        )

    @property
    def _passes(self) -> int:
        return 2 * self.pipeline.virtual_stages * self.pipeline.micro_batches

    def _composed(self, plans: Sequence[StagePlan]) -> Timeline | None:
        if self._passes > _MOST_PASSES:
            return None
        from megatron_ext.recompute.advice import composed  # loads PyTorch

        return composed(self._of_one_pipeline(plans))

    def _of_one_pipeline(self, plans: Sequence[StagePlan]) -> list[StagePlan]:
        return [replace(plan, pipeline=asdict(self.pipeline)) for plan in plans]


def parse_stages(told: Any) -> Stages:
    """`told`: the stages of a `recompute_stages` event, in any order."""
    plans = tuple(sorted(_STAGES.validate_python(told), key=lambda plan: plan.stage))
    if not plans:
        raise ValueError("no stage is told")
    try:
        pipelines = [Pipeline(**plan.pipeline) for plan in plans]
        for plan, pipeline in zip(plans, pipelines, strict=True):
            _check(plan, pipeline.chunks)
    except (TypeError, KeyError) as error:
        raise ValueError(f"a stage lacks something: {error}") from None
    pipeline = max(pipelines, key=lambda one: one.micro_batches)
    if [plan.stage for plan in plans] != list(range(pipeline.stages)):
        raise ValueError(f"stages {[plan.stage for plan in plans]} are told of {pipeline.stages}")
    if any(one.chunks != pipeline.chunks for one in pipelines):
        raise ValueError("stages were told for different pipelines")
    return Stages(plans, pipeline)


def _check(plan: StagePlan, chunks: int) -> None:
    measured = (plan.forward_seconds, plan.backward_seconds, plan.recompute_seconds)
    if any((seconds is None) != (plan.forward_seconds is None) for seconds in measured):
        raise ValueError(f"stage {plan.stage} tells of some seconds and not of others")
    by_chunk = (plan.chunks, plan.open, *measured, plan.outside_seconds, plan.outside_bytes)
    if any(values is not None and len(values) != chunks for values in by_chunk):
        raise ValueError(f"stage {plan.stage} does not tell about {chunks} chunks")
    for value in _numbers(plan):
        if not (math.isfinite(value) and 0 <= value < 2**63):
            raise ValueError(f"stage {plan.stage} tells {value}; allowed: numbers from 0 to 2^63")
    # Negative where less was held than predicted.
    if plan.error is not None and not math.isfinite(plan.error):
        raise ValueError(f"stage {plan.stage} tells an error of {plan.error}; allowed: a finite share")
    chunk_plans(plan)
    for option in plan.layer_options or ():
        Option(**option)


def _numbers(plan: StagePlan) -> Iterator[float]:
    for name, value in asdict(plan).items():
        if name == "error":
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float):
                yield number


def chunk_plans(plan: StagePlan) -> list[ChunkPlan]:
    """What each chunk of the stage does."""
    return [
        ChunkPlan(tuple(chunk["layers"]), None if chunk.get("share") is None else Share(**chunk["share"]))
        for chunk in plan.chunks
    ]


def layer_counts(plan: StagePlan) -> tuple[float, int]:
    """How many layers are recomputed, in full or in part, and how many there are. One that is recomputed in a share of
    the micro-batches counts as that share."""
    recomputed, layers = 0.0, 0
    for chunk in chunk_plans(plan):
        layers += len(chunk.layers)
        recomputed += sum(choice != NONE for choice in chunk.layers)
        share = chunk.share
        if share is not None:
            change = (share.choice != NONE) - (chunk.layers[share.layer] != NONE)
            recomputed += change * share.micro_batches / share.window
    return recomputed, layers


def in_words(plan: StagePlan) -> str:
    """What is recomputed, in words: "3 full, 2 mlp, 1 full in 3 of 4 micro-batches"."""
    chunks = chunk_plans(plan)
    counts = Counter(choice for chunk in chunks for choice in chunk.layers if choice != NONE)
    said = [f"{count} {choice}" for choice, count in counts.most_common()]
    said += [
        f"1 {chunk.share.choice} in {chunk.share.micro_batches} of {chunk.share.window} micro-batches"
        for chunk in chunks
        if chunk.share is not None
    ]
    return ", ".join(said) or "nothing"


def error_of(plan: StagePlan) -> float | None:
    """By which part of the prediction the measured peak is above it; None where either is not there."""
    if plan.error is not None:
        return plan.error
    if plan.measured_bytes is None or not plan.predicted_bytes:
        return None
    return plan.measured_bytes / plan.predicted_bytes - 1


def document(stages: Stages) -> dict[str, Any]:
    """What was told and what follows, as one JSON document."""
    shares = stages.recompute_shares or (None,) * len(stages.plans)
    timelines = {"composed": stages.timeline, "composed_all_recomputed": stages.all_recomputed_timeline}
    return {
        "pipeline": asdict(stages.pipeline),
        **{f"{name}_seconds": found and found.seconds for name, found in timelines.items()},
        "advice": None if stages.advice is None else asdict(stages.advice) | {"gain": stages.advice.gain},
        "stages": [
            {
                **asdict(plan),
                "layers_recomputed": layer_counts(plan)[0],
                "error": error_of(plan),
                "recompute_share": share,
            }
            for plan, share in zip(stages.plans, shares, strict=True)
        ],
    }
