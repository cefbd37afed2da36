"""Contracts of what a layer costs where the script recomputes it, and what the planner makes of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_ext.sequence_parallel.cost_model import Cost
from megatron_ext.sequence_parallel.layer_shape import LayerShape
from megatron_ext.sequence_parallel.planner import LayerKind, Planner
from megatron_ext.sequence_parallel.recomputed import layers_together, recomputed_cost

SHAPE = LayerShape(64, 256, num_heads=8, num_kv_heads=8, head_dim=8, group_size=4)
"""2 bytes an element: a rank keeps 32 bytes of a layer's input for each token of the group."""


def config(granularity=None, method=None, layers=None) -> SimpleNamespace:
    return SimpleNamespace(
        recompute_granularity=granularity, recompute_method=method, recompute_num_layers=layers
    )


@pytest.mark.parametrize(
    ("given", "together"),
    [
        (config(), (0, 0, 0, 0)),
        (config("selective"), (0, 0, 0, 0)),
        (config("full", "uniform", 1), (1, 1, 1, 1)),
        (config("full", "uniform", 3), (3, 3, 3, 3)),
        (config("full", "uniform", 9), (4, 4, 4, 4)),
        (config("full", "block", 3), (1, 1, 1, 0)),
        (config("full", "block", 0), (0, 0, 0, 0)),
    ],
)
def test_layers_are_recomputed_as_megatrons_settings_say(given, together):
    assert layers_together(given, 4) == together


def test_inputs_are_kept_and_the_rest_is_there_for_a_moment():
    assert recomputed_cost(Cost(3.0, 1000, 50), SHAPE, tokens=8, together=1) == Cost(4.0, 256, 1050)
    assert recomputed_cost(Cost(3.0, 1000, 50), SHAPE, tokens=8, together=4) == Cost(4.0, 64, 4050)


class Fixed:
    """The same cost for every size."""

    shape = SHAPE

    def predict(self, strategy, batch, length, documents=None) -> Cost:
        return {"megatron_ts": Cost(1.0, 100_000, 10), "metp": Cost(2.0, 1_000, 10)}[strategy]

    def fingerprint(self) -> str:
        return ""


def test_layers_that_are_recomputed_leave_room_for_the_faster_strategy():
    names = ("megatron_ts", "metp")
    kept = [LayerKind(Fixed(), (0, 1, 2, 3), names)]
    recomputed = [LayerKind(Fixed(), (0, 1), names, 1), LayerKind(Fixed(), (2, 3), names)]
    # Inputs of two layers that are run again, two layers that are kept lean, and all of one that is run again.
    budget = 2 * (2048 + 1_000) + 100_010
    assert Planner(kept, budget).best(1, 64).names == ("megatron_ts", "metp", "metp", "metp")
    assert Planner(recomputed, budget).best(1, 64).names == ("megatron_ts", "megatron_ts", "metp", "metp")
