"""Steps over the limit: plans count with what was unforeseen, and only a step that ran as planned tells of it.

What a device would count is pretended. Narrow: a longer sequence is planned for when it comes. Wide: at the next step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from megatron_ext import job
from tests import spread_models
from tests.distributed.cases_recompute_job import applied
from tests.distributed.cases_recompute_spread import EXPERTS, GLOBAL, batches_of, gpt_of, train
from tests.distributed.harness import Context
from tests.distributed.registry import case
from tests.pretended_device import pretended_device

CONFIGS = {"wide": GLOBAL, "narrow": EXPERTS}
"""A loss that is balanced over all ranks makes the group wide, also where it has but one."""
SHORT, LONG = (32, 32), (32, 64)
MUCH = 10**12


class Trained:
    """A model that trains on a device of which `peak` is told."""

    def __init__(self, kind: str):
        self.gpt, self.peak, self._over = gpt_of("ep1"), 0, 0
        (self._chunk,) = spread_models.build(self.gpt, **CONFIGS[kind])
        self._chunk.register_forward_pre_hook(self._forward_begins)

    def _forward_begins(self, *_: Any) -> None:
        self.peak = max(self.peak, self._over)

    def steps(self, *steps: tuple[int, ...], over: int = 0) -> Any:
        """Run them, in which the most that is held is `over`; what recomputation has come to."""
        self._over = over
        train([self._chunk], [batches_of(self.gpt, lengths) for lengths in steps])
        self.peak = 0  # as if all later steps held less
        running = job.running().recomputation
        (plan,) = running.plans
        return SimpleNamespace(layers=plan.layers, is_frozen=running.is_frozen, told=running.stage_plan)


@contextmanager
def trained(ctx: Context, kind: str, limit: int) -> Iterator[Trained]:
    model: list[Trained] = []
    device = pretended_device(lambda: 1_000_000, lambda: model[0].peak if model else 0)
    with spread_models.parallel_state(), device, applied(ctx, {}, limit):
        model.append(Trained(kind))
        yield model[0]


def needs(ctx: Context, kind: str, lengths: tuple[int, ...]) -> tuple[int, int]:
    """Bytes of a step with everything recomputed, and with nothing."""
    with trained(ctx, kind, MUCH) as model:
        model.steps(lengths, lengths)
        told = job.running().recomputation.stage_plan
        return told.all_recomputed_bytes, told.nothing_recomputed_bytes


@case(ranks=(1,), most_quick=1, strength=1, kind=("wide", "narrow"))
def step_with_a_longer_sequence_is_not_judged(ctx: Context, kind: str) -> dict:
    """Over the limit in a frozen step, and in one that should verify a plan: what is planned for may hold all of it."""
    limit = 10**9
    for before in (3, 1):  # the plan for short ones is frozen; or is there only since the step began
        with trained(ctx, kind, limit) as model:
            model.steps(*[SHORT] * before)
            came = model.steps(LONG, over=limit + 10**6)
            assert not came.is_frozen or (kind, before) == ("wide", 3)
            found = [model.steps(LONG), model.steps(LONG, LONG)]
            assert all(step.is_frozen and not step.told.unforeseen_bytes for step in found), found
            assert set(found[1].layers) == {"none"}, found
    return {"limit": limit}


@case(ranks=(1,), slow=True, kind=("wide", "narrow"))
def job_that_has_run_goes_on_where_nothing_fits_any_more(ctx: Context, kind: str) -> dict:
    """A longer sequence, or a step that held far more than was predicted: everything is recomputed, with a warning."""
    limit = (needs(ctx, kind, SHORT)[0] + needs(ctx, kind, LONG)[0]) // 2
    for before, lengths, over in ((3, LONG, 0), (1, LONG, 0), (1, SHORT, 2 * limit)):
        with trained(ctx, kind, limit) as model:
            model.steps(*[SHORT] * before)
            model.steps(lengths, over=over)
            found = [model.steps(lengths), model.steps(lengths, over=3 * limit), model.steps(lengths)]
            assert all(step.is_frozen and set(step.layers) == {"full"} for step in found), found
            assert len({step.told.unforeseen_bytes for step in found}) == 1, found  # nothing more can be done
            assert found[-1].told.frozen
    return {"limit": limit}


@case(ranks=(1,), most_quick=1, strength=1, kind=("wide", "narrow"), before=(1, 3))
def plan_that_left_room_and_went_over_is_not_made_again(ctx: Context, kind: str, before: int) -> dict:
    """By one byte more than allowed: what it left free was held by something, too. `before`: steps until then; in the
    second it is verified, later it is frozen."""
    least, most = needs(ctx, kind, SHORT)
    limit = most + (most - least) // 2
    with trained(ctx, kind, limit) as model:
        model.steps(*[SHORT] * before)
        over = model.steps(SHORT, over=limit + 1)
        next_one = model.steps(SHORT, SHORT)
    assert set(next_one.layers) != {"none"}
    assert next_one.is_frozen
    told = next_one.told
    # Experts are measured with random tokens, so not to the byte.
    assert abs(limit + 1 - told.unforeseen_bytes - most) < most / 100
    assert (told.limit_bytes, told.static_bytes) == (limit, over.told.static_bytes)
    assert told.unforeseen_bytes < told.predicted_bytes <= limit
    return {"unforeseen": told.unforeseen_bytes}


@case(ranks=(1,), slow=True)
def overshoot_is_forgotten_when_layers_are_measured_anew(ctx: Context) -> dict:
    """It was of layers that kept other bytes."""
    least, most = needs(ctx, "narrow", SHORT)
    with trained(ctx, "narrow", most) as model:
        before = model.steps(SHORT, SHORT)
        tight = [model.steps(SHORT, over=most + (most - least) // 4), model.steps(SHORT, SHORT)][1]
        assert tight.told.unforeseen_bytes == (most - least) // 4 > before.told.unforeseen_bytes == 0
        assert "none" in tight.layers != before.layers
        model._chunk.decoder.layers[0].requires_grad_(False)
        after = model.steps(SHORT, SHORT, SHORT)
    assert after.told.unforeseen_bytes == 0
    return {"unforeseen": tight.told.unforeseen_bytes}


@case(ranks=(1,))
def layer_that_is_told_of_is_of_the_most_frequent_class(ctx: Context) -> dict:
    """What a layer weighs, for the advice to move some: most have experts, and the first is dense."""
    config = EXPERTS | {"moe_layer_freq": [0] + [1] * 7}
    with spread_models.parallel_state(), applied(ctx, {}, "1GB"):
        gpt = gpt_of("ep1")
        chunks = spread_models.build(gpt, **config)
        train(chunks, [batches_of(gpt)] * 2)
        told = job.running().recomputation.stage_plan
        dense, experts = (
            sum(parameter.numel() for parameter in chunks[0].decoder.layers[place].parameters())
            for place in (0, 1)
        )
    assert told.layer_static_bytes == experts * (8 + 8 + 12) != dense * (8 + 8 + 12)
    return {"bytes": told.layer_static_bytes}
