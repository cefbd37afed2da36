"""Parameters that are nobody's, over the storage of those of a job: a layer runs on them, its training untouched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_MARKS = ("sequence_parallel", "tensor_model_parallel", "partition_dim", "partition_stride", "allreduce")
"""What Megatron-core writes on a parameter and reads in forward or backward."""


def alias_of(parameter: nn.Parameter, config: Any) -> nn.Parameter:
    """A leaf of its own, whose gradient is dropped as soon as it is complete, as Megatron's DDP drops it."""
    alias = nn.Parameter(parameter.detach(), parameter.requires_grad)
    if parameter.requires_grad:
        alias.register_post_accumulate_grad_hook(_drop)
    if getattr(config, "gradient_accumulation_fusion", False):
        alias.main_grad = torch.zeros_like(alias, dtype=torch.float32)  # what Megatron's fused kernel adds to
    for mark in _MARKS:
        if hasattr(parameter, mark):
            setattr(alias, mark, getattr(parameter, mark))
    return alias


def _drop(alias: Tensor) -> None:
    alias.grad = None
