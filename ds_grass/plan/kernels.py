"""What a replay on the meta device puts in the place of three functions, so that it saves what the device's kernels do.

Attention: flash and memory-efficient kernels keep their output and one number a row, never the scores; the meta device
by itself would take the kernel that keeps them. Dropout: CUDA keeps a mask of one byte an element, the CPU one of the
input's dtype. Linear: stage 3 has its own. The functions are replaced by name, for a mode would not reach into what
backward recomputes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F


@contextlib.contextmanager
def device_kernels(device: str, *, partitioned: bool) -> Iterator[None]:
    """`device`: "cuda" or "cpu". `partitioned`: the weights are sharded by DeepSpeed's stage 3."""
    with contextlib.ExitStack() as replaced:
        replaced.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _attention))
        if device == "cuda":
            replaced.enter_context(mock.patch.object(F, "dropout", _dropout))
        if partitioned:
            replaced.enter_context(mock.patch.object(F, "linear", _linear))
        yield


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
               is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
    """[batch, heads, length, width] each; dropout keeps the state of a generator."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)  # every kernel adds its mask
    if attn_mask is not None and attn_mask.requires_grad:  # a learned bias, which one kernel differentiates
        mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(query, key, value, mask, True, 0.0, is_causal, scale=scale)[0]
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return MemoryEfficientLinear.apply(input, weight, bias)


class MemoryEfficientLinear(torch.autograd.Function):
    """What DeepSpeed puts in the place of `F.linear` in stage 3: it saves its input even where the weight rests."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight, bias)
        if input.dim() == 2 and bias is not None:
            return torch.addmm(bias, input, weight.t())
        output = input.matmul(weight.t())
        if bias is not None:
            output += bias
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_input = gradient.matmul(weight) if needs_input else None
        of_weight = rows.t().matmul(input.reshape(-1, input.shape[-1])) if needs_weight else None
        of_bias = rows.sum(0) if bias is not None and needs_bias else None
        return of_input, of_weight, of_bias
