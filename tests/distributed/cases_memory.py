"""Bytes on the device in every phase, as the allocator saw them, against what the active set and one unit may cost."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
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
        """The script's weights and one unit being flattened; DeepSpeed's stage 3 copies its shards through the host."""
        shards = self.weights_bytes if self.stage == 3 else 0
        return self.weight * (self.total + 2 * self.unit) + shards

    def states_bytes(self, mode: str) -> int:
        """States of the active set and one unit more, or of the slots."""
        elements = self.active + self.unit if mode == "resident" else 2 * self.unit
        return self.state * elements // self.ranks

    @property
    def in_flight_bytes(self) -> int:
        """Gradients of a unit on their way: as autograd made them, gathered, reduced; gloo copies what it sends."""
        return self.weight * self.unit * (3 if self.ranks == 1 else 5)

    @property
    def gradients_bytes(self) -> int:
        """Gradients of the active set, sharded from stage 2 on, and a unit in flight."""
        return (
            self.weight * (self.active if self.stage < 2 else self.active // self.ranks)
            + self.in_flight_bytes
        )


def _activation_bytes(job: jobs.Job, ctx: Context) -> int:
    """Peak of a bare forward and backward that frees each gradient at once, above the weights."""
    model = _built(job)
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch = job.data(0, ctx)[0][0]
    models.loss(model, batch).backward()
    return audit.measure_peak(lambda: models.loss(model, batch).backward()).extra_bytes


class Course:
    """One job, run phase by phase with the peak of each; bytes count from before the model was built."""

    def __init__(self, job: jobs.Job, ctx: Context) -> None:
        audit.start()
        self.job, self.ctx = job, ctx
        self.activations = _activation_bytes(job, ctx)
        model = _built(job)
        self.budget = Budget(job, model, ctx.world_size)
        gc.collect()
        self._zero = audit.live_bytes() - self.budget.weight * self.budget.total
        self.used: dict[str, int] = {}
        engines: list[Any] = []
        self.measure("construct", lambda: engines.append(jobs.start(job, model=model)))
        self.engine = engines.pop()

    def measure(self, phase: str, run: Callable[[], Any]) -> None:
        """Run something and keep its peak as that of `phase`."""
        audit.reset_peak()
        run()
        self.used[phase] = audit.peak_bytes() - self._zero

    def train(self, phase: str, first: int, stop: int) -> None:
        """Run steps `first` to `stop` as `phase`."""
        self.measure(
            phase, lambda: [jobs.train_step(self.engine, self.job, self.ctx, n) for n in range(first, stop)]
        )

    def allowed(self, phase: str, mode: str) -> int:
        """The budget of a phase."""
        budget = self.budget
        gathered = 2 * budget.weight * budget.unit if self.job.stage == 3 else 0
        common = budget.weights_bytes + self.activations + gathered + SLACK_BYTES
        if phase == "construct":
            return budget.construction_bytes + SLACK_BYTES
        if phase == "probe":
            return common + budget.in_flight_bytes
        # What is written to the file is made on the host, which a CPU that plays the device cannot tell apart.
        host = 12 * budget.total // budget.ranks if phase == "save" else 0
        return common + budget.states_bytes(mode) + budget.gradients_bytes + host

    def assert_within(self, mode: str) -> dict[str, tuple[int, int]]:
        """Raise if a phase went over its budget; return bytes used and allowed."""
        report = {phase: (used, self.allowed(phase, mode)) for phase, used in self.used.items()}
        over = [phase for phase, (used, allowed) in report.items() if used > allowed]
        assert not over, f"over the budget: {over} of {report}, {vars(self.budget)}, {self.activations}"
        return report


@case(
    most_quick=2, ranks=(1, 2), strength=1, stage=STAGES, dtype=("bf16", "fp32"), mode=("resident", "stream")
)
def device_bytes_stay_within_the_target(ctx: Context, stage: int, dtype: str, mode: str) -> dict:
    """Construction, probing, training, swapping, saving and loading hold weights, active set and one unit at most."""
    course = Course(_job(stage, dtype, mode), ctx)
    course.train("probe", 0, 1)
    course.train("first draws", 1, 5)
    course.train("swaps", 5, 12)
    folder = str(ctx.folder / "saved")
    course.measure("save", lambda: course.engine.save_checkpoint(folder, tag="end"))
    with pytest.MonkeyPatch.context() as patch:  # what is read from files is host memory: map it instead
        patch.setattr(torch, "load", functools.partial(torch.load, mmap=True))
        course.measure("load", lambda: course.engine.load_checkpoint(folder, tag="end"))
    course.train("after load", 12, 16)
    course.engine.destroy()
    return course.assert_within(mode)


@case(
    most_quick=2,
    ranks=(1, 2),
    strength=1,
    stage=STAGES,
    model=({"skipped": 14}, {"rounds": 2, "checkpoint": "reentrant"}),
)
def probing_never_piles_up_gradients(ctx: Context, stage: int, model: dict) -> dict:
    """A block without a gradient holds nothing up, and gradients that come in parts are measured in turns."""
    layers = 16
    options = {"dim": 160, "layers": layers, "tied": False, **model}
    job = jobs.replace(_job(stage, "fp32", "stream"), model="stack", model_options=options, alternate=True)
    course = Course(job, ctx)
    in_turns = "rounds" in model
    grass = jobs.controller(course.engine)
    step = 0
    while grass.phase == "probe":
        course.train(f"step {step}", step, step + 1)
        step += 1
    course.engine.destroy()
    assert step == (1 + layers // ACTIVE if in_turns else 2)
    # the unit held up and two behind it; in turns what is active, its late parts, and one on its way
    units = 2 * ACTIVE + 1 if in_turns else 3
    if stage == 3 and in_turns and ctx.world_size > 1:
        # DeepSpeed keeps frozen weights gathered to the end of a reentrant backward, without grass as well.
        units += layers
    allowed = course.allowed("probe", "stream") + units * course.budget.weight * course.budget.unit
    used = {phase: bytes_ for phase, bytes_ in course.used.items() if phase != "construct"}
    assert max(used.values()) <= allowed, (used, allowed, vars(course.budget))
    return {"used": used, "allowed": allowed}


@case(most_quick=1, ranks=(2,), strength=1, stage=(1, 3))
def whole_model_allocation_is_noticed(ctx: Context, stage: int) -> None:
    """The audit would fail if anything, ours or not, made one fp32 tensor for each parameter on the device."""
    course = Course(_job(stage, "bf16", "resident"), ctx)
    course.train("probe", 0, 1)

    def spoil(module: torch.nn.Module, args: tuple, output: Any) -> None:
        torch.zeros(course.budget.total)

    hook = course.engine.module.register_forward_hook(spoil)
    course.train("first draws", 1, 5)
    hook.remove()
    course.engine.destroy()
    with pytest.raises(AssertionError, match="over the budget: .'first draws'"):
        course.assert_within("resident")
