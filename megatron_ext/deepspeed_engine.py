"""A Megatron-core model inside a DeepSpeed engine: the block of its config, and gradients summed over the group.

With sequence parallelism the norms and the biases of row-cut linears see only this rank's tokens, so their gradients
are parts of a sum over the tensor-parallel group. Megatron's own training loop adds them up (``finalize_model_grads``);
DeepSpeed does not, and the ranks' copies of these weights drift apart. So each of them gets a gradient hook that sums,
once a micro-batch.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import job
from .sequence_parallel.block_policy import blocks_of
from .sequence_parallel.switch import group_of

logger = logging.getLogger("megatron_ext")

_MARK = "_megatron_ext_summed"
"""On a parameter whose gradient is summed already."""


def join(engine: Any, ds_config: Mapping[str, Any]) -> None:
    """Apply the engine's block to its model as it was built, where no other config has, and sum gradients."""
    blocks = blocks_of(engine.module)
    if not blocks:
        return
    stage = engine.zero_optimization_stage()
    if stage == 3:
        raise ValueError(
            "megatron_ext works on weight shards of tensor parallelism, but zero_optimization.stage is 3, which takes "
            "them apart; allowed: 0, 1 or 2"
        )
    running = job.current()
    if running is None:
        running = job.apply(dict(ds_config))
    if running is None:
        return
    running.adopt_model(engine.module)
    running.memory.count_steps_of(engine)
    for block in running.blocks:
        if block in blocks:
            _sum_gradients(engine.module, group_of(block), running.on_close)
            return


def _sum_gradients(model: nn.Module, group: Any, on_close: contextlib.ExitStack) -> None:
    """Once for each parameter, however many engines are built around it."""
    summed = [parameter for parameter in _partial(model) if not hasattr(parameter, _MARK)]
    for parameter in summed:
        setattr(parameter, _MARK, True)
        trains = parameter.requires_grad
        parameter.requires_grad_(True)  # one that rests now may train later, and needs the hook then
        handle = parameter.register_hook(lambda grad: _summed(grad, group))
        parameter.requires_grad_(trains)
        on_close.callback(_sum_no_more, parameter, handle)
    if summed:
        logger.info(
            "megatron_ext: gradients of %d parameters that Megatron-core would have summed over %d tensor-parallel "
            "ranks are summed in this engine",
            len(summed),
            group.size(),
        )


def _sum_no_more(parameter: nn.Parameter, handle: RemovableHandle) -> None:
    handle.remove()
    delattr(parameter, _MARK)


def _partial(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of which every rank has a copy and a part of the gradient, as ``finalize_model_grads`` has it."""
    for name, parameter in model.named_parameters():
        marked = getattr(parameter, "sequence_parallel", False)
        if marked or "q_layernorm" in name or "k_layernorm" in name:
            yield parameter


def _summed(grad: Tensor, group: Any) -> Tensor:
    grad = grad.contiguous().clone()
    dist.all_reduce(grad, group=group)
    return grad
