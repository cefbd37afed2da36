"""The small machinery under the distributed cases."""

from __future__ import annotations

import itertools

from tests.distributed.registry import covering, load_cases

FACTORS = {
    "stage": (0, 1, 2, 3),
    "dtype": ("fp32", "bf16"),
    "accumulation": (1, 3),
    "mode": ("resident", "stream"),
}


def test_all_pairs_lets_every_two_values_meet() -> None:
    cells = covering(FACTORS)
    for (name, values), (other, others) in itertools.combinations(FACTORS.items(), 2):
        for value, other_value in itertools.product(values, others):
            assert any(c[name] == value and c[other] == other_value for c in cells)


def test_all_pairs_is_small_and_always_the_same() -> None:
    assert len(covering(FACTORS)) <= 10
    assert covering(FACTORS) == covering(FACTORS)


def test_every_value_comes_once_with_strength_1() -> None:
    cells = covering(FACTORS, 1)
    assert len(cells) == 4
    assert all({cell[name] for cell in cells} == set(values) for name, values in FACTORS.items())


def test_single_factor_is_taken_whole() -> None:
    assert covering({"stage": (0, 1, 2)}) == [{"stage": 0}, {"stage": 1}, {"stage": 2}]


def test_case_names_are_unique() -> None:
    names = [case.id for case in load_cases()]
    assert len(names) == len(set(names))
