"""Bytes on the device in every phase, as the allocator saw them, against what the active set and one unit may cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import audit, models
from tests.distributed import jobs
from tests.distributed.harness import Context
from tests.distributed.registry import case

STAGES = (0, 1, 2, 3)
LAYERS, ACTIVE, HIDDEN = 8, 2, 128
SLACK_BYTES = 64 * 1024  # allocator rounding, scalars, logs; a block's weights alone are five times that


def _job(stage: int, dtype: str, mode: str, **block: Any) -> jobs.Job:
    zero: dict[str, Any] = {}
    if stage == 3:  # DeepSpeed's own gathered weights and buckets are not the subject
        zero = {
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "reduce_bucket_size": 1,
        }
    options = {"layers": LAYERS, "hidden": HIDDEN}
    grass = {"active_layers": ACTIVE, "states": {"mode": mode}, **block}
    return jobs.Job(
        stage=stage, dtype=dtype, model_options=options, zero=zero, grass=grass, rows=1, length=4, clip=1.0
    )


def _built(job: jobs.Job) -> torch.nn.Module:
    """The model in the dtype it will train in, so that casting is not counted."""
    model = job.build()
    for param in model.parameters():
        param.data = param.data.to(jobs.DTYPES[job.dtype])
    return model


class Budget:
    """What the target table of the design allows, in bytes, for one job."""

    def __init__(self, job: jobs.Job, model: torch.nn.Module, ranks: int) -> None:
        sizes = {n: p.numel() for n, p in model.named_parameters()}
        blocks = [sum(sizes[n] for n in names) for names in jobs.block_names(model, job)]
        self.weight = jobs.DTYPES[job.dtype].itemsize
        self.state = 12 if job.dtype != "fp32" else 8  # fp32 weights are their own master copy
        self.ranks, self.stage = ranks, job.stage
        self.unit = max(blocks)
        self.outer = sum(sizes.values()) - sum(blocks)
        self.active = ACTIVE * self.unit + self.outer
        self.total = sum(sizes.values())

    @property
    def weights_bytes(self) -> int:
        """The model's weights on this rank."""
        return self.weight * self.total // (self.ranks if self.stage == 3 else 1)

    @property
    def construction_bytes(self) -> int:
        """The script's weights and one unit being flattened; DeepSpeed's stage 3 copies its shards by way of the host."""
        shards = self.weights_bytes if self.stage == 3 else 0
        return self.weight * (self.total + 2 * self.unit) + shards

    def states_bytes(self, mode: str) -> int:
        """States of the active set and one unit more, or of the slots."""
        elements = self.active + self.unit if mode == "resident" else 2 * self.unit
        return self.state * elements // self.ranks

    @property
    def gradients_bytes(self) -> int:
        """Gradients of the active set, sharded from stage 2 on, and one whole unit in flight with its copy."""
        kept = self.active if self.stage < 2 else self.active // self.ranks
        return self.weight * (kept + 2 * self.unit)

    def whole_model_states_bytes(self) -> int:
        """What any whole-model allocation of states would cost at least: one fp32 tensor for every parameter."""
        return 4 * self.total // self.ranks


def _activation_bytes(job: jobs.Job, ctx: Context) -> int:
    """Peak of a bare forward and backward that frees each gradient at once, above the weights."""
    model = _built(job)
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch = job.data(0, ctx)[0][0]
    models.loss(model, batch).backward()
    return audit.measure_peak(lambda: models.loss(model, batch).backward()).extra_bytes


@case(ranks=(1, 2), stage=STAGES, dtype=("bf16", "fp32"), mode=("resident", "stream"))
def device_bytes_stay_within_the_target(ctx: Context, stage: int, dtype: str, mode: str) -> dict:
    """Construction, probing, training and swapping hold the weights, the active set and one unit, never the model."""
    audit.start()
    job = _job(stage, dtype, mode)
    activations = _activation_bytes(job, ctx)
    model = _built(job)
    budget = Budget(job, model, ctx.world_size)
    nothing = audit.live_bytes() - budget.weight * budget.total
    peaks = {}
    engines: list[Any] = []
    peaks["construct"] = audit.measure_peak(lambda: engines.append(jobs.start(job, model=model)))
    engine = engines.pop()
    phases = {"probe": range(1), "first": range(1, 5), "later": range(5, 12)}  # drawn at the end of step 1
    for phase, numbers in phases.items():
        run = [lambda n=n: jobs.train_step(engine, job, ctx, n) for n in numbers]
        peaks[phase] = audit.measure_peak(lambda run=run: [step() for step in run])
    engine.destroy()
    used = {phase: peak.peak_bytes - nothing for phase, peak in peaks.items()}
    gathered = 2 * budget.weight * budget.unit if stage == 3 else 0
    common = budget.weights_bytes + activations + gathered + SLACK_BYTES
    allowed = {
        "construct": budget.construction_bytes + SLACK_BYTES,
        "probe": common + 3 * budget.weight * budget.unit,
        "first": common + budget.states_bytes(mode) + budget.gradients_bytes,
        "later": common + budget.states_bytes(mode) + budget.gradients_bytes,
    }
    report = {phase: (used[phase], allowed[phase]) for phase in used}
    for phase in used:
        assert used[phase] <= allowed[phase], (phase, report, vars(budget), activations)
        assert used[phase] < budget.weights_bytes + budget.whole_model_states_bytes() + common
    return {"report": report, "activations": activations}
