"""Contracts of what a rank holds besides activations, on a device that is pretended and by parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_ext.config import MemoryConfig
from megatron_ext.rank_memory import STATE_BYTES, RankMemory

WEIGHTS, FLOAT = 6, 4


@pytest.fixture
def allocated(monkeypatch):
    """Bytes that PyTorch's allocator would say, as a list of one; nothing else of CUDA is asked."""
    said = [1000]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: said[0])
    monkeypatch.setattr(RankMemory, "device_counts", True)
    return said


def memory_of(*modules: nn.Module) -> RankMemory:
    memory = RankMemory(MemoryConfig(limit="1GB"), 1)
    for module in modules:
        memory.add(module)
    return memory


def give_gradients(*modules: nn.Module) -> None:
    for parameter in (p for module in modules for p in module.parameters()):
        parameter.grad = torch.zeros_like(parameter)


def run_step(memory: RankMemory) -> None:
    with memory.step():
        pass


def test_until_a_step_has_ended_gradients_and_states_are_counted_that_are_still_to_come(allocated):
    block = nn.Linear(2, 2)
    memory = memory_of(block)
    assert memory.static() == 1000 + WEIGHTS * (FLOAT + STATE_BYTES)
    with memory.step():
        assert memory.static() == 1000 + WEIGHTS * (FLOAT + STATE_BYTES)
    give_gradients(block)
    assert memory.static() == 1000
    with memory.step():
        assert memory.static() == 1000


def test_a_step_that_failed_made_no_states(allocated):
    memory = memory_of(nn.Linear(2, 2))
    with pytest.raises(RuntimeError), memory.step():
        raise RuntimeError
    assert memory.static() == 1000 + WEIGHTS * (FLOAT + STATE_BYTES)


def test_states_of_all_that_the_rank_trains_are_to_come_each_once(allocated):
    block, other, frozen = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    memory = memory_of(block, nn.Sequential(block, other, frozen))
    give_gradients(block, other)
    assert memory.static() == 1000 + 2 * WEIGHTS * STATE_BYTES


def test_in_a_step_static_is_what_was_there_when_it_began_however_much_is_open(allocated):
    block = nn.Linear(2, 2)
    memory = memory_of(block)
    give_gradients(block)
    run_step(memory)
    with memory.step():
        allocated[0] += 500
        assert (memory.static(), memory.held_since_start()) == (1000, 500)
    with memory.step():
        assert (memory.static(), memory.held_since_start()) == (1500, 0)


def test_gradients_that_are_freed_between_steps_come_back(allocated):
    block = nn.Linear(2, 2)
    memory = memory_of(block)
    run_step(memory)
    with memory.step():
        give_gradients(block)  # a plan may be made anew when some are there already
        assert memory.static() == 1000 + WEIGHTS * FLOAT
    block.zero_grad()
    for parameter in block.parameters():
        parameter.main_grad = torch.zeros_like(parameter)  # of Megatron-core's buffers, which stay
    with memory.step():
        assert memory.static() == 1000


def test_what_stays_after_measuring_is_nobodys_activation(allocated):
    block = nn.Linear(2, 2)
    memory = memory_of(block)
    give_gradients(block)
    run_step(memory)
    with memory.step():
        allocated[0] += 100  # the embedding
        with memory.stays():
            allocated[0] += 30  # a workspace
        assert (memory.static(), memory.held_since_start()) == (1030, 100)


def test_an_engine_counts_its_own_steps(allocated):
    block, steps = nn.Linear(2, 2), [0]
    memory = memory_of(block)
    memory.count_steps(lambda: steps[0])
    give_gradients(block)
    assert memory.static() == 1000 + WEIGHTS * STATE_BYTES
    steps[0] = 1
    assert (memory.steps_ended, memory.static()) == (1, 1000)


def test_where_nothing_counts_all_is_added_up_by_parameter():
    block, frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    memory = memory_of(block, nn.Sequential(block, frozen))
    assert memory.static() == WEIGHTS * (2 * FLOAT + STATE_BYTES) + WEIGHTS * FLOAT
    with memory.step():
        assert not memory.in_step


def test_a_share_of_a_device_is_of_what_others_leave(allocated, monkeypatch):
    memory = RankMemory(MemoryConfig(fraction=0.5), 1)
    memory.add(nn.Linear(2, 2))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (5_000, 10_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 3_000)
    assert memory.limit() == (10_000 - 2_000) // 2
