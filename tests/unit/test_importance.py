"""Importance: the measure, its mean over a window, and the blend that leaves unmeasured blocks alone."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from ds_grass.importance import Window, blend, complete, root_mean_square


def test_root_mean_square_of_a_gradient_equals_that_of_torch() -> None:
    gradient = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = gradient.square().mean().sqrt().item()
    assert root_mean_square(gradient.norm().item() ** 2, gradient.numel()) == pytest.approx(
        expected, rel=1e-14
    )


def test_root_mean_square_of_blocks_of_different_size_is_comparable() -> None:
    assert root_mean_square(4.0 * 10, 10) == root_mean_square(4.0 * 1000, 1000) == 2.0


def test_root_mean_square_of_a_zero_gradient_is_zero() -> None:
    assert root_mean_square(0.0, 3) == 0.0


def test_root_mean_square_of_no_parameters_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        root_mean_square(1.0, 0)


def test_window_averages_over_the_steps_of_each_block_alone() -> None:
    window = Window(3)
    for block, value in ((0, 1.0), (0, 2.0), (0, 6.0), (2, 5.0)):
        window.add(block, value)
    assert window.means() == (3.0, None, 5.0)
    assert window.mean(1) is None


def test_window_cleared_has_measured_nothing() -> None:
    window = Window(2)
    window.add(1, 1.0)
    window.clear()
    assert window.means() == (None, None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_window_given_a_value_that_no_applied_step_can_have_is_a_bug(value: float) -> None:
    with pytest.raises(AssertionError, match="block 1"):
        Window(2).add(1, value)


def test_window_restored_through_json_continues_exactly() -> None:
    window, copy = Window(3), Window(3)
    values = random.Random(3)
    for _ in range(50):
        window.add(values.randrange(2), values.random())
    copy.load_state_dict(json.loads(json.dumps(window.state_dict())))
    for each in (window, copy):
        each.add(0, 0.1)
    assert copy.means() == window.means()


def test_window_state_is_a_copy() -> None:
    window = Window(1)
    state = window.state_dict()
    window.add(0, 1.0)
    assert state == {"sums": [0.0], "counts": [0]}


def test_window_of_another_number_of_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="2 sums.* 3 blocks"):
        Window(3).load_state_dict(Window(2).state_dict())


def test_blend_follows_the_exponential_mean_of_measured_blocks() -> None:
    window = Window(2)
    window.add(0, 8.0)
    assert blend([4.0, 1.0], window, 0.25) == [5.0, 1.0]
    assert blend([4.0, 1.0], window, 1.0) == [8.0, 1.0]


def test_blend_keeps_frozen_blocks_in_every_bit() -> None:
    values = random.Random(0)
    for _ in range(200):
        num_blocks = values.randint(1, 12)
        old = [values.random() * 10 ** values.randint(-12, 12) for _ in range(num_blocks)]
        active = set(values.sample(range(num_blocks), values.randint(0, num_blocks)))
        alpha = values.random() or 1.0
        window = Window(num_blocks)
        for block in active:
            for _ in range(values.randint(1, 5)):
                window.add(block, values.random())
        new = blend(old, window, alpha)
        assert [new[b] for b in range(num_blocks) if b not in active] == [
            old[b] for b in range(num_blocks) if b not in active
        ]
        for block in active:
            low, high = sorted((old[block], window.mean(block)))
            assert low * (1 - 1e-12) <= new[block] <= high * (1 + 1e-12)


def test_blend_returns_values_and_changes_none() -> None:
    old, window = [1.0], Window(1)
    window.add(0, 3.0)
    assert blend(old, window, 0.5) == blend(old, window, 0.5) == [2.0]
    assert old == [1.0]


def test_blend_of_a_block_never_measured_takes_its_first_window_whole() -> None:
    window = Window(3)
    window.add(0, 1.0)
    window.add(0, 3.0)
    assert blend([None, None, 7.0], window, 0.25) == [2.0, None, 7.0]


def test_complete_importance_is_unchanged() -> None:
    assert complete([0.5, 0.0, 2.0]) == [0.5, 0.0, 2.0]


def test_complete_puts_unmeasured_blocks_first_on_the_scale_of_the_others() -> None:
    for largest in (0.0, 1e-30, 3.0, 1e30):
        first, second, third = complete([largest, None, largest / 2])
        assert (first, third) == (largest, largest / 2)
        assert largest < second <= largest * (1 + 1e-15) + 5e-324
    assert complete([None, None]) == [1.0, 1.0]
