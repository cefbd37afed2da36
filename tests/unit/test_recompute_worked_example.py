"""The worked example, from its inputs alone: the shipped solver says what each stage recomputes, the timeline how long
a step takes.

Llama-3-8B-like, 32 layers over 4 stages, sequences of 8192, micro-batches of 2, 76 of 80 GB usable. A layer keeps 34
bytes for each token and channel, its input alone 2. The unit of time is a layer's forward: its backward takes 2, its
recomputation 1, and the head of the last stage is 2.1 layer-forwards wide.
Gains are over full recomputation everywhere with an equal cut; what is expected is worked by hand in comments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from megatron_ext.recompute.layout_advice import advise
from megatron_ext.recompute.schedule import Pipeline, corners, open_counts
from megatron_ext.recompute.solver import Solution, solve
from megatron_ext.recompute.stage_memory import ChunkLayers, LayerClass, Option, StageProblem, peak_bytes
from megatron_ext.recompute.stage_peak import solve_in_order
from megatron_ext.recompute.timeline import StageTimes, compose

STAGES, HIDDEN, FFN, KV_SIZE, VOCABULARY, LENGTH = 4, 4096, 14336, 1024, 128256, 8192
LIMIT_BYTES = 76 * 10**9
LAYER_WEIGHTS = 2 * HIDDEN * (HIDDEN + KV_SIZE) + 3 * HIDDEN * FFN
VOCABULARY_WEIGHTS = VOCABULARY * HIDDEN
WEIGHT_BYTES = 16
"""bf16 with its gradient, and fp32 master and two moments."""
LOGIT_BYTES = 10
"""bf16, and fp32 of logits and of their gradient."""
EQUAL = (8, 8, 8, 8)
HEAD = 2.1


@dataclass(frozen=True)
class Example:
    """The job; its variants change one number."""

    head: float = HEAD
    """Of the last stage, in layer-forwards; 0: neither its time nor its logits and weights are there."""
    micro_batch: int = 2

    def problem(self, layers: tuple[int, ...], stage: int) -> StageProblem:
        channels = LENGTH * self.micro_batch * HIDDEN
        layer = LayerClass(
            "layer",
            (
                Option("none", 0.0, 34 * channels, 0),
                Option("full", 1.0, 2 * channels, 32 * channels),  # the rest is there once more
            ),
        )
        has_head = stage == STAGES - 1 and self.head > 0
        logits = LOGIT_BYTES * LENGTH * self.micro_batch * VOCABULARY if has_head else 0
        weights = layers[stage] * LAYER_WEIGHTS + (stage == 0 or has_head) * VOCABULARY_WEIGHTS
        pipeline = Pipeline(STAGES, 16)  # as many open as with 8 or 64
        return StageProblem(
            (ChunkLayers((layer,) * layers[stage], outside_transient_bytes=logits),),
            corners(pipeline, stage),
            open_counts(pipeline, stage),
            WEIGHT_BYTES * weights,
            LIMIT_BYTES,
        )

    def planned(self, layers: tuple[int, ...] = EQUAL) -> list[Solution]:
        """The least recomputation of each stage, in whole layers."""
        return [solve(self.problem(layers, stage), fractional=False) for stage in range(STAGES)]

    def smallest_uniform(self) -> int:
        """The one count for all stages that Megatron-core would be given."""
        for count in range(EQUAL[0] + 1):
            names = (("full",) * count + ("none",) * (EQUAL[0] - count),)
            problems = [self.problem(EQUAL, stage) for stage in range(STAGES)]
            if all(peak_bytes(problem, names) <= LIMIT_BYTES for problem in problems):
                return count
        raise AssertionError("full recomputation fits")

    def seconds(self, recomputed, micro_batches: int, layers: tuple[int, ...] = EQUAL) -> float:
        """Of a step; `recomputed`: by stage, seconds of a micro-batch, or of each micro-batch of a window."""
        widths = [count + (self.head if stage == STAGES - 1 else 0.0) for stage, count in enumerate(layers)]
        times = [[StageTimes(w, 2 * w, again)] for w, again in zip(widths, recomputed, strict=True)]
        return compose(Pipeline(STAGES, micro_batches), times).seconds

    def gain(self, recomputed, micro_batches: int) -> float:
        """Over full recomputation."""
        full = self.seconds([float(count) for count in EQUAL], micro_batches)
        return full / self.seconds(recomputed, micro_batches)


def counts(solutions: list[Solution]) -> list[int]:
    """Layers recomputed by stage: the first ones of each, in a plan that fits."""
    assert all(solution.fits and solution.peak_bytes <= LIMIT_BYTES for solution in solutions)
    for solution in solutions:
        (names,) = solution.options
        assert list(names) == sorted(names)  # "full" before "none"
    return [solution.options[0].count("full") for solution in solutions]


def recompute_seconds(solutions: list[Solution]) -> list[float]:
    return [solution.seconds for solution in solutions]


def windows(solution: Solution, window: int) -> tuple[float, ...]:
    """Recomputation of each micro-batch in a row, where one layer is recomputed for some of them."""
    whole = float(solution.options[0].count("full"))
    if solution.fraction is None:
        return (whole,)
    return tuple(whole + (number < solution.fraction.micro_batches) for number in range(window))


MICRO_BATCHES = (8, 16, 64)


def test_a_layer_keeps_two_gigabytes_and_the_head_is_as_wide_as_two_layers():
    """Multiplications of a token: weights, and for attention half of the pairs, causal."""
    problem = Example().problem(EQUAL, 0)
    assert problem.chunks[0].classes[0]["none"].kept_bytes == pytest.approx(2.3e9, rel=0.01)
    head_over_layer = VOCABULARY_WEIGHTS / (LAYER_WEIGHTS + LENGTH * HIDDEN)
    assert head_over_layer == pytest.approx(HEAD, rel=0.01)


@pytest.mark.parametrize(
    ("micro_batches", "uniform", "stage_aware"), [(8, 1.089, 1.252), (16, 1.087, 1.257), (64, 1.086, 1.262)]
)
def test_stage_aware_lifts_recomputation_off_the_head(micro_batches, uniform, stage_aware):
    """The last stage is slowest and never waits: a step is its slots, and one micro-batch there and back.

    full        slot 8 + 2.1 + 16 + 4.2 + 8 = 38.3, there and back 3 x (8 + 16 + 8) = 96; m = 8: 402.4
    uniform 5   slot 35.3,                          3 x (8 + 16 + 5) = 87;                        369.4
    5, 2, 0, 0  slot 30.3,                          3 x 24 + 5 + 2   = 79;                        321.4
    """
    example = Example()
    planned = example.planned()
    assert counts(planned) == [5, 2, 0, 0]
    assert example.smallest_uniform() == 5
    assert example.seconds([8.0] * 4, micro_batches) == pytest.approx(38.3 * micro_batches + 96)
    assert example.seconds([5.0] * 4, micro_batches) == pytest.approx(35.3 * micro_batches + 87)
    assert example.seconds(recompute_seconds(planned), micro_batches) == pytest.approx(
        30.3 * micro_batches + 79
    )
    assert example.gain([5.0] * 4, micro_batches) == pytest.approx(uniform, abs=6e-4)
    assert example.gain(recompute_seconds(planned), micro_batches) == pytest.approx(stage_aware, abs=6e-4)


@pytest.mark.parametrize(("micro_batches", "gain"), [(8, 1.317), (16, 1.318), (64, 1.320)])
def test_a_layer_moved_off_the_head_wins_more(micro_batches, gain):
    example = Example()

    def plan_seconds(layers: tuple[int, ...]) -> float:
        planned = example.planned(layers)
        if not all(solution.fits for solution in planned):
            return math.inf
        return example.seconds(recompute_seconds(planned), micro_batches, layers)

    found = advise(EQUAL, plan_seconds)
    assert found is not None
    assert found.layers == (8, 8, 9, 7)
    assert counts(example.planned(found.layers)) == [5, 2, 0, 0]
    full = example.seconds([8.0] * 4, micro_batches)
    assert full / found.seconds == pytest.approx(gain, abs=6e-4)


def test_what_a_sharper_peak_and_shared_layers_save_is_no_time_of_the_slowest_stage():
    """A layer for some micro-batches, and transients behind what later layers have freed: less is recomputed on the
    first two stages, whose time shows only once in a step, on the way back."""
    example = Example()
    problems = [example.problem(EQUAL, stage) for stage in range(STAGES)]
    whole, sharp = example.planned(), [solve_in_order(problem) for problem in problems]
    assert all(solution.fits for solution in sharp)
    assert all(a.seconds <= b.seconds for a, b in zip(sharp, whole, strict=True))
    assert sharp[0].seconds < whole[0].seconds
    for micro_batches in MICRO_BATCHES:
        again = [windows(s, problem.window[0]) for s, problem in zip(sharp, problems, strict=True)]
        before = example.seconds(recompute_seconds(whole), micro_batches)
        after = example.seconds(again, micro_batches)
        assert before - 2.0 <= after <= before


@pytest.mark.parametrize("micro_batches", MICRO_BATCHES)
def test_variant_without_a_head(micro_batches):
    """By hand. Memory of stages 0 to 2 is as before: 5, 2, 0, 0.

    Stage 0 is slowest with 29. From the end of its forward 0 until backward 0 may begin: 3 forwards of 8, backwards of
    16, 16 and 18, together 74; meanwhile it runs 3 forwards, 24, and waits 50. Then it never waits, until its last
    forward has ended: that micro-batch is gone for 74 too, and 3 backwards of 5 + 16 take 63, which leaves 11.
    So 29 m + 61. Full: 32 (m + 3); uniform 5: 29 (m + 3).
    """
    example = Example(head=0.0)
    planned = example.planned()
    assert counts(planned) == [5, 2, 0, 0]
    assert example.smallest_uniform() == 5
    assert example.seconds(recompute_seconds(planned), micro_batches) == pytest.approx(
        29 * micro_batches + 61
    )
    assert example.gain([5.0] * 4, micro_batches) == pytest.approx(32 / 29)
    assert example.gain(recompute_seconds(planned), micro_batches) == pytest.approx(
        32 * (micro_batches + 3) / (29 * micro_batches + 61)
    )


@pytest.mark.parametrize("micro_batches", MICRO_BATCHES)
def test_variant_with_micro_batches_of_three(micro_batches):
    """By hand. A token and channel of a micro-batch: 3 x 8192 x 4096 = 0.1007 GB. With k of 8 layers recomputed, what
    is open holds (272 - 32 k) of these each, and a recomputed layer 32 once more, 3.22 GB.

    stage  weights          left  open   holds
    0      36.32            39.7  4      109.5 + 3.2 - 12.88 k   k >= 5.7
    1      27.92            48.1  3       82.1 + 3.2 -  9.66 k   k >= 3.9
    2      27.92            48.1  2       54.8 + 3.2 -  6.44 k   k >= 1.6
    3      36.32, logits 31.5:
                             8.1  1       27.4       -  3.22 k   k >= 6.0 (the logits are there before any layer)

    The logits now cost recomputation on the last stage, and little can be won: the slot is 30.3 + k_3 for uniform and
    for stage-aware, on the way there and back are 3 x (24 + k_3) or 72 + 6 + 4 + 2.
    """
    example = Example(micro_batch=3)
    planned = example.planned()
    found = counts(planned)
    assert found[:3] == [6, 4, 2]
    # (27.380 + 31.518 + 36.324 - 76) / 3.2212 = 5.967
    assert found[3] == 6
    assert example.smallest_uniform() == 6
    assert example.seconds([6.0] * 4, micro_batches) == pytest.approx(36.3 * micro_batches + 90)
    assert example.seconds(recompute_seconds(planned), micro_batches) == pytest.approx(
        36.3 * micro_batches + 84
    )
    full = 38.3 * micro_batches + 96
    assert example.gain(recompute_seconds(planned), micro_batches) == pytest.approx(
        full / (36.3 * micro_batches + 84)
    )
