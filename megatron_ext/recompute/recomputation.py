"""The recomputation of one job on this rank: measure, plan, verify, freeze.

The first training step recomputes everything, the safest there is. When its first micro-batch comes, one layer of each
class is measured under every choice, and what a micro-batch keeps outside the layers is counted (:mod:`.measurements`).
At the start of the second step weights, gradients and optimizer states are there to be counted; with the schedule's
open micro-batches the stage's problem is whole, and solved. That step is verified: what it held is compared with what
was predicted, and with the limit. A plan that held is frozen; one that did not makes place for one that counts with
what was unforeseen. More micro-batches at once or longer sequences are planned for anew, from the same measurements.
Where the device counts, so are optimizer states that come late and a frozen step that held more than the limit. A step
that held more because a longer sequence came is not judged. Where data-parallel ranks must hold one plan
(:mod:`.planning_group`) they plan between steps only: until then a longer sequence runs under the plan that is there.
Policies that follow a rule, and plans read from a file, are not measured, only verified.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from ds_grass.telemetry.human import human_bytes

from ..board import Board
from ..config import RecomputeConfig
from ..rank_memory import RankMemory, bytes_by_parameter
from ..sequence_parallel.switch import group_of
from ..telemetry import Telemetry
from . import layer_loop
from .held import Held
from .largest_size import LargestSize
from .layer_classes import allowed_modules, layers_that_train
from .layer_loop import LayerLoop
from .measurements import Measurements
from .overshoot import Overshoot
from .plan import ChunkPlan
from .planning_group import News, are_equal, is_spread
from .refusals import check_config, nothing_fits, plans_of_file
from .running_pipeline import opens_more, own_chunks, own_stage, pipeline_of
from .schedule import Pipeline
from .sizes import Size
from .solver import Solution
from .stage import all_layers, chunk_plans, everything_recomputed, fraction_of, problem_of, rule_plans
from .stage_memory import StageProblem
from .stage_peak import peak_in_order, solve_in_order
from .stage_plan import StagePlan
from .storyteller import Storyteller

logger = logging.getLogger("megatron_ext")

_GREW = 1.01
"""Times the bytes that a plan counts as there anyway: with more, it is made anew."""


class Recomputation:
    """Plans for the blocks of this rank."""

    def __init__(
        self,
        config: RecomputeConfig,
        memory: RankMemory,
        telemetry: Telemetry,
        name: str,
    ):
        """`memory` is told of steps and blocks by the job; `name`: of the job, equal on all ranks."""
        self._config = config
        self._loops: dict[nn.Module, LayerLoop] = {}
        self._held = Held(self._loops, memory)
        self._board: Board | None = None
        self._measurements = Measurements(self._loops, config.modules, telemetry)
        self._story = Storyteller(config, telemetry, name)
        self._pipeline: Pipeline | None = None
        self._sizes = LargestSize()
        self._is_wide = False
        """Whether data-parallel ranks must hold one plan, which they make between steps only."""
        self._predicted: int | None = None
        self._static = 0
        """Weights, gradients and optimizer states that the plan counts with."""
        self._overshoot = Overshoot(self._held)
        self._fits = True
        """Whether the plan is to hold the limit; else everything is recomputed, and nothing more can be done."""
        self._plans_made = 0
        self._probing = True
        """No plan yet: everything is recomputed."""
        self._trains: tuple[bool, ...] = ()
        self._frozen = False
        self.own_seconds = 0.0
        """Spent in here at the beginnings of steps whose plan is frozen."""

    @property
    def is_measured(self) -> bool:
        """Whether this policy plans from measurements."""
        return self._config.policy == "stage_aware" and self._config.plan.load is None

    @property
    def is_frozen(self) -> bool:
        """Whether the plan has held its limit."""
        return self._frozen

    @property
    def plans(self) -> tuple[ChunkPlan, ...]:
        """What this rank's chunks run now, first chunk first."""
        return tuple(loop.plan for loop in self._loops.values())

    @property
    def stage_plan(self) -> StagePlan | None:
        """What this rank's stage plans and held; None before its first plan."""
        return self._story.own

    def counters(self) -> dict[str, dict[str, int]]:
        """{choice: {"forward": layers, "recomputed": layers}} on this rank."""
        return layer_loop.counted(self._loops.values())

    def layers_recomputed(self, block: nn.Module) -> tuple[int, ...] | None:
        """1 for each layer that runs again in full in every micro-batch, 0 for the others; None of another's block."""
        loop = self._loops.get(block)
        return None if loop is None else tuple(int(whole) for whole in loop.plan.always_in_full())

    def adopt(self, block: nn.Module, board: Board) -> None:
        """Recompute this block by plan. Raises ValueError where it cannot be."""
        if block in self._loops:
            return
        if len(self._loops) == own_chunks():
            logger.warning(
                "megatron_ext: recompute plans the first model of a job; another one's blocks stay as they are"
            )
            return
        check_config(block.config)
        for layer in block.layers:
            allowed_modules(layer, self._config.modules)
        loop = layer_loop.attach(block)
        loop.plan = all_layers(len(block.layers))
        loop.arrived = self._arrived
        self._loops[block], self._board = loop, board
        self._is_wide = is_spread(block.config)

    def close(self) -> None:
        """Give all blocks back."""
        self._story.close()
        for block in self._loops:
            layer_loop.detach(block)
        self._loops.clear()

    # -- a step ---------------------------------------------------------------------------------------------------

    @contextmanager
    def step(self, micro_batches: int) -> Iterator[None]:
        """Around one training step of `micro_batches` on this rank."""
        start = time.perf_counter()
        self._story.meet([len(block.layers) for block in self._loops])
        if not any(len(plan.layers) for plan in self.plans):  # a stage for the embedding or the loss alone
            self._story.plan_of_nothing(
                pipeline_of(micro_batches, next(iter(self._loops)).config), self.plans
            )
            yield
            return
        news = self._news(micro_batches)
        grew = self._sizes.grow(news.waiting)
        pipeline = pipeline_of(news.micro_batches, self._held.block.config)
        more = self._pipeline is not None and opens_more(self._pipeline, pipeline)
        if self._pipeline is None or more:
            self._pipeline = pipeline
        if news.trains_others:
            self._measure_anew()
        if self._probing or more or grew:
            if not self.is_measured:
                self._follow_rule()
            elif self._measurements:
                self._make_plan()
        elif self._looks_again:
            self._look_again(news)
        watching, plans_made = not self._frozen, self._plans_made
        if not watching:
            self.own_seconds += time.perf_counter() - start
        with self._held.watched() if watching else self._noticing_peaks():
            yield
        # A step in which another plan was made tells nothing of either; the next one will.
        if watching and not self._probing and self._plans_made == plans_made:
            self._verify()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Around a pass of the schedule that runs nothing backward, whatever mode the model is in."""
        for loop in self._loops.values():
            loop.evaluates = True
        try:
            yield
        finally:
            for loop in self._loops.values():
                loop.evaluates = False

    def forward_begins(self) -> None:
        """One forward pass of the schedule."""
        if self._counts_outside:
            self._measurements.forward_begins(self._held.device)

    def forward_ended(self) -> None:
        """It has ended."""
        if self._counts_outside:
            self._measurements.forward_ended(self._held.device, self._held.activations())

    @property
    def _counts_outside(self) -> bool:
        return self._held.is_watching and self._probing and self.is_measured

    @property
    def _looks_again(self) -> bool:
        """Whether a frozen plan is still looked at when a step begins."""
        return self._frozen and self.is_measured and self._held.counts_everything and self._fits

    def _news(self, micro_batches: int) -> News:
        """What may ask for another plan: of all ranks where that takes nothing more, in a wide group, else of this."""
        if not self.is_measured:
            return News(micro_batches)
        static, over = (self._held.static(), self._overshoot.last) if self._looks_again else (0, 0)
        own = News(micro_batches, self._sizes.waiting, self._trains_others(), static, over)
        return own.of_all(self._held.most_of_group) if self._is_wide else own

    def _look_again(self, news: News) -> None:
        """Optimizer states may be made late, after steps that overflowed; and a frozen step may have gone over."""
        static, over = news.static_bytes, news.over_bytes
        if not self._is_wide:
            static, over = self._held.most_of_group(static, over)
        if over or static > _GREW * self._static:
            self._overshoot.count(over)
            self._make_plan()

    def _noticing_peaks(self) -> AbstractContextManager[None]:
        """Around a step whose plan is frozen."""
        if not self._looks_again:
            return nullcontext()
        plans_made = self._plans_made
        return self._overshoot.noticed(lambda: self._plans_made == plans_made)

    def _trains_others(self) -> bool:
        """Whether weights were frozen or freed since."""
        before, self._trains = self._trains, layers_that_train(self._loops)
        return bool(before) and before != self._trains

    def _measure_anew(self) -> None:
        """Layers keep other bytes than those that were measured."""
        self._probing, self._frozen = True, False
        self._sizes.forget()
        self._measurements.forget()
        self._overshoot.forget()
        for block, loop in self._loops.items():
            loop.plan, loop.number = all_layers(len(block.layers)), 0

    def _arrived(self, block: nn.Module, hidden: Tensor, options: dict[str, Any]) -> None:
        """A micro-batch: nothing to do but for the first, and for one that is larger than all before. A chunk without
        layers knows no strategies, so it leaves that to the next one."""
        cut = group_of(block).size() if block.config.sequence_parallel else 1
        size = Size(hidden.shape[1], hidden.shape[0] * cut)
        if not self.is_measured or not len(block.layers) or self._sizes.covers(size):
            return
        is_first = self._sizes.largest is None
        if self._is_wide and not is_first:
            self._sizes.wait(size, is_planned=not self._probing)
            return
        self._sizes.grow(size)
        if is_first:
            self._measure(block, hidden, options, size)
            if self._pipeline is None:  # a loop of the script's own, or an engine
                logger.warning(
                    "megatron_ext: recompute sees no schedule of Megatron-core's, so it counts nothing outside of "
                    "layers, and does not verify its plan; set megatron_ext.memory.limit with room for logits and loss"
                )
                self._pipeline = Pipeline(1, 1)
                self._make_plan()
        elif not self._probing:
            self._make_plan()

    def _measure(self, block: nn.Module, hidden: Tensor, options: dict[str, Any], size: Size) -> None:
        """Of data-parallel ranks each measures its own first micro-batch, and all plan for one that covers them."""
        is_somebodys = True
        if self._is_wide:
            self._agree("the layers that are measured", self._measurements.layers(block))
            is_somebodys = self._sizes.first(size, self._held.most_of_group)
        else:
            self._agree("the size that layers are measured at", asdict(size))
        with self._held.stays():
            self._measurements.measure(
                block, hidden, options, size, self._sizes.planned, is_made_up=not is_somebodys
            )

    # -- planning -------------------------------------------------------------------------------------------------

    def _make_plan(self) -> None:
        problem = self._problem()
        start = time.perf_counter()
        solution = solve_in_order(problem)
        solved_in = time.perf_counter() - start
        if not solution.fits:
            solution = self._where_nothing_fits(problem)
        self._fits, self._predicted = solution.fits, solution.peak_bytes
        self._use(chunk_plans(problem, solution))
        self._overshoot.plan_leaves(problem.limit_bytes - solution.peak_bytes)
        self._frozen = not self._fits
        assert self._pipeline is not None
        size = self._sizes.planned
        self._story.measured_plan(
            self._pipeline,
            self.plans,
            problem,
            self._overshoot.unforeseen_bytes,
            solution,
            [self._measurements.seconds(block, size) for block in self._loops],
            [self._measurements.outside_seconds(block, size) for block in self._loops],
            bytes_by_parameter(self._measurements.typical_layer().parameters()),
            size,
            solved_in,
        )

    def _where_nothing_fits(self, problem: StageProblem) -> Solution:
        """A job that has run by a plan may go on. ValueError before the first one, when more can still be given."""
        reason = nothing_fits(problem, self._overshoot.unforeseen_bytes, own_stage(), self._sizes.planned)
        if not self._plans_made:
            raise ValueError(reason)
        logger.warning("%s; until then every layer is recomputed", reason)
        return everything_recomputed(problem)

    def _follow_rule(self) -> None:
        """A rule's plan, or the one of a file."""
        assert self._pipeline is not None
        layers = self._story.layers_by_stage()
        if self._config.plan.load:
            plans = plans_of_file(self._config.plan.load, layers, own_stage(), self._loops)
        else:
            ratio = self._config.ratio or 0.0
            plans = rule_plans(self._config.policy, ratio, self._pipeline, own_stage(), layers)
        self._use(plans)
        self._story.plan_of_rule(self._pipeline, self.plans, self._held.limit())

    def _use(self, plans: Sequence[ChunkPlan]) -> None:
        """Ranks that replay collectives together must run the same."""
        self._plans_made += 1
        self._probing = self._frozen = False
        self._agree(f"recomputation plan {self._plans_made}", [plan.digest() for plan in plans])
        for loop, plan in zip(self._loops.values(), plans, strict=True):
            loop.plan = plan

    def _agree(self, what: str, fact: Any) -> None:
        """Return where all ranks that hold one plan say the same; ValueError names those that differ."""
        assert self._board is not None
        if not (self._is_wide and are_equal(fact, self._held.most_of_group)):
            self._board.compare(what, fact)

    def _problem(self, *, saved_only: bool = False) -> StageProblem:
        """`saved_only`: of transients, what recomputation saves once more."""
        assert self._pipeline is not None
        # Each rank sees its own device, and its own share of the host; the plan must be everybody's.
        static, of_limit, *outside = self._held.most_of_group(
            self._held.static(), -self._held.limit(), *self._measurements.outside_bytes(self._sizes.planned)
        )
        if not saved_only:
            self._static = static
        return problem_of(
            self._pipeline,
            own_stage(),
            [self._measurements.classes_of(block) for block in self._loops],
            self._measurements.layer_classes(self._sizes.planned, saved_only=saved_only),
            outside,
            static + self._overshoot.unforeseen_bytes,
            -of_limit,
            saved_only=saved_only,
        )

    # -- verifying ------------------------------------------------------------------------------------------------

    def _verify(self) -> None:
        """What the step held, against the prediction and the limit."""
        measured, limit = self._held.peak(), self._held.limit()
        predicted = self._predicted if self._held.counts_everything else self._predicted_saved()
        over, waits = self._held.most_of_group(max(0, measured - limit), int(self._sizes.waiting is not None))
        if waits:  # it ran for less than what came, and the next step will have another plan
            return
        if over and self.is_measured:
            self._story.verified(measured, predicted, limit, frozen=False)
            self._overshoot.count(over)
            self._make_plan()
            return
        self._frozen = True
        self._story.verified(measured, predicted, limit, frozen=True)
        if over:
            logger.warning(
                "megatron_ext: stage %d held %s, %s more than megatron_ext.memory allows; policy %s does not look at "
                "memory, stage_aware does",
                own_stage(), human_bytes(measured), human_bytes(over), self._config.policy,
            )  # fmt: skip

    def _predicted_saved(self) -> int | None:
        if self._predicted is None:
            return None
        options = [list(plan.layers) for plan in self.plans]
        return peak_in_order(self._problem(saved_only=True), options, fraction_of(self.plans))
