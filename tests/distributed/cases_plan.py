"""`ds_grass plan` against the allocator: what was planned for each phase, and what a real job then held at its peak."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch

from tests import audit
from tests.distributed.harness import Context
from tests.distributed.registry import case
from tests.planned_models import MODELS, config_of

ACTIVE, PROBE_STEPS = 2, 3
STEPS = {1: 4, 2: 4, 3: 6}  # by stage; the third gathers otherwise from the third step of a set on
TOLERANCE = 0.05


def ds_config_of(stage: int, dtype: str, mode: str, accumulation: int, rows: int) -> dict[str, Any]:
    """A complete file: every draw another, so that the most expensive sets come up."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1000000,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "grass": {
            "active_layers": ACTIVE,
            "sampling_period": 3 if stage == 3 else 1,
            "refresh_period": None,
            "probe_steps": PROBE_STEPS,
            "exploration": 1.0,
            "states": {"mode": mode},
            "log": {"enabled": False},
        },
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    if stage == 3:  # small models: let weights be partitioned, and gathered module by module
        config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 1000,
            "stage3_prefetch_bucket_size": 100_000,
            "stage3_max_reuse_distance": 100_000,
        }
    return config


class Measured:
    """A real job, and the peak of each of its phases above what was there before its model."""

    def __init__(
        self, ctx: Context, name: str, ds_config: dict[str, Any], dtype: torch.dtype, checkpointing: bool
    ):
        import deepspeed

        import ds_grass

        audit.start()
        gc.collect()
        self._before = audit.live_bytes()
        self.peaks: dict[str, int] = {}
        shape = MODELS[name]
        model = shape.build(dtype, checkpointing=checkpointing)
        self._batch = shape.batch(ctx.rank)
        self._accumulation = ds_config["gradient_accumulation_steps"]
        engines: list[Any] = []
        start = lambda: engines.append(  # noqa: E731
            deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds_config)[0]
        )
        self._measure("init", start)
        self.engine = engines.pop()
        self.controller = ds_grass.controller(self.engine)
        while self.controller.phase == "probe":
            self._measure("probe", self._step)
        for _ in range(STEPS[ds_config["zero_optimization"]["stage"]]):
            self._measure("train", self._step)
        self.engine.destroy()

    def _step(self) -> None:
        for _ in range(self._accumulation):
            loss = self.engine(**self._batch).loss
            self.engine.backward(loss)
            self.engine.step()

    def _measure(self, phase: str, run: Callable[[], Any]) -> None:
        gc.collect()
        audit.reset_peak()
        run()
        self.peaks[phase] = max(self.peaks.get(phase, 0), audit.peak_bytes() - self._before)


def planned(name: str, ds_config: dict[str, Any], ranks: int, checkpointing: bool) -> dict[str, int]:
    """The same phases by the plan."""
    from ds_grass.plan.budget import Limits, Planner
    from ds_grass.plan.job import resolve

    shape = MODELS[name]
    job, notes = resolve(
        ds_config, seq_length=shape.length, ranks_per_node=ranks, checkpointing=checkpointing
    )
    assert not notes, notes
    found = Planner(config_of(name), Limits()).budget(job.on_cpu())
    return {
        "init": found.init.total_bytes,
        "probe": found.probe.total_bytes,
        "train": found.train.total_bytes,
    }


def errors(measured: dict[str, int], plan: dict[str, int]) -> dict[str, float]:
    """How far each phase is off, as a share of what was measured."""
    return {phase: plan[phase] / measured[phase] - 1 for phase in measured}


def over(found: Iterable[float]) -> bool:
    return any(abs(error) > TOLERANCE for error in found)


@case(
    most_quick=2,
    ranks=(1, 2),
    strength=1,
    thorough=3,
    model=tuple(MODELS),
    stage=(1, 2, 3),
    dtype=("fp32", "bf16"),
    mode=("stream", "resident"),
    accumulation=(1, 2),
    checkpointing=(False, True),
)
def plan_is_within_five_percent_of_what_is_measured(
    ctx: Context, model: str, stage: int, dtype: str, mode: str, accumulation: int, checkpointing: bool
) -> dict:
    """At initialisation, in the probe and in training."""
    ds_config = ds_config_of(stage, dtype, mode, accumulation, MODELS[model].rows)
    plan = planned(model, ds_config, ctx.world_size, checkpointing)
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    with audit.collectives_that_let_go():
        measured = Measured(ctx, model, ds_config, torch_dtype, checkpointing).peaks
    off = errors(measured, plan)
    result = {"measured": measured, "planned": plan, "off": off}
    assert not over(off.values()), result
    return result
