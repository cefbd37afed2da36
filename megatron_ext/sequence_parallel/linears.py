"""A linear layer on this rank's tokens with the whole weight, of which this rank stores a shard.

ZeRO-3 along the tensor-parallel group: the "Z" of the paper's UlyssesZ and MegatronCZ.

The weight is gathered, used and freed, in backward gathered again while the weight gradient is computed; the weight
gradient is reduce-scattered while the input gradient is. Kept for backward are the input and the shard, nothing
gathered.

Megatron stores what it cuts by output features (``linear_qkv``, ``linear_fc1``) as [n / p, k] and what it cuts by input
features (``linear_proj``, ``linear_fc2``) as [n, k / p]. An all-gather puts shards one below the other, which is the
whole matrix for the first and a stack of column slabs for the second: forward then needs them side by side, a copy, and
backward computes slab by slab.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .collectives import start_all_gather, start_reduce_scatter


def fused_gradients_begin_anew(weight: Tensor) -> None:
    """Let Megatron's DDP take the gradient that autograd is about to hand over.

    With ``gradient_accumulation_fusion`` the stock linear adds its gradient to ``main_grad`` itself and marks the
    weight for the rest of the step, so that DDP ignores ``.grad``: a later micro-batch with another strategy would lose
    its gradient without a word.
    """
    if hasattr(weight, "grad_added_to_main_grad"):
        weight.grad_added_to_main_grad = False


class _InTurn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.parameters = parameters
        found = tuple(parameter.detach() for parameter in parameters)
        # A frozen weight beside a trained bias stays frozen: no gradient is computed or reduced for it.
        ctx.mark_non_differentiable(
            *(t for t, p in zip(found, parameters, strict=True) if not p.requires_grad)
        )
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        for parameter in ctx.parameters:
            fused_gradients_begin_anew(parameter)
        return grads


def in_turn(*parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """The parameters, whose gradients autograd hands over later than those of what is made from now on.

    Megatron's DDP with ``overlap_grad_reduce`` and DeepSpeed's ZeRO reduce over data-parallel ranks in the order in
    which gradients come, and those ranks run other plans: so gradients must come in one order under every strategy,
    Megatron's own. Autograd runs the newest node that is ready, so one made early holds its gradients back.
    """
    given = [parameter for parameter in parameters if parameter is not None]
    left = iter(_InTurn.apply(*given) if given else ())
    return tuple(None if parameter is None else next(left) for parameter in parameters)


class ColumnLinear(torch.autograd.Function):
    """[..., k] x shard [n / p, k] -> [..., n]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Tensor, group: Any) -> Tensor:
        ctx.save_for_backward(x, shard)
        ctx.group, ctx.weight = group, shard
        return x @ start_all_gather(shard, group).wait().t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, shard = ctx.saved_tensors
        grad_x = reduced = None
        gathering = start_all_gather(shard, ctx.group) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            grad_weight = _rows(grad).t() @ _rows(x)
            reduced = start_reduce_scatter(grad_weight, ctx.group)
            del grad_weight
        if gathering:
            grad_x = grad @ gathering.wait()
            del gathering
        return grad_x, _taken(reduced, ctx.weight), None


class RowLinear(torch.autograd.Function):
    """[..., k] x shard [n, k / p] -> [..., n]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Tensor, group: Any) -> Tensor:
        ctx.save_for_backward(x, shard)
        ctx.group, ctx.weight = group, shard
        slabs = _slabs(start_all_gather(shard, group).wait(), shard)
        whole = slabs.transpose(0, 1).reshape(shard.shape[0], -1)
        del slabs
        return x @ whole.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, shard = ctx.saved_tensors
        size = ctx.group.size()
        grad_x = reduced = None
        gathering = start_all_gather(shard, ctx.group) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            grad_slabs = grad.new_empty(size, *shard.shape)
            columns = _rows(x).unflatten(-1, (size, -1))
            for slab in range(size):
                torch.mm(_rows(grad).t(), columns[:, slab], out=grad_slabs[slab])
            reduced = start_reduce_scatter(grad_slabs.flatten(0, 1), ctx.group)
            del grad_slabs
        if gathering:
            slabs = _slabs(gathering.wait(), shard)
            grad_x = torch.cat([grad @ slabs[slab] for slab in range(size)], -1)
            del slabs, gathering
        return grad_x, _taken(reduced, ctx.weight), None


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _slabs(gathered: Tensor, shard: Tensor) -> Tensor:
    """[p * n, k / p] -> [p, n, k / p]."""
    return gathered.unflatten(0, (-1, shard.shape[0]))


def _taken(reduced: Any, weight: Tensor) -> Tensor | None:
    if reduced is None:
        return None
    fused_gradients_begin_anew(weight)
    return reduced.wait()
