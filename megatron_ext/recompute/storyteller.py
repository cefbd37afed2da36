"""What stages tell each other of their plans, and one rank tells of all: lines in the log, the plan's file.

Every stage puts its plan, and what it was made from, into the store; when all have, the rank that writes the log writes
them there and saves the plan. Nothing waits: what is not there yet is looked for at the next step, until all is frozen.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist

from ds_grass.telemetry.human import human_bytes

from ..config import RecomputeConfig
from ..stage_facts import StageFacts, stage_facts
from ..telemetry import Telemetry
from .plan import FULL, NONE, ChunkPlan, RecomputePlan, Share
from .schedule import Pipeline, open_counts
from .sizes import Size
from .solver import Solution
from .stage import recompute_seconds_by_chunk
from .stage_memory import LayerClass, StageProblem
from .stage_peak import peak_in_order
from .stage_plan import StagePlan

logger = logging.getLogger("megatron_ext")

GATHER_EVERY = 100
"""Steps after which frozen plans are looked at again."""

_SAVED = ("limit_bytes", "static_bytes", "predicted_bytes", "measured_bytes", "recompute_seconds")


class Storyteller:
    """Of this rank's stage, and on the rank that writes of all stages."""

    def __init__(self, config: RecomputeConfig, telemetry: Telemetry, name: str):
        self._config, self._telemetry, self._name = config, telemetry, name
        self._facts: StageFacts | None = None
        self.own: StagePlan | None = None
        """What this rank's stage told last."""
        self._told: list[dict[str, Any]] | None = None
        self._steps_since = 0
        """Since all were frozen first."""
        self._size: Size | None = None

    def meet(self, layers: Sequence[int]) -> None:
        """At the beginning of each step; `layers`: of this rank's chunks."""
        if self._facts is None:
            self._facts = stage_facts(f"{self._name}/recompute")
            self._facts.tell("layers", list(layers))
        elif self._told is None or not all(stage["frozen"] for stage in self._told):
            self._gather()
        else:  # a longer micro-batch may have changed a plan
            self._steps_since += 1
            if self._steps_since % GATHER_EVERY == 0:
                self._gather()

    def layers_by_stage(self) -> list[list[int]]:
        """Layers of each chunk of each stage; waits for all stages."""
        assert self._facts is not None
        return self._facts.wait("layers")

    def measured_plan(
        self,
        pipeline: Pipeline,
        plans: Sequence[ChunkPlan],
        problem: StageProblem,
        unforeseen_bytes: int,
        solution: Solution,
        seconds: Sequence[tuple[float, float]],
        outside_seconds: Sequence[float],
        layer_static_bytes: int,
        size: Size,
        solved_in: float,
    ) -> None:
        """`unforeseen_bytes`: of the problem's static ones, what a step held beside its prediction;
        `seconds`: forward and backward of a micro-batch through each chunk's layers, nothing recomputed;
        `outside_seconds`: forward of what is not layers; `layer_static_bytes`: what is there of a layer anyway."""
        self._size = size
        fact = replace(
            self._plain(pipeline, plans, problem.limit_bytes),
            static_bytes=problem.static_bytes - unforeseen_bytes,
            unforeseen_bytes=unforeseen_bytes,
            predicted_bytes=solution.peak_bytes,
            nothing_recomputed_bytes=_peak_of_all(problem, NONE),
            all_recomputed_bytes=_peak_of_all(problem, FULL),
            forward_seconds=tuple(forward for forward, _ in seconds),
            backward_seconds=tuple(backward for _, backward in seconds),
            outside_seconds=tuple(outside_seconds),
            recompute_seconds=recompute_seconds_by_chunk(problem, plans),
            layer_options=tuple(asdict(option) for option in _most_frequent(problem).options),
            layer_static_bytes=layer_static_bytes,
            outside_bytes=tuple(chunk.outside_bytes for chunk in problem.chunks),
            frozen=not solution.fits,  # it will not be verified
        )
        self._planned(fact, solved_in=solved_in, gap_seconds=solution.gap_seconds)

    def plan_of_rule(self, pipeline: Pipeline, plans: Sequence[ChunkPlan], limit_bytes: int) -> None:
        """Of a policy that does not measure."""
        self._planned(self._plain(pipeline, plans, limit_bytes))

    def plan_of_nothing(self, pipeline: Pipeline, plans: Sequence[ChunkPlan]) -> None:
        """Of a stage without layers, so that the others need not wait for it."""
        if self.own is None:
            self._tell(replace(self._plain(pipeline, plans, 0), frozen=True))

    def verified(
        self, measured_bytes: int, predicted_bytes: int | None, limit_bytes: int, *, frozen: bool
    ) -> None:
        """What a step held, at its peak."""
        error = None if predicted_bytes is None else measured_bytes / predicted_bytes - 1
        self._telemetry.log.write(
            "recompute_verified",
            measured_bytes=measured_bytes,
            predicted_bytes=predicted_bytes,
            limit_bytes=limit_bytes,
            error=error,
            frozen=frozen,
        )
        if self.own is not None:
            self._tell(replace(self.own, measured_bytes=measured_bytes, error=error, frozen=frozen))

    def close(self) -> None:
        """Tell what all stages have told by now."""
        if self._facts is not None and dist.is_initialized():
            self._gather()

    def _plain(self, pipeline: Pipeline, plans: Sequence[ChunkPlan], limit_bytes: int) -> StagePlan:
        from megatron.core import parallel_state

        stage = parallel_state.get_pipeline_model_parallel_rank()
        return StagePlan(
            stage=stage,
            policy=self._config.policy,
            chunks=tuple(asdict(plan) for plan in plans),
            open=open_counts(pipeline, stage),
            pipeline=asdict(pipeline),
            limit_bytes=limit_bytes,
        )

    def _planned(self, fact: StagePlan, **more: Any) -> None:
        counts = [
            f"{sum(choice != NONE for choice in chunk['layers'])} of {len(chunk['layers'])}"
            for chunk in fact.chunks
        ]
        logger.info(
            "megatron_ext: stage %d recomputes %s layers (policy %s)%s",
            fact.stage,
            " + ".join(counts),
            fact.policy,
            f", since a step held {human_bytes(fact.unforeseen_bytes)} more" if fact.unforeseen_bytes else "",
        )
        self._telemetry.log.write("recompute_plan", **asdict(fact), **more)
        self._tell(fact)

    def _tell(self, fact: StagePlan) -> None:
        self.own = fact
        if self._facts is not None:
            self._facts.tell("plan", asdict(fact))

    def _gather(self) -> None:
        if self._facts is None or not self._telemetry.is_writer:
            return
        told = self._facts.all_there("plan")
        if told is None or told == self._told:
            return
        self._told = told
        self._telemetry.log.write("recompute_stages", stages=told)
        if self._config.plan.save:
            self._plan_of(told).save(self._config.plan.save)

    def _plan_of(self, told: Sequence[dict[str, Any]]) -> RecomputePlan:
        chunks, measured = {}, {}
        for stage in told:
            for number, chunk in enumerate(stage["chunks"]):
                share = None if chunk["share"] is None else Share(**chunk["share"])
                chunks[stage["stage"], number] = ChunkPlan(tuple(chunk["layers"]), share)
                measured[stage["stage"], number] = {key: stage[key] for key in _SAVED}
        job = dict(told[0]["pipeline"]) | ({} if self._size is None else asdict(self._size))
        return RecomputePlan(self._config.policy, chunks, job, measured, _versions())


def _most_frequent(problem: StageProblem) -> LayerClass:
    classes = Counter(layer for chunk in problem.chunks for layer in chunk.classes)
    return classes.most_common(1)[0][0]


def _peak_of_all(problem: StageProblem, choice: str) -> int:
    return peak_in_order(problem, [[choice] * len(chunk.classes) for chunk in problem.chunks])


def _versions() -> dict[str, str]:
    from ds_grass import __version__

    return {"ds-grass": __version__, "torch": torch.__version__, "megatron-core": version("megatron-core")}
