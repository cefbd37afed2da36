"""`grass::squared_norm`: the squared L2 norm of a flat tensor, on its device, in one fixed order of additions.

All in fp32, each operation rounded once. A segment of 4096 values is 16 rows of 256 lanes. Rows are squared and added
one after the other, lane by lane; then the lanes are folded, the upper half onto the lower, until one is left. The sums
of segments are added in the same way, as values of the next level, until one sum is left. Values that a segment lacks
are zeros. So no term passes through more than 24 additions a level, and every kernel gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_grass.ops.library import FLOATS, FLOATS_TEXT, chunks, define

_NAME = "grass::squared_norm"
_ROWS = 16
_LANES = 256
_SEGMENT = _ROWS * _LANES  # divides every chunk


def squared_norm(x: Tensor) -> Tensor:
    """Sum of squares of `x`, [n] fp32, bf16 or fp16: an fp32 scalar, 0-d, on the device of `x`. The host never waits.

    The sum over no elements is 0. Raises RuntimeError when `x` is not flat and contiguous or of another dtype.
    """
    return _op(x)


def squared_norm_specification(x: Tensor) -> Tensor:
    """The PyTorch kernel and specification. Its temporaries are of one chunk."""
    _check(x)
    sums = torch.zeros(-(-x.numel() // _SEGMENT), dtype=torch.float32, device=x.device)
    for chunk in chunks(x.numel(), 0, x.device):
        values = x[chunk].float()
        parts = _add_segments(values * values)
        sums[chunk.start // _SEGMENT :][: parts.numel()] = parts
    while sums.numel() > 1:
        sums = _add_segments(sums)
    return sums.sum()  # of one, or none


def _add_segments(values: Tensor) -> Tensor:
    """The sum of each segment of the fp32 tensor `values`, [n]: fp32 [ceil(n / 4096)]."""
    segments = -(-values.numel() // _SEGMENT)
    missing = segments * _SEGMENT - values.numel()
    rows = torch.nn.functional.pad(values, (0, missing)).view(segments, _ROWS, _LANES)
    lanes = rows[:, 0].clone()
    for row in range(1, _ROWS):
        lanes += rows[:, row]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def _check(x: Tensor) -> Tensor:
    """The preconditions, and the fake's result."""
    torch._check(
        x.dim() == 1 and x.is_contiguous(),
        lambda: f"{_NAME}: x has {x.dim()} dimensions or gaps; pass a flat contiguous tensor",
    )
    torch._check(x.dtype in FLOATS, lambda: f"{_NAME}: x is {x.dtype}; use {FLOATS_TEXT}")
    return x.new_empty((), dtype=torch.float32)


_op = define("squared_norm(Tensor x) -> Tensor", kernel=squared_norm_specification, fake=_check)
