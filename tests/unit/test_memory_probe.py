"""Contracts of what a layer is measured to keep: what lives when its forward has ended, as large as it is then."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.sequence_parallel import memory_probe

N, FLOAT = 1024, 4
BYTES = N * FLOAT


def vector() -> Tensor:
    return torch.rand(N).requires_grad_()


def test_kept_is_what_backward_needs_and_transient_what_comes_on_top():
    x = vector()
    kept, transient = memory_probe.measure(lambda: x.exp().sin().cos(), x, [])
    assert kept == 2 * BYTES  # inputs of sin and cos; exp's own result is the first
    assert transient >= BYTES


def test_weights_are_there_anyway():
    x, weight = vector(), vector()
    assert (
        memory_probe.measure(lambda: (x * weight).sin(), x, [weight])[0] == 2 * BYTES
    )  # the factor x, sin's input


def test_what_the_forward_empties_itself_is_not_kept():
    """As Megatron-core does with what it will compute again just before it is needed."""

    class Discarding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, given: Tensor) -> Tensor:
            inner = given.detach().exp()
            ctx.save_for_backward(given, inner)
            y = inner.sin()
            inner.untyped_storage().resize_(0)
            return y

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            given, _ = ctx.saved_tensors
            return gradient * given.exp().cos() * given.exp()

    x = vector()
    kept, _ = memory_probe.measure(lambda: Discarding.apply(x), x, [])
    assert kept == BYTES  # the input
