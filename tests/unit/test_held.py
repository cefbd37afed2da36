"""Contracts of what a rank holds where the device counts it, on a device that is pretended."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_ext import device_peak
from megatron_ext.config import MemoryConfig
from megatron_ext.recompute.held import Held
from megatron_ext.sequence_parallel.budget import STATE_BYTES

WEIGHTS, FLOAT = 6, 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2)])


@pytest.fixture
def device(monkeypatch):
    """Bytes that PyTorch's allocator would say; nothing else of CUDA is asked."""
    said = {"allocated": 1000, "watched": 0}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: said["allocated"])
    monkeypatch.setattr(device_peak, "watch", lambda _device: said.update(watched=said["watched"] + 1))
    monkeypatch.setattr(Held, "counts_everything", True)
    return said


@pytest.fixture
def held(device):
    return Held({Block(): None}, MemoryConfig(limit="1GB"), 1)


def give_gradients(held: Held) -> None:
    for parameter in held.block.parameters():
        parameter.grad = torch.zeros_like(parameter)


def test_before_steps_gradients_and_states_are_counted_that_are_still_to_come(held):
    assert held.static() == 1000 + WEIGHTS * (FLOAT + STATE_BYTES)
    give_gradients(held)
    assert held.static() == 1000 + WEIGHTS * STATE_BYTES


def test_in_a_step_static_is_what_was_there_when_it_began_however_much_is_open(held, device):
    give_gradients(held)
    with held.step():
        device["allocated"] += 500
        assert (held.static(), held.activations()) == (1000, 500)
    with held.step():
        assert (held.static(), held.activations()) == (1500, 0)


def test_gradients_that_are_freed_between_steps_come_back(held):
    with held.step():
        give_gradients(held)  # a plan may be made anew when some are there already
        assert held.static() == 1000 + WEIGHTS * FLOAT
    held.block.zero_grad()
    for parameter in held.block.parameters():
        parameter.main_grad = torch.zeros_like(parameter)  # of Megatron-core's buffers, which stay
    with held.step():
        assert held.static() == 1000


def test_what_stays_after_measuring_is_nobodys_activation(held, device):
    give_gradients(held)
    with held.step():
        device["allocated"] += 100  # the embedding
        with held.stays():
            device["allocated"] += 30  # a workspace
        assert (held.static(), held.activations()) == (1030, 100)


def test_watching_hooks_no_saved_tensor_where_the_device_counts(held, device):
    given = torch.ones(3, requires_grad=True)
    with held.step(), held.watched():
        assert held.is_watching
        assert given.sin().grad_fn._saved_self is given  # what a hook gives back would be another
    assert not held.is_watching
    assert device["watched"] == 1
