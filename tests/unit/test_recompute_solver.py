"""Contracts of the solver: equal to brute force, never over the limit, quick, and honest where it stops early."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import statistics
import time
from collections.abc import Iterator

import numpy as np
import pytest

from megatron_ext.recompute.schedule import Corner, Pipeline, corners, open_counts
from megatron_ext.recompute.solver import Solution, solve
from megatron_ext.recompute.stage_memory import (
    ChunkLayers,
    Fraction,
    LayerClass,
    Option,
    StageProblem,
    heavy_passes,
    peak_bytes,
    recompute_seconds,
)

NONE, PART, FULL = Option("none", 0.0, 10, 0), Option("part", 1.0, 6, 4), Option("full", 4.0, 1, 9)
DENSE = LayerClass("dense", (NONE, PART, FULL))


def one_chunk(layers: int, window: int, limit: int, kind: LayerClass = DENSE, **outside: int) -> StageProblem:
    chunk = ChunkLayers((kind,) * layers, **outside)
    return StageProblem((chunk,), (Corner((window,), 0),), (window,), 0, limit)


MANY, SMALL = 50, 20
"""Random cases of each shape: with up to three layers, and with more."""

# ------------------------------------------------------------------------------------------------ what a plan holds


def test_peak_is_what_open_micro_batches_keep_and_one_transient():
    problem = one_chunk(3, 4, 0, outside_bytes=5, outside_transient_bytes=7)
    problem = dataclasses.replace(problem, static_bytes=1000)
    assert peak_bytes(problem, [["none"] * 3]) == 1000 + 4 * (5 + 30) + 7
    assert peak_bytes(problem, [["full", "part", "none"]]) == 1000 + 4 * (5 + 17) + 9
    assert (
        peak_bytes(problem, [["full", "none", "none"]], Fraction(0, 1, "part", 3))
        == 1000 + 4 * 26 - 3 * 4 + 9
    )


def test_peak_is_that_of_the_worst_corner():
    chunks = (ChunkLayers((DENSE,)), ChunkLayers((DENSE,)))
    both = (Corner((3, 1), 0), Corner((1, 2), 1))
    problem = StageProblem(chunks, both, (3, 2), 0, 0)
    assert peak_bytes(problem, [["none"], ["full"]]) == 3 * 10 + 1
    assert peak_bytes(problem, [["full"], ["none"]]) == max(3 * 1 + 10 + 9, 1 + 20)


@pytest.mark.parametrize("window", [2, 3, 4, 5])
def test_passes_in_a_row_have_no_more_heavy_ones_than_counted(window):
    for light in range(1, window):
        for places in itertools.combinations(range(window), light):
            heavy = [place not in places for place in range(window)] * 3
            for count in range(window + 1):
                most = max(sum(heavy[first : first + count]) for first in range(2 * window))
                assert most <= heavy_passes(count, window, light)
            together = places == tuple(range(light))
            if together:  # the bound is reached where the light ones follow each other
                assert all(
                    max(sum(heavy[first : first + count]) for first in range(2 * window))
                    == heavy_passes(count, window, light)
                    for count in range(window + 1)
                )


def test_seconds_of_a_fraction_are_the_mean_over_the_window():
    problem = one_chunk(2, 4, 0)
    assert recompute_seconds(problem, [["full", "part"]]) == 5.0
    assert recompute_seconds(problem, [["full", "none"]], Fraction(0, 1, "full", 3)) == 4.0 + 3.0


# ------------------------------------------------------------------------------------------------ against brute force


def plans(problem: StageProblem, *, fractional: bool) -> Iterator[tuple[list[list[str]], Fraction | None]]:
    """Every option of every layer, and every fraction of every layer."""
    shape = [[layer for layer in chunk.classes] for chunk in problem.chunks]
    layers = [layer for row in shape for layer in row]
    for picked in itertools.product(*([option.name for option in layer.options] for layer in layers)):
        names = iter(picked)
        rows = [[next(names) for _ in row] for row in shape]
        yield rows, None
        if not fractional:
            continue
        for number, row in enumerate(shape):
            for place, layer in enumerate(row):
                for light in layer.options:
                    if light.kept_bytes < layer[rows[number][place]].kept_bytes:
                        for count in range(1, problem.window[number]):
                            yield rows, Fraction(number, place, light.name, count)


def brute_force(problem: StageProblem, *, fractional: bool) -> tuple[float, int, bool]:
    """Seconds and peak of the best plan, and whether it fits."""
    costs = {
        (peak_bytes(problem, rows, fraction), recompute_seconds(problem, rows, fraction))
        for rows, fraction in plans(problem, fractional=fractional)
    }
    limit = max(problem.limit_bytes, min(peak for peak, _ in costs))
    seconds, peak = min((seconds, peak) for peak, seconds in costs if peak <= limit)
    return seconds, peak, limit == problem.limit_bytes


def random_class(rng: random.Random, name: str, *, ties: bool) -> LayerClass:
    """Small whole numbers make ties and options that others beat; others cost the more the less they keep, or not."""
    count = rng.randint(1, 4)
    if ties:
        numbers = [(float(rng.randint(0, 4)), rng.randint(0, 5), rng.randint(0, 5)) for _ in range(count)]
    else:
        seconds, kept = ([rng.uniform(0, 10**9) for _ in range(count)] for _ in range(2))
        if rng.random() < 0.7:
            seconds, kept = sorted(seconds), sorted(kept, reverse=True)
        numbers = [(s / 10**8, int(k), rng.randint(0, 10**9)) for s, k in zip(seconds, kept, strict=True)]
    return LayerClass(name, tuple(Option(f"o{place}", *given) for place, given in enumerate(numbers)))


def random_problem(rng: random.Random, shape: tuple[int, ...], *, ties: bool) -> StageProblem:
    """Chunks of so many layers, of one to three classes; corners of any kind; limits from hopeless to generous."""
    big = 5 if ties else 10**9
    classes = [random_class(rng, f"c{number}", ties=ties) for number in range(rng.randint(1, 3))]
    chunks = tuple(
        ChunkLayers(
            tuple(rng.choice(classes) for _ in range(layers)),
            rng.randint(0, big) if rng.random() < 0.5 else 0,
            rng.randint(0, big) if rng.random() < 0.5 else 0,
        )
        for layers in shape
    )
    window = tuple(rng.randint(1, 4) for _ in shape)
    found = tuple(
        Corner(tuple(rng.randint(0, w) for w in window), rng.randrange(len(shape)))
        for _ in range(rng.randint(1, 4))
    )
    problem = StageProblem(chunks, found, window, rng.randint(0, big), 0)
    drawn = [[[rng.choice(la.options).name for la in chunk.classes] for chunk in chunks] for _ in range(6)]
    peaks = [peak_bytes(problem, names) for names in drawn]
    return dataclasses.replace(problem, limit_bytes=rng.randint(min(peaks) * 3 // 4, max(peaks)))


def check_against_brute_force(problem: StageProblem, *, fractional: bool) -> Solution:
    seconds, peak, fits = brute_force(problem, fractional=fractional)
    found = solve(problem, fractional=fractional)
    assert found.fits == fits
    assert found.gap_seconds == 0
    assert found.seconds == pytest.approx(seconds, rel=1e-9, abs=1e-12)
    assert found.peak_bytes == peak_bytes(problem, found.options, found.fraction)
    assert found.seconds == recompute_seconds(problem, found.options, found.fraction)
    if fits:
        assert found.peak_bytes <= problem.limit_bytes
    else:
        assert found.peak_bytes == peak
    return found


@pytest.mark.parametrize("fractional", [True, False])
@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize(
    "shape", [(1,), (2,), (3,), (4,), (1, 1), (2, 1), (2, 2), (1, 1, 1), (2, 1, 1), (0, 2)], ids=str
)
def test_solution_equals_brute_force(shape, ties, fractional):
    rng = random.Random(f"{shape} {ties} {fractional}")
    found = [
        check_against_brute_force(random_problem(rng, shape, ties=ties), fractional=fractional)
        for _ in range(SMALL if sum(shape) > 3 else MANY)
    ]
    assert {solution.fits for solution in found} == {True, False}
    if fractional and not ties:
        assert any(solution.fraction for solution in found)


def test_thousand_cases_and_more_were_compared():
    """The count that the contract asks for, with a fraction or without, of all shapes above."""
    marks = {mark.args[0]: mark.args[1] for mark in test_solution_equals_brute_force.pytestmark}
    cases = sum(SMALL if sum(shape) > 3 else MANY for shape in marks["shape"])
    assert cases * len(marks["ties"]) * len(marks["fractional"]) >= 1000


def oracle(problem: StageProblem) -> float:
    """Least seconds without a fraction, by an integer program over every layer's options and each chunk's transient."""
    milp = pytest.importorskip("scipy.optimize")
    columns = [
        (number, place, option)
        for number, chunk in enumerate(problem.chunks)
        for place, layer in enumerate(chunk.classes)
        for option in layer.options
    ]
    chunks, unit = len(problem.chunks), 1e9
    size = len(columns) + chunks
    rows, low, high = [], [], []
    for number, chunk in enumerate(problem.chunks):
        for place in range(len(chunk.classes)):
            rows.append([float(column[:2] == (number, place)) for column in columns] + [0.0] * chunks)
            low.append(1.0)
            high.append(1.0)
            transient = [
                option.transient_bytes / unit * ((c, p) == (number, place)) for c, p, option in columns
            ]
            rows.append(transient + [-float(number == other) for other in range(chunks)])
            low.append(-np.inf)
            high.append(0.0)
    for corner in problem.corners:
        kept = [corner.open[c] * option.kept_bytes / unit for c, _, option in columns]
        rows.append(kept + [float(corner.running == other) for other in range(chunks)])
        outside = sum(o * chunk.outside_bytes for o, chunk in zip(corner.open, problem.chunks, strict=True))
        low.append(-np.inf)
        high.append((problem.limit_bytes - problem.static_bytes - outside) / unit)
    least = [0.0] * len(columns) + [chunk.outside_transient_bytes / unit for chunk in problem.chunks]
    found = milp.milp(
        [option.seconds for *_, option in columns] + [0.0] * chunks,
        integrality=[1] * len(columns) + [0] * chunks,
        bounds=milp.Bounds(least, [1.0] * len(columns) + [np.inf] * chunks),
        constraints=milp.LinearConstraint(np.array(rows).reshape(-1, size), low, high),
        options={"mip_rel_gap": 0.0, "time_limit": 60},
    )
    assert found.status == 0, found.message
    return found.fun


# ------------------------------------------------------------------------------------------------ realistic sizes


def modelled_class(rng: random.Random, name: str) -> LayerClass:
    """A layer of which four modules, or all, may be recomputed."""
    kept, seconds = rng.randint(10**9, 3 * 10**9), rng.uniform(1e-3, 2e-3)
    options = [Option("none", 0.0, kept, 0)]
    for number in range(4):
        freed = int(kept * rng.uniform(0.05, 0.4))
        options.append(Option(f"module {number}", seconds * rng.uniform(0.05, 0.5), kept - freed, freed))
    return LayerClass(name, (*options, Option("full", seconds, kept // 17, kept - kept // 17)))


def modelled_stage(
    rng: random.Random, pipeline: Pipeline, layers: int, classes: int, kinds: list[LayerClass] | None = None
) -> StageProblem:
    """Any stage of a pipeline, with a limit between what full recomputation and none need."""
    stage = rng.randrange(pipeline.stages)
    kinds = kinds or [modelled_class(rng, f"class {number}") for number in range(classes)]
    row = ChunkLayers(tuple(kinds[place * len(kinds) // layers] for place in range(layers)), 10**7)
    chunks = (row,) * pipeline.chunks
    moments, window = corners(pipeline, stage), open_counts(pipeline, stage)
    problem = StageProblem(chunks, moments, window, 10**10, 0)
    least, most = (peak_bytes(problem, [[name] * layers] * len(chunks)) for name in ("full", "none"))
    return dataclasses.replace(problem, limit_bytes=int(least + (most - least) * rng.uniform(0.02, 0.98)))


SIZES = [
    (Pipeline(4, 16), 32, 2),
    (Pipeline(8, 64), 12, 3),
    (Pipeline(4, 16, 4), 8, 2),
    (Pipeline(4, 8, 2), 12, 3),
]


@pytest.mark.parametrize(("pipeline", "layers", "classes"), SIZES, ids=str)
def test_solution_equals_an_integer_program_at_realistic_sizes(pipeline, layers, classes):
    rng = random.Random(f"{pipeline} {layers}")
    for _ in range(3):
        problem = modelled_stage(rng, pipeline, layers, classes)
        whole, split = solve(problem, fractional=False), solve(problem)
        assert whole.fits
        assert split.fits
        assert whole.gap_seconds == 0
        assert whole.fraction is None
        assert whole.seconds == pytest.approx(oracle(problem), rel=1e-6)
        assert split.seconds <= whole.seconds
        assert max(whole.peak_bytes, split.peak_bytes) <= problem.limit_bytes


@pytest.mark.parametrize(("pipeline", "layers", "classes"), SIZES, ids=str)
def test_solver_takes_milliseconds(pipeline, layers, classes):
    """Of its own: the processor's time, not that of others on the machine."""
    rng = random.Random(f"time {pipeline} {layers}")
    spent = []
    for _ in range(15):
        problem = modelled_stage(rng, pipeline, layers, classes)
        before = time.process_time()
        solve(problem)
        spent.append(time.process_time() - before)
    assert statistics.median(spent) < (
        0.03 if pipeline.chunks == 1 else 0.1
    )  # a quarter of it on an idle core


def test_search_that_stops_early_says_what_is_left_to_gain():
    """Options on one line, to a millionth: too many plans that are nearly alike to tell which is best."""
    rng = random.Random(1)
    kinds = []
    for name in ("a", "b", "c"):
        kept = sorted((rng.randint(10**8, 2 * 10**9) for _ in range(7)), reverse=True)
        options = [Option(f"o{k}", (kept[0] - k) * 1e-9 * rng.uniform(1, 1 + 1e-6), k, 0) for k in kept]
        kinds.append(LayerClass(name, tuple(options)))
    rng = random.Random(2)
    classes = tuple(rng.choice(kinds) for _ in range(96))
    problem = StageProblem((ChunkLayers(classes),), (Corner((4,), 0),), (4,), 0, 400 * 10**9 // 3 * 2)
    found = solve(problem, fractional=False, most_nodes=3000)
    assert found.fits
    assert 0 < found.gap_seconds < 0.05 * found.seconds
    assert found.peak_bytes <= problem.limit_bytes
    better = solve(problem, fractional=False, most_nodes=60_000)
    assert found.seconds - found.gap_seconds <= better.seconds <= found.seconds


# ------------------------------------------------------------------------------------------------ single contracts


def test_less_is_recomputed_the_more_room_there_is():
    seconds = [solve(one_chunk(6, 4, limit)).seconds for limit in range(0, 260, 3)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] == 0.0


def test_first_layers_are_recomputed_most_and_the_last_least():
    other = LayerClass("other", (NONE, FULL))
    chunk = ChunkLayers((DENSE, other, DENSE, other, DENSE, DENSE))
    for limit in range(60, 250, 7):
        problem = StageProblem((chunk,), (Corner((4,), 0),), (4,), 0, limit)
        found = solve(problem, fractional=False)
        for kind in (DENSE, other):
            kept = [
                kind[name].kept_bytes
                for layer, name in zip(chunk.classes, found.options[0], strict=True)
                if layer == kind
            ]
            assert kept == sorted(kept)


def test_fraction_stands_between_lighter_and_heavier_layers_of_its_class():
    kind = LayerClass("two", (NONE, FULL))
    found = solve(one_chunk(4, 4, 106, kind))
    assert found.options == (("full", "none", "none", "none"),)
    assert found.fraction == Fraction(0, 1, "full", 3)
    assert found.peak_bytes == 4 * (1 + 10 + 10) + (10 + 3 * 1) + 9 == 106
    assert found.seconds == 4.0 + 3.0


def test_nothing_is_recomputed_where_all_fits():
    found = solve(one_chunk(4, 4, 10**6))
    assert found == Solution((("none",) * 4,), None, 0.0, 160, fits=True)


def test_least_memory_is_found_where_nothing_fits():
    found = solve(one_chunk(4, 4, 3))
    assert found == Solution((("full",) * 4,), None, 16.0, 4 * 4 + 9, fits=False)


def test_chunk_with_more_open_passes_is_recomputed_first():
    chunks = (ChunkLayers((DENSE,) * 2), ChunkLayers((DENSE,) * 2))
    problem = StageProblem(
        chunks, (Corner((5, 2), 0), Corner((5, 2), 1)), (5, 2), 0, 6 * 5 + 6 * 5 + 2 * 20 + 4
    )
    assert solve(problem).options == (("part", "part"), ("none", "none"))


def test_same_problem_has_the_same_solution():
    rng = random.Random(11)
    problem = modelled_stage(rng, Pipeline(4, 16, 2), 8, 2)
    assert solve(problem) == solve(dataclasses.replace(problem))


# ------------------------------------------------------------------------------------------------ messages


@pytest.mark.parametrize(
    "numbers", [(math.inf, 1, 1), (math.nan, 1, 1), (-1.0, 1, 1), (1.0, -1, 1), (1.0, 1, -1)]
)
def test_option_that_cannot_run_is_refused(numbers):
    with pytest.raises(ValueError, match="option 'x' takes .* leave out an option that can't run"):
        Option("x", *numbers)


def test_wrong_problems_and_plans_are_refused():
    with pytest.raises(ValueError, match="'dense' has the options .* each name once"):
        LayerClass("dense", (NONE, NONE))
    with pytest.raises(ValueError, match="one chunk or more, as many windows, and one corner or more"):
        StageProblem((ChunkLayers((DENSE,)),), (), (1,), 0, 0)
    with pytest.raises(ValueError, match=r"corner has \(3,\) open and chunk 0 running; .* its window \(2,\)"):
        StageProblem((ChunkLayers((DENSE,)),), (Corner((3,), 0),), (2,), 0, 0)
    problem = one_chunk(1, 4, 0)
    with pytest.raises(ValueError, match="no option 'half'; use one of none, part, full"):
        peak_bytes(problem, [["half"]])
    with pytest.raises(ValueError, match="1 to 3 micro-batches"):
        peak_bytes(problem, [["none"]], Fraction(0, 0, "full", 4))
    with pytest.raises(ValueError, match="swap the two options"):
        recompute_seconds(problem, [["full"]], Fraction(0, 0, "none", 1))
