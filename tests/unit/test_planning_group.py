"""Contracts of the group that holds one plan: which ranks those are, and what they tell each other between steps."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from megatron_ext.recompute.largest_size import LargestSize
from megatron_ext.recompute.planning_group import News, are_equal, is_spread, largest_of_all, planning_group
from megatron_ext.recompute.sizes import Size


def config(**given) -> SimpleNamespace:
    """What a TransformerConfig says of a dense model on one tensor-parallel group."""
    plain = {"context_parallel_size": 1, "expert_model_parallel_size": 1, "tensor_model_parallel_size": 2}
    return SimpleNamespace(**plain | {"expert_tensor_parallel_size": 2, "num_moe_experts": None} | given)


def together(*others: tuple[int, ...]):
    """An all-reduce with ranks that give these numbers."""
    return lambda *own: [max(column) for column in zip(own, *others, strict=True)]


@pytest.mark.parametrize(
    "given",
    [
        {"context_parallel_size": 2},
        {"expert_model_parallel_size": 2},
        {"num_moe_experts": 4, "expert_tensor_parallel_size": 4},
        {"moe_router_load_balancing_type": "global_aux_loss"},
        {"moe_router_load_balancing_type": ["aux_loss", "global_aux_loss"]},
    ],
)
def test_layers_that_talk_to_other_groups_are_planned_by_the_whole_stage(given):
    assert is_spread(config(**given))
    groups = SimpleNamespace(tp="tensor", tp_dp_cp="stage")
    assert planning_group(SimpleNamespace(config=config(**given), pg_collection=groups)) == "stage"


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"num_moe_experts": 4},
        {"num_moe_experts": 4, "expert_tensor_parallel_size": 1},
        {"moe_router_load_balancing_type": "aux_loss"},
        {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"]},
    ],
)
def test_layers_of_one_group_are_planned_by_it(given):
    assert not is_spread(config(**given))
    groups = SimpleNamespace(tp="tensor", tp_dp_cp="stage")
    assert planning_group(SimpleNamespace(config=config(**given), pg_collection=groups)) == "tensor"


def test_stage_is_asked_of_parallel_state_where_a_block_does_not_say(monkeypatch):
    state = pytest.importorskip("megatron.core.parallel_state", reason="needs Megatron-core")
    asked = []
    monkeypatch.setattr(
        state, "get_tensor_and_data_parallel_group", lambda **options: asked.append(options) or "stage"
    )
    assert planning_group(SimpleNamespace(config=config(expert_model_parallel_size=2))) == "stage"
    assert asked == [{"with_context_parallel": True}]


def test_news_of_all_ranks_are_the_most_of_each():
    own = News(4, None, trains_others=False, static_bytes=10, over_bytes=0)
    assert own.of_all(together((4, 0, 0, 0, 0, 0, 0))) == own
    others = (6, 1, 7, 3, 64, 4096, 1)  # micro-batches, trains, static, over; tokens, pairs and sequences
    assert own.of_all(together(others)) == News(6, Size(1, 64), True, 10, 3)


def test_facts_are_equal_only_where_every_rank_has_the_same():
    told: list[tuple[int, ...]] = []
    assert are_equal(["none", "full"], lambda *own: told.append(own) or list(own))
    assert are_equal(["none", "full"], together(*told))
    for other in (["full", "none"], ["none"], []):
        assert not are_equal(other, together(*told))


@pytest.mark.parametrize(
    ("sizes", "largest"),
    [
        ([(2, 32), (2, 64)], (2, 64)),
        ([(4, 16), (2, 64), (1, 8)], (2, 64)),
        ([(8, 16), (1, 64)], (4, 32)),  # the least tokens that have as many of both
        ([(3, 7)], (3, 7)),
    ],
)
def test_largest_of_all_covers_every_ranks_and_is_one_of_them_where_it_can_be(sizes, largest):
    own, *others = [Size(*size) for size in sizes]
    found = largest_of_all(own, together(*((s.tokens, s.pairs, s.batch) for s in others)))
    assert found == Size(*largest)
    assert all(found.covers(size) for size in (own, *others))


def test_larger_size_waits_for_the_next_step_and_says_so_once(caplog):
    sizes = LargestSize()
    assert sizes.grow(Size(1, 32))
    with caplog.at_level(logging.WARNING):
        sizes.wait(Size(1, 64), is_planned=False)
        assert not caplog.records  # everything is recomputed still
        sizes.wait(Size(4, 32), is_planned=True)
        sizes.wait(Size(8, 32), is_planned=True)
    assert [record.getMessage() for record in caplog.records] == [
        "megatron_ext: a micro-batch of 4 x 32 tokens runs under a recomputation plan for 1 x 32: ranks whose layers "
        "are spread plan between steps only"
    ]
    assert (sizes.planned, sizes.waiting) == (Size(1, 32), Size(8, 32))
    assert sizes.grow(sizes.waiting)
    assert (sizes.planned, sizes.waiting) == (Size(8, 32), None)
    assert not sizes.grow(Size(1, 64))
    assert not sizes.grow(None)


def test_first_sizes_of_all_tell_whether_somebody_has_the_largest():
    sizes, calls = LargestSize(), []

    def most(*own: int) -> list[int]:
        calls.append(own)
        return [max(pair) for pair in zip(own, (64, 4096, 1) if len(own) == 3 else (0,), strict=True)]

    assert not sizes.first(Size(8, 16), most)
    assert sizes.planned == Size(4, 32)
    assert calls == [(128, 2048, 8), (0,)]
