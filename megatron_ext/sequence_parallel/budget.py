"""How many bytes of activations one micro-batch of one block may hold on this rank.

The limit is the job's whole share of the device; what it holds besides activations is :mod:`megatron_ext.rank_memory`'s
to say. What is left is shared by the micro-batches that the pipeline schedule holds at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..in_flight import in_flight
from ..rank_memory import RankMemory


@dataclass(frozen=True)
class Budget:
    """Bytes of one rank."""

    limit_bytes: int
    static_bytes: int
    """Weights, gradients, optimizer states: what is there whatever the sequence."""
    in_flight: int
    """Forward passes of this block held at once."""

    @property
    def activation_bytes(self) -> int:
        """For one forward pass of one block; not below zero."""
        return max(0, (self.limit_bytes - self.static_bytes) // self.in_flight)


def measure(memory: RankMemory, config: Any) -> Budget:
    """The budget of a block whose micro-batch is about to run; `config`: the model's TransformerConfig."""
    from megatron.core import parallel_state

    chunks = parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1
    held = in_flight(
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_rank(),
        chunks,
        getattr(config, "microbatch_group_size_per_vp_stage", None),
    )
    return Budget(memory.limit(), memory.static(), held)
