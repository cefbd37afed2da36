"""Ranks that hold one recomputation plan and were given other settings: named before they wait for each other."""

from __future__ import annotations

import pytest

from tests import megatron_models, spread_models
from tests.distributed.cases_recompute_job import applied
from tests.distributed.cases_recompute_spread import EXPERTS, gpt_of
from tests.distributed.harness import Context
from tests.distributed.registry import case
from tests.plain_gpt import GPT

OTHERS = {
    "off": ({"enabled": False}, "enabled"),
    "rule": ({"policy": "uniform", "ratio": 0.5}, "policy"),
    "load": ({"plan": {"load": "plan.json", "save": None}}, "plan.load"),
}


@case(ranks=(2,), other=tuple(OTHERS))
def ranks_with_other_settings_are_named_when_a_block_is_adopted(ctx: Context, other: str) -> None:
    """Of two data-parallel ranks that share experts; before any collective of a plan."""
    settings, key = OTHERS[other]
    gpt = gpt_of("ep2")
    with spread_models.parallel_state(ep=2), applied(ctx, settings if ctx.rank else {}, "1GB"):
        message = rf"rank {1 - ctx.rank} and rank {ctx.rank}, .* differ about the recompute settings: .*{key}"
        with pytest.raises(ValueError, match=message):
            spread_models.build(gpt, **EXPERTS)


@case(ranks=(2,))
def ranks_that_plan_alone_may_have_other_settings(ctx: Context) -> None:
    """Data-parallel ranks of a dense model: nobody waits for the other, and one may write its plan elsewhere."""
    settings = {"policy": "uniform", "ratio": 0.5} if ctx.rank else {}
    with megatron_models.parallel_state(), applied(ctx, settings, "1GB"):
        megatron_models.build(GPT(layers=2))
    save = {"plan": {"save": str(ctx.folder / f"{ctx.rank}.json")}}
    with megatron_models.parallel_state(tp=2), applied(ctx, save, "1GB"):
        megatron_models.build(GPT(layers=2))
