"""Which layers of a stage are alike, and what each may recompute.

Alike are layers of the same classes, sizes and settings whose weights train or rest alike: what one of them keeps, all
of them keep. A dense layer and one of experts, or one with another attention, are two classes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations
from typing import Any

from torch import nn

from .layer_loop import has_experts, obstacle
from .plan import FULL, MODULES, NONE, join_choice

MOST_TOGETHER = 3
"""Modules beyond so many are tried one by one and all together, but in no other combination."""


def signature(layer: nn.Module) -> Hashable:
    """Equal for layers that are alike."""
    attention = getattr(layer, "self_attention", None)
    core = getattr(attention, "core_attention", None)
    return (
        _settings(layer, attention),
        tuple(type(module).__qualname__ for module in (layer, *layer.children(), core)),
        tuple(
            (name, tuple(parameter.shape), parameter.dtype, parameter.requires_grad)
            for name, parameter in layer.named_parameters()
        ),
    )


def _settings(layer: nn.Module, attention: Any) -> tuple[Hashable, ...]:
    """What layers with the same config do by turns: rotate or not, look at a window or at everything."""
    config, number = getattr(attention, "config", None), getattr(layer, "layer_number", 1) - 1
    kind = getattr(attention, "attn_mask_type", None)
    skipped = getattr(config, "no_rope_freq", None)
    window, full = getattr(config, "window_size", None), getattr(config, "window_attn_skip_freq", None)
    if window and full is not None:  # every so many layers see everything, or those without a mark
        seen = bool((number + 1) % full) if isinstance(full, int) else bool(full[number])
    else:
        seen = bool(window)
    return str(kind), bool(skipped and skipped[number]), tuple(window) if window and seen else None


def writes_scores(layer: nn.Module) -> bool:
    """Whether its attention may keep a number for each pair of tokens. Transformer Engine's does not, unless it is told
    to; of attention that is not known it is to be feared."""
    core = getattr(getattr(layer, "self_attention", None), "core_attention", None)
    if core is None:
        return False
    backend = getattr(getattr(layer, "config", None), "attention_backend", None)
    is_engine = type(core).__module__ == "megatron.core.extensions.transformer_engine"
    return not is_engine or getattr(backend, "name", None) == "unfused"


def layers_that_train(blocks: Iterable[nn.Module]) -> tuple[bool, ...]:
    """For each layer of these blocks, whether any of its weights is trained."""
    return tuple(
        any(parameter.requires_grad for parameter in layer.parameters())
        for block in blocks
        for layer in block.layers
    )


def allowed_modules(layer: nn.Module, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Modules that this layer can recompute by itself. ValueError for a `wanted` one that it can't."""
    reasons = {name: obstacle(layer, name) for name in MODULES}
    if wanted is None:
        return tuple(name for name, reason in reasons.items() if reason is None)
    for name in wanted:
        if name not in MODULES:
            raise ValueError(
                f"megatron_ext.recompute.modules names {name!r}; allowed: {', '.join(MODULES)}, or null"
            )
        if reasons[name] is not None and not _belongs_to_others(layer, name):
            able = [f'"{module}"' for module, reason in reasons.items() if reason is None]
            raise ValueError(
                f"megatron_ext.recompute.modules names {name!r}, which this model cannot recompute by itself: "
                f"{reasons[name]}; allowed here: {', '.join(able) or 'none'}; leave it out, or write null"
            )
    return tuple(name for name in MODULES if name in wanted and reasons[name] is None)


def choices(modules: Sequence[str]) -> tuple[str, ...]:
    """All that a layer with these modules may do, nothing first and everything last."""
    sizes = range(1, len(modules) + 1) if len(modules) <= MOST_TOGETHER else (1, len(modules))
    joined = [join_choice(some) for size in sizes for some in combinations(modules, size)]
    return (NONE, *dict.fromkeys(joined), FULL)


def _belongs_to_others(layer: nn.Module, module: str) -> bool:
    """A module of experts in a dense layer, or the reverse: other layers of the model have it."""
    return module == "mlp" if has_experts(layer) else module in ("moe", "moe_act", "shared_experts")
