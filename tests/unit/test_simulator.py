"""Contracts of the simulator: an oracle that is one, another truth than the planner's model, a small regret."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from megatron_ext.sequence_parallel import simulator as sim
from megatron_ext.sequence_parallel.cluster import PRESETS
from megatron_ext.sequence_parallel.cost_model import AnalyticalModel
from megatron_ext.sequence_parallel.layer_shape import LayerShape
from megatron_ext.sequence_parallel.truths import FineTruth, PublishedTruth

CLUSTER = PRESETS["8xA100-80G"]
GPT = LayerShape(12288, 49152, 96, 96, 128, 8, causal=False)
TRUTHS = [PublishedTruth(GPT), FineTruth(GPT, CLUSTER)]


def case_of(truth, **keys) -> sim.Case:
    return sim.Case(truth, 8, 40 * 10**9, 128, **keys)


def planner_of(case: sim.Case, **keys):
    data = sim.DISTRIBUTIONS["GRCh38"]
    model = AnalyticalModel(case.truth.shape, CLUSTER).calibrated(
        case.profile(sim.profiled_lengths(data.longest))
    )
    return case.planner(model, **keys)


@pytest.mark.parametrize("data", sim.DISTRIBUTIONS.values(), ids=lambda data: data.name)
def test_lengths_follow_the_papers_table(data):
    lengths = np.array(data.draw(20_000, seed=3))
    assert lengths.max() <= data.longest
    assert not (lengths % sim.GRAIN).any()
    counts, _ = np.histogram(lengths, bins=[0, *(edge + 1 for edge in sim.EDGES[1:]), data.longest + 1])
    assert counts / len(lengths) == pytest.approx(np.array(data.shares) / sum(data.shares), abs=0.01)
    assert data.draw(50, seed=3) == data.draw(50, seed=3)


def test_published_times_are_the_authors():
    """Tensor parallelism wins at 1K, Ulysses beyond the crossover of 57.9K."""
    truth = PublishedTruth(GPT)
    assert truth.cost("megatron_ts", 32768).seconds == pytest.approx(
        1.08e-10 * 32768**2 + 6.22e-6 * 32768 + 0.010
    )
    for length, winner in ((1024, "megatron_ts"), (57_000, "megatron_ts"), (59_000, "ulysses")):
        ours = {name: truth.cost(name, length).seconds for name in ("megatron_ts", "ulysses")}
        assert min(ours, key=ours.get) == winner


def test_fine_truth_is_not_the_planners_model():
    """It has noise, and what is small costs more than in proportion."""
    truth, model = FineTruth(GPT, CLUSTER, noise=0.0), AnalyticalModel(GPT, CLUSTER)
    ratios = [
        truth.cost("ulysses", s).seconds / model.predict("ulysses", 1, s).seconds for s in (1024, 131072)
    ]
    assert abs(ratios[0] / ratios[1] - 1) > 0.05
    assert FineTruth(GPT, CLUSTER).cost("ring", 4096).seconds != truth.cost("ring", 4096).seconds
    assert FineTruth(GPT, CLUSTER).cost("ring", 4096) == FineTruth(GPT, CLUSTER).cost("ring", 4096)


@pytest.mark.parametrize("truth", TRUTHS, ids=lambda truth: type(truth).__name__)
def test_no_policy_beats_the_oracle(truth):
    case = case_of(truth)
    planner = planner_of(case, smoothing=0.0)
    for length in (4096, 65536, 131072, 262144):
        oracle = case.oracle(length)
        for policy in (sim.planned(case, planner), *(case.single(name) for name in truth.strategies)):
            tried = policy(length)
            assert not tried.fits or tried.seconds >= oracle.seconds * (1 - 1e-9)


@pytest.mark.parametrize("truth", TRUTHS, ids=lambda truth: type(truth).__name__)
@pytest.mark.parametrize("smoothing", [0.0, 0.02, 0.05])
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_regret_is_at_most_three_percent(truth, smoothing, order):
    case = case_of(truth)
    lengths = sorted(sim.DISTRIBUTIONS["GRCh38"].draw(80, seed=2))
    if order == "shuffled":
        random.Random(2).shuffle(lengths)
    ours = sim.run(case, lengths, sim.planned(case, planner_of(case, smoothing=smoothing)))
    oracle = sim.run(case, lengths, case.oracle)
    both = ours.trained & oracle.trained
    assert both.mean() > 0.95
    assert 0.0 <= ours.seconds(both) / oracle.seconds(both) - 1 <= 0.03
    assert (
        max(choice.peak_bytes for choice in np.array(ours.choices)[oracle.trained]) < 1.02 * case.limit_bytes
    )


@pytest.mark.parametrize("truth", TRUTHS, ids=lambda truth: type(truth).__name__)
@pytest.mark.parametrize("first", [1024, 8192, 65536])
def test_regret_is_at_most_three_percent_from_any_first_sequence(truth, first):
    """As a job runs: nothing is known before, the closed forms are of another machine, and the profile grows."""
    case = case_of(truth)
    prior = AnalyticalModel(truth.shape, PRESETS["8xH100-80G"])
    lengths = [first, *sim.DISTRIBUTIONS["GRCh38"].draw(80, seed=2)]
    policy = sim.Growing(case, prior.calibrated)
    ours, oracle = sim.run(case, lengths, policy), sim.run(case, lengths, case.oracle)
    both = ours.trained & oracle.trained
    assert both.mean() > 0.95
    assert 0.0 <= ours.seconds(both) / oracle.seconds(both) - 1 <= 0.03
    assert policy.profiled[:3] == [first, first // 4, first // 16]
    assert 3 <= len(policy.profiled) <= 8


def test_switching_reaches_lengths_that_tensor_parallelism_does_not():
    case = case_of(TRUTHS[1])
    longest = {
        name: sim.longest(lambda s, name=name: case.single(name)(s).fits) for name in case.truth.strategies
    }
    policy = sim.planned(case, planner_of(case))
    ours = sim.longest(lambda s: policy(s).fits)
    assert ours > 2.5 * longest["megatron_ts"]
    assert ours >= 0.97 * longest["metp"]


def test_replicas_wait_for_the_slowest_of_each_step():
    case = case_of(TRUTHS[0], replicas=2, accumulation=2)
    run = sim.run(case, [1024, 2048, 1024, 4096, 1024], case.single("megatron_ts"))
    each = [choice.seconds for choice in run.choices]
    wanted = max(each[0] + each[2], each[1] + each[3]) + each[4]
    assert run.seconds(np.ones(5, dtype=bool)) == pytest.approx(wanted)


def test_longest_finds_the_edge_in_whole_grains():
    assert sim.longest(lambda length: length <= 100_000) == 100_000 // sim.GRAIN * sim.GRAIN
    assert sim.longest(lambda length: False) == 0


def test_switches_are_counted_between_neighbours():
    case = case_of(TRUTHS[0])
    run = sim.run(case, [1024] * 4, lambda s: case.charged(s, {"ring": 8}))
    assert run.switches == 0
    assert math.isfinite(run.seconds(run.trained))
