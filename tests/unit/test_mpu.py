"""Contracts of the mpu adapter: it answers all that DeepSpeed asks, with Megatron-core's groups."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch.distributed as dist

from megatron_ext import mpu

ANSWERED_BY_NOBODY = {
    # Their presence would tell DeepSpeed that the mpu is one of its own.
    "initialize_sequence_parallel",
    "_init_tp_mesh_device",
}


@pytest.fixture
def megatron(monkeypatch):
    """A stand-in for Megatron-core whose groups are lists of global ranks: 8 ranks, TP 2, CP 2, DP 2, rank 3."""
    state = ModuleType("megatron.core.parallel_state")
    state.initialized = True
    state.model_parallel_is_initialized = lambda: state.initialized
    state.get_model_parallel_group = lambda: [2, 3]
    state.get_tensor_model_parallel_group = lambda: [2, 3]
    state.get_tensor_model_parallel_rank = lambda: 1
    state.get_tensor_model_parallel_world_size = lambda: 2
    state.get_tensor_model_parallel_src_rank = lambda: 2
    state.get_pipeline_model_parallel_group = lambda: [3]
    state.get_pipeline_model_parallel_rank = lambda: 0
    state.get_pipeline_model_parallel_world_size = lambda: 1
    state.get_context_parallel_group = lambda: [1, 3]
    state.get_context_parallel_rank = lambda: 1
    state.get_context_parallel_world_size = lambda: 2
    state.get_data_parallel_group = lambda with_context_parallel=False: (
        [1, 3, 5, 7] if with_context_parallel else [3, 7]
    )
    state.get_data_parallel_rank = lambda: 0
    state.get_data_parallel_world_size = lambda: 2
    core = ModuleType("megatron.core")
    core.parallel_state = state
    monkeypatch.setitem(sys.modules, "megatron", ModuleType("megatron"))
    monkeypatch.setitem(sys.modules, "megatron.core", core)
    monkeypatch.setattr(dist, "get_rank", lambda group: group.index(3))
    monkeypatch.setattr(dist, "get_world_size", lambda group: len(group))
    monkeypatch.setattr(dist, "get_process_group_ranks", list)
    return state


def test_every_answer_is_megatrons(megatron):
    answers = {name: getattr(mpu, name)() for name in dir(mpu) if name.startswith("get_")}
    assert answers == {
        "get_model_parallel_group": [2, 3],
        "get_model_parallel_rank": 1,
        "get_model_parallel_world_size": 2,
        "get_tensor_model_parallel_group": [2, 3],
        "get_tensor_model_parallel_rank": 1,
        "get_tensor_model_parallel_world_size": 2,
        "get_tensor_model_parallel_src_rank": 2,
        "get_slice_parallel_group": [2, 3],
        "get_slice_parallel_rank": 1,
        "get_slice_parallel_world_size": 2,
        "get_pipeline_model_parallel_group": [3],
        "get_pipeline_model_parallel_rank": 0,
        "get_pipeline_model_parallel_world_size": 1,
        "get_pipe_parallel_group": [3],
        "get_pipe_parallel_rank": 0,
        "get_pipe_parallel_world_size": 1,
        "get_data_parallel_group": [3, 7],
        "get_data_parallel_rank": 0,
        "get_data_parallel_world_size": 2,
        "get_data_parallel_group_ranks": [3, 7],
        "get_sequence_parallel_group": [1, 3],
        "get_sequence_parallel_rank": 1,
        "get_sequence_parallel_world_size": 2,
        "get_sequence_data_parallel_group": [1, 3, 5, 7],
        "get_sequence_data_parallel_rank": 1,
        "get_sequence_data_parallel_world_size": 4,
    }


def test_everything_that_deepspeed_calls_on_an_mpu_is_answered():
    """Read from the installed sources, so that a new release that asks more is noticed."""
    spec = importlib.util.find_spec("deepspeed")
    if spec is None:
        pytest.skip("deepspeed is not installed")
    called = set()
    for path in Path(spec.origin).parent.rglob("*.py"):
        called |= set(re.findall(r"\bmpu\.(_?[a-z]\w*)\(", path.read_text()))
    assert len(called) > 15
    assert {name for name in called - ANSWERED_BY_NOBODY if not hasattr(mpu, name)} == set()
    assert not any(hasattr(mpu, name) for name in ANSWERED_BY_NOBODY)


def test_groups_that_are_not_initialised_are_an_error_with_the_call_to_make(megatron):
    megatron.initialized = False
    with pytest.raises(RuntimeError, match="call megatron.core.parallel_state.initialize_model_parallel"):
        mpu.get_model_parallel_rank()


def test_megatron_that_is_not_installed_is_an_error_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron", None)
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    with pytest.raises(ImportError, match="needs Megatron-core, .*; pip install megatron-core"):
        mpu.get_data_parallel_group()


def test_import_loads_neither_torch_nor_megatron():
    source = (
        "import sys, megatron_ext.mpu\n"
        "import megatron_ext; assert megatron_ext.mpu is sys.modules['megatron_ext.mpu']\n"
        "print([name for name in ('torch', 'megatron', 'deepspeed') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr
