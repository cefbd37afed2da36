"""Random plans under Megatron's own DDP and optimizers: its buckets, overlaps and fused weight gradients.

Replicas draw different plans, as they do where their micro-batches differ in length: what overlaps with backward must
be started in the same order by all of them. Buckets are small, so that every weight of a layer is in one of its own.
Not covered: Megatron's CUDA kernel for weight gradients, which is stood in for.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from megatron_ext.sequence_parallel.names import NATIVE, STRATEGIES
from tests import megatron_models, plain_gpt
from tests.distributed.cases_megatron_host import FULL
from tests.distributed.cases_megatron_training import RECOMPUTE, assert_learned, learnable
from tests.distributed.harness import Context
from tests.distributed.registry import case
from tests.megatron_on_cpu import cuda_types
from tests.plain_gpt import GPT, Batch
from tests.random_plans import Ran, random_plans

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"use_distributed_optimizer": False},
    "overlap_grad_reduce": {"use_distributed_optimizer": False, "overlap_grad_reduce": True},
    "distributed": {},
    "distributed_overlap_grad_reduce": {"overlap_grad_reduce": True},
    "overlap_param_gather": {"overlap_grad_reduce": True, "overlap_param_gather": True},
}
BUCKET = 1000
"""Elements: fewer than any weight matrix has."""
LENGTHS = (16, 32, 48)


@case(ranks=(4,), most_quick=1, strength=1, kind=("overlap_param_gather",), recompute=("none",), steps=(4,))
@case(ranks=(4,), kind=tuple(KINDS), recompute=("none", "full"), steps=(12,), slow=True, timeout_seconds=300)
def random_plans_equal_stock_under_ddp(ctx: Context, kind: str, recompute: str, steps: int) -> dict:
    """Two tensor-parallel ranks, two replicas, three micro-batches a step, clipped, fp32."""
    gpt = GPT(groups=4, activation="swiglu", qk_norm=True)
    config = FULL if recompute == "full" else {}
    with megatron_models.parallel_state(tp=2), cuda_types():
        stock, stock_norms, _ = _trained(ctx, gpt, steps, KINDS[kind], config, switched=False)
        losses, norms, ran = _trained(ctx, gpt, steps, KINDS[kind], config, switched=True)
    assert ran is not None
    count = ran.check(recomputed=recompute == "full")
    apart = max(abs(ours / theirs - 1) for ours, theirs in zip(sum(losses, []), sum(stock, []), strict=True))
    assert apart <= 1e-6, f"losses are {apart:.1e} apart"
    worst = max((abs(norms[name] / stock_norms[name] - 1), name) for name in norms)
    assert worst[0] <= 1e-6, f"norm of {worst[1]}: {worst[0]:.1e}"
    assert_learned(losses)
    return {"losses": apart, "norms": worst, "calls": count}


@case(ranks=(2,), most_quick=1, gated=(True, False), recompute=("none", "full", "selective"))
def gradients_come_in_megatrons_order(ctx: Context, gated: bool, recompute: str) -> list[str]:
    """Whoever reduces gradients as they come, over replicas with other plans, relies on it."""
    gpt = GPT(layers=1, groups=4, qk_norm=True, activation="swiglu" if gated else "gelu")
    config, orders = RECOMPUTE[recompute], {}
    with megatron_models.parallel_state(tp=2):
        for name in (None, *STRATEGIES):
            chunks = megatron_models.build(gpt, **config)
            orders[name] = _order_of_gradients(chunks[0])
            with contextlib.nullcontext() if name is None else planned_in_turn(chunks, [[name]]):
                megatron_models.forward_backward(chunks, [learnable(gpt, 0, 32)])
    for name in STRATEGIES:
        assert orders[name] == orders[None], f"{name}: {orders[name]}, stock: {orders[None]}"
    return orders[None]


def _order_of_gradients(chunk: nn.Module) -> list[str]:
    """A list that names of parameters are added to when their gradients are there."""
    order: list[str] = []
    for name, parameter in chunk.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    return order


def _trained(
    ctx: Context, gpt: GPT, steps: int, kind: dict[str, Any], config: dict[str, Any], *, switched: bool
) -> tuple[list[list[float]], dict[str, float], Ran | None]:
    gathered = kind.get("overlap_param_gather", False)
    chunks = megatron_models.in_ddp(
        megatron_models.build(gpt, dtype=torch.float32, **config), bucket_size=BUCKET, **kind
    )
    optimizer = megatron_models.optimizer_of(
        chunks, lr=3e-3, weight_decay=0.1, adam_eps=1e-4, clip_grad=1.0, overlap_param_gather=gathered
    )
    losses = []
    with random_plans(chunks) if switched else contextlib.nullcontext() as ran:
        for step in range(steps):
            chunks[0].zero_grad_buffer()
            optimizer.zero_grad()
            batches = _of_replica(gpt, step, replica=ctx.rank // 2)
            losses.append(megatron_models.forward_backward(chunks, batches))
            optimizer.step()
        for chunk in chunks if gathered else ():  # the last step's parameters come with the next forward
            chunk.start_param_sync(force_sync=True)
    weights = megatron_models.gather_weights(chunks)
    return losses, {name: float(weight.norm()) for name, weight in weights.items()}, ran


def _of_replica(gpt: GPT, step: int, replica: int) -> list[Batch]:
    seeds = range(100 * step + 10 * replica, 100 * step + 10 * replica + 3)
    return [learnable(gpt, seed, LENGTHS[(seed + replica) % 3]) for seed in seeds]


@case(ranks=(2,), recompute=("none", "full"), most_quick=1)
def fused_weight_gradients_lose_nothing(ctx: Context, recompute: str) -> dict:
    """Six micro-batches, native ones between others: every weight gradient is the sum of all."""
    gpt = GPT(groups=4)
    plans = [(NATIVE, "metp"), ("ulysses", NATIVE), ("metp", "ring"), (NATIVE, NATIVE), ("context", "metp")]
    worst, fused = _fused_gradients(gpt, plans, FULL if recompute == "full" else {})
    assert fused > 0, "the stand-in for the fused kernel was not called"
    assert worst <= 1e-4, f"{worst:.1e}"
    return {"worst": worst, "fused": fused}


@case(ranks=(2,), most_quick=1, ends_with=("metp", "ulysses"))
def fused_weight_gradients_would_be_lost_without_a_new_beginning(ctx: Context, ends_with: str) -> dict:
    """The negative of the case above: Megatron's mark of an earlier micro-batch hides a later gradient from DDP."""
    from megatron_ext.sequence_parallel import linears
    from megatron_ext.sequence_parallel.strategies import metp

    plans = [(NATIVE, NATIVE), (ends_with, ends_with)]
    kept, _ = _fused_gradients(GPT(groups=4), plans, {})
    with (
        patch.object(linears, "fused_gradients_begin_anew", lambda weight: None),
        patch.object(metp, "fused_gradients_begin_anew", lambda weight: None),
    ):
        lost, _ = _fused_gradients(GPT(groups=4), plans, {})
    assert kept <= 1e-4, f"{kept:.1e}"
    assert lost > 0.1, f"{lost:.1e}"
    return {"kept": kept, "lost": lost}


def _fused_gradients(gpt: GPT, plans: Sequence[Sequence[str]], config: dict[str, Any]) -> tuple[float, int]:
    """Error of the gradients over one micro-batch for each plan, and how often the fused kernel was called."""
    batches = [learnable(gpt, number, 32) for number in range(len(plans))]
    _, exact = plain_gpt.loss_and_gradients(
        gpt, {n: w.float().double() for n, w in plain_gpt.full_weights(gpt).items()}, batches
    )
    with megatron_models.parallel_state(tp=2), _fused_kernel() as calls:
        config = config | {"gradient_accumulation_fusion": True}
        chunks = megatron_models.in_ddp(megatron_models.build(gpt, dtype=torch.float32, **config))
        with planned_in_turn(chunks, plans):
            megatron_models.forward_backward(chunks, batches)
        gradients = megatron_models.gather_gradients(chunks)
    return megatron_models.largest_difference(gradients, exact)[0], len(calls)


@contextlib.contextmanager
def planned_in_turn(chunks: Sequence[nn.Module], plans: Sequence[Sequence[str]]) -> Iterator[None]:
    from megatron_ext.sequence_parallel import switch
    from megatron_ext.sequence_parallel.block_policy import blocks_of

    (block,) = blocks_of(chunks[0])
    left = iter(plans)
    switch.attach(block, lambda batch, length, documents: tuple(next(left)))
    try:
        yield
    finally:
        switch.detach(block)
    assert next(left, None) is None


@contextlib.contextmanager
def _fused_kernel() -> Iterator[list[None]]:
    """What Apex's kernel does: add the weight gradient to `main_grad`, in fp32. Yields a list that grows with calls."""
    from megatron.core.tensor_parallel import layers

    calls: list[None] = []

    def accumulate(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        calls.append(None)
        main_grad.add_(grad_output.t() @ total_input)

    module = types.SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    with (
        patch.object(layers, "fused_weight_gradient_mlp_cuda", module, create=True),
        patch.object(layers, "_grad_accum_fusion_available", True),
    ):
        yield calls
