"""Saved at any step and resumed, a run ends with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import models
from tests.distributed import jobs
from tests.distributed.cases_faults import fp16_on_cpu, recorded_warnings
from tests.distributed.cases_schedule import WARMUP
from tests.distributed.harness import Context
from tests.distributed.registry import case

TOTAL_STEPS = 11


@case(
    ranks=(1, 2),
    strength=1,
    stage=(0, 1, 2, 3),
    dtype=("fp32", "bf16"),
    accumulation=(1, 2),
    save_after=(1, 2, 4, 7),
    timeout_seconds=120,
)
def resume_ends_with_the_same_bits(
    ctx: Context, stage: int, dtype: str, accumulation: int, save_after: int
) -> None:
    """Saved after 1 (while probing), 2 (as probing ends), 4 or 7 steps; the second run starts from other weights."""
    job = jobs.Job(
        stage=stage,
        dtype=dtype,
        accumulation=accumulation,
        extra={"scheduler": WARMUP},
        grass={"states": {"mode": ("resident", "stream", None)[(stage + save_after) % 3]}},
    )
    with jobs.engine_of(job) as engine:
        for number in range(save_after):
            jobs.train_step(engine, job, ctx, number)
        engine.save_checkpoint(str(ctx.folder / "saved"), tag="middle")
        uninterrupted = _finish(engine, job, ctx, save_after)
    with jobs.engine_of(jobs.replace(job, model_options={"seed": 99})) as engine:
        jobs.train_step(engine, job, ctx, 50)
        path, _ = engine.load_checkpoint(str(ctx.folder / "saved"), tag="middle")
        assert path is not None
        resumed = _finish(engine, job, ctx, save_after)
    assert resumed["steps"] == uninterrupted["steps"]
    for what in ("weights", "masters", "exp_avg", "exp_avg_sq"):
        jobs.assert_identical(resumed[what], uninterrupted[what], what)
    assert resumed["counters"] == uninterrupted["counters"]


@case(most_quick=2, ranks=(2,), stage=(1, 2, 3))
def saving_changes_nothing(ctx: Context, stage: int) -> None:
    """A run that saves after every step is the run that never does; frozen flags are as before."""
    kept = []
    for saves in (False, True):
        job = jobs.Job(stage=stage)
        with jobs.engine_of(job) as engine:
            steps = []
            for number in range(8):
                steps.append(jobs.train_step(engine, job, ctx, number))
                if saves:
                    flags = [p.requires_grad for p in engine.module.parameters()]
                    engine.save_checkpoint(str(ctx.folder / "saved"), tag=f"step{number}")
                    assert [p.requires_grad for p in engine.module.parameters()] == flags
            kept.append((steps, jobs.masters(engine)))
    assert kept[0][0] == kept[1][0]
    jobs.assert_identical(kept[0][1], kept[1][1], "masters")


@case(ranks=(1, 2), strength=1, stage=(1, 2, 3), dtype=("fp32", "bf16"))
def zero_to_fp32_reads_what_was_saved(ctx: Context, stage: int, dtype: str) -> None:
    """DeepSpeed's own script finds every parameter, drawn or not, with its master's bits."""
    import torch.distributed as dist
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    job = jobs.Job(stage=stage, dtype=dtype, model_options={"tied": True})
    with jobs.engine_of(job) as engine:
        for number in range(5):
            jobs.train_step(engine, job, ctx, number)
        masters = jobs.masters(engine)
        engine.save_checkpoint(str(ctx.folder / "saved"), tag="end")
    dist.barrier()
    found = get_fp32_state_dict_from_zero_checkpoint(str(ctx.folder / "saved"), tag="end")
    jobs.assert_identical({n: found[n].float() for n in masters}, masters, "masters")


@case(most_quick=2, ranks=(1, 2), strength=1, stage=(1, 2, 3))
def resumed_right_after_an_fp16_overflow_a_run_ends_with_the_same_bits(ctx: Context, stage: int) -> dict:
    """Forced overflows while training: scale, hysteresis and the count of skips go on where they were."""
    fp16 = {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 3, "hysteresis": 2}
    job = jobs.Job(stage=stage, dtype="fp16", extra={"fp16": fp16, "scheduler": WARMUP})
    with fp16_on_cpu():
        with jobs.engine_of(job) as engine:
            for number in range(5):
                jobs.train_step(engine, job, ctx, number)
            engine.optimizer.loss_scaler.cur_scale = 2.0**60
            assert not jobs.train_step(engine, job, ctx, 5).applied
            engine.save_checkpoint(str(ctx.folder / "saved"), tag="overflow")
            engine.optimizer.loss_scaler.cur_scale = 2.0**10  # as below: both runs come down at once
            uninterrupted = _finish(engine, job, ctx, 6)
        with jobs.engine_of(jobs.replace(job, model_options={"seed": 99})) as engine:
            engine.load_checkpoint(str(ctx.folder / "saved"), tag="overflow")
            assert engine.optimizer.loss_scale == 2.0**60  # hysteresis bore the first one
            assert engine.optimizer.loss_scaler.cur_hysteresis == 1
            engine.optimizer.loss_scaler.cur_scale = 2.0**10
            assert jobs.controller(engine).counters["skipped_in_a_row"] == 1
            resumed = _finish(engine, job, ctx, 6)
    for what in ("weights", "masters", "exp_avg", "exp_avg_sq"):
        jobs.assert_identical(resumed[what], uninterrupted[what], what)
    assert resumed["steps"] == uninterrupted["steps"]
    assert resumed["counters"] == uninterrupted["counters"]
    return resumed["counters"]


@case(most_quick=2, ranks=(1, 2), strength=1, stage=(1, 2, 3))
def saved_between_micro_batches_the_step_begins_anew(ctx: Context, stage: int) -> None:
    """Files of DeepSpeed hold no gradients: a warning says so, the saving run goes on, the resumed one repeats it."""
    job, warnings = jobs.Job(stage=stage, accumulation=2), []
    with recorded_warnings(warnings), jobs.engine_of(job) as engine:
        for number in range(4):
            jobs.train_step(engine, job, ctx, number)
        for micro, batch in enumerate(job.data(4, ctx)[ctx.rank]):
            engine.backward(models.loss(engine, batch))
            engine.step()
            if micro == 0:
                engine.save_checkpoint(str(ctx.folder / "saved"), tag="between")
        uninterrupted = _finish(engine, job, ctx, 5)
    assert (len([text for text in warnings if "in the middle of a step" in text]) == 1) == (ctx.rank == 0)
    with jobs.engine_of(jobs.replace(job, model_options={"seed": 99})) as engine:
        engine.load_checkpoint(str(ctx.folder / "saved"), tag="between")
        jobs.train_step(engine, job, ctx, 4)
        resumed = _finish(engine, job, ctx, 5)
    assert resumed["steps"] == uninterrupted["steps"]
    jobs.assert_identical(resumed["masters"], uninterrupted["masters"], "masters")


@case(ranks=(1, 2), strength=1, stage=(1, 2, 3), dtype=("fp32", "bf16"))
def blocks_never_drawn_take_no_space_for_moments(ctx: Context, stage: int, dtype: str) -> dict:
    """The file of a run that trained one block is smaller by the moments of the others, and loads as any other."""
    job = jobs.Job(stage=stage, dtype=dtype, model_options={"hidden": 64}, grass={"sampling_period": None})
    sizes = []
    for active in (4, 1):
        few = jobs.with_grass(job, active_layers=active, refresh_period=None, outer="never")
        with jobs.engine_of(few) as engine:
            for number in range(3):
                jobs.train_step(engine, few, ctx, number)
            engine.save_checkpoint(str(ctx.folder / f"saved{active}"), tag="end")
            own = engine._get_zero_ckpt_name(str(ctx.folder / f"saved{active}"), "end")
            sizes.append(Path(own).stat().st_size)
            shard = max(unit.numel for unit in engine.optimizer.units) // ctx.world_size
            engine.load_checkpoint(str(ctx.folder / f"saved{active}"), tag="end")
    saved = sizes[0] - sizes[1]
    assert saved > 0.95 * 3 * 8 * shard, (sizes, shard)
    return {"all": sizes[0], "one": sizes[1], "moments of a block": 8 * shard}


REFUSED = {
    "policy": ({}, {"policy": "top_k"}),
    "active_layers": ({}, {"active_layers": 1}),
    "of another model": ({"layers": 5}, {}),
    "not saved by a grass job": ({}, {"enabled": False}),
}
"""What the message says -> the model and the grass block of the job that saved."""


@case(most_quick=2, ranks=(1, 2), strength=1, stage=(1, 2, 3), message=tuple(REFUSED))
def a_refused_checkpoint_changes_nothing(ctx: Context, stage: int, message: str) -> None:
    """The run that was refused another job's checkpoint in its middle is the run that never asked for it."""
    job = jobs.Job(stage=stage, extra={"scheduler": WARMUP})
    model_options, block = REFUSED[message]
    saver = jobs.with_grass(jobs.replace(job, model_options={"seed": 99, **model_options}), **block)
    with jobs.engine_of(saver) as engine:
        for number in range(5):
            engine.backward(models.loss(engine, job.data(number, ctx)[ctx.rank][0]))
            engine.step()
        engine.save_checkpoint(str(ctx.folder / "saved"), tag="other")
    kept = []
    for asks in (False, True):
        with jobs.engine_of(job) as engine:
            for number in range(4):
                jobs.train_step(engine, job, ctx, number)
            before = _state(engine)
            if asks:
                with pytest.raises(ValueError, match=message):
                    engine.load_checkpoint(str(ctx.folder / "saved"), tag="other")
                after = _state(engine)
                changed = [what for what in before if before[what] != after[what]]
                assert not changed, changed
            kept.append(_finish(engine, job, ctx, 4))
    for what in ("weights", "masters", "exp_avg", "exp_avg_sq"):
        jobs.assert_identical(kept[1][what], kept[0][what], what)
    assert kept[1]["steps"] == kept[0]["steps"]
    assert kept[1]["counters"] == kept[0]["counters"]


def _state(engine: object) -> dict:
    """What must stay as it is, in a form that `==` compares."""
    grass = jobs.controller(engine)
    tensors = {"weights": jobs.weights(engine), "masters": jobs.masters(engine)}
    return {
        **{what: {n: t.tolist() for n, t in found.items()} for what, found in tensors.items()},
        "flags": [p.requires_grad for p in engine.module.parameters()],
        "active": tuple(grass.active),
        "phase": grass.phase,
        "counters": dict(grass.counters),
        "rates": [group["lr"] for group in engine.optimizer.param_groups],
        "schedule": engine.lr_scheduler.state_dict(),
        "engine": (engine.global_steps, engine.skipped_steps, engine.global_samples),
    }


def _finish(engine: object, job: jobs.Job, ctx: Context, first: int) -> dict:
    steps = [jobs.train_step(engine, job, ctx, number) for number in range(first, TOTAL_STEPS)]
    return {
        "steps": steps,
        "weights": jobs.weights(engine),
        "masters": jobs.masters(engine),
        "exp_avg": jobs.moments(engine, "exp_avg"),
        "exp_avg_sq": jobs.moments(engine, "exp_avg_sq"),
        "counters": dict(jobs.controller(engine).counters),
    }
