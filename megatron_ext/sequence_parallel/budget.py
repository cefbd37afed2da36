"""How many bytes of activations one micro-batch may hold on this rank.

The limit is the job's whole share of the device. What it holds besides activations is measured where a device counts
(what is allocated when the first micro-batch begins: weights, gradient buffers, what the optimizer has made), and
optimizer states that are still to come are counted at 12 bytes a parameter: an fp32 copy and Adam's two moments, not
divided over data-parallel ranks, as nothing here says that they are. What is left is shared by the micro-batches that
the pipeline schedule holds at once.

A limit that is known better is written down: ``megatron_ext.memory.limit``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..config import MemoryConfig
from ..in_flight import in_flight

STATE_BYTES = 12
"""A parameter's optimizer state: fp32 master copy, first and second moment."""


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


def limit_of(config: MemoryConfig, device: torch.device, ranks_on_node: int) -> int:
    """Bytes that this rank may hold; on a CPU a share of what is available now."""
    if config.limit is not None:
        return config.limit
    if device.type == "cuda":
        return int(config.fraction * torch.cuda.get_device_properties(device).total_memory)
    from ds_grass.host_memory import available_bytes

    available = available_bytes()
    if available is None:
        raise ValueError(
            "megatron_ext.memory.limit is None but this machine does not say how much memory is available; "
            'write a size such as "limit": "16GB"'
        )
    return int(config.fraction * available / ranks_on_node)


def static_bytes(block: nn.Module, device: torch.device) -> int:
    """What a rank holds beside activations while it trains."""
    parameters = list(block.parameters())
    states = sum(p.numel() for p in parameters if p.requires_grad) * STATE_BYTES
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) + states
    weights_and_gradients = sum(p.numel() * p.element_size() * (1 + p.requires_grad) for p in parameters)
    return weights_and_gradients + states


def measure(block: nn.Module, config: MemoryConfig, ranks_on_node: int) -> Budget:
    """The budget of a ``TransformerBlock`` whose first micro-batch is about to run."""
    from megatron.core import parallel_state

    device = next(block.parameters()).device
    chunks = parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1
    held = in_flight(
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_rank(),
        chunks,
        getattr(block.config, "microbatch_group_size_per_vp_stage", None),
    )
    return Budget(limit_of(config, device, ranks_on_node), static_bytes(block, device), held)
