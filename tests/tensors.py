"""What tests of kernels ask of tensors: random shards, their bits, and how much an operation allocates."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
WEIGHTS = [(FP32, True), (BF16, True), (FP16, True), (FP32, False), (BF16, False)]
"""dtype of the weights, and whether they have a master."""


def make_shard(n, param=FP32, master=False, moments=FP32, grad=FP32, seed=0, start=0):
    """Random tensors (param, master, exp_avg, exp_avg_sq, grad) of `n` elements, gradients over twelve decades."""
    generator = torch.Generator().manual_seed(seed)
    weights, first, second, gradient = torch.randn(4, n + start, generator=generator)
    scale = 10.0 ** torch.randint(-10, 3, (n + start,), generator=generator)
    tensors = (
        weights.to(param),
        weights.clone() if master else None,
        (0.1 * first * scale).to(moments),
        (second * scale).square().to(moments),
        (gradient * scale).to(grad),
    )
    return [None if tensor is None else tensor[start:] for tensor in tensors]


def clone(shard):
    return [None if tensor is None else tensor.clone() for tensor in shard]


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, so that zeros of either sign differ and NaNs compare."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.itemsize])


def assert_same_bits(left: Iterable[Tensor | None], right: Iterable[Tensor | None]) -> None:
    for position, (one, other) in enumerate(zip(left, right, strict=True)):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(bits(one), bits(other)), f"tensor {position}"


class LargestResult(TorchDispatchMode):
    """Notes the largest tensor that any operation allocates."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view and result._base is None:
            known = any(result is argument for argument in args)
            self.numel = (
                self.numel if known else max(self.numel, result.untyped_storage().nbytes() // result.itemsize)
            )
        return result
