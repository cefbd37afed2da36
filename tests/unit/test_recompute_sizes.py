"""Contracts of scaling a measurement: in proportion to the closed forms, and exact at the size that was measured."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from megatron_ext.recompute.plan import FULL, NONE
from megatron_ext.recompute.probe import Measured
from megatron_ext.recompute.sizes import Size, scaled
from megatron_ext.sequence_parallel.layer_shape import LayerShape
from megatron_ext.sequence_parallel.memory_forms import kept_bytes
from megatron_ext.sequence_parallel.names import STRATEGIES

FUSED = LayerShape(64, 256, num_heads=8, num_kv_heads=8, head_dim=8, group_size=4)
UNFUSED = replace(FUSED, unfused_attention=True)
SHORT, LONG, WIDE = Size(1, 512), Size(1, 2048), Size(4, 512)
ROW = Measured(NONE, 1.0, 2.0, 10_000, 5_000)


def test_size_knows_its_tokens_and_pairs():
    assert (LONG.tokens, LONG.pairs) == (2048, 2048**2)
    assert (WIDE.tokens, WIDE.pairs) == (2048, 4 * 512**2)


def test_many_short_sequences_and_few_long_ones_are_joined_in_a_size_that_covers_both():
    many, few = Size(8, 512), Size(1, 4000)
    joined = many.joined(few)
    assert joined == few.joined(many) == Size(1, 4096)
    assert joined.covers(many)
    assert joined.covers(few)
    assert LONG.joined(WIDE) is LONG  # which covers it


def test_joined_sizes_cover_and_settle():
    drawn = random.Random(0)
    for _ in range(200):
        sizes = [Size(drawn.randint(1, 9), drawn.randint(1, 999)) for _ in range(3)]
        joined = sizes[0]
        for size in sizes[1:]:
            joined = joined.joined(size)
        assert all(joined.covers(size) for size in sizes), sizes
        assert all(joined.joined(size) is joined for size in sizes)


@pytest.mark.parametrize("choice", [NONE, FULL, "mlp"])
def test_same_size_is_the_measurement_itself(choice):
    row = replace(ROW, choice=choice)
    assert scaled(row, UNFUSED, "megatron_ts", LONG, Size(1, 2048)) is row


@pytest.mark.parametrize("choice", [NONE, FULL, "mlp", "core_attn", "core_attn+mlp"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_scores_everything_goes_with_the_tokens(choice, strategy):
    row = replace(ROW, choice=choice)
    for after in (LONG, WIDE):
        found = scaled(row, FUSED, strategy, SHORT, after)
        assert found == Measured(choice, 4.0, 8.0, 40_000, 20_000)


def test_more_sequences_go_with_the_tokens_where_scores_are_written_out_too():
    assert scaled(ROW, UNFUSED, "megatron_ts", SHORT, WIDE).kept_bytes == 40_000


def test_longer_sequences_go_with_the_scores_where_these_are_written_out():
    """What the closed form keeps is predicted exactly: scores grow sixteenfold, the rest fourfold."""

    def form(size):
        return kept_bytes(UNFUSED, "megatron_ts", size.tokens // 4, size.pairs)

    row = replace(ROW, kept_bytes=form(SHORT))
    found = scaled(row, UNFUSED, "megatron_ts", SHORT, LONG)
    assert found.kept_bytes == form(LONG)
    assert 4 < found.kept_bytes / row.kept_bytes < 16
    assert found.transient_bytes == round(row.transient_bytes * form(LONG) / form(SHORT))


@pytest.mark.parametrize("choice", [FULL, "core_attn", "core_attn+mlp"])
def test_what_keeps_no_scores_goes_with_the_tokens_but_holds_them_for_a_moment(choice):
    found = scaled(replace(ROW, choice=choice), UNFUSED, "megatron_ts", SHORT, LONG)
    assert found.kept_bytes == 40_000
    assert found.transient_bytes > 4 * 5_000


def test_scores_are_kept_where_only_other_modules_are_recomputed():
    found = scaled(replace(ROW, choice="mlp"), UNFUSED, "megatron_ts", SHORT, LONG)
    assert found.kept_bytes == scaled(ROW, UNFUSED, "megatron_ts", SHORT, LONG).kept_bytes


def test_there_and_back_is_where_it_was():
    for choice in (NONE, FULL, "core_attn"):
        row = replace(ROW, choice=choice, kept_bytes=10**9, transient_bytes=10**8)
        back = scaled(scaled(row, UNFUSED, "megatron_ts", SHORT, LONG), UNFUSED, "megatron_ts", LONG, SHORT)
        assert back.kept_bytes == pytest.approx(row.kept_bytes, abs=1)
        assert back.transient_bytes == pytest.approx(row.transient_bytes, abs=1)
        assert back.forward_seconds == pytest.approx(row.forward_seconds)
