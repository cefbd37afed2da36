"""Contracts of what recomputation refuses: which key, what was given, what to do."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from megatron_ext.recompute.plan import ChunkPlan, Share
from megatron_ext.recompute.refusals import check_config, check_plan, nothing_fits
from megatron_ext.recompute.schedule import Pipeline
from megatron_ext.recompute.sizes import Size
from megatron_ext.recompute.stage import problem_of
from megatron_ext.recompute.stage_memory import LayerClass, Option

LAYER = SimpleNamespace(layer_number=3)


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("fp8", "hybrid"),
        ("cpu_offloading", True),
        ("overlap_moe_expert_parallel_comm", True),
        ("enable_cuda_graph", True),
        ("cuda_graph_impl", "local"),
        ("hybrid_context_parallel", True),
    ],
)
def test_setting_that_runs_layers_in_another_way_is_refused_by_name(key, given):
    with pytest.raises(
        ValueError, match=rf"under {key}, which the script's config sets to {given!r}; .* leave {key} out"
    ):
        check_config(SimpleNamespace(**{key: given}))


def test_settings_that_are_off_are_not_refused():
    check_config(SimpleNamespace(fp8=None, cpu_offloading=False, cuda_graph_impl="none"))


@pytest.mark.parametrize("key", ["context_parallel_size", "expert_model_parallel_size"])
def test_layers_spread_over_several_groups_are_not_refused(key):
    check_config(SimpleNamespace(**{key: 2}))


def test_layers_of_a_file_must_have_the_modules_they_recompute():
    check_plan(ChunkPlan(("none", "full")), [LAYER, LAYER], "plan.json")
    for plan in (ChunkPlan(("none", "moe_act")), ChunkPlan(("none", "full"), Share(1, "moe_act", 1, 2))):
        with pytest.raises(
            ValueError, match="is 'plan.json', which recomputes moe_act of layer 3, but .* save a new plan"
        ):
            check_plan(plan, [LAYER, LAYER], "plan.json")


@pytest.mark.parametrize(
    ("unforeseen", "said"),
    [(0, r"optimizer states\) for"), (20, r"optimizer states, 20 B more than was predicted")],
)
def test_what_was_unforeseen_is_not_said_to_be_weights(unforeseen, said):
    layer = LayerClass("layer", (Option("none", 0.0, 50, 0), Option("full", 1.0, 10, 30)))
    problem = problem_of(Pipeline(1, 1), 0, [["layer"] * 2], {"layer": layer}, [0], 100 + unforeseen, 110)
    found = nothing_fits(problem, unforeseen, 0, Size(1, 8))
    assert re.search(rf"\(100 B of it weights, gradients and {said}", found), found
    assert "allows 110 B; give it" in found
