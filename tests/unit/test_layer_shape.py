"""Contracts of a layer's shape: its sizes, and why a strategy can't run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_ext.sequence_parallel.layer_shape import LayerShape
from megatron_ext.sequence_parallel.names import STRATEGIES

SHAPE = LayerShape(64, 256, num_heads=8, num_kv_heads=8, head_dim=8, group_size=4)


def test_weight_of_the_papers_layer_is_twelve_h_squared():
    assert SHAPE.weight == 12 * 64**2
    assert replace(SHAPE, gated=True).weight == 16 * 64**2


def test_dealt_kv_heads_are_at_least_one_for_each_rank():
    assert replace(SHAPE, num_kv_heads=2).dealt_kv_size == 4 * 8
    assert SHAPE.dealt_kv_size == SHAPE.kv_size == 64


def test_nothing_is_in_the_way_of_a_layer_that_divides():
    assert [SHAPE.obstacle(name, 1, 64) for name in STRATEGIES] == [None] * 5


@pytest.mark.parametrize(
    ("change", "strategy", "length", "said"),
    [
        ({}, "megatron_ts", 62, "62 is no multiple of 4 ranks; pad"),
        ({}, "ring", 60, "60 is no multiple of 8; pad"),
        ({}, "context", 60, "two chunks for each of 4 ranks"),
        ({}, "metp", 60, "two chunks"),
        ({"num_kv_heads": 2}, "metp", 64, "whole KV heads on each rank and 2 are no multiple of 4"),
        ({"num_heads": 6, "num_kv_heads": 6}, "megatron_ts", 64, "6 heads are no multiple of 4"),
        ({"num_heads": 6, "num_kv_heads": 6}, "ulysses", 64, "use context or ring"),
        ({"num_heads": 12, "num_kv_heads": 6}, "ulysses", 64, "KV heads"),
    ],
)
def test_obstacle_says_what_and_what_helps(change, strategy, length, said):
    assert said in replace(SHAPE, **change).obstacle(strategy, 1, length)


@pytest.mark.parametrize(
    ("change", "strategy", "length"),
    [
        ({"causal": False}, "ring", 60),
        ({"num_kv_heads": 2}, "ulysses", 64),
        ({"num_kv_heads": 1}, "megatron_ts", 64),
        ({"num_heads": 6, "num_kv_heads": 6}, "ring", 64),
        ({"group_size": 1}, "metp", 63),
    ],
)
def test_no_obstacle_where_another_shape_has_none(change, strategy, length):
    assert replace(SHAPE, **change).obstacle(strategy, 1, length) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0; allowed: an integer from 1"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"causal": 1}, "causal is 1; allowed: true or false"),
        ({"num_kv_heads": 3}, "num_kv_heads is 3 with 8 heads; allowed: a divisor"),
        ({"ffn_hidden_size": 255}, "ffn_hidden_size is 255, of which 4 ranks cannot hold equal shards"),
    ],
)
def test_wrong_shape_names_its_field(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SHAPE, **change)


def test_unknown_strategy_and_empty_batch_are_errors():
    with pytest.raises(ValueError, match="strategy is 'ulises'; allowed: megatron_ts"):
        SHAPE.obstacle("ulises", 1, 64)
    with pytest.raises(ValueError, match="batch and length are 0 and 64"):
        SHAPE.obstacle("ring", 0, 64)


def test_shape_goes_through_json():
    assert LayerShape.from_json(SHAPE.to_json(), "shape") == SHAPE
    with pytest.raises(ValueError, match=r"shape has \['colour'\]"):
        LayerShape.from_json({"colour": 1}, "shape")
    with pytest.raises(ValueError, match="shape is incomplete"):
        LayerShape.from_json({"hidden_size": 1}, "shape")
