"""Contracts of the advice: finds what enumeration finds, says nothing without a gain, in words Megatron understands."""

from __future__ import annotations

import importlib.util
import itertools
import math
import random
from collections.abc import Callable

import pytest

from megatron_ext.recompute.layout_advice import advise, layout_string, one_moved
from megatron_ext.recompute.schedule import Pipeline, open_counts
from megatron_ext.recompute.timeline import StageTimes, compose

TOKENS, HIDDEN, VOCABULARY = 8192 * 2, 4096, 128256
LAYER_WEIGHTS = 2 * HIDDEN * (HIDDEN + 1024) + 3 * HIDDEN * 14336
STATIC_BYTES = 16
"""Of a weight: bf16 with gradient, and fp32 master and two moments."""
LIMIT_BYTES = 76 * 10**9


def fewest_recomputed(layers: tuple[int, ...], stage: int, *, head: bool) -> int:
    """Llama-3-8B, p = 4, sequence 8192, micro-batch 2: a kept layer 34 bytes a token and channel, its input 2; while a
    layer is recomputed it is there once more, and the last stage holds logits and loss instead."""
    outside = stage == 0 or (stage == 3 and head)
    static = STATIC_BYTES * (layers[stage] * LAYER_WEIGHTS + outside * VOCABULARY * HIDDEN)
    logits = TOKENS * VOCABULARY * 10 if stage == 3 and head else 0
    for count in range(layers[stage] + 1):
        held = TOKENS * HIDDEN * (34 * (layers[stage] - count) + 2 * count)
        once = max(logits, 34 * TOKENS * HIDDEN if count else 0)
        if static + open_counts(Pipeline(4, 16), stage)[0] * held + once <= LIMIT_BYTES:
            return count
    raise AssertionError("every layout here fits with all layers recomputed")


def llama_seconds(head: float, micro_batches: int) -> Callable[[tuple[int, ...]], float]:
    """A layer's forward 1, backward 2, recomputation 1; `head`: layer-forwards on the last stage."""

    def seconds(layers: tuple[int, ...]) -> float:
        times = []
        for stage, count in enumerate(layers):
            width = count + (head if stage == 3 else 0.0)
            recomputed = fewest_recomputed(layers, stage, head=head > 0)
            times.append([StageTimes(width, 2 * width, float(recomputed))])
        return compose(Pipeline(4, micro_batches), times).seconds

    return seconds


EQUAL = (8, 8, 8, 8)


def test_worked_example_recomputes_what_its_memory_demands():
    assert [fewest_recomputed(EQUAL, stage, head=True) for stage in range(4)] == [5, 2, 0, 0]
    assert [fewest_recomputed((8, 8, 9, 7), stage, head=True) for stage in range(4)] == [5, 2, 0, 0]


@pytest.mark.parametrize(
    ("micro_batches", "before", "after"), [(8, 1.252, 1.317), (16, 1.257, 1.318), (64, 1.262, 1.320)]
)
def test_worked_example_gets_its_layout(micro_batches, before, after):
    """Gains over full recomputation of an equal cut, of which a slot of the last stage is 32 + 3 heads of 2.1."""
    full = micro_batches * (32 + 6.3) + 3 * 32
    found = advise(EQUAL, llama_seconds(2.1, micro_batches))
    assert found is not None
    assert found.layers == (8, 8, 9, 7)
    assert found.layout == "Et*8|t*8|t*9|t*7L"
    assert full / found.current_seconds == pytest.approx(before, abs=6e-4)
    assert full / found.seconds == pytest.approx(after, abs=6e-4)
    assert found.gain == found.current_seconds / found.seconds


@pytest.mark.parametrize("micro_batches", [8, 16, 64])
def test_without_a_head_a_layer_leaves_the_first_stage(micro_batches):
    """To stage 2: a step is a little shorter than with 7, 8, 8, 9 of the digest of Merak."""
    seconds = llama_seconds(0.0, micro_batches)
    found = advise(EQUAL, seconds)
    assert found is not None
    assert found.layers == (7, 8, 9, 8)
    assert found.seconds < seconds((7, 8, 8, 9))


def test_search_equals_an_enumeration_of_all_layouts_near_by():
    """All that lie within three moved layers, for random speeds of four stages; the slowest stage counts."""
    rng = random.Random(4)
    for _ in range(30):
        speeds = [rng.uniform(0.5, 2.0) for _ in range(4)]

        def seconds(layers: tuple[int, ...], speeds: list[float] = speeds) -> float:
            return max(n * speed for n, speed in zip(layers, speeds, strict=True))

        near = [
            layers
            for layers in itertools.product(range(1, 9), repeat=4)
            if sum(layers) == 20 and sum(max(0, n - 5) for n in layers) <= 3
        ]
        best = min(map(seconds, near))
        found = advise((5, 5, 5, 5), seconds, least_gain=1.0)
        assert (found.seconds if found else seconds((5, 5, 5, 5))) == best


def test_two_slowest_stages_are_relieved_together():
    """One move alone wins nothing."""
    found = advise((6, 6, 3, 3), lambda layers: float(max(layers)), most_moved=2)
    assert found is not None
    assert found.seconds == 5.0


def test_no_advice_without_a_gain_worth_a_new_job():
    assert advise((4, 4), lambda layers: float(max(layers))) is None
    slower = {(4, 4): 1.004, (3, 5): 1.0}
    assert advise((4, 4), lambda layers: slower.get(layers, 2.0)) is None
    assert advise((4, 4), lambda layers: slower.get(layers, 2.0), least_gain=1.001) is not None


def test_of_equal_layouts_the_nearest_is_advised():
    found = advise((4, 4, 4), lambda layers: 2.0 if layers == (4, 4, 4) else 1.0)
    assert found is not None
    assert sum(max(0, n - 4) for n in found.layers) == 1


def test_a_layout_that_fits_is_advised_where_the_present_one_does_not():
    found = advise((4, 4), lambda layers: 3.0 if layers[0] == 2 else math.inf)
    assert found is not None
    assert (found.layers, found.gain) == ((2, 6), math.inf)
    assert advise((4, 4), lambda layers: math.inf) is None


def test_each_layout_is_asked_for_once_and_keeps_every_layer():
    asked = []

    def seconds(layers: tuple[int, ...]) -> float:
        asked.append(layers)
        return float(max(layers))

    advise((1, 2, 5, 4), seconds)
    assert len(asked) == len(set(asked))
    assert all(sum(layers) == 12 and min(layers) >= 1 for layers in asked)


def test_one_moved_layer_leaves_one_at_least():
    assert sorted(one_moved((1, 2))) == [(2, 1)]
    assert len(list(one_moved((3, 3, 3)))) == 6


def test_layers_must_be_counts():
    with pytest.raises(ValueError, match=r"layers is \[4, -1\]"):
        advise((4, -1), lambda layers: 1.0)
    with pytest.raises(ValueError, match=r"layers is \[\]"):
        advise((), lambda layers: 1.0)


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="Megatron-core is not installed")
@pytest.mark.parametrize("mtp_layers", [0, 1, 2])
@pytest.mark.parametrize(
    ("layers", "stages"),
    [((8, 8, 9, 7), 4), ((1, 0, 2, 12, 1, 1, 1, 1), 4), ((1, 11), 2), ((0, 3, 3, 0), 2), ((5,), 1)],
)
def test_installed_megatron_reads_the_layout_back(layers, stages, mtp_layers):
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    parsed = PipelineParallelLayerLayout.from_str(layout_string(layers, mtp_layers), stages)
    parsed.validate_layer_layout(sum(layers), mtp_layers)
    found = [
        parsed.layout[stage][chunk].count(LayerType.decoder)
        for chunk in range(len(layers) // stages)
        for stage in range(stages)
    ]
    assert found == list(layers)
