"""Learning rates: the schedule waits while the job probes, whoever made the scheduler and whenever."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.distributed import jobs
from tests.distributed.harness import Context
from tests.distributed.registry import case

WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-4, "warmup_max_lr": 1e-3, "warmup_num_steps": 6}}


def _factor(step: int) -> float:
    return 1.0 / (1 + step)


def _groups(model: torch.nn.Module) -> list[dict]:
    """The two groups of the usual script: no decay for vectors, and another rate to tell them apart."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1, "lr": 1e-3},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0, "lr": 5e-4},
    ]


def _from_config(job: jobs.Job) -> tuple[jobs.Job, dict]:
    return jobs.replace(job, extra={"scheduler": WARMUP}), {}


def _client_before(job: jobs.Job) -> tuple[jobs.Job, dict]:
    model = job.build()
    optimizer = torch.optim.AdamW(_groups(model), eps=jobs.ADAMW["eps"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _factor)
    return job, {"model": model, "optimizer": optimizer, "lr_scheduler": scheduler}


def _callable_client_optimizer(job: jobs.Job) -> tuple[jobs.Job, dict]:
    model = job.build()
    return job, {
        "model": model,
        "optimizer": torch.optim.AdamW(_groups(model), eps=jobs.ADAMW["eps"]),
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, _factor),
    }


def _callable_config_optimizer(job: jobs.Job) -> tuple[jobs.Job, dict]:
    job = jobs.replace(job, optimizer_block=True)
    return job, {"lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, _factor)}


def _callable_optimizer(job: jobs.Job) -> tuple[jobs.Job, dict]:
    model = job.build()
    return job, {
        "model": model,
        "model_parameters": _groups(model),
        "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-3),
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, _factor),
    }


KINDS: dict[str, Callable[[jobs.Job], tuple[jobs.Job, dict]]] = {
    "config": _from_config,
    "client_before": _client_before,
    "callable_client": _callable_client_optimizer,
    "callable_config": _callable_config_optimizer,
    "callable_both": _callable_optimizer,
}


@case(most_quick=3, ranks=(1, 2), strength=1, stage=(0, 1, 2, 3), kind=tuple(KINDS))
def learning_rate_after_the_probe_is_that_of_step_0(ctx: Context, stage: int, kind: str) -> list:
    """The rates of the training steps are those of a run that never probed; none passes while probing."""
    rates = []
    for probe_steps in (0, 3):
        job = jobs.Job(stage=stage, grass={"probe_steps": probe_steps}, optimizer_block=kind == "config")
        job, arguments = KINDS[kind](job)
        with jobs.engine_of(job, **arguments) as engine:
            seen = []
            for number in range(probe_steps + 5):
                before = [group["lr"] for group in engine.optimizer.param_groups]
                step = jobs.train_step(engine, job, ctx, number)
                assert step.phase_before == ("probe" if number < probe_steps else "train")
                seen.append(before)
            assert engine.skipped_steps == probe_steps
            rates.append(seen)
    plain, probed = rates
    assert probed[3:] == plain
    assert probed[:3] == [plain[0]] * 3
    assert len({tuple(r) for r in plain}) >= 4, "the schedule hardly moved"
    return plain


@case(most_quick=2, ranks=(2,), strength=1, stage=(1, 2, 3), made=("config", "client_before"))
def rate_and_decay_of_each_group_reach_its_weights(ctx: Context, stage: int, made: str) -> dict:
    """Weights follow the reference with its groups and schedule, though the engine never splits the user's groups."""
    from tests.distributed.cases_trajectory import assert_moved_alike, assert_near_the_reference
    from tests.reference import Group

    job = jobs.Job(stage=stage, optimizer_block=False, clip=0.0)
    if made == "config":
        job = jobs.replace(job, optimizer_block=True)
        model = job.build()
        arguments = {"model": model, "model_parameters": _groups(model)}
        arguments["lr_scheduler"] = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, _factor)
        betas = tuple(jobs.ADAMW["betas"])
    else:
        job, arguments = _client_before(job)
        betas = (0.9, 0.999)
    names = dict(job.build().named_parameters())
    groups = [
        Group([n for n, p in names.items() if p.ndim > 1], 1e-3, betas, jobs.ADAMW["eps"], 0.1),
        Group([n for n, p in names.items() if p.ndim <= 1], 5e-4, betas, jobs.ADAMW["eps"], 0.0),
    ]
    reference = jobs.reference_of(job, groups=groups, lr_factor=_factor)
    start = {n: m.detach().clone() for n, m in reference.masters.items()}
    with jobs.engine_of(job, **arguments) as engine:
        count = len(engine.optimizer.param_groups)
        for number in range(8):
            jobs.follow(reference, job, ctx, number, jobs.train_step(engine, job, ctx, number))
        assert len(engine.optimizer.param_groups) == count == 2
        masters = jobs.masters(engine)
    worst = assert_near_the_reference(masters, reference.masters, "fp32")
    moved = {n: s for n, s in start.items() if not torch.equal(s, reference.masters[n])}
    assert_moved_alike(masters, reference.masters, moved, 1e-3)
    return {"worst": worst}
