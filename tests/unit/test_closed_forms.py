"""Contracts of the closed forms: the volumes that section 1.3 of the ParaDySe paper lists, and orders of memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from megatron_ext.sequence_parallel import closed_forms as forms
from megatron_ext.sequence_parallel import memory_forms as memory
from megatron_ext.sequence_parallel.layer_shape import LayerShape
from megatron_ext.sequence_parallel.names import STRATEGIES

P, LENGTH = 8, 4096
SHAPE = LayerShape(1024, 4096, num_heads=16, num_kv_heads=16, head_dim=64, group_size=P, causal=False)
TOKENS = LENGTH // P
A = LENGTH * SHAPE.hidden_size
"""The paper's a = b s h."""
W = 12 * SHAPE.hidden_size**2


def volume(shape: LayerShape, strategy: str, phase: str) -> float:
    """Elements that leave a rank in a layer's `phase`."""
    events = (e for part in forms.PARTS for e in forms.collectives(shape, strategy, part, phase, TOKENS))
    return sum(forms.wire_elements(event, P) for event in events)


def kinds(shape: LayerShape, strategy: str, part: str, phase: str) -> Counter:
    return Counter(event.kind for event in forms.collectives(shape, strategy, part, phase, TOKENS))


SHARE = (P - 1) / P
"""Of a collective's elements, what leaves a rank; the paper's table drops it."""


@pytest.mark.parametrize(
    ("strategy", "forward", "backward"),
    [
        ("megatron_ts", 4 * A * SHARE, 6 * A * SHARE),
        ("ulysses", (W + 4 * A / P) * SHARE, (2 * W + 4 * A / P) * SHARE),
        # keys and values in p - 1 hops of 2a/p; in backward once more, and their fp32 gradients in p hops
        ("ring", (W + 2 * A) * SHARE, 2 * W * SHARE + 2 * A * SHARE + 2 * A),
        ("context", (W + 2 * A) * SHARE, (2 * W + 2 * A + 2 * A) * SHARE),
        # p broadcasts of 4h^2/p, p - 1 hops of 8h^2/p
        ("metp", 4 * W / 12 + 8 * W / 12 * SHARE + 2 * A * SHARE,
         4 * W / 12 + 4 * W / 12 + 8 * W / 12 * (2 * P - 1) / P + 2 * A * SHARE + 2 * A),
    ],
)  # fmt: skip
def test_volume_is_the_papers(strategy, forward, backward):
    assert volume(SHAPE, strategy, "forward") == pytest.approx(forward)
    assert volume(SHAPE, strategy, "backward") == pytest.approx(backward)


def test_megatron_ts_sends_ten_activations_and_no_weight():
    assert (
        volume(SHAPE, "megatron_ts", "forward") + volume(SHAPE, "megatron_ts", "backward") == 10 * A * SHARE
    )
    wider = replace(SHAPE, ffn_hidden_size=8192)
    assert volume(wider, "megatron_ts", "forward") == volume(SHAPE, "megatron_ts", "forward")


def test_volumes_of_megatron_ts_and_ulysses_cross_where_the_paper_says():
    """b s = 36 h / (10 - 8 / p)."""
    crossover = 36 * SHAPE.hidden_size / (10 - 8 / P)

    def total(strategy: str, length: float) -> float:
        events = forms.all_collectives(SHAPE, strategy, round(length / P))
        return sum(forms.wire_elements(event, P) for event in events)

    assert total("megatron_ts", 0.99 * crossover) < total("ulysses", 0.99 * crossover)
    assert total("megatron_ts", 1.01 * crossover) > total("ulysses", 1.01 * crossover)


def test_messages_of_metp_are_many_and_small():
    assert kinds(SHAPE, "metp", "attention", "forward") == {"broadcast": P, "send": P * (P - 1)}
    assert kinds(SHAPE, "metp", "attention", "backward") == {
        "broadcast": P, "send": P * (2 * P - 1), "reduce": P,
    }  # fmt: skip
    assert kinds(SHAPE, "metp", "feed_forward", "forward") == {"send": P - 1}


def test_causal_masks_cost_two_exchanges_where_the_sequence_is_cut():
    for strategy, wanted in (("context", 2), ("ring", 2), ("metp", 2), ("ulysses", 0), ("megatron_ts", 0)):
        assert kinds(replace(SHAPE, causal=True), strategy, "attention", "forward")["exchange"] == wanted


def test_biases_that_are_cut_are_gathered():
    biased = replace(SHAPE, linear_bias=True)
    assert kinds(biased, "ulysses", "feed_forward", "forward") == {"all_gather": 3}
    assert kinds(biased, "ulysses", "feed_forward", "backward") == {"all_gather": 2, "reduce_scatter": 3}
    assert kinds(biased, "context", "attention", "forward")["all_gather"] == 4
    assert kinds(biased, "ulysses", "attention", "forward")["all_gather"] == 2


def test_gradients_of_keys_travel_in_fp32():
    sends = [e for e in forms.collectives(SHAPE, "ring", "attention", "backward", TOKENS) if e.kind == "send"]
    assert Counter(event.bytes // event.elements for event in sends) == {2: P - 1, 4: P}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_group_of_one_sends_nothing(strategy):
    assert forms.all_collectives(replace(SHAPE, group_size=1), strategy, LENGTH) == ()


def test_flops_are_those_of_dense_layers():
    linears = {
        name: sum(forms.gemm_flops(SHAPE, name, part, "backward", TOKENS) for part in forms.PARTS)
        for name in STRATEGIES
    }
    assert linears["megatron_ts"] == linears["ring"] == 4 * TOKENS * W
    assert linears["metp"] == 4 * TOKENS * W + 2 * TOKENS * (3 + 4) * SHAPE.hidden_size**2
    pairs = LENGTH**2
    full = forms.attention_flops(SHAPE, "ring", "forward", pairs)
    assert full == 4 * SHAPE.hidden_size * pairs / P
    assert forms.attention_flops(replace(SHAPE, causal=True), "ring", "forward", pairs) == full / 2
    unfused = replace(SHAPE, causal=True, unfused_attention=True)
    assert forms.attention_flops(unfused, "megatron_ts", "forward", pairs) == full


def test_kept_bytes_are_sixteen_or_five_activations():
    """In units of T h elements: norms 4, q k v 3, attention's output 1, the feed-forward layer 8; METP 5."""
    unit, pairs = TOKENS * SHAPE.hidden_size * SHAPE.element_bytes, LENGTH**2
    softmax = 4 * TOKENS * SHAPE.num_heads
    for strategy in STRATEGIES:
        wanted = (5 if strategy == "metp" else 16) * unit + softmax
        assert memory.kept_bytes(SHAPE, strategy, TOKENS, pairs) == wanted


def test_written_scores_grow_with_the_square_for_the_native_strategy_alone():
    unfused, pairs = replace(SHAPE, unfused_attention=True), LENGTH**2
    for strategy in STRATEGIES:
        more = memory.kept_bytes(unfused, strategy, TOKENS, pairs) - memory.kept_bytes(
            SHAPE, strategy, TOKENS, pairs
        )
        assert more == (pairs * SHAPE.num_heads // P * 6 if strategy == "megatron_ts" else 0)


@pytest.mark.parametrize("length", [16384, 262144])
def test_metp_is_the_leanest(length):
    tokens, pairs = length // P, length**2
    for measure in (memory.kept_bytes, memory.transient_bytes):
        assert min(STRATEGIES, key=lambda name: measure(SHAPE, name, tokens, pairs)) == "metp"
