"""One pipeline rank's side of a plan: what its layers may do as a problem, and the solution as plans of chunks."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from ..sequence_parallel.layer_shape import LayerShape
from .plan import FULL, NONE, ChunkPlan, Share, parse_choice
from .policies import layers_recomputed
from .probe import Measured
from .schedule import Pipeline, corners, open_counts
from .sizes import Size, scaled
from .solver import Solution
from .stage_memory import ChunkLayers, Fraction, LayerClass, Option, StageProblem, recompute_seconds
from .stage_peak import least_in_order, peak_in_order

LEAST_SHARE = 0.01
"""Of a layer's forward: what recomputing anything takes at least, whatever a noisy clock says."""


@dataclass(frozen=True)
class Known:
    """What was measured of one class of layers, at one size."""

    measured: tuple[Measured, ...]
    size: Size
    shape: LayerShape | None
    """None: a layer that the closed forms do not know."""
    strategy: str
    writes_scores: bool = True
    """As :func:`.layer_classes.writes_scores`; read where there is no shape."""

    def at(self, size: Size) -> tuple[Measured, ...]:
        """The measurements for another size."""
        return tuple(
            scaled(row, self.shape, self.strategy, self.size, size, writes_scores=self.writes_scores)
            for row in self.measured
        )


def layer_class(name: str, rows: Sequence[Measured], *, saved_only: bool = False) -> LayerClass:
    """Options of a layer. `saved_only`: of transients, only what recomputation saves once more."""
    plain = next(row for row in rows if row.choice == NONE)
    seconds = _seconds_again(rows, plain)
    options = []
    for row in rows:
        again = max(0, plain.kept_bytes - row.kept_bytes)
        transient = again if saved_only else row.transient_bytes
        options.append(Option(row.choice, seconds[row.choice], row.kept_bytes, transient))
    return LayerClass(name, tuple(options))


def _seconds_again(rows: Sequence[Measured], plain: Measured) -> dict[str, float]:
    """By choice, how much longer backward takes than where nothing is run again.

    That is a difference of two clocks. So what runs others' modules again and more is taken to last no less than they
    do, and a whole layer no less than its forward.
    """
    least = LEAST_SHARE * plain.forward_seconds
    found = {NONE: 0.0}
    for row in sorted(rows, key=lambda row: (row.choice == FULL, len(parse_choice(row.choice)))):
        if row.choice == NONE:
            continue
        modules = set(parse_choice(row.choice))
        parts = [other for other in found if row.choice == FULL or set(parse_choice(other)) < modules]
        slowest = max(found[part] for part in parts)
        known = plain.forward_seconds if row.choice == FULL else least
        found[row.choice] = max(known, slowest, row.backward_seconds - plain.backward_seconds)
    return found


def problem_of(
    pipeline: Pipeline,
    stage: int,
    layers: Sequence[Sequence[Hashable]],
    classes: Mapping[Hashable, LayerClass],
    outside_bytes: Sequence[int],
    static_bytes: int,
    limit_bytes: int,
    *,
    saved_only: bool = False,
) -> StageProblem:
    """`layers`: the class of each layer, by chunk. `outside_bytes`: kept by a micro-batch outside of them, by chunk.

    The last stage's last chunk has the head: while its backward begins, the gradient of what it keeps is there too.
    """
    heads = [stage == pipeline.stages - 1 and number == pipeline.chunks - 1 for number in range(len(layers))]
    return StageProblem(
        tuple(
            ChunkLayers(
                tuple(classes[layer] for layer in chunk),
                outside,
                outside if head and not saved_only else 0,
                head,
            )
            for chunk, outside, head in zip(layers, outside_bytes, heads, strict=True)
        ),
        corners(pipeline, stage),
        open_counts(pipeline, stage),
        static_bytes,
        limit_bytes,
    )


def chunk_plans(problem: StageProblem, solution: Solution) -> tuple[ChunkPlan, ...]:
    """The solution as each chunk runs it."""
    plans = []
    for number, names in enumerate(solution.options):
        share = None
        if solution.fraction is not None and solution.fraction.chunk == number:
            share = Share(
                solution.fraction.layer,
                solution.fraction.option,
                solution.fraction.micro_batches,
                problem.window[number],
            )
        plans.append(ChunkPlan(tuple(names), share))
    return tuple(plans)


def fraction_of(plans: Sequence[ChunkPlan]) -> Fraction | None:
    """The share of a rank's chunks, as the solver has it."""
    for number, plan in enumerate(plans):
        if plan.share is not None:
            return Fraction(number, plan.share.layer, plan.share.choice, plan.share.micro_batches)
    return None


def recompute_seconds_by_chunk(problem: StageProblem, plans: Sequence[ChunkPlan]) -> tuple[float, ...]:
    """Of one micro-batch through each chunk; with a share, the mean over its window."""
    found = []
    for chunk, plan in zip(problem.chunks, plans, strict=True):
        spent = sum(layer[name].seconds for layer, name in zip(chunk.classes, plan.layers, strict=True))
        if plan.share is not None:
            layer = chunk.classes[plan.share.layer]
            more = layer[plan.share.choice].seconds - layer[plan.layers[plan.share.layer]].seconds
            spent += more * plan.share.micro_batches / plan.share.window
        found.append(spent)
    return tuple(found)


def everything_recomputed(problem: StageProblem) -> Solution:
    """Every layer in full, whether that fits or not."""
    names = tuple((FULL,) * len(chunk.classes) for chunk in problem.chunks)
    peak = peak_in_order(problem, names)
    return Solution(names, None, recompute_seconds(problem, names), peak, peak <= problem.limit_bytes)


def least_peak(problem: StageProblem) -> int:
    """What the stage needs with everything recomputed: close to the least that a plan can do with, and enough."""
    return least_in_order(problem).peak_bytes


def all_layers(layers: int) -> ChunkPlan:
    """Every layer recomputed in full: the safest there is."""
    return first_layers(layers, layers)


def first_layers(count: int, layers: int) -> ChunkPlan:
    """Megatron-core's own order: the first `count` of `layers` are recomputed in full."""
    return ChunkPlan((FULL,) * count + (NONE,) * (layers - count))


def rule_plans(
    policy: str, ratio: float, pipeline: Pipeline, stage: int, layers: Sequence[Sequence[int]]
) -> list[ChunkPlan]:
    """Of one stage's chunks by a rule (:mod:`.policies`); `layers`: of each chunk of each stage."""
    windows = [sum(open_counts(pipeline, number)) for number in range(pipeline.stages)]
    counts = layers_recomputed(policy, ratio, windows, [sum(chunks) for chunks in layers])
    return spread(counts[stage], layers[stage])


def spread(count: int, layers: Sequence[int]) -> list[ChunkPlan]:
    """`count` layers of a rank, evenly over its chunks of so many `layers`, the first ones of each."""
    shares = [count * size // max(1, sum(layers)) for size in layers]
    for number in range(count - sum(shares)):
        shares[number % len(shares)] += 1
    return [first_layers(min(share, size), size) for share, size in zip(shares, layers, strict=True)]
