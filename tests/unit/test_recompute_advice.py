"""Contracts of the advice on layouts, from what stages tell: the worked case of a heavy head; what cannot be said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_ext.recompute.advice import composed, layout_advice
from megatron_ext.recompute.stage_plan import StagePlan

LAYERS, STAGES = 8, 4
OPTIONS = (
    {"name": "none", "seconds": 0.0, "kept_bytes": 100, "transient_bytes": 20},
    {"name": "full", "seconds": 1.0, "kept_bytes": 6, "transient_bytes": 120},
)
HEAD = 2.1


def told(limit: int = 1700, micro_batches: int = 16) -> list[StagePlan]:
    """Units: a layer's forward; recomputed are 5, 2, 0 and 0 of 8 layers, as the limit allows."""
    recomputed = (5, 2, 0, 0)
    return [
        StagePlan(
            stage=stage,
            policy="stage_aware",
            chunks=({"layers": ["full"] * count + ["none"] * (LAYERS - count), "share": None},),
            open=(STAGES - stage,),
            pipeline={"stages": STAGES, "micro_batches": micro_batches, "chunks": 1, "group_size": None},
            limit_bytes=limit,
            static_bytes=100,
            forward_seconds=(8.0,),
            backward_seconds=(16.0,),
            recompute_seconds=(float(count),),
            outside_seconds=(HEAD if stage == STAGES - 1 else 0.0,),
            layer_options=OPTIONS,
            layer_static_bytes=10,
            outside_bytes=(0,),
        )
        for stage, count in enumerate(recomputed)
    ]


def test_a_layer_leaves_the_stage_with_the_head():
    found = layout_advice(told())
    assert found is not None
    assert found.layers == (8, 8, 9, 7)
    assert found.gain > 1.03
    assert found.layout.count("L") >= 1 or "t" in found.layout


def test_step_is_composed_from_the_stages_seconds():
    full = [replace(stage, recompute_seconds=(8.0,), outside_seconds=(0.0,)) for stage in told()]
    step = composed(full)
    assert step is not None
    assert step.seconds == pytest.approx((16 + STAGES - 1) * 32)


def test_what_was_unforeseen_takes_its_part_of_the_limit():
    unforeseen = [replace(stage, unforeseen_bytes=300) for stage in told(limit=2000)]
    assert layout_advice(unforeseen) == layout_advice(told()) != layout_advice(told(limit=2000))


def test_stages_that_were_not_measured_give_no_advice():
    stages = told()
    assert layout_advice(stages[:1]) is None
    assert layout_advice([replace(stages[0], layer_options=None), *stages[1:]]) is None
    assert composed([replace(stages[0], forward_seconds=None), *stages[1:]]) is None


def test_layers_stay_where_no_other_layout_fits():
    tight = [replace(stage, limit_bytes=330) for stage in told()]
    assert layout_advice(tight) is None
