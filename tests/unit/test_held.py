"""Contracts of watching a step where the device counts what is held, on a device that is pretended."""

from __future__ import annotations

import torch
from torch import nn

from megatron_ext import device_peak
from megatron_ext.config import MemoryConfig
from megatron_ext.rank_memory import RankMemory
from megatron_ext.recompute.held import Held


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2)])


def test_watching_hooks_no_saved_tensor_where_the_device_counts(monkeypatch):
    watched = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 1000)
    monkeypatch.setattr(device_peak, "watch", watched.append)
    monkeypatch.setattr(RankMemory, "device_counts", True)
    block, memory = Block(), RankMemory(MemoryConfig(limit="1GB"), 1)
    memory.add(block)
    held = Held({block: None}, memory)
    given = torch.ones(3, requires_grad=True)
    with memory.step(), held.watched():
        assert held.is_watching
        assert given.sin().grad_fn._saved_self is given  # what a hook gives back would be another
    assert not held.is_watching
    assert len(watched) == 1
