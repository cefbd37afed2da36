"""Composed step times against closed forms, dependencies, and the worked example of Merak's digest."""

from __future__ import annotations

import random

import pytest

from megatron_ext.recompute.schedule import Pipeline, passes
from megatron_ext.recompute.timeline import Interval, StageTimes, Timeline, compose

HEAD = 2.1
"""Layer-forwards of Llama-3-8B's output layer and loss: 4096 x 128256 weights against 218 million of a layer."""
PIPELINES = [
    Pipeline(1, 3),
    Pipeline(2, 1),
    Pipeline(4, 2),
    Pipeline(4, 8),
    Pipeline(2, 4, 2),
    Pipeline(2, 5, 2, 3),
    Pipeline(4, 13, 2, 8),
    Pipeline(3, 6, 3),
]


def llama_seconds(layers: list[int], recomputed: list[int], micro_batches: int, head: float = HEAD) -> float:
    """p = 4, a layer's forward 1, backward 2, recompute 1; the head's forward and backward on the last stage."""
    widths = [*layers[:-1], layers[-1] + head]
    times = [[StageTimes(n, 2 * n, float(again))] for n, again in zip(widths, recomputed, strict=True)]
    return compose(Pipeline(len(layers), micro_batches), times).seconds


def gains(layers: list[int], recomputed: list[int], head: float = HEAD) -> list[float]:
    """Over full recomputation of an equal cut, for m = 8, 16, 64."""
    full = [8, 8, 8, 8]
    return [
        llama_seconds(full, full, m, head) / llama_seconds(layers, recomputed, m, head) for m in (8, 16, 64)
    ]


@pytest.mark.parametrize(
    ("layers", "recomputed", "wanted"),
    [
        ([8, 8, 8, 8], [8, 8, 8, 8], [1, 1, 1]),
        ([8, 8, 8, 8], [5, 5, 5, 5], [1.089, 1.087, 1.086]),
        ([8, 8, 8, 8], [5, 2, 0, 0], [1.252, 1.257, 1.262]),
        ([8, 8, 9, 7], [5, 2, 0, 0], [1.317, 1.318, 1.320]),
        # variants: the same layout where stage 2 must recompute one layer, and where every stage has stage 0's room
        # for 3 x 4 = 12 layers' activations
        ([8, 8, 9, 7], [5, 2, 1, 0], [1.308, 1.314, 1.319]),
        ([8, 8, 8, 8], [5, 4, 2, 0], [1.237, 1.248, 1.260]),
    ],
)
def test_worked_example_with_a_heavy_head(layers, recomputed, wanted):
    """To the last digit given, which the source rounds down once (1.0875, 1.3185)."""
    assert gains(layers, recomputed) == pytest.approx(wanted, abs=6e-4)


@pytest.mark.parametrize(
    ("layers", "recomputed", "wanted"),
    [
        ([8, 8, 8, 8], [5, 5, 5, 5], [1.103, 1.103, 1.103]),
        ([8, 8, 8, 8], [5, 2, 0, 0], [1.201, 1.158, 1.118]),
        ([7, 8, 8, 9], [4, 2, 0, 0], [1.210, 1.199, 1.189]),
    ],
)
def test_worked_example_without_a_head(layers, recomputed, wanted):
    assert gains(layers, recomputed, head=0.0) == pytest.approx(wanted, abs=6e-4)


def test_worked_example_by_hand():
    """Where the last stage is the slowest, a step is the way of the first micro-batch there, m of its slots, and the
    last gradient's way back through the others."""
    for m in (8, 16, 64):
        slot, others = 8 + 16 + 8 + 3 * HEAD, 3 * (8 + 8 + 16)
        assert llama_seconds([8] * 4, [8] * 4, m) == pytest.approx(m * slot + others)
        assert llama_seconds([8] * 4, [5, 2, 0, 0], m) == pytest.approx(
            m * (24 + 3 * HEAD) + 3 * 8 + (16 + 5) + (16 + 2) + 16
        )


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_equal_stages_take_the_closed_form_of_1f1b(stages, micro_batches):
    times = [[StageTimes(1.0, 2.0, 0.75)]] * stages
    found = compose(Pipeline(stages, micro_batches), times)
    assert found.seconds == pytest.approx((micro_batches + stages - 1) * 3.75)
    share = (stages - 1) / (micro_batches + stages - 1)
    assert found.idle_shares == pytest.approx([share] * stages)


@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 2), (2, 8), (4, 4), (4, 16), (8, 16)])
def test_interleaving_divides_the_bubble_by_the_chunks(stages, micro_batches, chunks):
    """Narayanan et al., section 2.2: idle over ideal time is (p - 1) / (v m)."""
    times = [[StageTimes(1.0 / chunks, 2.0 / chunks)] * chunks] * stages
    found = compose(Pipeline(stages, micro_batches, chunks), times)
    assert found.seconds / (3.0 * micro_batches) - 1 == pytest.approx((stages - 1) / (chunks * micro_batches))


def random_times(pipeline: Pipeline, rng: random.Random) -> list[list[StageTimes]]:
    def one() -> StageTimes:
        again = rng.choice([0.0, rng.random(), (rng.random(), 0.0, rng.random())])
        return StageTimes(rng.random(), 2 * rng.random(), again)

    return [[one() for _ in range(pipeline.chunks)] for _ in range(pipeline.stages)]


def check_dependencies(pipeline: Pipeline, found: Timeline, latency: float) -> None:
    """What must come before what; and nothing waits without a reason."""
    spans: dict[tuple, Interval] = {}
    begins: dict[tuple, float] = {}
    for stage, intervals in enumerate(found.intervals):
        for interval in intervals:
            virtual = interval.chunk * pipeline.stages + stage
            spans[(interval.kind, interval.micro_batch, virtual)] = interval
            kind = "backward" if interval.kind == "recompute" else interval.kind
            begins.setdefault((kind, interval.micro_batch, virtual), interval.start)
    last = pipeline.virtual_stages - 1
    for stage in range(pipeline.stages):
        free = 0.0
        for one in passes(pipeline, stage):
            virtual = one.chunk * pipeline.stages + stage
            if one.kind == "forward":
                needed = spans["forward", one.micro_batch, virtual - 1].end + latency if virtual else 0.0
            elif virtual == last:
                needed = spans["forward", one.micro_batch, virtual].end
            else:
                needed = spans["backward", one.micro_batch, virtual + 1].end + latency
            assert begins[one.kind, one.micro_batch, virtual] == pytest.approx(max(free, needed))
            free = spans[one.kind, one.micro_batch, virtual].end


@pytest.mark.parametrize("latency", [0.0, 0.3])
@pytest.mark.parametrize("pipeline", PIPELINES, ids=str)
def test_each_pass_starts_once_its_stage_is_free_and_its_input_is_there(pipeline, latency):
    rng = random.Random(str(pipeline))
    for _ in range(20):
        times = random_times(pipeline, rng)
        found = compose(pipeline, times, latency=latency)
        check_dependencies(pipeline, found, latency)
        assert found.seconds == max(interval.end for stage in found.intervals for interval in stage)
        for stage, intervals in enumerate(found.intervals):
            assert all(one.end <= after.start for one, after in zip(intervals, intervals[1:], strict=False))
            work = sum(
                each.forward + each.backward + each.recompute_of(n)
                for each in times[stage]
                for n in range(pipeline.micro_batches)
            )
            assert sum(interval.end - interval.start for interval in intervals) == pytest.approx(work)
            assert found.idle_shares[stage] == pytest.approx(1 - work / found.seconds)


def test_less_recomputation_never_takes_longer():
    """What lets stages be solved one by one: every start is a maximum of sums of times."""
    rng = random.Random(3)
    for pipeline in PIPELINES:
        for _ in range(20):
            times = random_times(pipeline, rng)
            before = compose(pipeline, times).seconds
            stage, chunk = rng.randrange(pipeline.stages), rng.randrange(pipeline.chunks)
            times[stage][chunk] = StageTimes(times[stage][chunk].forward, times[stage][chunk].backward)
            assert compose(pipeline, times).seconds <= before


def test_recomputation_of_some_micro_batches_of_a_window():
    """One of three micro-batches in a row recomputes a layer."""
    times = [[StageTimes(1.0, 2.0, (1.0, 0.0, 0.0))]]
    found = compose(Pipeline(1, 7), times)
    assert found.seconds == 7 * 3 + 3
    assert [one.micro_batch for one in found.intervals[0] if one.kind == "recompute"] == [0, 3, 6]


def test_recompute_stands_between_the_gradient_and_the_backward():
    times = [[StageTimes(1.0, 2.0, 1.0)], [StageTimes(1.0, 2.0)]]
    first, _ = compose(Pipeline(2, 1), times).intervals
    assert [(one.kind, one.start, one.end) for one in first] == [
        ("forward", 0.0, 1.0),
        ("recompute", 4.0, 5.0),
        ("backward", 5.0, 7.0),
    ]


@pytest.mark.parametrize("pipeline", [Pipeline(2, 1), Pipeline(4, 1)], ids=str)
def test_latency_is_paid_on_every_message(pipeline):
    times = [[StageTimes(1.0, 2.0)]] * pipeline.stages
    free = compose(pipeline, times).seconds
    assert compose(pipeline, times, latency=0.5).seconds == free + 2 * (pipeline.stages - 1) * 0.5


def test_times_must_fit_the_pipeline():
    with pytest.raises(ValueError, match=r"times has \[1, 1\] chunks by stage; .* 2 stages of 2 chunks"):
        compose(Pipeline(2, 4, 2), [[StageTimes(1.0, 2.0)]] * 2)
