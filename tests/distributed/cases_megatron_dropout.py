"""Dropout: hidden dropout draws what stock draws, attention dropout draws other masks with the same statistics.

Hidden dropout acts on this rank's tokens under every strategy, from the same random state, so it is exact. Attention
dropout is drawn where the scores are, which strategies place on other ranks, so only its distribution is stock's: for
random numbers that are linear in the masks the mean over seeds is known exactly, and their variance is stock's.
Not covered: the random numbers of a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ext.sequence_parallel.names import NATIVE, STRATEGIES
from tests import megatron_models, plain_gpt
from tests.distributed.cases_megatron_ddp import planned_in_turn
from tests.distributed.cases_megatron_host import FULL, SELECTIVE
from tests.distributed.harness import Context
from tests.distributed.registry import case
from tests.plain_gpt import GPT
from tests.random_plans import counted_bodies

MIX = ("metp", NATIVE, "ulysses", "ring", "context")
RECOMPUTE = {"none": {}, "full": FULL, "selective": SELECTIVE}
SEEDS = 25
DEVIATIONS = 6.0


@case(ranks=(2, 4), most_quick=1, recompute=("full", "none", "selective"))
def hidden_dropout_equals_stock(ctx: Context, recompute: str) -> dict:
    """Losses and every gradient of two micro-batches, from the same seed."""
    gpt, config = GPT(layers=len(MIX), groups=4), {"hidden_dropout": 0.1} | RECOMPUTE[recompute]
    results = [_run(ctx, gpt, config, plan) for plan in (None, MIX, MIX[::-1])]
    without, _ = _run(ctx, gpt, {}, None)
    (stock_losses, stock), *others = results
    assert abs(stock_losses[0] / without[0] - 1) > 1e-3, "nothing was dropped"
    errors = []
    for losses, gradients in others:
        apart = max(abs(ours / theirs - 1) for ours, theirs in zip(losses, stock_losses, strict=True))
        worst, name = megatron_models.largest_difference(gradients, stock)
        assert apart <= 1e-12, f"losses are {apart:.1e} apart"
        assert worst <= 1e-12, f"{name}: {worst:.1e}"
        errors.append(worst)
    return {"gradients": max(errors)}


@case(ranks=(2, 4), most_quick=1, hidden_dropout=(0.1, 0.0))
def recomputation_draws_the_same_attention_dropout(ctx: Context, hidden_dropout: float) -> dict:
    """Gradients with full recomputation are those without."""
    gpt = GPT(layers=len(MIX), groups=4)
    config = {"attention_dropout": 0.2, "hidden_dropout": hidden_dropout}
    (losses, gradients), (again_losses, again) = (
        _run(ctx, gpt, config | recompute, MIX) for recompute in ({}, FULL)
    )
    other, _ = _run(ctx, gpt, config, MIX, seed=2)
    assert abs(losses[0] / other[0] - 1) > 1e-6, "nothing was dropped"
    assert losses == again_losses
    worst, name = megatron_models.largest_difference(again, gradients)
    assert worst <= 1e-12, f"{name}: {worst:.1e}"
    return {"gradients": worst}


def _run(
    ctx: Context, gpt: GPT, config: dict[str, Any], plan: Sequence[str] | None, seed: int = 1
) -> tuple[list[float], dict[str, Tensor]]:
    batches = [plain_gpt.make_batch(gpt, number) for number in range(2)]
    with megatron_models.parallel_state(tp=ctx.world_size, seed=seed):
        chunks = megatron_models.build(gpt, **config)
        with planned_in_turn(chunks, [plan or [NATIVE] * gpt.layers] * 2), counted_bodies() as ran:
            losses = megatron_models.forward_backward(chunks, batches)
        assert {name for name, _ in ran.bodies} == set(plan or ()) - {NATIVE}
        return losses, megatron_models.gather_gradients(chunks)


@case(ranks=(2,), slow=True, groups=(8, 1))
def attention_dropout_has_the_statistics_of_stock(ctx: Context, groups: int) -> dict:
    """Output and gradients of one attention layer over many seeds: mean exact, total variance as stock's.

    The output is linear in the mask, and so is every gradient of a fixed linear function of it; masks have mean 1. Six
    standard deviations of the mean are allowed: Student's t with 24 degrees of freedom is that large once in
    300 000 draws. The variance is summed over all entries, which are many and nearly independent: 10 % are allowed.
    """
    gpt = GPT(layers=1, groups=groups)
    names = [name for name in STRATEGIES if name != "metp" or groups % ctx.world_size == 0]
    with megatron_models.parallel_state(tp=ctx.world_size):
        exact = _attention(megatron_models.build(gpt), NATIVE)
        chunks = megatron_models.build(gpt, attention_dropout=0.2)
        draws = {name: [_attention(chunks, name) for _ in range(SEEDS)] for name in names}
    spreads, worst, ratios = {}, {}, {}
    for name in names:
        worst[name] = max(_deviations([draw[key] for draw in draws[name]], exact[key]) for key in exact)
        spreads[name] = {
            key: float(torch.stack([draw[key] for draw in draws[name]]).var(0).sum()) for key in exact
        }
    for name in names:
        assert worst[name] <= DEVIATIONS, f"{name}: {worst[name]:.1f} standard deviations from the exact mean"
        ratios[name] = {key: spreads[name][key] / spreads[NATIVE][key] for key in exact}
        apart = max(abs(ratio - 1) for ratio in ratios[name].values())
        assert apart <= 0.1, f"{name}: variance over stock's {ratios[name]}"
    return {"deviations": worst, "ratios": ratios}


def _attention(chunks: list[nn.Module], name: str) -> dict[str, Tensor]:
    """The output of the layer's attention on all tokens, and gradients of its product with a fixed tensor."""
    batch = plain_gpt.make_batch(GPT(), 0, rows=2, length=32)
    seen: list[Tensor] = []
    attention = chunks[0].decoder.layers[0].self_attention
    hook = attention.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    chunks[0].zero_grad()
    try:
        with planned_in_turn(chunks, [[name]]):
            chunks[0](batch.tokens, batch.positions, None)
    finally:
        hook.remove()
    fixed = torch.randn(seen[0].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights = dict(attention.named_parameters())
    weights = {name: weight for name, weight in weights.items() if name != "linear_proj.bias"}  # added later
    gradients = torch.autograd.grad((seen[0] * fixed).sum(), list(weights.values()))
    results = {"output": seen[0].detach()} | dict(zip(weights, gradients, strict=True))
    return {name: _over_ranks(result) for name, result in results.items()}


def _over_ranks(mine: Tensor) -> Tensor:
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    torch.distributed.all_gather(parts, mine.contiguous(), group=group)
    return torch.stack(parts)


def _deviations(draws: Sequence[Tensor], exact: Tensor) -> float:
    """How many standard deviations of the mean lie between the mean of the draws and the exact value, along the exact
    value itself: there a wrong scale shows most."""
    along = torch.stack([(draw * exact).sum() / exact.square().sum() for draw in draws])
    return float((along.mean() - 1).abs() / (along.std() / math.sqrt(len(draws))))
