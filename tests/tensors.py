"""What tests of kernels ask of tensors: their bits, and how much an operation allocates."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


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
