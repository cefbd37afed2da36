"""Contracts of the ratio rules: the closed forms, whole layers, and the messages for a wrong ratio."""

from __future__ import annotations

import math

import pytest

from megatron_ext.in_flight import in_flight
from megatron_ext.recompute.policies import POLICIES, layers_recomputed


def windows_of(stages: int, micro_batches: int | None = None) -> list[int]:
    return [in_flight(stages, stage, micro_batches=micro_batches) for stage in range(stages)]


def test_none_recomputes_nothing_whatever_the_ratio():
    assert layers_recomputed("none", 7.0, [2, 1], [8, 8]) == (0, 0)


def test_uniform_is_one_number_for_all_stages():
    assert layers_recomputed("uniform", 0.6, windows_of(4), [8, 8, 8, 8]) == (5, 5, 5, 5)
    assert layers_recomputed("uniform", 0.7, windows_of(2), [10, 3]) == (7, 3)


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_level_is_the_closed_form_where_layers_divide(stages, ratio):
    layers = 8 * math.lcm(*range(1, stages + 1))
    kept = [min(1.0, (1 - ratio) * stages / (stages - stage)) for stage in range(stages)]
    counts = layers_recomputed("level", ratio, windows_of(stages), [layers] * stages)
    assert counts == tuple(round(layers * (1 - k)) for k in kept)


@pytest.mark.parametrize("micro_batches", [None, 1, 2, 3])
@pytest.mark.parametrize("layers", [(8, 8, 8, 8), (7, 8, 8, 9), (9, 9, 8, 6), (5, 13, 0, 14)])
def test_level_never_holds_more_than_the_first_stage(layers, micro_batches):
    windows = windows_of(4, micro_batches)
    for tenths in range(11):
        counts = layers_recomputed("level", tenths / 10, windows, layers)
        kept = [(n - count) * window for n, count, window in zip(layers, counts, windows, strict=True)]
        assert max(kept) == kept[0]
        assert all(0 <= count <= n for n, count in zip(layers, counts, strict=True))
        for n, count, window in zip(layers, counts, windows, strict=True):
            assert count == 0 or (n - count + 1) * window > kept[0]  # one layer fewer would not fit


def test_merak_is_the_rule_of_its_code():
    # kept shares 1/4, 3/8, 3/4 and all: 6, 5, 2 and no layers of 8
    assert layers_recomputed("merak", 0.75, windows_of(4), [8] * 4) == (6, 5, 2, 0)
    assert layers_recomputed("merak", 0.5, windows_of(4), [8] * 4) == (4, 2, 0, 0)
    assert layers_recomputed("merak", 0.25, windows_of(4), [8] * 4) == (2, 0, 0, 0)
    assert layers_recomputed("merak", 1.0, windows_of(4), [8] * 4) == (8, 8, 8, 0)
    assert layers_recomputed("merak", 1.0, [1], [8]) == (0,)


def test_merak_holds_more_before_its_free_stages():
    """As the digest of its code found by hand: 1.00, 1.12, 1.50, 1.00 of one stage's activations."""
    windows, layers = windows_of(4), [80] * 4
    counts = layers_recomputed("merak", 0.75, windows, layers)
    held = [w * (n - count) / n for w, n, count in zip(windows, layers, counts, strict=True)]
    assert held == pytest.approx([1.0, 1.125, 1.5, 1.0])


@pytest.mark.parametrize("policy", ["uniform", "level", "merak"])
def test_share_is_not_rounded_by_binary_fractions(policy):
    assert layers_recomputed(policy, 0.7, [2, 1], [10, 10])[0] == 7
    assert layers_recomputed(policy, 1 / 3, [2, 1], [9, 9])[0] == 3


@pytest.mark.parametrize("policy", POLICIES[1:])
@pytest.mark.parametrize("ratio", [-0.1, 1.01, math.nan, math.inf])
def test_wrong_ratio_is_refused(policy, ratio):
    with pytest.raises(ValueError, match=rf"ratio is {ratio}; use 0 .* to 1"):
        layers_recomputed(policy, ratio, [2, 1], [8, 8])


def test_unknown_policy_and_wrong_stages_are_refused():
    with pytest.raises(ValueError, match="'greedy'; use one of none, uniform, level, merak"):
        layers_recomputed("greedy", 0.5, [2, 1], [8, 8])
    for windows, layers in (([2], [8, 8]), ([2, 0], [8, 8]), ([2, 1], [8, -1]), ([], [])):
        with pytest.raises(ValueError, match="one number of layers from 0 for each stage"):
            layers_recomputed("level", 0.5, windows, layers)
