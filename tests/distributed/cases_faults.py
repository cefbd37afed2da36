"""Ranks that disagree, gradients that are not finite, fp16's loss scale."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from tests import models
from tests.distributed import jobs
from tests.distributed.cases_trajectory import assert_moved_alike
from tests.distributed.harness import Context
from tests.distributed.registry import case

STAGES = (0, 1, 2, 3)


@case(strength=1, ranks=(2,), key=("seed", "active_layers", "policy"))
def rank_with_another_config_is_named(ctx: Context, key: str) -> str:
    """Every rank raises the same error, which names the rank and the key; the next engine starts as usual."""
    other = {"seed": 8, "active_layers": 1, "policy": "lisa"}[key]
    job = jobs.Job(grass={"probe_steps": None, **({key: other} if ctx.rank == 1 else {})})
    begin = time.monotonic()
    with pytest.raises(ValueError, match=rf"rank 1 .*grass\.{key}") as caught:
        jobs.start(job)
    assert time.monotonic() - begin < 30
    right = jobs.Job()
    with jobs.engine_of(right) as engine:
        jobs.train_step(engine, right, ctx, 0)
    return str(caught.value)


@case(strength=1, ranks=(2,))
def rank_with_a_wrong_config_is_named_on_the_others(ctx: Context) -> str:
    """A rank that refuses its block says so to the others, which stop at once instead of waiting."""
    job = jobs.Job(grass={"temperature": -1.0} if ctx.rank == 1 else {})
    begin = time.monotonic()
    expected = r"grass\.temperature" if ctx.rank == 1 else r"rank 1 .*grass\.temperature"
    with pytest.raises(ValueError, match=expected) as caught:
        jobs.start(job)
    assert time.monotonic() - begin < 30
    return str(caught.value)


@case(strength=1, ranks=(2,))
def rank_with_another_model_is_named(ctx: Context) -> str:
    """Ranks that built different models are told apart before any weight is sent."""
    job = jobs.Job(model_options={"layers": 4 + ctx.rank})
    with pytest.raises(ValueError, match="rank 1 "):
        jobs.start(job)
    return ""


WITHOUT_PACKAGE = {
    "environment": ({}, {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}),
    "alone": True,
    "timeout_seconds": 150,
}


@case(ranks=(2,), timeout_s=(8, 60), slow=True, **WITHOUT_PACKAGE)
def rank_without_the_package_is_named(ctx: Context, timeout_s: int) -> str:
    """A rank that was started with TORCH_DEVICE_BACKEND_AUTOLOAD=0 is named by the others in time, no hang."""
    finished = ctx.folder / "finished"
    if ctx.rank == 1:
        assert "ds_grass" not in sys.modules
        threading.Thread(target=_plain_initialize, daemon=True).start()  # never returns: the launcher ends it
        while not finished.exists():
            time.sleep(0.1)
        return ""
    from ds_grass import agreement

    agree = functools.partial(agreement.agree, timeout_s=timeout_s)
    begin = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "agree", agree)
        with pytest.raises(RuntimeError, match="rank 1 .*TORCH_DEVICE_BACKEND_AUTOLOAD") as caught:
            jobs.start(jobs.Job())
    assert time.monotonic() - begin < timeout_s + 15
    finished.touch()
    return str(caught.value)


def _plain_initialize() -> None:
    import deepspeed

    job = jobs.Job()
    model = job.build()
    deepspeed.initialize(model=model, model_parameters=model.parameters(), config=job.ds_config())


@case(strength=1, ranks=(1, 2), stage=STAGES, dtype=("fp32", "bf16"), phase=("probe", "train"))
def step_with_a_gradient_that_is_not_finite_is_skipped(
    ctx: Context, stage: int, dtype: str, phase: str
) -> None:
    """One rank's bad batch: no rank steps, records, switches or moves its schedule; the run goes on as without it."""
    from tests.distributed.cases_schedule import WARMUP

    extra = {"scheduler": WARMUP}
    extra[dtype] = {"enabled": True, "check_grad_overflow": True}
    job = jobs.Job(stage=stage, dtype=dtype, extra=extra if dtype == "bf16" else {"scheduler": WARMUP})
    bad_at = 1 if phase == "probe" else 4
    kept = []
    for spoils in (False, True):
        with jobs.engine_of(job) as engine:
            steps = []
            for number in range(8):
                if spoils and number == bad_at:
                    _assert_skipped(engine, job, ctx)
                steps.append(jobs.train_step(engine, job, ctx, number))
            kept.append((steps, jobs.masters(engine)))
    assert kept[0][0] == kept[1][0]
    jobs.assert_identical(kept[0][1], kept[1][1], "masters")


def _assert_skipped(engine: object, job: jobs.Job, ctx: Context) -> None:
    grass = jobs.controller(engine)
    counters, active, masters = dict(grass.counters), grass.active, jobs.masters(engine)
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    loss = models.loss(engine, job.data(77, ctx)[ctx.rank][0])
    engine.backward(loss * float("nan") if ctx.rank == ctx.world_size - 1 else loss)
    engine.step()
    assert not engine.was_step_applied()
    after = dict(grass.counters)
    assert after == {**counters, "skipped_steps": counters["skipped_steps"] + 1, "skipped_in_a_row": 1}
    assert grass.active == active
    assert [group["lr"] for group in engine.optimizer.param_groups] == rates
    jobs.assert_identical(jobs.masters(engine), masters, "masters after a skipped step")


@case(most_quick=2, strength=1, ranks=(1, 2), stage=STAGES, value=("nan", "inf"))
def a_bad_gradient_in_one_block_on_one_rank_is_named(ctx: Context, stage: int, value: str) -> str:
    """The step is skipped everywhere, the block is named once, and the run goes on as if it had not been."""
    job, warnings, kept = jobs.Job(stage=stage), [], []
    for spoils in (False, True):
        with jobs.engine_of(job) as engine:
            train_steps(engine, job, ctx, 0, 4)
            if spoils:
                block = jobs.controller(engine).active[-1]
                name = f"{jobs.BLOCK_LISTS[job.model]}.{block}"
                param = dict(engine.module.named_parameters())[f"{name}.mlp.up_proj.weight"]
                factor = float(value) if ctx.rank == ctx.world_size - 1 else 1.0
                hook = param.register_hook(functools.partial(torch.mul, other=factor))
                with recorded_warnings(warnings):
                    assert not jobs.train_step(engine, job, ctx, 77).applied
                hook.remove()
            kept.append((jobs.train_step(engine, job, ctx, 4), jobs.masters(engine)))
    assert kept[0][0] == kept[1][0]
    jobs.assert_identical(kept[0][1], kept[1][1], "masters")
    assert len(warnings) == (ctx.rank == 0), warnings
    assert all(f"non-finite gradient in {name};" in text for text in warnings)
    return str(warnings)


@contextlib.contextmanager
def recorded_warnings(texts: list[str]) -> Iterator[None]:
    """What the package warns of goes into `texts`."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())
    logging.getLogger("ds_grass").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("ds_grass").removeHandler(handler)


@case(strength=1, ranks=(1, 2), stage=(1, 3))
def twenty_skipped_steps_in_a_row_end_the_job(ctx: Context, stage: int) -> None:
    """An error on every rank instead of an endless run that trains nothing."""
    job = jobs.Job(stage=stage)
    with jobs.engine_of(job) as engine:
        for number in range(20):
            engine.backward(models.loss(engine, job.data(number, ctx)[ctx.rank][0]) * float("nan"))
            if number < 19:
                engine.step()
        with pytest.raises(RuntimeError, match="20 optimizer steps in a row"):
            engine.step()


def train_steps(engine: object, job: jobs.Job, ctx: Context, first: int, last: int) -> None:
    for number in range(first, last):
        jobs.train_step(engine, job, ctx, number)


@contextlib.contextmanager
def no_more_pages() -> Iterator[None]:
    """The kernel gives this process no more memory for states."""
    import mmap

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmap, "mmap", refuse)
        yield


@case(strength=1, ranks=(1, 2), stage=(1, 3), mode=("resident", "stream"))
def host_memory_that_runs_out_on_one_rank_ends_all(ctx: Context, stage: int, mode: str) -> str:
    """A block is drawn for the first time and its home cannot be made: every rank says so, none hangs."""
    job = jobs.Job(
        stage=stage,
        grass={"policy": "cyclic", "probe_steps": 0, "active_layers": 1, "states": {"mode": mode}},
    )
    with jobs.engine_of(job) as engine, contextlib.ExitStack() as stack:
        jobs.train_step(engine, job, ctx, 0)
        if ctx.rank == ctx.world_size - 1:
            stack.enter_context(no_more_pages())
        with pytest.raises(RuntimeError, match="cannot allocate .* of host memory") as caught:
            train_steps(engine, job, ctx, 1, 5)
    return str(caught.value)


@case(strength=1, ranks=(2,), stage=STAGES)
def a_rank_whose_draw_was_tampered_with_is_named(ctx: Context, stage: int) -> str:
    """One rank's sampler goes astray: the draw is compared before anything switches, and all ranks name that rank."""
    job = jobs.Job(stage=stage, grass={"active_layers": 1, "temperature": 1e6})
    with jobs.engine_of(job) as engine:
        train_steps(engine, job, ctx, 0, 2)
        grass = jobs.controller(engine)
        if ctx.rank == 1:
            grass._sampler._generator.manual_seed(4)
        with pytest.raises(RuntimeError, match=r"rank\(s\) \[1\] drew other blocks than rank 0") as caught:
            train_steps(engine, job, ctx, 2, 20)
    return str(caught.value)


@contextlib.contextmanager
def fp16_on_cpu() -> Iterator[None]:
    """DeepSpeed's CPU accelerator refuses fp16 though its arithmetic works; tests alone may say otherwise."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CPU_Accelerator, "is_fp16_supported", lambda self: True)
        yield


@case(most_quick=2, strength=1, ranks=(1, 2), stage=STAGES, accumulation=(1, 2))
def fp16_with_dynamic_loss_scale_follows_the_reference(ctx: Context, stage: int, accumulation: int) -> dict:
    """Forced overflows while probing and training skip the step everywhere and halve the scale; the rest is as ever."""
    fp16 = {"enabled": True, "initial_scale_power": 22, "loss_scale_window": 3, "hysteresis": 1}
    job = jobs.Job(stage=stage, dtype="fp16", accumulation=accumulation, extra={"fp16": fp16})
    reference = jobs.reference_of(job)
    start = {n: m.detach().clone() for n, m in reference.masters.items()}
    scales, applied = [], []
    with fp16_on_cpu(), jobs.engine_of(job) as engine:
        for number in range(26):
            if number == 18:
                engine.optimizer.loss_scaler.cur_scale = 2.0**24
            reference.loss_scale = float(engine.optimizer.loss_scale)
            scales.append(reference.loss_scale)
            step = jobs.train_step(engine, job, ctx, number)
            record = jobs.follow(reference, job, ctx, number, step)
            applied.append(step.applied)
            if step.phase_before == "train":
                assert step.applied == record.applied, (number, scales)
        masters = jobs.masters(engine)
        counters = dict(jobs.controller(engine).counters)
    assert counters["skipped_steps"] >= 2, scales
    assert counters["applied_steps"] == sum(applied) == reference.applied >= 6, (counters, applied, scales)
    worst = assert_moved_alike(masters, reference.masters, start, 0.05)
    assert all(torch.isfinite(m).all() for m in masters.values())
    return {"scales": scales, "worst": worst, **counters}


@case(strength=1, ranks=(1, 2), stage=(3, 1))
def skips_while_the_loss_scale_may_fall_end_nothing(ctx: Context, stage: int) -> list[float]:
    """More than 20 steps skipped in a row on the way down from a scale of 2**46; then training begins."""
    fp16 = {"enabled": True, "initial_scale_power": 46, "hysteresis": 1}
    job = jobs.Job(stage=stage, dtype="fp16", extra={"fp16": fp16}, grass={"probe_steps": 1})
    scales, skipped = [], []
    with fp16_on_cpu(), jobs.engine_of(job) as engine:
        grass = jobs.controller(engine)
        while grass.counters["applied_steps"] < 2:
            scales.append(float(engine.optimizer.loss_scale))
            jobs.train_step(engine, job, ctx, len(scales))
            skipped.append(grass.counters["skipped_in_a_row"])
            assert len(scales) < 45, scales
        assert all(torch.isfinite(m).all() for m in jobs.masters(engine).values())
    assert max(skipped) > 20, skipped
    return scales


@case(strength=1, ranks=(1, 2), stage=(3, 1))
def skips_at_the_floor_of_the_loss_scale_end_the_job(ctx: Context, stage: int) -> None:
    """2**62 may fall 22 times to its floor of 2**40: the skips that make it fall are borne, the next one is not."""
    fp16 = {"enabled": True, "initial_scale_power": 62, "min_loss_scale": 2**40, "hysteresis": 1}
    job = jobs.Job(stage=stage, dtype="fp16", extra={"fp16": fp16})
    with fp16_on_cpu(), jobs.engine_of(job) as engine:
        for number in range(22):
            assert not jobs.train_step(engine, job, ctx, number).applied
        assert float(engine.optimizer.loss_scale) == 2.0**40
        engine.backward(models.loss(engine, job.data(22, ctx)[ctx.rank][0]))
        with pytest.raises(RuntimeError, match="20 optimizer steps in a row"):
            engine.step()
