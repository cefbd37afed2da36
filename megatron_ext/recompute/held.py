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
from ..saved_bytes import SavedBytes, place_of
from ..sequence_parallel import budget
from .planning_group import planning_group


class Held:
    """Bytes of this rank, whose transformer blocks are the keys of `blocks`; more may come."""

    def __init__(self, blocks: Mapping[nn.Module, Any], memory: MemoryConfig, ranks_on_node: int):
        self._blocks, self._memory, self._ranks_on_node = blocks, memory, ranks_on_node
        self._saved_peak = 0
        self._saved: SavedBytes | None = None
        self._at_start: int | None = None
        """Allocated on the device when the step began that is running."""
        self._to_come = 0
        """Gradients that were not there then."""
        self.is_watching = False

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
        """Weights, gradients, optimizer states. On a GPU what there is when a step begins; what may be still to come,
        gradients and outside of steps optimizer states, is counted by parameter."""
        if not self.counts_everything:
            return sum(budget.static_bytes(block, self.device) for block in self._blocks)
        if self._at_start is not None:
            return self._at_start + self._to_come
        states = budget.STATE_BYTES * sum(parameter.numel() for parameter in self._trained())
        return torch.cuda.memory_allocated(self.device) + self._gradients_to_come() + states

    def _gradients_to_come(self) -> int:
        """Of parameters that have neither a gradient nor a place in Megatron-core's buffers."""
        without = (p for p in self._trained() if p.grad is None and not hasattr(p, "main_grad"))
        return sum(parameter.numel() * parameter.element_size() for parameter in without)

    def _trained(self) -> Iterator[nn.Parameter]:
        return (p for block in self._blocks for p in block.parameters() if p.requires_grad)

    def activations(self) -> int:
        """Held by the micro-batches of the step that is being watched."""
        if self._at_start is not None:
            return torch.cuda.memory_allocated(self.device) - self._at_start
        assert self._saved is not None
        return self._saved.now

    @contextmanager
    def stays(self) -> Iterator[None]:
        """What the device still holds after this was not there before, but is nobody's activation: workspaces."""
        before = torch.cuda.memory_allocated(self.device) if self._at_start is not None else 0
        yield
        if self._at_start is not None:
            self._at_start += torch.cuda.memory_allocated(self.device) - before

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each step."""
        if self.counts_everything:
            self._at_start = torch.cuda.memory_allocated(self.device)
            self._to_come = self._gradients_to_come()
        try:
            yield
        finally:
            self._at_start = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around the step of which `peak` tells.

        No hooks on saved tensors where the device counts: what they give back is not the parameter that was saved,
        and kernels which add to a main gradient look for their marks on it.
        """
        self.is_watching = True
        try:
            if self.counts_everything:
                device_peak.watch(self.device)
                yield
                return
            parameters = (parameter for block in self._blocks for parameter in block.parameters())
            self._saved = SavedBytes(place_of(parameter) for parameter in parameters)
            with self._saved:
                yield
            self._saved_peak = self._saved.peak
        finally:
            self._saved, self.is_watching = None, False

    def peak(self) -> int:
        """The most that was held in the step that was watched last."""
        if self.counts_everything:
            return device_peak.peak_bytes(self.device)
        return self.static() + self._saved_peak

    def most_of_group(self, *numbers: int) -> list[int]:
        """The largest of each, the same on all ranks that hold one plan."""
        group = planning_group(self.block)
        if group.size() == 1:
            return list(numbers)
        most = torch.tensor(numbers, device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        return most.tolist()
