"""Training with a fresh plan for every micro-batch and layer is stock training: losses and weights, step by step.

The optimizer is torch's AdamW in fp64, so nothing but the switch can make a difference. Not covered: Megatron's DDP and
optimizers (cases_megatron_ddp.py), DeepSpeed engines (cases_megatron_engine.py), dropout (cases_megatron_dropout.py).
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from tests import megatron_models, plain_gpt
from tests.distributed.cases_megatron_host import FULL, SELECTIVE
from tests.distributed.harness import Context
from tests.distributed.registry import case
from tests.plain_gpt import GPT, Batch
from tests.random_plans import Ran, random_plans

RECOMPUTE = {"none": {}, "full": FULL, "selective": SELECTIVE}
VARIED = {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
LENGTHS = (16, 32, 48, 64)
SLOW = {"slow": True, "timeout_seconds": 600}


@case(ranks=(2,), strength=1, steps=(8,), recompute=("full",))
@case(ranks=(2, 4), steps=(50,), recompute=tuple(RECOMPUTE), **SLOW)
def random_plans_equal_stock_steps(ctx: Context, steps: int, recompute: str) -> dict:
    """Two or three micro-batches a step, each of a length of its own."""
    gpt = GPT(groups=4, activation="swiglu", qk_norm=True)
    batches = drawn_batches(gpt, steps)
    with megatron_models.parallel_state(tp=ctx.world_size):
        return assert_equals_stock_steps(gpt, batches, recompute, {})


@case(ranks=(4,), strength=1, steps=(3,), recompute=("full",))
@case(ranks=(4,), steps=(50,), recompute=tuple(RECOMPUTE), **SLOW)
def random_plans_in_pipeline_stages_equal_stock_steps(ctx: Context, steps: int, recompute: str) -> dict:
    """Two stages of two ranks, each with plans of its own, and micro-batches in flight with other plans and lengths."""
    gpt = GPT(layers=4, groups=4)
    batches = drawn_batches(gpt, steps, at_once=(2, 3, 4))
    with megatron_models.parallel_state(tp=2, pp=2):
        return assert_equals_stock_steps(gpt, batches, recompute, VARIED)


@case(ranks=(4,), steps=(50,), recompute=("none", "full"), varied=(False, True), **SLOW)
def random_plans_in_interleaved_stages_equal_stock_steps(
    ctx: Context, steps: int, recompute: str, varied: bool
) -> dict:
    """Two chunks on each of two stages of two ranks."""
    gpt = GPT(layers=4, groups=4)
    batches = drawn_batches(gpt, steps, at_once=(2, 4), lengths=LENGTHS if varied else (32,))
    with megatron_models.parallel_state(tp=2, pp=2, vpp=2):
        return assert_equals_stock_steps(gpt, batches, recompute, VARIED if varied else {})


def assert_equals_stock_steps(
    gpt: GPT, batches: Sequence[Sequence[Batch]], recompute: str, config: dict
) -> dict:
    """Train twice from the same weights. Rounding is 1e-16 and AdamW divides by roots of squares: 1e-9 is asked."""
    config = config | RECOMPUTE[recompute]
    stock, stock_weights, _ = _trained(gpt, batches, config, switched=False)
    losses, weights, ran = _trained(gpt, batches, config, switched=True)
    assert ran is not None
    count = ran.check(recomputed=recompute == "full")
    if recompute == "full":
        assert ran.recomputed() == ran.forward()
    apart = max(abs(ours / theirs - 1) for ours, theirs in zip(sum(losses, []), sum(stock, []), strict=True))
    assert apart <= 1e-9, f"losses are {apart:.1e} apart"
    worst, name = megatron_models.largest_difference(weights, stock_weights)
    assert worst <= 1e-9, f"{name}: {worst:.1e}"
    assert_learned(losses)
    return {"losses": apart, "weights": worst, "calls": count, "last": losses[-1]}


def assert_learned(losses: Sequence[Sequence[float]]) -> None:
    """The mean loss of the last fifth of the steps is well below that of the first."""
    means, fifth = [sum(step) / len(step) for step in losses], max(1, len(losses) // 5)
    first, last = sum(means[:fifth]) / fifth, sum(means[-fifth:]) / fifth
    assert last < 0.9 * first, f"nothing was learned: {means}"


def _trained(
    gpt: GPT, batches: Sequence[Sequence[Batch]], config: dict, *, switched: bool
) -> tuple[list[list[float]], dict[str, torch.Tensor], Ran | None]:
    chunks = megatron_models.build(gpt, **config)
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    adamw = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    with random_plans(chunks) if switched else contextlib.nullcontext() as ran:
        for step in batches:
            adamw.zero_grad()
            losses.append(megatron_models.forward_backward(chunks, step))
            sum_gradients(chunks)
            adamw.step()
    return losses, megatron_models.gather_weights(chunks), ran


def sum_gradients(chunks: Sequence[nn.Module]) -> None:
    """What `finalize_model_grads` does for a model without DDP: norms and row biases saw this rank's tokens only."""
    from megatron.core import parallel_state

    config = megatron_models.unwrapped(chunks[0]).config
    for name, parameter in megatron_models.named_parameters(chunks):
        if megatron_models.is_summed(config, name, parameter):
            dist.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())


def drawn_batches(
    gpt: GPT,
    steps: int,
    *,
    at_once: Sequence[int] = (2, 3),
    lengths: Sequence[int] = LENGTHS,
    seed: int = 0,
) -> list[list[Batch]]:
    """Micro-batches of every step, with something to learn: a token's label follows from the token."""
    generator = random.Random(seed)
    return [
        [learnable(gpt, generator.randrange(2**30), generator.choice(lengths)) for _ in range(count)]
        for count in generator.choices(at_once, k=steps)
    ]


def learnable(gpt: GPT, seed: int, length: int) -> Batch:
    """Random tokens, labelled by a permutation of the vocabulary."""
    batch = plain_gpt.make_batch(gpt, seed, length=length)
    return Batch(batch.tokens, (5 * batch.tokens + 3) % gpt.vocabulary)
