"""Universal checkpoints: other ranks, other stages, and plain DeepSpeed AdamW, through DeepSpeed's own converter."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import models
from tests.distributed import harness, jobs
from tests.distributed.cases_schedule import WARMUP
from tests.distributed.harness import Context
from tests.distributed.registry import Case, case

SAVED_AFTER, TOTAL_STEPS = 5, 9
SAVE, RESUME = "source", "resumed"
UNIVERSAL = {"checkpoint": {"load_universal": True}}


def convert(source: Path) -> None:
    """What `python -m deepspeed.checkpoint.ds_to_universal` does, in this process."""
    from deepspeed.checkpoint import ds_to_universal

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(source),
                output_folder=f"{source}_universal",
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )


def convert_together(ctx: Context, source: Path) -> None:
    """One rank converts, the others wait."""
    import torch.distributed as dist

    if ctx.rank == 0:
        convert(source)
    dist.barrier()


def job_of(ctx: Context, stage: int, **options: Any) -> jobs.Job:
    """The same four rows a step, over however many ranks there are."""
    return jobs.Job(stage=stage, rows=4 // ctx.world_size, extra={"scheduler": WARMUP, **options})


def train(engine: Any, ctx: Context, first: int, last: int) -> list[dict]:
    """Steps `first` to `last` on this rank's part of rows that do not depend on the ranks."""
    grass, steps = jobs.controller(engine), []
    for number in range(first, last):
        rows = models.step_data(number, ranks=1, accumulation=1, rows=4)[0][0]
        active = list(grass.active)
        engine.backward(models.loss(engine, rows.chunk(ctx.world_size)[ctx.rank]))
        engine.step()
        steps.append({"phase": grass.phase, "active": active, "norm": float(engine.get_global_grad_norm())})
    return steps


def all_states(engine: Any) -> dict[str, dict[str, Tensor]]:
    moments = {key: jobs.moments(engine, key) for key in ("exp_avg", "exp_avg_sq")}
    return {"masters": jobs.masters(engine), **moments}


def leg(ctx: Context, *, stage: int, folder: str, part: str) -> None:
    """One half of a run: train and save, or resume and finish; the end is kept in a file."""
    folder_path = Path(folder)
    job = job_of(ctx, stage, **(UNIVERSAL if part == RESUME else {}))
    model = job.build() if part == SAVE else models.build("llama", seed=99)
    with jobs.engine_of(job, model=model) as engine:
        first, last = (0, SAVED_AFTER) if part == SAVE else (SAVED_AFTER, TOTAL_STEPS)
        if part == RESUME:
            path, client_state = engine.load_checkpoint(folder)
            assert path is not None
            assert client_state["note"] == "mine"
            assert engine.global_steps == SAVED_AFTER
        steps = train(engine, ctx, first, last)
        found = {"steps": steps, "counters": dict(jobs.controller(engine).counters), **all_states(engine)}
        found["adam_steps"] = [engine.optimizer.core.store.steps[unit.key] for unit in engine.optimizer.units]
        if part == SAVE:
            engine.save_checkpoint(folder, client_state={"note": "mine"})
    if ctx.rank == 0:
        torch.save(found, folder_path / f"{part}.pt")


def run_leg(ctx: Context, ranks: int, **kwargs: Any) -> None:
    """`leg` on `ranks` ranks: here if that is what this group has, else in processes of its own."""
    if ranks == ctx.world_size:
        leg(ctx, **kwargs)
        return
    elsewhere = Case("leg", f"{__name__}:leg", ranks, kwargs, timeout_seconds=100)
    work = ctx.folder / f"ranks{ranks}-{kwargs['part']}"
    result = harness.run_cases(ranks, [elsewhere], work)["leg"]
    assert result.passed, result.report()


QUICK_ROUTES = (((2, 2), (1, 3)),)
ROUTES = (((2, 2), (1, 2)), ((1, 2), (2, 2)), ((2, 3), (1, 3)), ((1, 3), (2, 3)), ((2, 1), (2, 3)), ((2, 3), (2, 1)),
          ((1, 1), (4, 2)), ((4, 3), (1, 2)), ((1, 3), (2, 2)))  # fmt: skip


@case(ranks=(1,), strength=1, slow=True, route=ROUTES, timeout_seconds=200)
@case(ranks=(1,), strength=1, route=QUICK_ROUTES, timeout_seconds=200)
def a_run_goes_on_with_other_ranks_and_another_stage(
    ctx: Context, route: tuple[tuple[int, int], tuple[int, int]]
) -> dict:
    """(ranks, stage) to (ranks, stage) in its middle: draws, counters and states of the run never interrupted."""
    source, target = route
    folder = ctx.folder / "checkpoints"
    folder.mkdir()
    run_leg(ctx, source[0], stage=source[1], folder=str(folder), part=SAVE)
    convert(folder / f"global_step{SAVED_AFTER}")
    run_leg(ctx, target[0], stage=target[1], folder=str(folder), part=RESUME)
    before, after = (torch.load(folder / f"{part}.pt", weights_only=True) for part in (SAVE, RESUME))
    with jobs.engine_of(job_of(ctx, 1)) as engine:
        steps = train(engine, ctx, 0, TOTAL_STEPS)
        wanted, counters = all_states(engine), dict(jobs.controller(engine).counters)
        adam_steps = [engine.optimizer.core.store.steps[unit.key] for unit in engine.optimizer.units]
    assert after["counters"] == counters
    assert after["adam_steps"] == adam_steps, "Adam's steps of each unit"
    for step, ours in zip(steps, before["steps"] + after["steps"], strict=True):
        assert (step["phase"], step["active"]) == (ours["phase"], ours["active"])
        assert abs(step["norm"] - ours["norm"]) < 1e-4 * step["norm"]
    worst = {}
    for what, tensors in wanted.items():
        largest = max(float(tensor.abs().max()) for tensor in tensors.values())
        worst[what], name = jobs.largest_difference(after[what], tensors)
        assert worst[what] <= 1e-6 * max(largest, 1e-3), (what, name, worst[what], largest)
    return worst


@case(ranks=(1, 2), strength=1, stage=(1, 2, 3), dtype=("fp32", "bf16"))
def plain_adamw_becomes_a_grass_job_state_by_state(ctx: Context, stage: int, dtype: str) -> None:
    """Refused as it is, with the command; converted, every master, moment and step is there, and it trains."""
    plain = jobs.Job(stage=stage, dtype=dtype, grass=None)
    folder = ctx.folder / "plain"
    with jobs.engine_of(plain) as engine:
        for number in range(4):
            jobs.train_step(engine, plain, ctx, number)
        wanted = all_states(engine)
        engine.save_checkpoint(str(folder))
    job = jobs.Job(stage=stage, dtype=dtype, model_options={"seed": 99})
    with jobs.engine_of(job) as engine, pytest.raises(ValueError, match="ds_to_universal") as refused:
        engine.load_checkpoint(str(folder))
    assert "\n" not in str(refused.value)
    convert_together(ctx, folder / "global_step4")
    with jobs.engine_of(jobs.replace(job, extra=UNIVERSAL)) as engine:
        engine.load_checkpoint(str(folder))
        for what, tensors in all_states(engine).items():
            jobs.assert_identical(tensors, wanted[what], what)
        store = engine.optimizer.core.store
        assert set(store.steps.values()) == {4}
        assert jobs.controller(engine).phase == "probe"
        assert engine.global_steps == 4
        steps = [jobs.train_step(engine, job, ctx, number) for number in range(4, 8)]
        assert [step.applied for step in steps] == [False, False, True, True]
        assert sorted(set(store.steps.values())) == [4, 6]


@case(ranks=(1, 2), strength=1, stage=(1, 2, 3), dtype=("fp32", "bf16"))
def a_grass_job_becomes_plain_adamw_state_by_state(ctx: Context, stage: int, dtype: str) -> None:
    """Plain DeepSpeed refuses it as it is; converted, it has every master and moment, and one step count for all."""
    job = jobs.Job(stage=stage, dtype=dtype)
    folder = ctx.folder / "grass"
    with jobs.engine_of(job) as engine:
        for number in range(6):
            jobs.train_step(engine, job, ctx, number)
        wanted = all_states(engine)
        engine.save_checkpoint(str(folder))
    plain = jobs.Job(stage=stage, dtype=dtype, grass=None, model_options={"seed": 99})
    with jobs.engine_of(plain) as engine, pytest.raises((ValueError, RuntimeError, AssertionError)):
        engine.load_checkpoint(str(folder))
    convert_together(ctx, folder / "global_step6")
    with jobs.engine_of(jobs.replace(plain, extra=UNIVERSAL)) as engine:
        engine.load_checkpoint(str(folder))
        for what, tensors in all_states(engine).items():
            jobs.assert_identical(tensors, wanted[what], what)
        assert jobs.train_step(engine, plain, ctx, 6).applied


SMALL = {"moments": {"dtype": "bf16"}, "both": {"dtype": "bf16", "master_weights": False}}


@case(most_quick=2, ranks=(1, 2), strength=1, stage=(1, 2, 3), states=tuple(SMALL))
def small_states_are_saved_as_they_are_and_come_back(ctx: Context, stage: int, states: str) -> None:
    """bf16 moments, without masters too: the same bits by a resume, by the universal way, and for `zero_to_fp32`."""
    import torch.distributed as dist
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    job = jobs.Job(stage=stage, dtype="bf16", grass={"states": SMALL[states]})
    folder = ctx.folder / "saved"
    with jobs.engine_of(job) as engine:
        for number in range(6):
            jobs.train_step(engine, job, ctx, number)
        engine.save_checkpoint(str(folder))
        saved = all_states(engine)
        jobs.train_step(engine, job, ctx, 6)
        wanted = all_states(engine)
    dist.barrier()
    found = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    jobs.assert_identical({name: found[name] for name in saved["masters"]}, saved["masters"], "zero_to_fp32")
    convert_together(ctx, folder / "global_step6")
    for extra in ({}, UNIVERSAL):
        other = jobs.replace(job, extra=extra, model_options={"seed": 99})
        with jobs.engine_of(other) as engine:
            engine.load_checkpoint(str(folder))
            for what, tensors in all_states(engine).items():
                jobs.assert_identical(tensors, saved[what], what)
            jobs.train_step(engine, job, ctx, 6)
            for what, tensors in all_states(engine).items():
                jobs.assert_identical(tensors, wanted[what], f"{what} after a step")


@case(
    most_quick=2,
    ranks=(1,),
    strength=1,
    stage=(2, 3),
    damage=("flip", "truncate", "remove", "other model", "not converted"),
)
def a_universal_checkpoint_that_cannot_be_used_changes_nothing(ctx: Context, stage: int, damage: str) -> str:
    """One line that names the file, or the parameter, and the running job is as it was."""
    folder = ctx.folder / "saved"
    job = jobs.Job(stage=stage)
    with jobs.engine_of(job) as engine:
        for number in range(4):
            jobs.train_step(engine, job, ctx, number)
        engine.save_checkpoint(str(folder), tag="end")
    if damage == "not converted":
        (folder / "latest_universal").write_text("end")
    else:
        convert(folder / "end")
    victim = folder / "end_universal" / "zero" / "model.layers.1.mlp.up_proj.weight" / "exp_avg.pt"
    if damage == "flip":
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 4
        victim.write_bytes(data)
    elif damage == "truncate":
        os.truncate(victim, victim.stat().st_size // 2)
    elif damage == "remove":
        victim.unlink()
    options = {"layers": 5} if damage == "other model" else {"seed": 99}
    with jobs.engine_of(jobs.replace(job, extra=UNIVERSAL, model_options=options)) as engine:
        before = jobs.weights(engine)
        with pytest.raises(ValueError, match="checkpoint") as refused:
            engine.load_checkpoint(str(folder))
        jobs.assert_identical(jobs.weights(engine), before, "weights")
        assert jobs.train_step(engine, job, ctx, 0).phase_before == "probe"
    assert "\n" not in str(refused.value)
    sys.stdout.write(f"{refused.value}\n")
    return str(refused.value)
