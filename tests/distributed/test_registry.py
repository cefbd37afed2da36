"""The small machinery under the distributed cases."""

from __future__ import annotations

import itertools

from tests.distributed.registry import all_pairs, load_cases

FACTORS = {
    "stage": (0, 1, 2, 3),
    "dtype": ("fp32", "bf16"),
    "accumulation": (1, 3),
    "mode": ("resident", "stream"),
}


def test_all_pairs_lets_every_two_values_meet() -> None:
    cells = all_pairs(FACTORS)
    for (name, values), (other, others) in itertools.combinations(FACTORS.items(), 2):
        for value, other_value in itertools.product(values, others):
            assert any(c[name] == value and c[other] == other_value for c in cells)


def test_all_pairs_is_small_and_always_the_same() -> None:
    assert len(all_pairs(FACTORS)) <= 10
    assert all_pairs(FACTORS) == all_pairs(FACTORS)


def test_all_pairs_keeps_every_value_of_a_single_factor() -> None:
    assert all_pairs({"stage": (0, 1, 2)}) == [{"stage": 0}, {"stage": 1}, {"stage": 2}]


def test_case_names_are_unique() -> None:
    names = [case.id for case in load_cases()]
    assert len(names) == len(set(names))
