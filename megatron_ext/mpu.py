"""The model-parallel unit for ``deepspeed.initialize(..., mpu=megatron_ext.mpu)`` with Megatron-core.

Purpose: Megatron-core's own ``parallel_state`` lacks ``get_model_parallel_rank``,
``get_model_parallel_world_size`` and more that DeepSpeed asks for. This module has every ``get_*`` that
DeepSpeed 0.17 to 0.19 calls on an mpu, under the names it uses, each answered by
``megatron.core.parallel_state``.

Contract: Megatron-core is imported at the first call, not before. Call ``initialize_model_parallel`` first; an
ImportError or RuntimeError says what is missing. Model parallel means tensor and pipeline together, as in
Megatron. DeepSpeed's *sequence* parallelism, ranks that hold different tokens of one sequence, is Megatron's
context parallelism: ZeRO shards over data times context, and DeepSpeed then averages gradients over data ranks
but adds them up over context ranks, so each context rank's loss must be its share of the sequence's mean.

Not covered: expert parallelism, DeepSpeed's PipelineModule (it builds an mpu of its own), and the gradients of
norm weights under Megatron's ``sequence_parallel`` flag, which neither side reduces over the tensor group.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _state() -> ModuleType:
    """``megatron.core.parallel_state``, imported and initialised, or an error that says which it is not."""
    try:
        from megatron.core import parallel_state
    except ImportError as error:
        raise ImportError(
            f"megatron_ext.mpu needs Megatron-core, which cannot be imported ({error}); "
            "pip install megatron-core"
        ) from error
    if not parallel_state.model_parallel_is_initialized():
        raise RuntimeError(
            "Megatron-core's process groups are not there yet; call "
            "megatron.core.parallel_state.initialize_model_parallel() before deepspeed.initialize(mpu=...)"
        )
    return parallel_state


# Model parallel: tensor and pipeline. DeepSpeed reduces norms over it and names files by the rank in it.


def get_model_parallel_group() -> ProcessGroup:
    """Ranks that hold parts of one model replica."""
    return _state().get_model_parallel_group()


def get_model_parallel_rank() -> int:
    """This rank's place in its model replica."""
    return _rank(get_model_parallel_group())


def get_model_parallel_world_size() -> int:
    """Number of ranks that hold parts of one model replica."""
    return _size(get_model_parallel_group())


# Tensor parallel. DeepSpeed once called it "slice".


def get_tensor_model_parallel_group() -> ProcessGroup:
    """Ranks that hold slices of the same layers."""
    return _state().get_tensor_model_parallel_group()


def get_tensor_model_parallel_rank() -> int:
    """This rank's slice."""
    return _state().get_tensor_model_parallel_rank()


def get_tensor_model_parallel_world_size() -> int:
    """Number of slices."""
    return _state().get_tensor_model_parallel_world_size()


def get_tensor_model_parallel_src_rank() -> int:
    """Global rank that holds the first slice."""
    return _state().get_tensor_model_parallel_src_rank()


get_slice_parallel_group = get_tensor_model_parallel_group
get_slice_parallel_rank = get_tensor_model_parallel_rank
get_slice_parallel_world_size = get_tensor_model_parallel_world_size


# Pipeline parallel, "pipe" in DeepSpeed's own topology.


def get_pipeline_model_parallel_group() -> ProcessGroup:
    """Ranks that hold successive stages."""
    return _state().get_pipeline_model_parallel_group()


def get_pipeline_model_parallel_rank() -> int:
    """This rank's stage."""
    return _state().get_pipeline_model_parallel_rank()


def get_pipeline_model_parallel_world_size() -> int:
    """Number of stages."""
    return _state().get_pipeline_model_parallel_world_size()


get_pipe_parallel_group = get_pipeline_model_parallel_group
get_pipe_parallel_rank = get_pipeline_model_parallel_rank
get_pipe_parallel_world_size = get_pipeline_model_parallel_world_size


# Data parallel: ranks that read different samples.


def get_data_parallel_group() -> ProcessGroup:
    """Ranks that hold the same weights and read different samples."""
    return _state().get_data_parallel_group()


def get_data_parallel_rank() -> int:
    """Which share of the samples this rank reads."""
    return _state().get_data_parallel_rank()


def get_data_parallel_world_size() -> int:
    """Number of shares of the samples."""
    return _state().get_data_parallel_world_size()


def get_data_parallel_group_ranks() -> list[int]:
    """Global ranks of the data-parallel group, in its order."""
    import torch.distributed as dist

    return dist.get_process_group_ranks(get_data_parallel_group())


# Sequence parallel in DeepSpeed's sense, context parallel in Megatron's; and data times that: ZeRO's shards.


def get_sequence_parallel_group() -> ProcessGroup:
    """Ranks that hold different tokens of the same sequences."""
    return _state().get_context_parallel_group()


def get_sequence_parallel_rank() -> int:
    """Which part of each sequence this rank holds."""
    return _state().get_context_parallel_rank()


def get_sequence_parallel_world_size() -> int:
    """Number of parts of each sequence."""
    return _state().get_context_parallel_world_size()


def get_sequence_data_parallel_group() -> ProcessGroup:
    """Ranks that hold the same weights, whatever tokens they read."""
    return _state().get_data_parallel_group(with_context_parallel=True)


def get_sequence_data_parallel_rank() -> int:
    """This rank's shard of the optimizer state."""
    return _rank(get_sequence_data_parallel_group())


def get_sequence_data_parallel_world_size() -> int:
    """Number of shards of the optimizer state."""
    return _size(get_sequence_data_parallel_group())


def _rank(group: ProcessGroup) -> int:
    import torch.distributed as dist

    return dist.get_rank(group=group)


def _size(group: ProcessGroup) -> int:
    import torch.distributed as dist

    return dist.get_world_size(group=group)
