"""A grass engine under DeepSpeed's accessors, tensor parallelism and zero.Init, and its errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed import jobs
from tests.distributed.harness import Context
from tests.distributed.registry import case

STAGES = (0, 1, 2, 3)


@case(strength=1, ranks=(1, 2), stage=STAGES, dtype=("fp32", "bf16"), mode=("resident", "stream"))
def accessors_read_and_write_blocks_that_rest_and_blocks_that_train(
    ctx: Context, stage: int, dtype: str, mode: str
) -> None:
    """`safe_set_*` then `safe_get_*` gives what was set, for every parameter, drawn or not, and training goes on."""
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
    )

    job = jobs.Job(stage=stage, dtype=dtype, grass={"states": {"mode": mode}, "active_layers": 1})
    with jobs.engine_of(job) as engine:
        for number in range(4):
            jobs.train_step(engine, job, ctx, number)
        for param in engine.module.parameters():
            value = safe_get_full_fp32_param(param)
            shape = tuple(getattr(param, "ds_shape", param.shape))
            assert value.dtype == torch.float32
            assert tuple(value.shape) == shape
            safe_set_full_fp32_param(param, value + 1)
            assert torch.equal(safe_get_full_fp32_param(param), value + 1)
            safe_set_full_fp32_param(param, value)
            for key in ("exp_avg", "exp_avg_sq"):
                moment = safe_get_full_optimizer_state(param, key)
                safe_set_full_optimizer_state(param, moment + 0.5, key)
                assert torch.equal(safe_get_full_optimizer_state(param, key), moment + 0.5)
                safe_set_full_optimizer_state(param, moment, key)
        assert jobs.train_step(engine, job, ctx, 5).applied


@case(most_quick=2, strength=1, ranks=(1, 2), stage=STAGES)
def gradients_can_be_read_between_backward_and_step(ctx: Context, stage: int) -> None:
    """`safe_get_full_grad` gives what the reference averages, for the active blocks."""
    from deepspeed.utils import safe_get_full_grad

    from tests import models

    job = jobs.Job(stage=stage, grass={"probe_steps": 0, "active_layers": 1})
    with jobs.engine_of(job) as engine:
        active = {n for n, p in engine.module.named_parameters() if p.requires_grad}
        engine.backward(models.loss(engine, job.data(0, ctx)[ctx.rank][0]))
        ours = {n: safe_get_full_grad(p) for n, p in engine.module.named_parameters() if n in active}
        engine.step()
    model = job.build()
    for rank in range(ctx.world_size):
        (models.loss(model, job.data(0, ctx)[rank][0]) / ctx.world_size).backward()
    theirs = {n: p.grad for n, p in model.named_parameters() if n in active}
    difference, name = jobs.largest_difference(ours, theirs)
    assert difference < 1e-6, (name, difference)


class _Slices:
    """An mpu of one tensor-parallel group that holds every rank, and data-parallel groups of one rank."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.model = dist.new_group(list(range(self.size)))
        self.data = [dist.new_group([rank]) for rank in range(self.size)][self.rank]

    def __getattr__(self, name: str) -> Any:
        answers = {
            "get_model_parallel_rank": self.rank,
            "get_model_parallel_world_size": self.size,
            "get_model_parallel_group": self.model,
            "get_tensor_model_parallel_rank": self.rank,
            "get_tensor_model_parallel_world_size": self.size,
            "get_tensor_model_parallel_group": self.model,
            "get_data_parallel_rank": 0,
            "get_data_parallel_world_size": 1,
            "get_data_parallel_group": self.data,
        }
        if name not in answers:
            raise AttributeError(name)
        return lambda *args, **kwargs: answers[name]


class _Block(nn.Module):
    """`own` is this rank's slice of a larger matrix, `shared` is the same on all ranks."""

    def __init__(self, rank: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.shared = nn.Parameter(torch.randn(4, 4, generator=generator))
        generator.manual_seed(1000 * (rank + 1) + seed)
        self.own = nn.Parameter(torch.randn(4, 4, generator=generator))
        self.own.model_parallel = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(x @ self.shared) * 0.1 + torch.tanh(x @ self.own) * 0.1


class _Sliced(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(rank, index) for index in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@case(
    strength=1, ranks=(2,), stage=(0, 1), slow=True, alone=True
)  # DeepSpeed keeps an mpu for the whole process
@case(strength=1, ranks=(2,), stage=(2, 3), alone=True)  # DeepSpeed keeps an mpu for the whole process
def tensor_parallel_shards_add_up_and_copies_count_once(ctx: Context, stage: int) -> None:
    """Norm and importance over a tensor-parallel group, against the gradients of both ranks added by hand."""
    import deepspeed
    import torch.distributed as dist

    import ds_grass

    model, batch = _Sliced(ctx.rank), torch.linspace(-1, 1, 8).view(2, 4)
    model(batch).backward()
    squares = []
    for block in model.blocks:
        own, shared = block.own.grad.square().sum(), block.shared.grad.square().sum()
        parts = torch.stack([own, shared if ctx.rank == 0 else torch.zeros(())])
        dist.all_reduce(parts)
        squares.append(float(parts.sum()))
    model.zero_grad(set_to_none=True)
    config = jobs.Job(stage=stage, grass={"probe_steps": 1, "active_layers": 1}, clip=0.0).ds_config()
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=config, mpu=_Slices()
    )
    engine.backward(engine(batch))
    engine.step()
    assert math.isclose(float(engine.get_global_grad_norm()), math.sqrt(sum(squares)), rel_tol=1e-5)
    expected = [math.sqrt(square / (16 + 2 * 16)) for square in squares]  # unsharded: shared once, own twice
    for ours, theirs in zip(ds_grass.controller(engine).importance, expected, strict=True):
        assert math.isclose(ours, theirs, rel_tol=1e-5)
    engine.save_checkpoint(str(ctx.folder / "saved"), tag="sliced")
    path, _ = engine.load_checkpoint(str(ctx.folder / "saved"))
    assert path is not None
    assert math.isclose(ds_grass.controller(engine).importance[0], expected[0], rel_tol=1e-5)
    engine._config.load_universal_checkpoint = True
    with pytest.raises(ValueError, match="2 tensor-parallel ranks"):
        engine.load_checkpoint(str(ctx.folder / "saved"), tag="sliced")
    engine.destroy()


@case(strength=1, ranks=(1, 2), dtype=("fp32", "bf16"))
def a_model_built_under_zero_init_trains_like_one_that_was_not(ctx: Context, dtype: str) -> None:
    """zero.Init partitions parameters while they are made: names, sizes and blocks must come out the same."""
    import deepspeed

    kept = []
    for under_init in (False, True):
        job = jobs.Job(stage=3, dtype=dtype)
        if under_init:
            with deepspeed.zero.Init(config_dict_or_path=job.ds_config()):
                model = job.build()
        else:
            model = job.build()
        with jobs.engine_of(job, model=model) as engine:
            steps = [jobs.train_step(engine, job, ctx, number) for number in range(6)]
            kept.append([(step.phase_before, step.active_before, step.norm > 0) for step in steps])
            assert {p.requires_grad for p in engine.module.parameters()} == {True, False}
    assert [entry[0] for entry in kept[0]] == [entry[0] for entry in kept[1]]
    assert all(positive for run in kept for _, _, positive in run)


WRONG = {
    "no such key": ({"grass": {"active_layer": 2}}, "grass.active_layer"),
    "more blocks than there are": ({"grass": {"active_layers": 40}}, "grass.active_layers is 40"),
    "no such path": ({"grass": {"layers": "model.nowhere"}}, "grass.layers"),
    "no such outer": ({"grass": {"outer": ["nowhere"]}}, "grass.outer"),
    "offload": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        "offload_optimizer",
    ),
    "another rule": ({"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}, "optimizer.type"),
    "a probe too short": (
        {"gradient_accumulation_steps": 2, "grass": {"probe_steps": 1}},
        "grass.probe_steps",
    ),
    "hybrid engine": ({"hybrid_engine": {"enabled": True}}, "hybrid_engine"),
    "fp16 autocast": ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast.dtype"),
}


@case(strength=1, ranks=(1, 2), wrong=tuple(WRONG))
def wrong_config_is_one_line_and_leaves_the_process_able_to_start(ctx: Context, wrong: str) -> str:
    """The engine refuses before it is built, on every rank, and the next engine starts."""
    change, key = WRONG[wrong]
    config = jobs.Job(stage=2).ds_config()
    for name, value in change.items():
        merged = (
            {**config.get(name, {}), **value} if isinstance(value, dict) and name != "optimizer" else value
        )
        config[name] = merged
    try:
        jobs.start(jobs.Job(stage=2), config=config)
    except ValueError as error:
        message = str(error)
    else:
        raise AssertionError(f"{wrong}: nothing was refused")
    assert key in message, message
    assert "\n" not in message.strip(), message
    job = jobs.Job(stage=2)
    with jobs.engine_of(job) as engine:
        jobs.train_step(engine, job, ctx, 0)
    return message
