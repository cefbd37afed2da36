"""The job's gradient reducer in a replay: the same buffers at the same times, each counted as what it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ds_grass.plan.ledger import GRADIENTS, IN_FLIGHT, Ledger
from ds_grass.zero.reducer import Filling, GradientReducer
from ds_grass.zero.shards import empty_buffer


class ReplayedReducer(GradientReducer):
    """Only the collective is left out."""

    def __init__(self, ledger: Ledger, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._ledger = ledger

    def arrived(self, param: nn.Parameter) -> None:
        with self._ledger.holding(IN_FLIGHT):
            super().arrived(param)

    def flush(self) -> None:
        with self._ledger.holding(IN_FLIGHT):
            super().flush()

    def _reduce(self, key: int, buffer: Tensor) -> Tensor:
        with self._ledger.holding(GRADIENTS):
            return super()._reduce(key, buffer)

    def _accumulate(self, key: int, shard: Tensor) -> None:
        super()._accumulate(key, shard)
        self._ledger.assign(self.shards[key], GRADIENTS)  # on one rank the buffer itself becomes the shard

    def hold_sums(self) -> None:
        """As the micro-batches before the last leave it: a sum of gradients for every active unit."""
        with self._ledger.holding(GRADIENTS):
            for key in self.order:
                layout, dtype = self.layouts[key], self.averaging.sum_dtype
                if self.partitioned:
                    self.shards[key] = torch.empty(layout.shard_numel, dtype=dtype, device=self.device)
                else:
                    every = set(range(self._sizes[key]))
                    self._filling[key] = Filling(empty_buffer(layout, dtype, self.device), written=every)

    def _reduce_scatter(self, shard: Tensor, buffer: Tensor) -> None:
        """NCCL needs nothing besides the two."""
