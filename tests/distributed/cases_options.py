"""Keys of the grass block and of ds_config that change what is computed or how it is sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import models
from tests.distributed import jobs
from tests.distributed.cases_trajectory import assert_near_the_reference, assert_only_active_changed
from tests.distributed.harness import Context
from tests.distributed.registry import case
from tests.reference import Reference

STAGES = (0, 1, 2, 3)


def _reference_with_frozen_outer(job: jobs.Job, trained: tuple[str, ...]) -> Reference:
    """The twin of a job whose outer parameters rest, except those whose name begins with one of `trained`."""
    reference = jobs.reference_of(job)
    inside = {n for names in jobs.block_names(reference.model, job) for n in names}
    for name in list(reference.params):
        if name not in inside and not name.startswith(trained or ("nothing",)):
            del reference.params[name]
            del reference.masters[name]
            reference.units[-1].remove(name)
    reference.optimizers[-1] = reference._adamw(reference.units[-1])
    return reference


@case(
    most_quick=2,
    ranks=(1, 2),
    strength=1,
    stage=STAGES,
    dtype=("fp32", "bf16"),
    outer=("never", "list"),
    clip=(0.0, 0.3),
)
def outer_parameters_rest_when_told(ctx: Context, stage: int, dtype: str, outer: str, clip: float) -> dict:
    """`outer: never` or a list: what rests keeps its bits and is out of the norm; what trains follows the reference."""
    job = jobs.Job(
        stage=stage, dtype=dtype, clip=clip, grass={"outer": ["lm_head"] if outer == "list" else outer}
    )
    reference = _reference_with_frozen_outer(job, ("lm_head",) if outer == "list" else ())
    with jobs.engine_of(job) as engine:
        before = jobs.weights(engine)
        for number in range(8):
            step = jobs.train_step(engine, job, ctx, number)
            record = jobs.follow(reference, job, ctx, number, step)
            if step.phase_before == "train":
                assert abs(step.norm - record.norm) <= (1e-5 if dtype == "fp32" else 5e-3) * record.norm
        after, masters = jobs.weights(engine), jobs.masters(engine)
    resting = set(before) - set(reference.masters)
    assert all(torch.equal(before[n], after[n]) for n in resting)
    ours = {n: masters[n] for n in reference.masters}
    return {"worst": assert_near_the_reference(ours, reference.masters, dtype)}


@case(most_quick=2, ranks=(1, 2), strength=1, stage=STAGES, accumulation=(1, 4))
def all_blocks_active_after_probing_is_the_reference(ctx: Context, stage: int, accumulation: int) -> dict:
    """The set does not change when probing ends, yet training begins, with the outer parameters."""
    job = jobs.Job(stage=stage, accumulation=accumulation, grass={"active_layers": 4, "probe_steps": 2})
    reference = jobs.reference_of(job)
    blocks = jobs.block_names(reference.model, job)
    with jobs.engine_of(job) as engine:
        before = jobs.weights(engine)
        for number in range(6):
            step = jobs.train_step(engine, job, ctx, number)
            jobs.follow(reference, job, ctx, number, step)
            after = jobs.weights(engine)
            assert_only_active_changed(job, before, after, blocks, step)
            before = after
        masters = jobs.masters(engine)
    assert reference.applied == 4
    return {"worst": assert_near_the_reference(masters, reference.masters, "fp32")}


SENDING = {
    "predivide": {"prescale_gradients": False, "gradient_predivide_factor": 2.0},
    "prescale": {"prescale_gradients": True},
    "wire_fp32": {"communication_data_type": "fp32"},
    "accumulate_fp32": {"data_types": {"grad_accum_dtype": "fp32"}},
}


@case(most_quick=2, ranks=(2,), strength=1, stage=(1, 2, 3), dtype=("bf16", "fp32"), key=tuple(SENDING))
def keys_of_gradient_sending_are_as_in_plain_deepspeed(
    ctx: Context, stage: int, dtype: str, key: str
) -> dict:
    """Division, wire and accumulation dtypes: with all blocks active the run is that of plain DeepSpeed."""
    zero = {"reduce_scatter": "pre" not in key}  # DeepSpeed divides before the sum only without it
    plain = jobs.Job(stage=stage, dtype=dtype, accumulation=2, grass=None, extra=SENDING[key], zero=zero)
    ours = jobs.with_grass(plain, active_layers=4, probe_steps=0)
    results = []
    for job in (plain, ours):
        with jobs.engine_of(job) as engine:
            for number in range(5):
                jobs.train_step(engine, job, ctx, number)
            results.append(jobs.masters(engine))
    return {"worst": assert_near_the_reference(results[1], results[0], dtype)}


@case(ranks=(1, 2), strength=1, stage=(1, 2, 3))
def predivision_of_gradients_cancels_out(ctx: Context, stage: int) -> dict:
    """`gradient_predivide_factor` divides before the sum and multiplies after it: the course of the reference."""
    extra = {"prescale_gradients": False, "gradient_predivide_factor": 4.0}
    zero = {"reduce_scatter": stage != 3}  # DeepSpeed's stage 3 has no predivision with it
    job = jobs.Job(stage=stage, extra=extra, zero=zero)
    reference = jobs.reference_of(job)
    with jobs.engine_of(job) as engine:
        for number in range(6):
            step = jobs.train_step(engine, job, ctx, number)
            record = jobs.follow(reference, job, ctx, number, step)
            if step.applied:
                assert abs(step.norm - record.norm) <= 1e-5 * record.norm
        masters = jobs.masters(engine)
    assert reference.applied == 4
    return {"worst": assert_near_the_reference(masters, reference.masters, "fp32")}


@case(ranks=(1, 2), strength=1, accumulation=(1, 2))
def zero_init_gives_the_same_run(ctx: Context, accumulation: int) -> None:
    """A model built sharded under `zero.Init` trains as one that was sharded later."""
    import deepspeed

    job = jobs.Job(
        stage=3, dtype="bf16", accumulation=accumulation, model="stack", model_options={"tied": False}
    )
    kept = []
    for sharded in (False, True):
        whole = job.build()
        model = whole
        if sharded:
            with deepspeed.zero.Init(config_dict_or_path=job.ds_config()):
                model = job.build()
            for (_, source), target in zip(whole.named_parameters(), model.parameters(), strict=True):
                with deepspeed.zero.GatheredParameters([target], modifier_rank=0):
                    target.data.copy_(source.data)
        with jobs.engine_of(job, model=model) as engine:
            steps = [jobs.train_step(engine, job, ctx, number) for number in range(8)]
            kept.append((steps, jobs.masters(engine)))
    assert kept[0][0] == kept[1][0]
    jobs.assert_identical(kept[0][1], kept[1][1], "masters")


STATES: dict[str, dict[str, Any]] = {
    "moments": {"dtype": "bf16"},
    "no_masters": {"master_weights": False},
    "both": {"dtype": "bf16", "master_weights": False},
}


@case(most_quick=2, ranks=(1, 2), strength=1, stage=STAGES, states=tuple(STATES))
def small_states_learn_and_do_not_depend_on_the_mode(ctx: Context, stage: int, states: str) -> dict:
    """bf16 moments, or no masters and stochastic rounding: the loss falls, modes agree in every bit, ranks too."""
    kept = []
    for mode in ("resident", "stream"):
        block = {"states": {"mode": mode, **STATES[states]}, "probe_steps": 1}
        job = jobs.Job(stage=stage, dtype="bf16", grass=block, optimizer_block=False)
        model = job.build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        fixed = job.data(0, ctx)[ctx.rank][0]
        with jobs.engine_of(job, model=model, optimizer=optimizer) as engine:
            losses = []
            for _ in range(20):
                loss = models.loss(engine, fixed)
                losses.append(float(loss.detach()))
                engine.backward(loss)
                engine.step()
            kept.append((losses, jobs.weights(engine)))
    jobs.assert_identical(kept[0][1], kept[1][1], "weights")
    losses = kept[0][0]
    assert losses == kept[1][0]
    assert losses[-1] < 0.8 * losses[0], losses
    everyone: list = [None] * ctx.world_size
    dist.all_gather_object(everyone, {n: float(w.double().sum()) for n, w in kept[0][1].items()})
    assert all(sums == everyone[0] for sums in everyone)
    return {"losses": losses}


@case(ranks=(2,), strength=1, stage=(2, 3))
def unwritable_log_is_one_warning(ctx: Context, stage: int) -> None:
    """A log that cannot be written never ends the job."""
    job = jobs.Job(
        stage=stage, grass={"log": {"enabled": True, "path": str(ctx.folder / "absent" / "x.jsonl")}}
    )
    with jobs.engine_of(job) as engine:
        steps = [jobs.train_step(engine, job, ctx, number) for number in range(6)]
    assert sum(step.applied for step in steps) == 4


@case(ranks=(2,), strength=1, stage=(1, 3))
def log_tells_every_draw_with_its_reasons(ctx: Context, stage: int) -> None:
    """Draws and refreshes in the log are what the controller showed at those steps; a disabled log writes nothing."""
    job = jobs.Job(stage=stage, grass={"log": {"enabled": True, "path": "told.jsonl"}})
    with jobs.engine_of(job) as engine:
        steps = [jobs.train_step(engine, job, ctx, number) for number in range(11)]
    dist.barrier()
    told = [json.loads(line) for line in Path("told.jsonl").read_text().splitlines()]
    draws = [line for line in told if line["event"] == "draw"]
    assert [tuple(line["active"]) for line in draws] == [steps[i].active_after for i in (1, 4, 7, 10)]
    assert [tuple(line["importance"]) for line in draws] == [steps[i].importance_after for i in (1, 4, 7, 10)]
    assert [tuple(line["probabilities"]) for line in draws] == [
        steps[i].probabilities_after for i in (1, 4, 7, 10)
    ]
    assert len({line["run_id"] for line in told}) == 1
    silent = jobs.Job(stage=stage, grass={"log": {"enabled": False, "path": "silent.jsonl"}})
    with jobs.engine_of(silent) as engine:
        jobs.train_step(engine, silent, ctx, 0)
    assert not Path("silent.jsonl").exists()


@case(most_quick=2, ranks=(2,), strength=1, stage=STAGES)
def rate_that_the_script_sets_is_used(ctx: Context, stage: int) -> None:
    """A loop that writes `param_groups[...]["lr"]` itself is obeyed at the next step; 0 changes nothing."""
    job = jobs.with_grass(jobs.Job(stage=stage, optimizer_block=False), probe_steps=0)
    model = job.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    with jobs.engine_of(job, model=model, optimizer=optimizer) as engine:
        start = jobs.masters(engine)
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0
        jobs.train_step(engine, job, ctx, 0)
        jobs.assert_identical(jobs.masters(engine), start, "masters at rate 0")
        for group in optimizer.param_groups:  # the user's own object is as good
            group["lr"] = 1e-3
        jobs.train_step(engine, job, ctx, 1)
        moved = jobs.masters(engine)
    assert any(not torch.equal(moved[n], start[n]) for n in start)


@case(
    most_quick=2,
    ranks=(2,),
    strength=1,
    stage=(1, 2, 3),
    what=("weights_only", "no_optimizer", "other_blocks"),
)
def partial_loads_do_what_they_say(ctx: Context, stage: int, what: str) -> None:
    """Weights without states start a new schedule on those weights; a checkpoint of another grouping is refused."""
    job = jobs.Job(stage=stage)
    folder = str(ctx.folder / "saved")
    with jobs.engine_of(job) as engine:
        for number in range(6):
            jobs.train_step(engine, job, ctx, number)
        engine.save_checkpoint(folder, tag="end")
        saved = jobs.weights(engine)
    other = jobs.replace(job, model_options={"seed": 9})
    if what == "other_blocks":
        other = jobs.with_grass(other, active_layers=1)
        with jobs.engine_of(other) as engine, pytest.raises(ValueError, match="active_layers"):
            engine.load_checkpoint(folder, tag="end")
        return
    arguments = {"load_module_only": True} if what == "weights_only" else {"load_optimizer_states": False}
    with jobs.engine_of(other) as engine:
        engine.load_checkpoint(folder, tag="end", **arguments)
        jobs.assert_identical(jobs.weights(engine), saved, "weights")
        jobs.assert_identical(jobs.masters(engine), {n: w.float() for n, w in saved.items()}, "masters")
        steps = [jobs.train_step(engine, other, ctx, number) for number in range(4)]
        assert [step.phase_before for step in steps] == ["probe", "probe", "train", "train"]
