"""What this rank holds, and what it may hold: the effects around a stage's plan.

On a GPU the device counts: what is allocated, and the most that was. On a CPU nothing does, so what is held is weights,
gradients and optimizer states by their parameters, and what autograd saves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .. import device_peak
from ..config import MemoryConfig
from ..sequence_parallel import budget
from ..sequence_parallel.switch import group_of
from .saved_bytes import SavedBytes


class Held:
    """Bytes of this rank, whose transformer blocks are the keys of `blocks`; more may come."""

    def __init__(self, blocks: Mapping[nn.Module, Any], memory: MemoryConfig, ranks_on_node: int):
        self._blocks, self._memory, self._ranks_on_node = blocks, memory, ranks_on_node
        self._saved_peak = 0
        self.saved: SavedBytes | None = None
        """What autograd holds, while a step is watched."""

    @property
    def block(self) -> nn.Module:
        """Any that has layers."""
        return next(block for block in self._blocks if len(block.layers))

    @property
    def device(self) -> torch.device:
        return next(self.block.parameters()).device

    @property
    def counts_everything(self) -> bool:
        """Whether `peak` has transients in it, too."""
        return self.device.type == "cuda"

    def limit(self) -> int:
        """Without what others than PyTorch hold on the device (its context, NCCL) where it is a share of the device."""
        limit = budget.limit_of(self._memory, self.device, self._ranks_on_node)
        if self._memory.limit is not None or self.device.type != "cuda":
            return limit
        free, total = torch.cuda.mem_get_info(self.device)
        of_others = max(0, total - free - torch.cuda.memory_reserved(self.device))
        return limit - int(self._memory.fraction * of_others)

    def static(self) -> int:
        """Weights, gradients, optimizer states."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return sum(budget.static_bytes(block, self.device) for block in self._blocks)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around the step of which `peak` tells."""
        if self.device.type == "cuda":
            device_peak.watch(self.device)
        self.saved = SavedBytes(parameter for block in self._blocks for parameter in block.parameters())
        try:
            with self.saved:
                yield
            self._saved_peak = self.saved.peak
        finally:
            self.saved = None

    def peak(self) -> int:
        """The most that was held in the step that was watched last."""
        if self.device.type == "cuda":
            return device_peak.peak_bytes(self.device)
        return self.static() + self._saved_peak

    def most_of_group(self, number: int) -> int:
        """The same on all ranks of the tensor-parallel group."""
        group = group_of(self.block)
        if group.size() == 1:
            return number
        most = torch.tensor([number], device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        return int(most.item())
