"""DeepSpeed's `safe_get_*` and `safe_set_*` on blocks that rest: what is written is trained, what is absent is None."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tests import models
from tests.distributed import jobs
from tests.distributed.harness import Context
from tests.distributed.registry import case

IN_TURN = {
    "policy": "cyclic",
    "probe_steps": None,
    "refresh_period": None,
    "active_layers": 1,
    "sampling_period": 1,
}

KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "fp32"},
    "masters": {"dtype": "bf16"},
    "no_masters": {"dtype": "bf16", "grass": {"states": {"master_weights": False}}},
    "whole": {"dtype": "bf16", "zero": {"stage3_param_persistence_threshold": 1_000_000}},
}
"""How the weights are kept; "whole": stage 3 that does not shard parameters of less than a million elements."""


@case(strength=1, ranks=(1, 2), stage=(1, 2), kind=("fp32", "masters", "no_masters"))
@case(strength=1, ranks=(1, 2), stage=(3,), kind=tuple(KINDS))
def weights_that_a_script_writes_are_those_that_train(ctx: Context, stage: int, kind: str) -> None:
    """`safe_set_full_fp32_param`, on an active block and one that rests: at once the weight of every rank, rounded."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    job = jobs.with_grass(jobs.Job(stage=stage, model="stack", **KINDS[kind]), **IN_TURN)
    with jobs.engine_of(job) as engine:
        for number in range(2):
            jobs.train_step(engine, job, ctx, number)
        assert jobs.controller(engine).active == (2,)
        resting, active = ([f"blocks.{block}.up.{part}" for part in ("weight", "bias")] for block in (0, 2))
        written = {}
        for name in resting + active:
            param = engine.module.get_parameter(name)
            before = safe_get_full_fp32_param(param)
            written[name] = torch.linspace(-0.3, 0.3, before.numel()).view(before.shape)
            safe_set_full_fp32_param(param, written[name])
        expected = {n: value.to(jobs.DTYPES[job.dtype]) for n, value in written.items()}
        rounds = kind == "no_masters"
        kept = {n: value.float() for n, value in expected.items()} if rounds else written
        held, masters = jobs.weights(engine), jobs.masters(engine)
        jobs.assert_identical({n: masters[n] for n in written}, kept, "masters")
        jobs.assert_identical({n: held[n] for n in written}, expected, "weights")
        jobs.train_step(engine, job, ctx, 2)
        assert max(_moved(engine, kept, resting)) == 0.0
        assert 0 < min(_moved(engine, kept, active)) <= max(_moved(engine, kept, active)) < 0.01
        for number in range(3, 5):
            jobs.train_step(engine, job, ctx, number)
        assert 0 < min(_moved(engine, kept, resting)) <= max(_moved(engine, kept, resting)) < 0.01


def _moved(engine: Any, kept: dict[str, torch.Tensor], names: list[str]) -> list[float]:
    """How far each of these parameters is from what was kept."""
    masters = jobs.masters(engine)
    return [float((masters[n] - kept[n]).abs().max()) for n in names]


def _gradients_on_all_ranks(ctx: Context, engine: Any) -> dict[str, torch.Tensor | None]:
    """`safe_get_full_grad` of every parameter; every rank must see the same."""
    from deepspeed.utils import safe_get_full_grad

    found = {n: safe_get_full_grad(p) for n, p in engine.module.named_parameters()}
    everyone: list = [None] * ctx.world_size
    dist.all_gather_object(
        everyone, {n: g if g is None else g.double().norm().item() for n, g in found.items()}
    )
    assert all(seen == everyone[0] for seen in everyone)
    return found


@case(strength=1, ranks=(1, 2), stage=(1, 2, 3))
def gradients_are_none_for_blocks_that_rest_or_were_probed(ctx: Context, stage: int) -> None:
    """On all ranks alike: nothing while probing frees them, and then what trains, the resting blocks excepted."""
    job = jobs.Job(stage=stage, grass={"probe_steps": 1, "active_layers": 1})
    with jobs.engine_of(job) as engine:
        assert set(_gradients_on_all_ranks(ctx, engine).values()) == {None}
        engine.backward(models.loss(engine, job.data(0, ctx)[ctx.rank][0]))
        assert set(_gradients_on_all_ranks(ctx, engine).values()) == {None}
        engine.step()
        trains = {n for n, p in engine.module.named_parameters() if p.requires_grad}
        engine.backward(models.loss(engine, job.data(1, ctx)[ctx.rank][0]))
        found = _gradients_on_all_ranks(ctx, engine)
        assert {n for n, grad in found.items() if grad is not None} == trains
        assert len(trains) < len(found)
        engine.step()
        assert engine.was_step_applied()
        assert set(_gradients_on_all_ranks(ctx, engine).values()) == {None}
