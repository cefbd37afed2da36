"""Contracts of the planner: equal to brute force, within the budget, quick, deterministic, calm."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from megatron_ext.sequence_parallel.choice import Choice, LayerClass, choose_counts, choose_one, evaluate
from megatron_ext.sequence_parallel.cost_model import Cost
from megatron_ext.sequence_parallel.layer_shape import LayerShape
from megatron_ext.sequence_parallel.names import STRATEGIES
from megatron_ext.sequence_parallel.planner import LayerKind, Plan, Planner, in_order

SHAPE = LayerShape(64, 256, num_heads=8, num_kv_heads=8, head_dim=8, group_size=4)


def brute_force(classes: list[LayerClass], budget: int) -> Choice:
    """Every assignment of layers that are alike."""
    options = [
        [
            Counter(names)
            for names in itertools.combinations_with_replacement(sorted(layers.costs), layers.count)
        ]
        for layers in classes
    ]
    choices = [evaluate(classes, counts, budget) for counts in itertools.product(*options)]
    fitting = [choice for choice in choices if choice.fits]
    if fitting:
        return min(fitting, key=lambda choice: choice.seconds)
    return min((c for c in choices if math.isfinite(c.seconds)), key=lambda choice: choice.peak_bytes)


def random_class(rng: random.Random, count: int, *, ties: bool) -> LayerClass:
    """Small whole numbers make ties; a strategy may be one that can't run."""

    def cost() -> Cost:
        if ties:
            seconds = math.inf if rng.random() < 0.1 else float(rng.randint(1, 5))
            return Cost(seconds, rng.randint(0, 6), rng.randint(0, 6))
        return Cost(rng.uniform(1, 10), rng.randint(1, 10**9), rng.randint(1, 10**9))

    costs = {name: cost() for name in rng.sample(STRATEGIES, rng.randint(1, 5))}
    if all(math.isinf(cost.seconds) for cost in costs.values()):
        costs[STRATEGIES[0]] = Cost(1.0, 3, 3)
    return LayerClass(count, costs)


def check_against(wanted: Choice, found: Choice, budget: int) -> None:
    assert found.fits == wanted.fits
    assert found.gap_seconds == 0
    if found.fits:
        assert found.seconds == pytest.approx(wanted.seconds, rel=1e-11)
        assert found.peak_bytes <= budget
    else:
        assert found.peak_bytes == wanted.peak_bytes


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize(
    "counts", [(1,), (2,), (3,), (4,), (1, 1), (2, 2), (3, 1), (1, 1, 1), (1, 1, 1, 1)], ids=str
)
def test_choice_equals_brute_force_up_to_four_layers(counts, ties):
    rng = random.Random(f"{counts} {ties}")
    for _ in range(20 if len(counts) > 3 else 100):
        classes = [random_class(rng, count, ties=ties) for count in counts]
        budget = 0 if rng.random() < 0.05 else rng.randint(0, 30 if ties else 5 * 10**9)
        check_against(brute_force(classes, budget), choose_counts(classes, budget), budget)


def test_choice_equals_an_enumeration_of_counts_for_more_layers():
    rng = random.Random(5)
    for _ in range(60):
        classes = [random_class(rng, rng.randint(8, 12), ties=False)]
        budget = rng.randint(0, 12 * 10**9)
        found = choose_counts(classes, budget, most_nodes=math.inf)
        check_against(brute_force(classes, budget), found, budget)


def test_choice_equals_a_table_over_all_budgets_for_96_layers():
    """A slow oracle: the least time for each number of layers and units of kept bytes, for each largest transient."""
    rng = random.Random(6)
    for _ in range(5):
        costs = {name: Cost(rng.uniform(1, 10), rng.randint(1, 9), rng.randint(0, 40)) for name in STRATEGIES}
        budget = rng.randint(96, 96 * 9)
        least = math.inf
        for cap in {cost.transient_bytes for cost in costs.values()}:
            allowed = [cost for cost in costs.values() if cost.transient_bytes <= cap]
            room = budget - cap
            table = np.zeros(max(0, room + 1))
            for _ in range(96):
                more = [np.concatenate((np.full(c.kept_bytes, math.inf), table + c.seconds)) for c in allowed]
                table = np.min([row[: len(table)] for row in more], axis=0)
            least = min(least, table[-1] if len(table) else math.inf)
        found = choose_counts([LayerClass(96, costs)], budget, most_nodes=math.inf)
        assert found.fits == math.isfinite(least)
        if found.fits:
            assert found.seconds == pytest.approx(least)


def test_search_that_stops_early_says_what_may_be_left():
    """Strategies on one line, to a millionth: very many plans are almost equally good."""
    rng = random.Random(7)
    costs = {
        name: Cost(1 + 0.1 * k + rng.uniform(0, 1e-6), 10**9 - 10**8 * k + rng.randint(0, 1000), 10**8)
        for k, name in enumerate(STRATEGIES)
    }
    found = choose_counts([LayerClass(96, costs)], 75 * 10**9)
    assert found.fits
    assert 0 < found.gap_seconds < 1e-3 * found.seconds
    better = choose_counts([LayerClass(96, costs)], 75 * 10**9, most_nodes=3000)
    assert found.seconds - found.gap_seconds <= better.seconds <= found.seconds


def test_more_memory_is_never_slower():
    rng = random.Random(8)
    layers = [random_class(rng, 48, ties=False)]
    seconds = [
        choice.seconds for b in range(0, 60 * 10**9, 10**9) if (choice := choose_counts(layers, b)).fits
    ]
    assert seconds == sorted(seconds, reverse=True)


def test_one_strategy_for_all_is_the_best_of_them_and_fixed_layers_stay():
    table = {"megatron_ts": Cost(1.0, 10, 1), "metp": Cost(2.0, 2, 1)}
    classes = [LayerClass(4, table), LayerClass(1, {"ring": Cost(1.0, 1, 1)})]
    assert choose_one(classes, 100).counts == ({"megatron_ts": 4}, {"ring": 1})
    assert choose_one(classes, 30).counts == ({"metp": 4}, {"ring": 1})
    assert choose_counts(classes, 30).counts == ({"megatron_ts": 2, "metp": 2}, {"ring": 1})
    assert not choose_one(classes, 5).fits
    with pytest.raises(ValueError, match="set granularity to layer"):
        choose_one([LayerClass(1, {a: Cost(1.0, 1, 1) for a in pair}) for pair in
                    (("ring", "metp"), ("context", "ulysses"))], 10)  # fmt: skip


def test_class_without_a_strategy_that_can_run_is_an_error():
    with pytest.raises(ValueError, match="one strategy or more that can run"):
        LayerClass(2, {"ring": Cost(math.inf, 0, 0)})


# -- plans ------------------------------------------------------------------------------------------------------------


@dataclass
class TableModel:
    """Costs in proportion to the length; counts how often it is asked."""

    shape: LayerShape
    table: dict[str, Cost]
    asked: int = 0

    def predict(self, strategy, batch, length, documents=None) -> Cost:
        self.asked += 1
        cost, tokens = self.table[strategy], batch * length
        return Cost(cost.seconds * tokens, cost.kept_bytes * tokens, cost.transient_bytes * tokens)

    def fingerprint(self) -> str:
        return str(self.table)


FAST_OR_LEAN = {"megatron_ts": Cost(1.0, 10, 4), "metp": Cost(2.0, 2, 1)}


def planner_of(budget: int, *, layers: int = 4, table=FAST_OR_LEAN, **keys) -> Planner:
    model = TableModel(SHAPE, table)
    return Planner([LayerKind(model, tuple(range(layers)), tuple(table))], budget, **keys)


def test_plan_goes_from_fast_to_lean_as_sequences_grow():
    planner = planner_of(44 * 64)
    assert planner.best(1, 64).names == ("megatron_ts",) * 4
    longer = planner.best(1, 128)
    assert longer.names == ("megatron_ts", "metp", "metp", "metp")  # the lean ones last
    assert longer.fits
    assert longer.peak_bytes == (10 + 3 * 2 + 4) * 128 <= 44 * 64
    longest = planner.best(1, 512)
    assert (longest.names, longest.fits) == (("metp",) * 4, False)


def test_a_strategy_that_cannot_run_is_not_planned_and_none_is_an_error():
    planner = planner_of(10**9)
    assert planner.best(1, 60).names == ("megatron_ts",) * 4
    lean = planner_of(0)
    assert "metp" not in lean.best(1, 60).names
    with pytest.raises(
        ValueError, match="no strategy of megatron_ts, metp can run 1 x 63 tokens: a length of 63"
    ):
        planner.best(1, 63)


def test_kinds_of_layers_keep_their_places():
    every_other = [
        LayerKind(TableModel(SHAPE, FAST_OR_LEAN), (0, 2), ("metp", "megatron_ts")),
        LayerKind(TableModel(SHAPE, {"ring": Cost(3.0, 5, 2)}), (1, 3), ("ring",)),
    ]
    assert Planner(every_other, 10**9).best(1, 64).names == ("megatron_ts", "ring", "megatron_ts", "ring")
    with pytest.raises(ValueError, match="every layer from 0 once"):
        Planner(every_other[:1], 10**9)


def test_what_is_held_outside_the_layers_counts_like_a_transient():
    assert planner_of(44 * 64, outside_bytes=lambda batch, length: 4 * length).best(1, 64).fits
    assert planner_of(44 * 64, outside_bytes=lambda batch, length: 5 * length).best(1, 64).names[-1] == "metp"


CLOSE = {"megatron_ts": Cost(1.0, 10, 1), "ulysses": Cost(1.04, 1, 1)}


def test_smoothing_keeps_a_plan_that_fits_and_costs_little_more():
    calm, nervous = (planner_of(41 * 64, table=CLOSE, smoothing=share) for share in (0.05, 0.0))
    lengths = [64, 128, 64, 64, 128]
    names = [[planner.plan(1, length).names for length in lengths] for planner in (calm, nervous)]
    assert names[0][1:] == [names[0][1]] * 4
    assert names[1][2] == ("megatron_ts",) * 4
    assert all(calm.plan(1, length).fits for length in lengths)


def test_smoothing_lets_go_where_the_plan_no_longer_fits_or_costs_more():
    planner = planner_of(44 * 64)
    assert planner.plan(1, 64).names != planner.plan(1, 128).names
    assert planner.plan(1, 64).names == ("megatron_ts",) * 4  # 5 % is less than metp's double time


def test_plans_are_hashable_and_their_digest_is_of_what_is_run():
    plan = Plan(("ring", "metp"), 1.0, 10, True)
    assert hash(plan) == hash(Plan(("ring", "metp"), 1.0, 10, True))
    assert plan.digest() == Plan(("ring", "metp"), 1.1, 11, True).digest()
    assert plan.digest() != Plan(("metp", "ring"), 1.0, 10, True).digest()
    assert len(plan.digest()) == 12


def test_larger_transients_come_first():
    costs = {"ring": Cost(1, 5, 7), "metp": Cost(1, 1, 1), "context": Cost(1, 5, 9)}
    assert in_order(costs, {"metp": 1, "ring": 2, "context": 1}) == ["context", "ring", "ring", "metp"]


def test_two_planners_asked_alike_hold_the_same_plans():
    rng = random.Random(9)
    lengths = [64 * rng.randint(1, 40) for _ in range(200)]
    plans = [[planner.plan(1, length).digest() for length in lengths] for planner in
             (planner_of(60_000, layers=7), planner_of(60_000, layers=7))]  # fmt: skip
    assert plans[0] == plans[1]


# -- speed ------------------------------------------------------------------------------------------------------------


def test_known_length_asks_no_model_again():
    planner = planner_of(44 * 64)
    model = planner.kinds[0].model
    first = planner.plan(1, 128)
    asked = model.asked
    assert planner.plan(1, 128) is first
    assert model.asked == asked == 2


def test_decision_takes_less_than_a_millisecond_for_96_layers_and_five_strategies():
    rng = random.Random(10)
    seconds = []
    for _ in range(100):
        costs = {
            n: Cost(rng.uniform(1, 10), rng.randint(1, 10**9), rng.randint(1, 10**9)) for n in STRATEGIES
        }
        classes, budget = [LayerClass(96, costs)], rng.randint(10**9, 96 * 10**9)
        start = time.perf_counter()
        choose_counts(classes, budget)
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 1e-3
