"""The weights of Megatron's linear modules, local and Transformer Engine's, read without calling the modules.

Contract: :func:`obstacle` says why a module is not understood; :func:`opened` hands out weight and bias, after
Megatron's DDP has made sure that they have arrived; :func:`normalised` applies the norm that Transformer Engine keeps
inside its first linears.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..tile_kernels import wide

_LOCAL = "megatron.core.tensor_parallel.layers"
_ENGINE = "megatron.core.extensions.transformer_engine"
COLUMN = {
    (_LOCAL, "ColumnParallelLinear"),
    (_ENGINE, "TEColumnParallelLinear"),
    (_ENGINE, "TELayerNormColumnParallelLinear"),
}
"""Classes of modules cut by output features."""
ROW = {(_LOCAL, "RowParallelLinear"), (_ENGINE, "TERowParallelLinear")}
"""Classes of modules cut by input features."""

_DDP_HOOK = "DistributedDataParallel._make_forward_pre_hook"


def obstacle(name: str, module: nn.Module, known: set[tuple[str, str]]) -> str | None:
    """Why the strategies cannot work with this linear, None when they can."""
    kind = type(module)
    if (kind.__module__, kind.__qualname__) not in known:
        return f"{name} is a {kind.__module__}.{kind.__qualname__}, not one of Megatron-core's own linears"
    if getattr(module, "weight", None) is None or getattr(module.weight, "ds_id", None) is not None:
        return f"{name} does not hold its weight (DeepSpeed's ZeRO stage 3 or a shared weight)"
    return None


def opened(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias. With ``overlap_param_gather`` Megatron's DDP fetches a module's parameters in a hook before its
    forward; as that forward is not called, the hook is. Other hooks do not run, and are told."""
    _fetch(module)
    _tell_of_hooks(module)
    bias = getattr(module, "bias", None)
    return module.weight, bias if bias is not None and bias.numel() else None


def _fetch(module: nn.Module) -> None:
    for hook in module._forward_pre_hooks.values():
        if _DDP_HOOK in getattr(hook, "__qualname__", ""):
            hook(module, ())


def _tell_of_hooks(module: nn.Module) -> None:
    for hooks in (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    ):
        for hook in hooks.values():
            name = getattr(hook, "__qualname__", type(hook).__qualname__)
            if _DDP_HOOK not in name:
                warnings.warn(
                    f"the hook {name} of a {type(module).__name__} does not run where megatron_ext computes the layer "
                    "by another strategy than Megatron-core's own; those of attention and feed-forward modules do",
                    stacklevel=2,
                )


def has_norm(module: nn.Module) -> bool:
    """Whether the norm before the linear is a part of it, as in Transformer Engine's fused module."""
    return getattr(module, "layer_norm_weight", None) is not None


def normalised(x: Tensor, module: nn.Module, config: Any) -> Tensor:
    """`x` after the norm that `module` applies itself; `x` where the norm is a module of its own."""
    if not has_norm(module):
        return x
    bias = getattr(module, "layer_norm_bias", None)
    if config.layernorm_zero_centered_gamma:
        return _ZeroCentered.apply(x, module.layer_norm_weight, bias, config)
    return _norm(x, module.layer_norm_weight, bias, config)


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, config: Any) -> Tensor:
    if config.normalization == "RMSNorm":
        return F.rms_norm(x, x.shape[-1:], weight, config.layernorm_epsilon)
    return F.layer_norm(x, x.shape[-1:], weight, bias, config.layernorm_epsilon)


class _ZeroCentered(torch.autograd.Function):
    """A norm whose weight is stored less one. One plus a small weight is one in bf16, so it is computed in fp32 or
    wider, as Transformer Engine does; backward computes it once more rather than having kept the wide input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, config: Any) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.config = config
        return _ZeroCentered.compute(x, weight, bias, config).to(x.dtype)

    @staticmethod
    def compute(x: Tensor, weight: Tensor, bias: Tensor | None, config: Any) -> Tensor:
        kind = wide(x.dtype)
        return _norm(x.to(kind), weight.to(kind) + 1, None if bias is None else bias.to(kind), config)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = [tensor is not None for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            given = [None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
            out = _ZeroCentered.compute(*given, ctx.config)
        leaves = [tensor for tensor in given if tensor is not None]
        grads = iter(torch.autograd.grad(out, leaves, grad.to(out.dtype)))
        return *(next(grads) if there else None for there in needed), None


def parameters_of(module: nn.Module) -> tuple[Tensor, ...]:
    """All parameters of a module without parts, in order, after they have arrived."""
    _fetch(module)
    return tuple(module.parameters())
