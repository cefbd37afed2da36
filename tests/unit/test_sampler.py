"""Sampler: probabilities as the formula says, draws that follow them, the same anywhere and after resume."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from ds_grass.policies import make_policy
from ds_grass.sampler import (
    Sampler,
    effective_blocks,
    gumbel_top_k,
    largest,
    log_probabilities,
    probabilities,
    turn,
)

REPOSITORY = Path(__file__).parents[2]
IMPORTANCE = [0.004, 0.001, 0.0005, 0.002, 0.0025, 0.0, 0.001, 0.003]
CRITICAL_7 = 24.32  # chi-square, 7 degrees of freedom, exceeded by chance once in a thousand


def by_formula(importance: list[float], temperature: float, exploration: float) -> list[float]:
    m = torch.tensor(importance, dtype=torch.float64)
    p = torch.softmax(m / m.mean() / temperature, 0)
    return ((1 - exploration) * p + exploration / len(m)).tolist()


def sampler(policy: str = "grass", *, active: int = 2, seed: int = 1234, exploration: float = 0.0) -> Sampler:
    return Sampler(make_policy(policy), active, 0.5, exploration, seed)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("exploration", [0.0, 0.3, 1.0])
def test_probabilities_equal_the_formula_in_torch(temperature: float, exploration: float) -> None:
    expected = by_formula(IMPORTANCE, temperature, exploration)
    assert probabilities(IMPORTANCE, temperature, exploration) == pytest.approx(expected, rel=1e-12)


def test_probabilities_do_not_depend_on_the_scale_of_gradients() -> None:
    expected = probabilities(IMPORTANCE, 0.5, 0.1)
    for scale in (1e-30, 1e-6, 1e6, 1e300):
        assert probabilities([m * scale for m in IMPORTANCE], 0.5, 0.1) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("importance", [[0.0] * 4, [1e-3] * 4, [1.7e308] * 4, [5e-324] * 4])
def test_probabilities_of_equal_importance_are_uniform(importance: list[float]) -> None:
    assert probabilities(importance, 0.5, 0.0) == pytest.approx([0.25] * 4, rel=1e-14)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-9, 1e-3, 1.0, 1e9, 1.7e308])
@pytest.mark.parametrize("exploration", [0.0, 5e-324, 1e-9, 0.5, 1.0])
@pytest.mark.parametrize("importance", [[0.0, 0.0, 1e-300], [1e308, 1.7e308, 0.0], [1.0, 2.0, 3.0]])
def test_probabilities_are_a_distribution_at_every_extreme(
    importance: list[float], temperature: float, exploration: float
) -> None:
    p = probabilities(importance, temperature, exploration)
    assert math.fsum(p) == pytest.approx(1.0, abs=1e-12)
    assert all(exploration / 3 * (1 - 1e-9) <= value <= 1 for value in p)
    assert p[importance.index(max(importance))] == max(p)


def test_probabilities_of_non_finite_importance_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="importance"):
        probabilities([1.0, math.nan], 0.5, 0.0)


def test_draw_of_one_block_follows_the_probabilities() -> None:
    num_draws = 20_000
    drawer = sampler(active=1, exploration=0.1)
    counts = Counter(drawer.draw(IMPORTANCE).active[0] for _ in range(num_draws))
    expected = [num_draws * p for p in by_formula(IMPORTANCE, 0.5, 0.1)]
    chi_square = sum((counts[b] - e) ** 2 / e for b, e in enumerate(expected))
    assert min(expected) > 5, "the test would not be valid"
    assert chi_square < CRITICAL_7


def test_draw_of_two_blocks_follows_successive_drawing_without_replacement() -> None:
    num_draws, p = 20_000, [0.5, 0.3, 0.15, 0.05]
    generator = torch.Generator().manual_seed(5)
    counts = Counter(gumbel_top_k([math.log(v) for v in p], 2, generator) for _ in range(num_draws))
    pairs = list(itertools.combinations(range(4), 2))
    expected = {(i, j): num_draws * p[i] * p[j] * (1 / (1 - p[i]) + 1 / (1 - p[j])) for i, j in pairs}
    assert set(counts) <= set(pairs)
    assert sum((counts[pair] - e) ** 2 / e for pair, e in expected.items()) < 20.52  # 5 degrees of freedom


def test_draw_gives_distinct_sorted_blocks_and_never_fewer() -> None:
    values = random.Random(1)
    for _ in range(300):
        num_blocks = values.randint(1, 40)
        active = values.randint(1, num_blocks)
        importance = [values.random() ** 8 for _ in range(num_blocks)]
        drawn = Sampler(make_policy("grass"), active, 1e-6, 0.0, 7).draw(importance).active
        assert len(set(drawn)) == len(drawn) == active
        assert list(drawn) == sorted(drawn)
        assert set(drawn) <= set(range(num_blocks))


def test_draw_at_low_temperature_keeps_the_order_of_probabilities_that_vanish() -> None:
    importance = [1.0, 3.0, 2.0, 5.0, 4.0]
    assert probabilities(importance, 1e-6, 0.0)[4] == 0.0  # the second largest has vanished in fp64
    drawer = Sampler(make_policy("grass"), 3, 1e-6, 0.0, 0)
    assert {drawer.draw(importance).active for _ in range(50)} == {(1, 3, 4)}


def test_gumbel_noise_of_a_zero_from_the_generator_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros_then_half = torch.tensor([0.0, 0.5, 0.0], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: zeros_then_half)
    assert gumbel_top_k(log_probabilities([1.0, 1.0, 1.0], 1.0, 0.0), 1, torch.Generator()) == (1,)


def test_draws_with_the_same_seed_are_the_same_and_with_another_differ() -> None:
    def sequence(seed: int) -> list[tuple[int, ...]]:
        drawer = sampler(seed=seed)
        return [drawer.draw(IMPORTANCE).active for _ in range(20)]

    assert sequence(1) == sequence(1) != sequence(2)


def test_draws_neither_use_nor_move_the_global_generators() -> None:
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    first = [sampler().draw(IMPORTANCE).active for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    torch.manual_seed(99)
    assert [sampler().draw(IMPORTANCE).active for _ in range(3)] == first


def test_draws_in_another_process_are_the_same_and_do_not_change_between_versions() -> None:
    code = (
        "import json\n"
        "from ds_grass.policies import make_policy\n"
        "from ds_grass.sampler import Sampler\n"
        "drawer = Sampler(make_policy('grass'), 2, 0.5, 0.0, 1234)\n"
        f"print(json.dumps([drawer.draw({IMPORTANCE}).active for _ in range(8)]))\n"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True
    )
    drawer = sampler()
    here = [list(drawer.draw(IMPORTANCE).active) for _ in range(8)]
    assert json.loads(other.stdout) == here
    assert here == [[0, 7], [0, 4], [0, 7], [4, 6], [0, 3], [0, 7], [0, 3], [0, 3]]


def test_sampler_restored_continues_with_the_same_draws() -> None:
    for policy in ("grass", "lisa", "cyclic"):
        original, copy = sampler(policy), sampler(policy, seed=77)
        for _ in range(5):
            original.draw(IMPORTANCE)
        copy.load_state_dict(original.state_dict())
        assert [original.draw(IMPORTANCE) for _ in range(10)] == [copy.draw(IMPORTANCE) for _ in range(10)]
        assert copy.num_draws == 15


def test_sampler_state_is_a_copy_of_plain_types_and_may_have_passed_through_a_list() -> None:
    original, copy = sampler(), sampler(seed=3)
    state = original.state_dict()
    assert {key: type(value) for key, value in state.items()} == {"generator": torch.Tensor, "num_draws": int}
    assert state["generator"].dtype == torch.uint8
    first = original.draw(IMPORTANCE)
    copy.load_state_dict({**state, "generator": state["generator"].tolist()})
    assert copy.draw(IMPORTANCE) == first


def test_largest_of_equal_values_prefers_the_lower_index() -> None:
    assert largest([1.0, 2.0, 2.0, 2.0, 0.0], 2) == (1, 2)
    assert largest([0.0] * 5, 3) == (0, 1, 2)


@pytest.mark.parametrize(
    ("num_active", "num_blocks"), [(1, 5), (2, 5), (3, 5), (2, 6), (4, 6), (5, 5), (7, 12)]
)
def test_turn_reaches_every_block_equally_often(num_active: int, num_blocks: int) -> None:
    visits = Counter(
        itertools.chain.from_iterable(turn(i, num_active, num_blocks) for i in range(num_blocks))
    )
    assert visits == dict.fromkeys(range(num_blocks), num_active)
    reached = itertools.chain.from_iterable(
        turn(i, num_active, num_blocks) for i in range(math.ceil(num_blocks / num_active))
    )
    assert set(reached) == set(range(num_blocks))


def test_effective_blocks_is_one_when_certain_and_all_when_uniform() -> None:
    assert effective_blocks([0.0, 1.0, 0.0]) == 1.0
    assert effective_blocks([0.25] * 4) == pytest.approx(4.0)
    assert effective_blocks([1.0, 1.0, 0.0, 0.0]) == pytest.approx(2.0)
    assert 1.0 < effective_blocks([0.9, 0.05, 0.05]) < 3.0
