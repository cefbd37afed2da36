"""Contracts of one stage's side of a plan: measurements become a problem, its solution becomes plans of chunks."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from megatron_ext.recompute.plan import FULL, NONE, ChunkPlan, Share
from megatron_ext.recompute.probe import Measured
from megatron_ext.recompute.schedule import Pipeline, corners, open_counts
from megatron_ext.recompute.sizes import Size, scaled
from megatron_ext.recompute.solver import Solution, solve
from megatron_ext.recompute.stage import (
    LEAST_SHARE,
    Known,
    chunk_plans,
    first_layers,
    fraction_of,
    layer_class,
    least_peak,
    problem_of,
    recompute_seconds_by_chunk,
    spread,
)
from megatron_ext.recompute.stage_memory import Fraction, Option, peak_bytes
from megatron_ext.recompute.stage_peak import peak_in_order, solve_in_order
from megatron_ext.sequence_parallel.layer_shape import LayerShape

SHAPE = LayerShape(64, 256, num_heads=8, num_kv_heads=8, head_dim=8, group_size=4, unfused_attention=True)
ROWS = (
    Measured(NONE, 1.0, 2.0, 340, 50),
    Measured("core_attn", 1.0, 2.3, 240, 150),
    Measured(FULL, 1.1, 3.1, 20, 360),
)
DENSE = layer_class("dense", ROWS)
LEAN = layer_class("lean", [replace(row, kept_bytes=row.kept_bytes // 2) for row in ROWS])


# -- layer_class ------------------------------------------------------------------------------------------------------


def test_recomputing_takes_what_backward_takes_more():
    assert [option.name for option in DENSE.options] == [NONE, "core_attn", FULL]
    assert DENSE.options[0] == Option(NONE, 0.0, 340, 50)
    assert DENSE["core_attn"].seconds == pytest.approx(0.3)
    assert DENSE[FULL].seconds == pytest.approx(1.1)
    assert (DENSE[FULL].kept_bytes, DENSE[FULL].transient_bytes) == (20, 360)


@pytest.mark.parametrize("backward", [2.0, 1.5, 2.0 + LEAST_SHARE / 2])
def test_recomputing_is_never_free_whatever_a_noisy_clock_says(backward):
    """A module takes a hundredth of the layer's forward, the whole layer all of it."""
    noisy = [ROWS[0], *(replace(row, backward_seconds=backward) for row in ROWS[1:])]
    assert [option.seconds for option in layer_class("noisy", noisy).options] == [
        0.0, LEAST_SHARE * 1.0, 1.0
    ]  # fmt: skip


def test_what_runs_more_again_takes_no_less_than_its_parts():
    """A clock that was disturbed for one module, and not for both together."""
    seconds = {NONE: 2.0, "core_attn": 2.3, "mlp": 2.5, "core_attn+mlp": 2.1, FULL: 2.2}
    rows = [Measured(choice, 1.0, backward, 340, 50) for choice, backward in seconds.items()]
    found = [option.seconds for option in layer_class("noisy", rows).options]
    assert found == pytest.approx([0.0, 0.3, 0.5, 0.5, 1.0])


def test_noise_is_no_reason_to_recompute():
    """Where everything fits, nothing is recomputed although a choice seemed to be faster."""
    noisy = layer_class("noisy", [ROWS[0], replace(ROWS[2], backward_seconds=1.0)])
    problem = problem_of(Pipeline(2, 4), 0, [["x"] * 3], {"x": noisy}, [0], 0, 10**6)
    solution = solve(problem)
    assert (solution.options, solution.seconds) == (((NONE,) * 3,), 0.0)


def test_on_a_cpu_a_transient_is_what_is_saved_once_more():
    found = layer_class("dense", ROWS, saved_only=True)
    assert [option.transient_bytes for option in found.options] == [0, 100, 320]
    more = [ROWS[0], replace(ROWS[1], kept_bytes=350)]
    assert layer_class("more", more, saved_only=True)["core_attn"].transient_bytes == 0


# -- Known ------------------------------------------------------------------------------------------------------------


def test_known_size_is_what_was_measured():
    for shape in (SHAPE, None):
        assert Known(ROWS, Size(1, 512), shape, "megatron_ts").at(Size(1, 512)) == ROWS


def test_other_size_follows_the_closed_forms():
    known = Known(ROWS, Size(1, 512), SHAPE, "megatron_ts")
    for size in (Size(1, 2048), Size(2, 512), Size(1, 128)):
        assert known.at(size) == tuple(scaled(row, SHAPE, "megatron_ts", known.size, size) for row in ROWS)


def test_layer_without_a_closed_form_is_never_taken_for_less_than_it_keeps():
    """Whether the size grows or shrinks; what is recomputed in full keeps its input whatever the attention."""
    known, exact = (
        Known(ROWS, Size(1, 512), None, "megatron_ts"),
        Known(ROWS, Size(1, 512), SHAPE, "megatron_ts"),
    )
    for size in (Size(1, 1024), Size(2, 1024), Size(3, 512), Size(1, 256), Size(4, 64), Size(1, 8)):
        for row, most in zip(exact.at(size), known.at(size), strict=True):
            assert most.kept_bytes >= row.kept_bytes
            assert most.transient_bytes >= row.transient_bytes
    assert [row.kept_bytes for row in known.at(Size(1, 1024))] == [4 * 340, 2 * 240, 2 * 20]
    assert [row.kept_bytes for row in known.at(Size(1, 256))] == [340 // 2, 240 // 2, 20 // 2]


def test_layer_without_a_closed_form_goes_with_its_tokens_where_no_scores_are_written_out():
    """From 4K to 32K eight times as much, not 64 times."""
    known = Known(ROWS, Size(1, 4096), None, "megatron_ts", writes_scores=False)
    fused = Known(ROWS, Size(1, 4096), replace(SHAPE, unfused_attention=False), "megatron_ts")
    for size in (Size(1, 32768), Size(3, 4096), Size(1, 1024)):
        assert known.at(size) == fused.at(size)
    assert known.at(Size(1, 32768))[0].kept_bytes == 8 * 340


# -- problem_of -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pipeline", "stage"),
    [(Pipeline(4, 8), 0), (Pipeline(4, 2), 1), (Pipeline(2, 4, 2), 1), (Pipeline(1, 3), 0)],
)
def test_problem_has_the_schedules_windows_and_corners(pipeline, stage):
    layers = [["dense", "lean"]] * pipeline.chunks
    classes = {"dense": DENSE, "lean": LEAN}
    problem = problem_of(pipeline, stage, layers, classes, list(range(pipeline.chunks)), 1000, 5000)
    assert problem.window == open_counts(pipeline, stage)
    assert problem.corners == corners(pipeline, stage)
    assert (problem.static_bytes, problem.limit_bytes) == (1000, 5000)
    for number, chunk in enumerate(problem.chunks):
        assert chunk.classes == (DENSE, LEAN)
        is_head = stage == pipeline.stages - 1 and number == pipeline.chunks - 1
        assert chunk.outside_bytes == number
        assert chunk.outside_goes_first == is_head
        assert chunk.outside_transient_bytes == (number if is_head else 0)


def test_first_stage_of_four_holds_four_of_everything():
    problem = problem_of(Pipeline(4, 8), 0, [["dense"] * 2], {"dense": DENSE}, [7], 1000, 0)
    assert peak_bytes(problem, [[NONE, NONE]]) == 1000 + 4 * (7 + 2 * 340) + 50


def test_head_is_freed_before_the_layers_run_backward():
    """Its gradient lies on top of all; a layer's transient does not lie on top of the head."""
    classes = {"dense": DENSE}
    problem = problem_of(Pipeline(2, 4), 1, [["dense"]], classes, [1000], 0, 0)
    kept, transient = DENSE[NONE].kept_bytes, DENSE[NONE].transient_bytes
    assert transient < 1000
    assert peak_in_order(problem, [[NONE]]) == 1000 + kept + 1000
    saved = problem_of(Pipeline(2, 4), 1, [["dense"]], classes, [1000], 0, 0, saved_only=True)
    assert peak_in_order(saved, [[NONE]]) == 1000 + kept


def test_numbers_for_other_chunks_than_there_are_layers_of_are_a_mistake():
    with pytest.raises(ValueError):  # noqa: PT011
        problem_of(Pipeline(2, 2), 0, [["dense"]], {"dense": DENSE}, [0, 0], 0, 0)
    with pytest.raises(ValueError, match="2 chunks, 1 windows"):
        problem_of(Pipeline(2, 2), 0, [["dense"]] * 2, {"dense": DENSE}, [0, 0], 0, 0)


# -- solutions as plans -----------------------------------------------------------------------------------------------


def test_solution_becomes_a_plan_for_each_chunk_with_the_share_in_one():
    pipeline = Pipeline(2, 8, 2)
    problem = problem_of(pipeline, 0, [["dense"] * 2] * 2, {"dense": DENSE}, [0, 0], 0, 0)
    solution = Solution(((FULL, NONE), (NONE, "core_attn")), Fraction(0, 1, FULL, 1), 0.0, 0, True)
    window = open_counts(pipeline, 0)[0]
    assert chunk_plans(problem, solution) == (
        ChunkPlan((FULL, NONE), Share(1, FULL, 1, window)),
        ChunkPlan((NONE, "core_attn")),
    )
    without = chunk_plans(problem, replace(solution, fraction=None))
    assert [plan.share for plan in without] == [None, None]


def test_plan_of_a_solution_takes_the_seconds_that_the_solver_promised():
    """Averaged over a window of passes, for random limits."""
    rng = random.Random(3)
    pipeline = Pipeline(4, 12)
    shared = 0
    for _ in range(60):
        stage = rng.randrange(4)
        layers = [rng.choice(["dense", "lean"]) for _ in range(4)]
        problem = problem_of(
            pipeline, stage, [layers], {"dense": DENSE, "lean": LEAN}, [5], 100, rng.randint(600, 6000)
        )
        solution = solve(problem)
        (plan,) = chunk_plans(problem, solution)
        (window,) = problem.window
        seconds = [
            problem.chunks[0].classes[layer][plan.choice(layer, number)].seconds
            for number in range(window)
            for layer in range(4)
        ]
        assert sum(seconds) / window == pytest.approx(solution.seconds)
        shared += plan.share is not None
    assert shared > 10


def test_least_that_a_stage_needs_is_everything_in_full_and_one_layer_running_again():
    problem = problem_of(Pipeline(4, 8), 0, [["dense", "lean"]], {"dense": DENSE, "lean": LEAN}, [7], 1000, 9)
    assert least_peak(problem) == 1000 + 4 * (7 + 20 + 10) + max(360, 360 - 10)
    assert solve_in_order(replace(problem, limit_bytes=least_peak(problem))).fits


def test_last_layer_is_kept_where_running_it_again_needs_more():
    large = layer_class("large", [*ROWS[:2], replace(ROWS[2], transient_bytes=400)])
    problem = problem_of(Pipeline(1, 1), 0, [["large"] * 2], {"large": large}, [0], 0, 0)
    assert peak_in_order(problem, [[FULL, FULL]]) == 40 + 400
    assert least_peak(problem) == peak_in_order(problem, [[FULL, "core_attn"]]) == 20 + 400


def test_shares_of_plans_are_the_fractions_of_solutions():
    plans = (ChunkPlan((NONE,)), ChunkPlan((NONE, FULL), Share(1, NONE, 1, 3)))
    assert fraction_of(plans) == Fraction(1, 1, NONE, 1)
    assert fraction_of(plans[:1]) is None


def test_seconds_by_chunk_add_up_to_the_solutions():
    rng, pipeline, shared = random.Random(8), Pipeline(2, 8, 2), 0
    for _ in range(30):
        limit = rng.randint(2000, 9000)
        problem = problem_of(
            pipeline, 0, [["dense"] * 3, ["lean"] * 2], {"dense": DENSE, "lean": LEAN}, [5, 0], 0, limit
        )
        solution = solve(problem)
        plans = chunk_plans(problem, solution)
        assert sum(recompute_seconds_by_chunk(problem, plans)) == pytest.approx(solution.seconds)
        assert fraction_of(plans) == solution.fraction
        shared += solution.fraction is not None
    assert shared > 5


def test_layers_of_a_formula_are_spread_evenly_over_chunks_and_none_is_lost():
    assert spread(3, [4, 4]) == [first_layers(2, 4), first_layers(1, 4)]
    rng = random.Random(9)
    for _ in range(300):
        layers = [rng.randint(1, 6) for _ in range(rng.randint(1, 4))]
        count = rng.randint(0, sum(layers))
        plans = spread(count, layers)
        assert [len(plan.layers) for plan in plans] == layers
        recomputed = [plan.layers.count(FULL) for plan in plans]
        assert sum(recomputed) == count
        assert all(
            abs(found - count * size / sum(layers)) <= 1
            for found, size in zip(recomputed, layers, strict=True)
        )


@pytest.mark.parametrize("count", [0, 2, 3])
def test_first_layers_are_the_first(count):
    assert first_layers(count, 3) == ChunkPlan((FULL,) * count + (NONE,) * (3 - count))
