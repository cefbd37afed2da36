"""Contracts of what a rank holds besides activations, on a device that is pretended and by parameter."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from megatron_ext.config import MemoryConfig
from megatron_ext.rank_memory import STATE_BYTES, RankMemory, bytes_by_parameter

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


class Engine:
    global_steps = 0


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
    memory = memory_of(block := nn.Linear(2, 2))
    with pytest.raises(RuntimeError), memory.step():
        raise RuntimeError
    assert block.training
    assert memory.static() == 1000 + WEIGHTS * (FLOAT + STATE_BYTES)


def test_states_of_all_that_the_rank_trains_are_to_come_each_once(allocated):
    block, other, frozen = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    memory = memory_of(block, model := nn.Sequential(block, other, frozen))
    give_gradients(*model[:2])
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


def test_as_many_gradients_are_to_come_as_the_last_step_left(allocated):
    block, never = nn.Linear(2, 2), nn.Linear(2, 2)
    memory = memory_of(block, never)
    with memory.step():
        give_gradients(block)
        allocated[0] += WEIGHTS * FLOAT
    with memory.step():  # they were not freed
        assert memory.static() == 1000 + WEIGHTS * FLOAT
    block.zero_grad()
    allocated[0] -= WEIGHTS * FLOAT
    with memory.step():
        assert memory.static() == 1000 + WEIGHTS * FLOAT
        give_gradients(block)  # a plan may be made anew when some are there already
        assert memory.static() == 1000 + WEIGHTS * FLOAT


def test_gradients_in_buffers_of_megatron_core_are_there_already(allocated):
    block = nn.Linear(2, 2)
    for parameter in block.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    memory = memory_of(block)
    assert memory.static() == 1000 + WEIGHTS * STATE_BYTES
    run_step(memory)
    with memory.step():
        assert memory.static() == 1000


def test_what_only_evaluates_has_nothing_to_come(allocated):
    memory = memory_of(reference := nn.Linear(2, 2).eval())
    assert memory.static() == 1000
    assert not reference.training


def test_a_model_that_is_dropped_is_forgotten():
    memory = memory_of(kept := nn.Linear(2, 2), nn.Linear(4, 4))
    gc.collect()
    assert memory.static() == bytes_by_parameter(kept.parameters())


def test_a_rank_without_parameters_counts_nothing():
    memory = memory_of()
    with memory.step():
        assert memory.static() == 0
    assert memory.device == torch.device("cpu")


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


def test_engines_count_their_own_steps_from_the_first_question(allocated):
    block, engine, another = nn.Linear(2, 2), Engine(), Engine()
    memory = memory_of(block)
    memory.count_steps_of(engine)
    memory.count_steps_of(another)  # which never steps
    give_gradients(block)
    engine.global_steps = 1000  # a checkpoint was loaded
    assert (memory.steps_ended, memory.static()) == (0, 1000 + WEIGHTS * STATE_BYTES)
    engine.global_steps += 1
    assert (memory.steps_ended, memory.static()) == (1, 1000)
    del engine
    gc.collect()
    assert memory.steps_ended == 1


def test_room_is_what_may_be_taken_now(allocated):
    memory = RankMemory(MemoryConfig(limit=1500), 1)
    memory.add(block := nn.Linear(2, 2))
    assert (memory.room(), memory.limit() - memory.static()) == (500, 500 - WEIGHTS * (FLOAT + STATE_BYTES))
    allocated[0] = 2000
    assert memory.room() == 0
    assert block.training


def test_where_nothing_counts_all_is_added_up_by_parameter():
    block, frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    memory = memory_of(block, model := nn.Sequential(block, frozen))
    assert memory.static() == bytes_by_parameter(model.parameters())
    assert memory.static() == WEIGHTS * (2 * FLOAT + STATE_BYTES) + WEIGHTS * FLOAT
    with memory.step():
        assert not memory.in_step


def test_a_share_of_a_device_is_of_what_others_leave(allocated, monkeypatch):
    memory = RankMemory(MemoryConfig(fraction=0.5), 1)
    memory.add(nn.Linear(2, 2))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (5_000, 10_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 3_000)
    assert memory.limit() == (10_000 - 2_000) // 2
