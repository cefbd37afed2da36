"""Small Megatron-core GPTs whose layers are spread over data-parallel ranks: by experts, or by context.

Contract: inside `parallel_state(...)`, `build` gives this rank's chunks with weights that follow from their names and
the rank's place in tensor and expert parallelism, so that two models of one layout are equal; `gradients` are this
rank's own. Compared are runs of one layout with each other, so nothing is gathered. Megatron-core is imported inside
functions only.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import zlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn

from tests import megatron_models
from tests.plain_gpt import GPT

EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 1e-2,
    "moe_token_dispatcher_type": "alltoall",
    "moe_layer_freq": [0, 1] * 4,
    "add_bias_linear": False,
}
"""Every other layer is one of experts, of 8."""


@contextlib.contextmanager
def parallel_state(ep: int = 1, cp: int = 1, **sizes: int) -> Iterator[None]:
    """As :func:`tests.megatron_models.parallel_state`, with what experts need to run on a CPU."""
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher as AllToAll

    with contextlib.ExitStack() as stack:
        # Imported from Transformer Engine only, and then asked for None.
        stack.enter_context(patch.object(moe_utils, "te_general_gemm", None, create=True))
        # Counts of tokens go to the host on a stream of their own.
        stack.enter_context(patch.object(AllToAll, "cuda_dtoh_stream", "none"))
        stack.enter_context(patch.object(AllToAll, "_maybe_dtoh_and_synchronize", _splits_on_the_host))
        # A router's functions are compiled, which takes longer than a test.
        stack.enter_context(patch.object(torch._dynamo.config, "disable", True))
        spread = {"expert_model_parallel_size": ep, "context_parallel_size": cp}
        stack.enter_context(megatron_models.parallel_state(**sizes, **spread))
        # As in a new process: what a job leaves here the next one finds.
        stack.enter_context(patch.object(moe_utils.MoEAuxLossAutoScaler, "main_loss_backward_scale", None))
        stack.enter_context(patch.dict(moe_utils.get_moe_layer_wise_logging_tracker(), clear=True))
        yield


def _splits_on_the_host(dispatcher: Any, point: str, tokens_per_expert: Any = None) -> Any:
    for name in ("input_splits", "output_splits", "output_splits_tp"):
        splits = getattr(dispatcher, name)
        if isinstance(splits, torch.Tensor):
            setattr(dispatcher, name, splits.numpy())
    return tokens_per_expert


def build(model: GPT, dtype: torch.dtype = torch.float64, **config: Any) -> list[nn.Module]:
    """This rank's chunks; `config` goes to TransformerConfig over what follows from `model`."""
    from megatron.core import parallel_state as state

    ep, cp = state.get_expert_model_parallel_world_size(), state.get_context_parallel_world_size()
    sizes = {"expert_model_parallel_size": ep, "context_parallel_size": cp}
    arguments = megatron_models.transformer_config(model, dtype, **sizes | config)
    chunks = megatron_models.build_chunks(
        model, dtype, arguments, lambda vp_stage: _spec(model, arguments, vp_stage)
    )
    _fill(chunks)
    return chunks


def gradients(chunks: list[nn.Module]) -> dict[str, torch.Tensor]:
    """This rank's, by name."""
    return {name: parameter.grad for name, parameter in megatron_models.named_parameters(chunks)}


def _spec(model: GPT, config: Any, vp_stage: int | None) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    if config.num_moe_experts is None:
        spec = megatron_models._layer_spec(model, False)
        spec.submodules.self_attention.submodules.core_attention = _gathering_attention()
        return spec
    return get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=vp_stage)


@functools.cache
def _gathering_attention() -> type:
    """Megatron-core's own attention, which knows no context parallelism, over the keys and values of all ranks."""
    from megatron.core import parallel_state as state
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class GatheringDotProductAttention(DotProductAttention):
        def __init__(self, config: Any, *args: Any, **kwargs: Any):
            alone = copy.copy(config)
            alone.context_parallel_size = 1
            super().__init__(alone, *args, **kwargs)

        def forward(self, query, key, value, *args, **kwargs):
            """query, key, value (sequence / cp, batch, heads, head_dim)"""
            group = state.get_context_parallel_group()
            return super().forward(
                query, _Gathered.apply(key, group), _Gathered.apply(value, group), *args, **kwargs
            )

    return GatheringDotProductAttention


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(ctx.group.size())[ctx.group.rank()], None


@torch.no_grad()
def _fill(chunks: list[nn.Module]) -> None:
    from megatron.core import parallel_state as state

    tp, ep = state.get_tensor_model_parallel_rank(), state.get_expert_model_parallel_rank()
    for name, parameter in megatron_models.named_parameters(chunks):
        place = (
            tp if getattr(parameter, "tensor_model_parallel", False) else 0,
            ep if "experts" in name else 0,
        )
        drawn = torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{name} {place}".encode()))
        )
        is_norm = parameter.dim() == 1 and name.endswith("weight")
        parameter.copy_(1 + 0.05 * drawn if is_norm else 0.05 * drawn)
