"""A Megatron-core model in a DeepSpeed engine: the block of the engine's own config, and ranks that stay together.

DeepSpeed does not add up the gradients of norms over the tensor-parallel group as Megatron's training loop does; the
reference is AdamW on the plain GPT, which has no ranks. Not covered: which file a block is found in (unit tests).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch

import megatron_ext
from megatron_ext import job
from megatron_ext.sequence_parallel.names import STRATEGIES
from tests import megatron_models, plain_gpt
from tests.distributed.cases_megatron_training import learnable
from tests.distributed.harness import Context
from tests.distributed.registry import case
from tests.plain_gpt import GPT, Batch
from tests.random_plans import random_plans

ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-4, "weight_decay": 0.1}
LENGTHS = (16, 32, 48)
ACCUMULATION = 2
CLIP = 1.0


@case(ranks=(2,), strength=1, stage=(0, 1), steps=(6,), plans=("random",))
@case(ranks=(2, 4), stage=(0, 1, 2), steps=(12,), plans=("random", "own"), slow=True, timeout_seconds=300)
def engines_with_plans_equal_adamw(ctx: Context, stage: int, steps: int, plans: str) -> dict:
    """Tensor parallel over two ranks, replicas on the rest, which draw other plans; or the planner's own choice."""
    gpt, replicas = GPT(groups=4, activation="swiglu", qk_norm=True), ctx.world_size // 2
    batches = [[_of_replica(gpt, step, replica) for replica in range(replicas)] for step in range(steps)]
    with megatron_models.parallel_state(tp=2), engine_of(gpt, stage) as engine:
        with contextlib.nullcontext() if plans == "own" else random_plans([engine]) as ran:
            losses = [_step(engine, of_replicas[ctx.rank // 2]) for of_replicas in batches]
            counters = megatron_ext.counters()
        weights = megatron_models.gather_weights([engine])
    phases = {phase for lengths in counters.values() for counts in lengths.values() for phase in counts}
    assert phases == {"forward", "backward", "recomputed"}
    forward = {
        name: sum(counts["forward"] for counts in lengths.values()) for name, lengths in counters.items()
    }
    backward = sum(counts["backward"] for lengths in counters.values() for counts in lengths.values())
    assert sum(forward.values()) == backward == steps * ACCUMULATION * gpt.layers, counters
    if ran is not None:
        ran.check()
        assert forward == ran.forward(), (forward, ran.forward())
    assert set(counters) <= set(STRATEGIES)
    return {"counters": forward, **assert_equals_adamw(gpt, batches, losses, weights, ctx.rank // 2)}


@case(ranks=(2,), slow=True)
def ranks_would_drift_apart_without_summed_norm_gradients(ctx: Context) -> None:
    """The negative of the case above: what DeepSpeed alone does to the norms of a sequence-parallel model."""
    from megatron_ext import deepspeed_engine

    gpt = GPT(groups=4)
    with (
        megatron_models.parallel_state(tp=2),
        patch.object(deepspeed_engine, "_sum_gradients", lambda *_: None),
        engine_of(gpt, 0) as engine,
    ):
        for step in range(2):
            _step(engine, _of_replica(gpt, step, 0))
        with pytest.raises(AssertionError, match=r"(norm|bias).*: ranks are .* apart"):
            megatron_models.gather_weights([engine])


@case(ranks=(2,), slow=True, alone=True)
def stage_3_is_refused_by_name(ctx: Context) -> None:
    """Alone: DeepSpeed has taken the parameters apart by then."""
    with (
        megatron_models.parallel_state(tp=2),
        pytest.raises(ValueError, match=r"zero_optimization\.stage is 3.*allowed: 0, 1 or 2"),
        engine_of(GPT(), 3),
    ):
        pass
    assert job.current() is None or not job.current().blocks


@contextlib.contextmanager
def engine_of(gpt: GPT, stage: int) -> Iterator[Any]:
    """An engine whose config holds a block, over a model that was built before the block was known."""
    import deepspeed

    megatron_ext.remove()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": CLIP,  # the norm takes each replicated weight once
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1000000,
        "megatron_ext": {"memory": {"limit": "2GB"}, "log": {"enabled": False}},
    }
    model = megatron_models.build(gpt, dtype=torch.float32)[0]
    assert job.current() is None
    adamw = torch.optim.AdamW(model.parameters(), **ADAMW)
    engine = None
    try:
        engine = deepspeed.initialize(model=model, optimizer=adamw, config=config, mpu=megatron_ext.mpu)[0]
        running = job.current()
        assert running is not None
        assert running.blocks == [model.decoder]
        yield engine
    finally:
        megatron_ext.remove()
        if engine is not None:
            engine.destroy()


def _step(engine: Any, batches: Sequence[Batch]) -> list[float]:
    losses = []
    for batch in batches:
        loss = megatron_models.cross_entropy(engine(batch.tokens, batch.positions, None), batch.labels)
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    return losses


def _of_replica(gpt: GPT, step: int, replica: int) -> list[Batch]:
    seeds = range(100 * step + 10 * replica, 100 * step + 10 * replica + ACCUMULATION)
    return [learnable(gpt, seed, LENGTHS[(seed + replica) % 3]) for seed in seeds]


def assert_equals_adamw(
    gpt: GPT, batches: Sequence[Sequence[Sequence[Batch]]], losses: list, weights: dict, replica: int
) -> dict:
    """torch's AdamW on the plain GPT in fp64 has the same losses and ends at the same weights."""
    plain = plain_gpt.full_weights(gpt, dtype=torch.float32)
    plain = {name: weight.double() for name, weight in plain.items()}
    adamw = torch.optim.AdamW(plain.values(), **ADAMW)
    apart = 0.0
    for ours, of_replicas in zip(losses, batches, strict=True):
        expected, gradients = plain_gpt.loss_and_gradients(
            gpt, plain, [b for each in of_replicas for b in each]
        )
        mine = expected[replica * ACCUMULATION : (replica + 1) * ACCUMULATION]
        apart = max([apart, *(abs(loss / theirs - 1) for loss, theirs in zip(ours, mine, strict=True))])
        for name, weight in plain.items():
            weight.grad = gradients[name]
        torch.nn.utils.clip_grad_norm_(plain.values(), CLIP)
        adamw.step()
    assert apart <= 1e-5, f"losses are {apart:.1e} apart"
    worst, name = megatron_models.largest_difference(weights, plain)
    assert worst <= 1e-5, f"{name}: {worst:.1e}"
    return {"losses": apart, "weights": worst}
