"""How a unit's gradients lie in one flat buffer, and which part of it this rank owns.

Two layouts, one interface. Stages 0-2 keep a unit's parameters one after the other and cut the whole into equal
slices, one a rank. Stage 3 follows DeepSpeed: every parameter is cut into equal parts by itself, and a rank's shard is
the row of its parts. In both, rank r's shard is `buffer[r * shard_numel : (r + 1) * shard_numel]`, so one
reduce-scatter serves a whole unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

ALIGNMENT_BYTES = 32
"""Each rank's slice starts at a multiple of this, so that vector loads stay aligned."""


class ShardLayout(Protocol):
    """Where the gradient of each parameter of one unit goes."""

    numel: int
    """Elements of the whole buffer, padding included."""
    shard_numel: int
    """Elements of one rank's shard."""

    def store(self, buffer: Tensor, index: int, grad: Tensor, *, accumulate: bool) -> None:
        """Copy (or add) the gradient of parameter `index`, any shape, into its place in `buffer` (1-D, `numel`)."""

    def clear(self, buffer: Tensor, index: int) -> None:
        """Zero the place of parameter `index`, for one that got no gradient."""

    def clear_padding(self, buffer: Tensor) -> None:
        """Zero what belongs to no parameter."""

    def owned(self, index: int) -> tuple[int, int]:
        """Half-open range of parameter `index` inside this rank's shard, padding excluded; may be empty."""

    def source(self, index: int) -> int:
        """Where in the flat parameter `index` that range begins."""


class FlatShards:
    """[p0 | p1 | ... | padding], rank r owns the r-th of `world_size` equal slices (stages 0-2)."""

    def __init__(self, sizes: Sequence[int], world_size: int, rank: int, element_bytes: int):
        self.sizes = tuple(sizes)
        self.offsets = tuple(sum(sizes[:i]) for i in range(len(sizes)))
        step = max(1, ALIGNMENT_BYTES // element_bytes) * world_size
        self.lean_numel = sum(sizes)
        self.numel = -(-self.lean_numel // step) * step
        self.shard_numel = self.numel // world_size
        self.rank = rank

    def view(self, buffer: Tensor, index: int) -> Tensor:
        """The place of parameter `index` in a buffer, 1-D."""
        return buffer.narrow(0, self.offsets[index], self.sizes[index])

    def store(self, buffer: Tensor, index: int, grad: Tensor, *, accumulate: bool) -> None:
        place = self.view(buffer, index).view(grad.shape)
        place.add_(grad) if accumulate else place.copy_(grad)

    def clear(self, buffer: Tensor, index: int) -> None:
        self.view(buffer, index).zero_()

    def clear_padding(self, buffer: Tensor) -> None:
        buffer.narrow(0, self.lean_numel, self.numel - self.lean_numel).zero_()

    def owned(self, index: int) -> tuple[int, int]:
        first = self.rank * self.shard_numel
        start = min(max(self.offsets[index] - first, 0), self.shard_numel)
        stop = min(max(self.offsets[index] + self.sizes[index] - first, 0), self.shard_numel)
        return start, stop

    def source(self, index: int) -> int:
        return max(0, self.rank * self.shard_numel - self.offsets[index])

    @property
    def padding(self) -> int:
        """Elements of this rank's shard that belong to no parameter."""
        return max(0, min(self.shard_numel, (self.rank + 1) * self.shard_numel - self.lean_numel))


class ParameterShards:
    """Every parameter is cut into `world_size` equal parts; a shard is the row of a rank's parts (stage 3)."""

    def __init__(self, sizes: Sequence[int], world_size: int, rank: int):
        self.sizes = tuple(sizes)
        self.parts = tuple(-(-size // world_size) for size in sizes)
        self.columns = tuple(sum(self.parts[:i]) for i in range(len(sizes)))
        self.world_size = world_size
        self.shard_numel = sum(self.parts)
        self.numel = self.shard_numel * world_size
        self.rank = rank

    def _place(self, buffer: Tensor, index: int) -> Tensor:
        """The (world_size, part) places of parameter `index`."""
        return buffer.view(self.world_size, self.shard_numel).narrow(
            1, self.columns[index], self.parts[index]
        )

    def store(self, buffer: Tensor, index: int, grad: Tensor, *, accumulate: bool) -> None:
        place, flat, part = self._place(buffer, index), grad.reshape(-1), self.parts[index]
        full_rows = self.sizes[index] // part
        pairs = [(place[:full_rows], flat[: full_rows * part].view(full_rows, part))]
        rest = self.sizes[index] - full_rows * part
        if rest:
            pairs.append((place[full_rows, :rest], flat[full_rows * part :]))
        for target, source in pairs:
            target.add_(source) if accumulate else target.copy_(source)
        if not accumulate and full_rows < self.world_size:
            place[full_rows, rest:].zero_()
            place[full_rows + 1 :].zero_()

    def clear(self, buffer: Tensor, index: int) -> None:
        self._place(buffer, index).zero_()

    def clear_padding(self, buffer: Tensor) -> None:
        """Padding lies inside each parameter's own place and is cleared with it."""

    def owned(self, index: int) -> tuple[int, int]:
        start = self.columns[index]
        real = min(max(self.sizes[index] - self.rank * self.parts[index], 0), self.parts[index])
        return start, start + real

    def source(self, index: int) -> int:
        return self.rank * self.parts[index]


def flatten(layout: FlatShards, params: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Move the parameters of one unit into one new buffer, of which they become views."""
    flat = torch.empty(layout.numel, dtype=dtype, device=device)
    layout.clear_padding(flat)
    for index, param in enumerate(params):
        place = layout.view(flat, index).view(param.shape)
        place.copy_(param.data)
        param.data = place
    return flat


def empty_buffer(layout: ShardLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer for one unit's gradients; every place is written before it is read."""
    return torch.empty(layout.numel, dtype=dtype, device=device)
