"""What this rank holds while a step runs: the effects around a stage's plan.

On a GPU the device counts the most that was allocated. On a CPU nothing does, so what is held is what is there anyway
(:mod:`megatron_ext.rank_memory`), and what autograd saves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .. import device_peak
from ..rank_memory import RankMemory
from ..saved_bytes import SavedBytes, place_of
from .planning_group import planning_group


class Held:
    """Of this rank, whose transformer blocks are the keys of `blocks`; more may come."""

    def __init__(self, blocks: Mapping[nn.Module, Any], memory: RankMemory):
        self._blocks, self._memory = blocks, memory
        self._saved_peak = 0
        self._saved: SavedBytes | None = None
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
        return self._memory.device_counts

    def limit(self) -> int:
        """What the rank may hold."""
        return self._memory.limit()

    def static(self) -> int:
        """What is there anyway."""
        return self._memory.static()

    def stays(self) -> AbstractContextManager[None]:
        """What is held inside and not let go of is there anyway from now on."""
        return self._memory.stays()

    def activations(self) -> int:
        """Held by the micro-batches of the step that is being watched."""
        if self._memory.in_step:
            return self._memory.held_since_start()
        assert self._saved is not None
        return self._saved.now

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
