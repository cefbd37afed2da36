"""Policies: what each chooses, what it reports, and that the registry knows the names of the config."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import get_args

import pytest
import torch

from ds_grass.config import GrassConfig
from ds_grass.policies import POLICIES, make_policy
from ds_grass.sampler import Draw, DrawRule, probabilities

IMPORTANCE = [0.1, 0.5, 0.2, 0.4, 0.3]
RULE = DrawRule(num_active=2, temperature=0.5, exploration=0.2)


def draws(
    name: str, num_draws: int = 1, importance: list[float] = IMPORTANCE, rule: DrawRule = RULE
) -> list[Draw]:
    policy, generator = make_policy(name), torch.Generator().manual_seed(0)
    return [policy.draw(importance, rule, index, generator) for index in range(num_draws)]


def test_registry_holds_the_names_that_the_config_allows() -> None:
    assert set(POLICIES) == set(get_args(GrassConfig.model_fields["policy"].annotation))
    assert all(policy.name == name for name, policy in POLICIES.items())


def test_unknown_policy_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"grass.policy is 'best'; allowed: grass, static, top_k, lisa, cyclic"
    ):
        make_policy("best")


@pytest.mark.parametrize(
    ("name", "probes", "refreshes"),
    [
        ("grass", True, True),
        ("static", True, False),
        ("top_k", True, True),
        ("lisa", False, False),
        ("cyclic", False, False),
    ],
)
def test_policy_says_whether_it_probes_and_refreshes(name: str, probes: bool, refreshes: bool) -> None:
    policy = make_policy(name)
    assert (policy.probes, policy.refreshes) == (probes, refreshes)
    assert GrassConfig(policy=name).measures == probes


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("num_active", [1, 2, 3, 5])
def test_policy_draws_the_number_of_distinct_blocks_that_was_asked_for(name: str, num_active: int) -> None:
    for draw in draws(name, 40, rule=DrawRule(num_active, 0.5, 0.0)):
        assert len(draw.active) == len(set(draw.active)) == num_active
        assert list(draw.active) == sorted(draw.active)
        assert len(draw.probabilities) == len(IMPORTANCE)


@pytest.mark.parametrize("name", POLICIES)
def test_policy_is_frozen_and_holds_no_state(name: str) -> None:
    policy = make_policy(name)
    assert dataclasses.is_dataclass(policy)
    assert dataclasses.fields(policy) == ()
    assert draws(name, 5) == draws(name, 5)


@pytest.mark.parametrize("name", ["grass", "static"])
def test_softmax_policies_report_the_probabilities_of_the_formula(name: str) -> None:
    assert list(draws(name)[0].probabilities) == probabilities(IMPORTANCE, 0.5, 0.2)
    assert draws("static", 10) == draws("grass", 10)


def test_top_k_takes_the_largest_without_chance() -> None:
    assert draws("top_k", 30) == [Draw((1, 3), (0.0, 1.0, 0.0, 1.0, 0.0))] * 30


def test_top_k_of_equal_blocks_takes_the_lower_index() -> None:
    assert draws("top_k", importance=[0.0] * 5)[0].active == (0, 1)
    assert draws("top_k", importance=[1.0, 2.0, 1.0, 1.0, 1.0])[0].active == (0, 1)


def test_lisa_is_uniform_whatever_the_importance() -> None:
    drawn = draws("lisa", 10_000, importance=[0.0, 0.0, 0.0, 0.0, 1e6])
    counts = Counter(block for draw in drawn for block in draw.active)
    expected = 10_000 * 2 / 5
    # Counts of a block vary with share * (1 - share) * draws; five standard deviations.
    assert all(abs(counts[block] - expected) < 5 * (10_000 * 0.4 * 0.6) ** 0.5 for block in range(5))
    assert drawn[0].probabilities == (0.2,) * 5
    assert drawn[0].effective_blocks == pytest.approx(5.0)


def test_cyclic_walks_round_all_blocks_in_turn() -> None:
    drawn = draws("cyclic", 5)
    assert [draw.active for draw in drawn] == [(0, 1), (2, 3), (0, 4), (1, 2), (3, 4)]
    assert drawn[2].probabilities == (1.0, 0.0, 0.0, 0.0, 1.0)
    assert drawn[2].effective_blocks == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("name", "uses"), [("grass", 5), ("static", 5), ("lisa", 5), ("top_k", 0), ("cyclic", 0)]
)
def test_policy_uses_a_fixed_amount_of_randomness(name: str, uses: int) -> None:
    generator, expected = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    make_policy(name).draw(IMPORTANCE, RULE, 0, generator)
    torch.rand(uses, generator=expected, dtype=torch.float64)
    assert torch.equal(generator.get_state(), expected.get_state())
