"""A device that counts what is held, pretended: what PyTorch's allocator would say comes from the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from megatron_ext import device_peak
from megatron_ext.rank_memory import RankMemory


@contextmanager
def pretended_device(allocated: Callable[[], int], peak: Callable[[], int]) -> Iterator[None]:
    """Inside, `allocated` tells the bytes held now, `peak` the most since it was watched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankMemory, "device_counts", True)
        patch.setattr(torch.cuda, "memory_allocated", lambda _device: allocated())
        patch.setattr(device_peak, "watch", lambda _device: None)
        patch.setattr(device_peak, "peak_bytes", lambda _device: peak())
        yield
