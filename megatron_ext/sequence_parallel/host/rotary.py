"""Megatron's rotary embedding on the tokens of a rank, keeping nothing for backward but the table of angles.

A rotation's transpose is the rotation by the opposite angles, so backward rotates the gradient; Megatron's own, run by
autograd, keeps four tables of sines and cosines in every layer. The table itself is one for all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..layout import Spans


class Rotated(torch.autograd.Function):
    """x [s, b, heads, d] rotated by angles [s, .., d], by Megatron's function with the layer's settings."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor, rotate: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.angles, ctx.rotate = angles, rotate
        return rotate(x, angles)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.rotate(grad, -ctx.angles), None, None


def rotation_of(attention: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Megatron's rotation with the settings of this layer: interleaved, partial and scaled ones too."""
    from megatron.core.models.common.embeddings import rope_utils

    options: dict[str, Any] = {"config": attention.config}
    factor = _yarn_factor()
    if factor is not None:
        options["mscale"] = factor(attention.config)
    groups = getattr(attention, "pg_collection", None)
    if groups is not None:
        options["cp_group"] = groups.cp
    return lambda x, angles: rope_utils.apply_rotary_pos_emb(x, angles, **options)


def rows_of(table: Tensor, spans: Spans, restarts: tuple[int, ...] | None) -> Tensor:
    """The rows of a table of angles that belong to tokens as they lie in memory. `restarts`: boundaries of documents at
    which positions begin anew."""
    parts = []
    for span in sorted(spans, key=lambda span: span.row):
        edges = restarts or (0, span.stop)
        for start, stop in zip(edges, edges[1:], strict=False):
            part = span.cut(start, stop)
            if part:
                parts.append(table[part.start - start : part.stop - start])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def restarts_of(documents: tuple[int, ...] | None, table: Tensor) -> tuple[int, ...] | None:
    """Where positions begin anew. As in Megatron: a table as long as all documents together holds every token's own
    position, a shorter one those of a single document."""
    if documents is None or table.shape[0] == documents[-1]:
        return None
    return documents


def _yarn_factor() -> Callable[[Any], float] | None:
    """Releases without YaRN have neither the function nor the argument."""
    try:
        from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
            _yarn_get_concentration_factor_from_config,
        )
    except ImportError:
        return None
    return _yarn_get_concentration_factor_from_config
