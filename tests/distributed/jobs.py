"""What a user's script does, in a few lines: a ds_config, an engine, a loop that records what it saw.

Contract: `Job` names everything a run depends on, so the same job can be given to DeepSpeed with GRASS, to DeepSpeed
without, and to `tests/reference.py`. Nothing here reads a private name of the package.
Not covered: assertions; the cases make them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tests import models
from tests.distributed.harness import Context
from tests.reference import Group, Record, Reference

# Adam divides a gradient by its own size plus eps: where eps is small, one that is all rounding (2e-9 here, from the
# order in which a CPU's kernels add up) becomes a whole step, and no two correct programs agree on that. Low precision
# learns slowly for the same reason. Measured on the reference against itself with such noise, nine steps:
# masters 8e-6 apart at eps 1e-6, 6e-7 at 1e-5, 1.8e-7 at 1e-4 (the rounding of a weight near 1).
ADAMW = {"betas": [0.9, 0.95], "eps": 1e-4, "weight_decay": 0.1}
LEARNING_RATES = {"fp32": 1e-3, "bf16": 2e-4, "fp16": 2e-4}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BLOCK_LISTS = {"llama": "model.layers", "stack": "blocks"}


@dataclass(frozen=True)
class Job:
    """One training job. `grass` None means no block; `model` is a key of `models.BUILDERS`."""

    stage: int = 2
    dtype: str = "fp32"
    accumulation: int = 1
    clip: float = 0.5
    grass: Mapping[str, Any] | None = field(default_factory=dict)
    model: str = "llama"
    model_options: Mapping[str, Any] = field(default_factory=dict)
    zero: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    optimizer_block: bool = True
    rows: int = 2
    length: int = 8
    alternate: bool = False
    """First tokens are even, then odd, step by step and on all ranks alike (see `models.Stack`)."""

    @property
    def lr(self) -> float:
        """The base learning rate."""
        return LEARNING_RATES[self.dtype]

    def ds_config(self) -> dict[str, Any]:
        """Return a fresh ds_config for this job."""
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.rows,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip,
            "zero_optimization": {"stage": self.stage, **self.zero},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1000000,
        }
        if self.optimizer_block:
            config["optimizer"] = {"type": "AdamW", "params": {"lr": self.lr, **ADAMW, "torch_adam": True}}
        if self.dtype != "fp32":
            config[self.dtype] = {"enabled": True}
        if self.stage == 3:
            config["zero_optimization"].setdefault("stage3_param_persistence_threshold", 0)
        if self.grass is not None:
            config["grass"] = {**GRASS, **self.grass}
        return copy.deepcopy(config | dict(self.extra))

    def build(self) -> torch.nn.Module:
        """Return the model in fp32, as a script hands it to DeepSpeed."""
        return models.build(self.model, **self.model_options)

    def data(self, step: int, context: Context) -> list[list[Tensor]]:
        """Return this step's tokens of every rank as `data[rank][micro_batch]`."""
        data = models.step_data(
            step, ranks=context.world_size, accumulation=self.accumulation, rows=self.rows, length=self.length
        )
        if self.alternate:
            for batch in (batch for micros in data for batch in micros):
                batch[0, 0] = int(batch[0, 0]) // 2 * 2 + step % 2
        return data


GRASS = {
    "active_layers": 2,
    "sampling_period": 3,
    "refresh_period": 3,
    "probe_steps": 2,
    "seed": 7,
    "log": {"enabled": True, "path": None},
}


@dataclass(frozen=True)
class Step:
    """What a script could see of one optimizer step; `before` and `after` say when."""

    phase_before: str
    active_before: tuple[int, ...]
    active_after: tuple[int, ...]
    applied: bool
    norm: float
    lr_before: float
    lr: float
    losses: tuple[float, ...]
    importance_after: tuple[float, ...] | None
    probabilities_after: tuple[float, ...]


def start(job: Job, *, model: torch.nn.Module | None = None, **arguments: Any) -> Any:
    """Return the engine of `job`; `arguments` go to `deepspeed.initialize`."""
    import deepspeed

    model = job.build() if model is None else model
    if "optimizer" not in arguments and "model_parameters" not in arguments:
        arguments["model_parameters"] = model.parameters()
    arguments.setdefault("config", job.ds_config())
    if job.grass is not None:
        import ds_grass  # noqa: F401  puts the hook in place where the entry point is not installed

    return deepspeed.initialize(model=model, **arguments)[0]


@contextlib.contextmanager
def engine_of(job: Job, **arguments: Any) -> Iterator[Any]:
    """`start`, and free what the engine holds afterwards."""
    engine = start(job, **arguments)
    try:
        yield engine
    finally:
        engine.destroy()


def controller(engine: Any) -> Any:
    """Return the controller of `engine`, or None when the engine has no grass block."""
    import ds_grass

    return ds_grass.controller(engine)


def train_step(engine: Any, job: Job, context: Context, step: int, *, style: str = "engine") -> Step:
    """Run one optimizer step on this rank's data; `style` is "engine" or "loss" (`loss.backward()`)."""
    grass = controller(engine) if job.grass is not None else None
    before = (grass.phase, tuple(grass.active)) if grass else ("train", ())
    losses, lr_before = [], float(engine.optimizer.param_groups[0]["lr"])
    for batch in job.data(step, context)[context.rank]:
        loss = models.loss(engine, batch)
        losses.append(float(loss.detach()))
        if style == "engine":
            engine.backward(loss)
        else:
            engine.scale(loss).backward()
        engine.step()
    return Step(
        phase_before=before[0],
        active_before=before[1],
        active_after=tuple(grass.active) if grass else (),
        applied=bool(engine.was_step_applied()),
        norm=float(engine.get_global_grad_norm() or 0.0),
        lr_before=lr_before,
        lr=float(engine.optimizer.param_groups[0]["lr"]),
        losses=tuple(losses),
        importance_after=tuple(grass.importance) if grass and grass.importance is not None else None,
        probabilities_after=tuple(grass.probabilities) if grass else (),
    )


def weights(engine: Any) -> dict[str, Tensor]:
    """Return a copy of every weight of the model, whole, as the model holds it."""
    import deepspeed

    result = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
            result[name] = param.detach().clone()
    return result


def masters(engine: Any) -> dict[str, Tensor]:
    """Return a copy of the fp32 value of every trained parameter through DeepSpeed's public function."""
    from deepspeed.utils import safe_get_full_fp32_param

    values = {n: safe_get_full_fp32_param(p) for n, p in engine.module.named_parameters()}
    return {n: v.detach().clone().cpu() for n, v in values.items() if v is not None}


def moments(engine: Any, key: str) -> dict[str, Tensor]:
    """Return a copy of `exp_avg` or `exp_avg_sq` of every parameter through DeepSpeed's public function."""
    from deepspeed.utils import safe_get_full_optimizer_state

    values = {n: safe_get_full_optimizer_state(p, key) for n, p in engine.module.named_parameters()}
    return {n: v.detach().clone().cpu() for n, v in values.items() if v is not None}


def block_names(model: torch.nn.Module, job: Job) -> list[list[str]]:
    """Return the parameter names of every block of `model`, trainable now or not."""
    path = BLOCK_LISTS[job.model]
    count = len(model.get_submodule(path))
    names = [n for n, _ in model.named_parameters()]
    return [[n for n in names if n.startswith(f"{path}.{i}.")] for i in range(count)]


def reference_of(job: Job, *, groups: Sequence[Group] | None = None, **options: Any) -> Reference:
    """Return the plain single-process twin of `job`."""
    model = job.build()
    for param in model.parameters():  # buffers keep their dtype, as in the engine
        param.data = param.data.to(DTYPES[job.dtype])
    if groups is None:
        betas = tuple(ADAMW["betas"])
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        groups = [Group(names, job.lr, betas, ADAMW["eps"], ADAMW["weight_decay"])]
    options.setdefault("each_micro_step", job.stage >= 2)
    return Reference(model, block_names(model, job), groups, models.loss, clip=job.clip, **options)


def follow(reference: Reference, job: Job, context: Context, number: int, step: Step) -> Record:
    """Let the reference do what the engine did at step `number`."""
    return reference.step(job.data(number, context), step.active_before, update=step.phase_before == "train")


def largest_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[float, str]:
    """Return the largest difference of two sets of tensors and the name of the tensor it is in."""
    assert ours.keys() == theirs.keys(), f"only in one: {sorted(ours.keys() ^ theirs.keys())}"
    return max((float((ours[n].double() - theirs[n].detach().double()).abs().max()), n) for n in ours)


def assert_identical(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], what: str) -> None:
    """Raise unless both hold the same bits."""
    assert ours.keys() == theirs.keys(), f"{what}: only in one: {sorted(ours.keys() ^ theirs.keys())}"
    different = [n for n in ours if not torch.equal(ours[n], theirs[n])]
    assert not different, f"{what}: {len(different)} tensors differ, first {different[:4]}"


def with_grass(job: Job, **block: Any) -> Job:
    """Return `job` with these keys in its grass block."""
    return replace(job, grass={**(job.grass or {}), **block})
