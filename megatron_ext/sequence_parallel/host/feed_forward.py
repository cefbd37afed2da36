"""A Megatron ``MLP``, read as :class:`FeedForwardLayer`: its weights and what it does between its two linears."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..linears import in_turn
from ..strategies.layer import FeedForwardLayer, FeedForwardWeights
from . import linears


def obstacles(mlp: nn.Module) -> list[str]:
    """Why this layer's feed-forward must stay Megatron's own."""
    kind = type(mlp)
    if (kind.__module__, kind.__qualname__) != ("megatron.core.transformer.mlp", "MLP"):
        return [f"mlp is a {kind.__module__}.{kind.__qualname__}, not MLP"]
    found = [
        linears.obstacle("linear_fc1", mlp.linear_fc1, linears.COLUMN),
        linears.obstacle("linear_fc2", mlp.linear_fc2, linears.ROW),
    ]
    for key in ("activation_func_fp8_input_store", "use_te_activation_func"):
        if getattr(mlp.config, key, False):
            found.append(f"config.{key} is true")
    return [reason for reason in found if reason]


def read_layer(mlp: nn.Module, group: Any) -> FeedForwardLayer:
    """The layer as the strategies see it."""
    config = mlp.config
    function = config.activation_func
    if config.bias_activation_fusion and function is F.gelu:
        function = partial(F.gelu, approximate="tanh")  # what Megatron's fused kernels compute for GELU
    if not config.gated_linear_unit:
        return FeedForwardLayer(group, False, function)
    clamp = getattr(config, "activation_func_clamp_value", None)
    offset = getattr(config, "glu_linear_offset", 0.0)
    gated = partial(_gated, function, clamp, offset)
    return FeedForwardLayer(group, True, lambda x: Lean.apply(x, gated))


def read_weights(mlp: nn.Module) -> tuple[FeedForwardWeights, Tensor | None]:
    """Shards of the weights, and the second linear's bias, which Megatron adds after the strategy. Gradients come as
    Megatron's do, first of fc2, then of the bias of fc1, which Megatron adds after its matrix, last of fc1."""
    fc1, fc1_bias = linears.opened(mlp.linear_fc1)
    (fc1,) = in_turn(fc1)
    if fc1_bias is not None:
        (fc1_bias,) = in_turn(fc1_bias)
    fc2, fc2_bias = linears.opened(mlp.linear_fc2)
    assert fc1 is not None
    return FeedForwardWeights(fc1, fc1_bias, fc2), fc2_bias


class Lean(torch.autograd.Function):
    """A gated activation that keeps its input and nothing else; autograd would keep the activated gate as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(ctx.function(x), x, grad)[0], None


def _gated(function: Any, clamp: float | None, offset: float, x: Tensor) -> Tensor:
    gate, other = torch.chunk(x, 2, dim=-1)
    if clamp is not None:
        gate, other = gate.clamp(max=clamp), other.clamp(-clamp, clamp)
    return function(gate) * (other + offset if offset else other)
