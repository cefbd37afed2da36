"""`grass::transfer_`: rows of bytes between the host and the device, as one copy on the current stream.

A unit's state is one range of bytes and moves as one row. A slice of it is one row from each of its parts: they lie at
equal distances, so the device's copy engine gathers and scatters them within the same single copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_grass.ops.library import define

_NAME = "grass::transfer_"


def transfer_(destination: Tensor, source: Tensor) -> None:
    """Copy `source` to `destination`, both uint8 [rows, width] with neighbouring bytes in a row, rows not overlapping.

    Does not wait for a copy between a device and pinned memory: the caller orders what reads the destination behind it,
    and keeps both alive. Raises RuntimeError for other shapes and dtypes.
    """
    _op(destination, source)


def transfer_specification(destination: Tensor, source: Tensor) -> None:
    """The PyTorch kernel and specification. Row by row: rows with gaps would pass through temporaries."""
    _check(destination, source)
    for row in range(source.shape[0]):
        destination[row].copy_(source[row], non_blocking=True)


def _check(destination: Tensor, source: Tensor) -> None:
    _check_side("destination", destination)
    _check_side("source", source)
    torch._check(
        destination.shape == source.shape,
        lambda: (
            f"{_NAME}: destination is {destination.shape[0]} x {destination.shape[1]} bytes but source is "
            f"{source.shape[0]} x {source.shape[1]}; pass two of one shape"
        ),
    )


def _check_side(name: str, side: Tensor) -> None:
    torch._check(side.dtype == torch.uint8, lambda: f"{_NAME}: {name} is {side.dtype}; use uint8")
    torch._check(
        side.dim() == 2
        and (side.shape[1] <= 1 or side.stride(1) == 1)
        and (side.shape[0] <= 1 or side.stride(0) >= side.shape[1]),
        lambda: (
            f"{_NAME}: {name} has {side.dim()} dimensions or rows with gaps; pass rows of neighbouring bytes, "
            "one behind the other"
        ),
    )


_op = define(
    "transfer_(Tensor(a!) destination, Tensor source) -> ()", kernel=transfer_specification, fake=_check
)
