"""Hyper-parameters of the AdamW-compatible optimizer that the user configured.

GRASS takes over the arithmetic, never the groups: schedulers keep writing into the user's `param_groups`, and they are
read here at every step. Other update rules are refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

from torch.optim import Optimizer

SUPPORTED = {
    "torch.optim.adam.Adam": "decoupled_weight_decay",
    "torch.optim.adamw.AdamW": "decoupled_weight_decay",
    "deepspeed.ops.adam.fused_adam.FusedAdam": "adam_w_mode",
    "deepspeed.ops.adam.cpu_adam.DeepSpeedCPUAdam": "adam_w_mode",
    "apex.optimizers.fused_adam.FusedAdam": "adam_w_mode",
}
"""Qualified class name -> where it says whether weight decay is decoupled."""


@dataclass(frozen=True)
class AdamHyper:
    """What one Adam or AdamW update needs besides the tensors and the step count."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise ValueError, naming the class or the option, unless the optimizer computes plain Adam or AdamW."""
    if _known_class(optimizer) is None:
        given = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        raise ValueError(
            f"grass needs an Adam or AdamW optimizer but got {given}; "
            'use torch.optim.AdamW, DeepSpeed\'s FusedAdam, or "optimizer": {"type": "AdamW"} in ds_config'
        )
    for index, group in enumerate(optimizer.param_groups):
        if group.get("amsgrad"):
            raise ValueError(
                f"optimizer group {index} has amsgrad true; grass keeps no third moment: set it to false"
            )
        if not group.get("bias_correction", True):
            raise ValueError(
                f"optimizer group {index} has bias_correction false; grass always corrects, by a block's own "
                "step count: set bias_correction to true"
            )


def read_group(optimizer: Optimizer, group: Mapping) -> AdamHyper:
    """The group's hyper-parameters as they stand now (a scheduler may have just changed them)."""
    beta1, beta2 = group["betas"]
    return AdamHyper(
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group.get("weight_decay", 0.0)),
        decoupled=_decoupled(optimizer, group),
        maximize=bool(group.get("maximize", False)),
    )


def _known_class(optimizer: Optimizer) -> str | None:
    """The supported class whose `step` this optimizer runs; a subclass with its own `step` is another rule."""
    # unwrapped: torch wraps `step` for profiling when an instance is made
    own_step = inspect.unwrap(type(optimizer).step)
    for base in type(optimizer).__mro__:
        name = f"{base.__module__}.{base.__qualname__}"
        if name in SUPPORTED:
            return name if inspect.unwrap(base.step) is own_step else None
    return None


def _decoupled(optimizer: Optimizer, group: Mapping) -> bool:
    attribute = SUPPORTED[_known_class(optimizer) or "torch.optim.adamw.AdamW"]
    if attribute in group:
        return bool(group[attribute])
    return bool(getattr(optimizer, attribute, "AdamW" in type(optimizer).__name__))
