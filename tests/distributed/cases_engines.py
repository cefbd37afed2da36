"""Engines side by side, engines that stand aside, and DeepSpeed without a block."""

from __future__ import annotations

import hashlib
import sys

import pytest
import torch

from tests import models
from tests.distributed import jobs
from tests.distributed.cases_trajectory import assert_near_the_reference
from tests.distributed.harness import Context
from tests.distributed.registry import case

WITHOUT_HOOK = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


@case(most_quick=2, strength=1, ranks=(1, 2), stage=(0, 1, 2, 3), dtype=("fp32", "bf16"))
def plain_deepspeed_equals_the_reference(ctx: Context, stage: int, dtype: str) -> dict:
    """The yardstick itself: with all blocks active the reference is what DeepSpeed with torch AdamW does."""
    job = jobs.Job(stage=stage, dtype=dtype, grass=None, accumulation=2)
    reference = jobs.reference_of(job)
    with jobs.engine_of(job) as engine:
        for number in range(4):
            jobs.train_step(engine, job, ctx, number)
            reference.step(job.data(number, ctx), range(4))
        ours = jobs.masters(engine) if stage else {n: w.float() for n, w in jobs.weights(engine).items()}
    return {"worst": assert_near_the_reference(ours, reference.masters, dtype)}


def _digest(stage: int, dtype: str, ctx: Context, **extra: object) -> str:
    """Train without a block and return a digest of losses, norms and weights."""
    job = jobs.Job(stage=stage, dtype=dtype, accumulation=2, grass=None, extra=extra)
    with jobs.engine_of(job) as engine:
        steps = [jobs.train_step(engine, job, ctx, number) for number in range(4)]
        weights = jobs.weights(engine)
        kind = type(engine.optimizer).__module__
    parts = [repr(steps), kind, *(repr(weights[n].double().flatten().tolist()) for n in sorted(weights))]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


SOME_CELLS = ((2, "fp32"), (3, "bf16"))
ALL_CELLS = tuple((stage, dtype) for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16"))
ALONE = {"alone": True, "environment": (WITHOUT_HOOK, WITHOUT_HOOK), "timeout_seconds": 150}


@case(ranks=(2,), cells=(SOME_CELLS,), **ALONE)
@case(ranks=(1, 2), cells=(ALL_CELLS,), slow=True, **ALONE)
def deepspeed_without_a_block_is_as_without_the_package(ctx: Context, cells: list) -> None:
    """Bit for bit, on every stage: before the package is imported, after, and with the block switched off."""
    assert "ds_grass" not in sys.modules
    before = [_digest(stage, dtype, ctx) for stage, dtype in cells]
    import ds_grass

    assert ds_grass.activate.is_active()
    assert [_digest(stage, dtype, ctx) for stage, dtype in cells] == before
    switched_off = {"grass": {"enabled": False}}
    assert [_digest(stage, dtype, ctx, **switched_off) for stage, dtype in cells] == before


@case(most_quick=1, strength=1, ranks=(1, 2), stages=((2, 2), (1, 3), (3, 3)))
def several_engines_in_one_process_are_independent(ctx: Context, stages: tuple[int, int]) -> None:
    """Two engines stepped in turn end as they do alone."""
    pair = [
        jobs.Job(stage=stages[0], grass={"seed": 1}),
        jobs.Job(stage=stages[1], grass={"seed": 2, "active_layers": 1}, model_options={"seed": 5}),
    ]
    alone = []
    for job in pair:
        with jobs.engine_of(job) as engine:
            steps = [jobs.train_step(engine, job, ctx, number) for number in range(7)]
            alone.append((steps, jobs.masters(engine)))
    with jobs.engine_of(pair[0]) as first, jobs.engine_of(pair[1]) as second:
        steps = [[], []]
        for number in range(7):
            for which, engine in enumerate((first, second)):
                steps[which].append(jobs.train_step(engine, pair[which], ctx, number))
        together = [jobs.masters(first), jobs.masters(second)]
    for which in range(2):
        assert steps[which] == alone[which][0]
        jobs.assert_identical(together[which], alone[which][1], f"masters of engine {which}")


@case(strength=1, ranks=(1, 2), stage=(0, 3))
def engine_without_optimizer_stands_aside(ctx: Context, stage: int) -> None:
    """A reference or reward model under the same ds_config evaluates as usual; a training engine beside it trains."""
    import deepspeed

    job = jobs.Job(stage=stage, optimizer_block=False)
    model = job.build()
    expected = models.loss(model, models.tokens(0))
    engine = deepspeed.initialize(model=model, config=job.ds_config())[0]
    with torch.no_grad():
        assert torch.equal(models.loss(engine, models.tokens(0)), expected)
    with pytest.raises(ValueError, match="grass"):
        jobs.controller(engine)
    training_job = jobs.Job(stage=max(1, stage))
    with jobs.engine_of(training_job) as training:
        steps = [jobs.train_step(training, training_job, ctx, number) for number in range(4)]
        assert any(step.applied for step in steps)
        with torch.no_grad():
            assert torch.equal(models.loss(engine, models.tokens(0)), expected)


@case(most_quick=2, strength=1, ranks=(1, 2), stage=(0, 1, 2, 3))
def parameters_the_user_froze_stay_frozen(ctx: Context, stage: int) -> None:
    """Frozen before initialize, they are never thawed, changed or counted, through draws and a checkpoint."""
    job = jobs.Job(stage=stage)
    model = job.build()
    frozen = {n for n, p in model.named_parameters() if "q_proj" in n or "embed" in n}
    for name, param in model.named_parameters():
        param.requires_grad_(name not in frozen)
    begin = {n: p.detach().clone() for n, p in model.named_parameters()}
    with jobs.engine_of(job, model=model) as engine:
        for number in range(9):
            jobs.train_step(engine, job, ctx, number)
            if number == 4:
                engine.save_checkpoint(str(ctx.folder / "saved"), tag="middle")
                engine.load_checkpoint(str(ctx.folder / "saved"), tag="middle")
            assert not any(p.requires_grad for n, p in engine.module.named_parameters() if n in frozen)
        end = jobs.weights(engine)
    changed = {n for n in begin if not torch.equal(begin[n], end[n])}
    assert changed
    assert not changed & frozen


@case(most_quick=1, strength=1, ranks=(1, 2), stage=(1, 2, 3))
def every_way_to_pass_parameters_gives_the_same_bits(ctx: Context, stage: int) -> None:
    """`model_parameters` as list, generator or groups, a client optimizer or a callable, a config as dict or path."""
    import json

    kept = []
    for way in ("list", "generator", "groups", "client", "callable"):
        job = jobs.Job(stage=stage, optimizer_block=way in ("list", "generator", "groups"))
        model = job.build()
        options = {"lr": 1e-3, **jobs.ADAMW}
        arguments: dict = {
            "list": {"model_parameters": list(model.parameters())},
            "generator": {"model_parameters": (p for p in model.parameters())},
            "groups": {"model_parameters": [{"params": list(model.parameters())}]},
            "client": {"optimizer": torch.optim.AdamW(model.parameters(), **options)},
            "callable": {
                "model_parameters": list(model.parameters()),
                "optimizer": lambda params, options=options: torch.optim.AdamW(params, **options),
            },
        }[way]
        with jobs.engine_of(job, model=model, **arguments) as engine:
            steps = [jobs.train_step(engine, job, ctx, number) for number in range(4)]
            kept.append((steps, jobs.masters(engine)))
    path = ctx.folder / f"ds_config{ctx.rank}.json"
    job = jobs.Job(stage=stage)
    path.write_text(json.dumps(job.ds_config()))
    with jobs.engine_of(job, config=str(path)) as engine:
        kept.append(
            ([jobs.train_step(engine, job, ctx, number) for number in range(4)], jobs.masters(engine))
        )
    for steps, masters in kept[1:]:
        assert steps == kept[0][0]
        jobs.assert_identical(masters, kept[0][1], "masters")
