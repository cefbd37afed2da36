"""Which ranks speak for others: one for a pipeline stage, and one of those for the job.

Contract: no communication; each rank knows of itself.
"""

from __future__ import annotations

from torch import nn


def is_first_of_stage() -> bool:
    """Whether this rank speaks for its pipeline stage: tensor- and data-parallel rank 0."""
    from megatron.core import parallel_state

    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    )


def speaks_for_job(block: nn.Module) -> bool:
    """Whether this rank, which has this block, is the first of the stage that has the model's first layer.

    Mostly rank 0 of the world. Not where the embedding is a stage of its own: no layer runs there, so that rank has
    nothing to tell.
    """
    return bool(len(block.layers)) and block.layers[0].layer_number == 1 and is_first_of_stage()
