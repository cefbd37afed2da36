"""A Megatron ``SelfAttention``, read as :class:`AttentionLayer`: its heads, norms, rotary embedding and mask.

What happens between projection and softmax is done by Megatron's own modules and functions, on other rows or heads of
the same tensors; what is not understood is named by :func:`obstacles`, and the layer then stays Megatron's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import Pattern
from ..layout import Spans
from ..linears import in_turn
from ..strategies.layer import AttentionLayer, AttentionWeights
from . import linears, rotary

CAUSAL_KINDS = ("causal", "padding_causal")
_LOCAL_CORE = ("megatron.core.transformer.dot_product_attention", "DotProductAttention")
_ENGINE_CORE = ("megatron.core.extensions.transformer_engine", "TEDotProductAttention")


def obstacles(attention: nn.Module) -> list[str]:
    """Why this layer's attention must stay Megatron's own, most important first."""
    kind = type(attention)
    if (kind.__module__, kind.__qualname__) != ("megatron.core.transformer.attention", "SelfAttention"):
        return [f"self_attention is a {kind.__module__}.{kind.__qualname__}, not SelfAttention"]
    found = [
        linears.obstacle("linear_qkv", attention.linear_qkv, linears.COLUMN),
        linears.obstacle("linear_proj", attention.linear_proj, linears.ROW),
    ]
    core = type(attention.core_attention)
    if (core.__module__, core.__qualname__) not in (_LOCAL_CORE, _ENGINE_CORE):
        found.append(f"core_attention is a {core.__module__}.{core.__qualname__}")
    refused = {
        "attention_output_gate": False,
        "window_size": None,
        "softmax_type": "vanilla",
        "qk_clip": False,
        "multi_latent_attention": False,
        "flash_decode": False,
        "test_mode": False,
    }
    for key, plain in refused.items():
        value = getattr(attention.config, key, plain)
        if value != plain:
            found.append(f"config.{key} is {value!r}")
    return [reason for reason in found if reason]


Rows = Callable[[Tensor, Spans], Tensor]
"""(table of angles, tokens) -> the tokens' rows of it."""


def read_layer(
    attention: nn.Module, group: Any, angles: tuple[Tensor, Tensor] | None, rows: Rows
) -> AttentionLayer:
    """The layer as the strategies see it. `angles`: rotary tables for queries and keys, [tokens, ..., d]."""
    norms = [norm for norm in (attention.q_layernorm, attention.k_layernorm) if norm is not None]
    return AttentionLayer(
        group=group,
        num_heads=attention.config.num_attention_heads,
        num_kv_heads=attention.config.num_query_groups,
        head_dim=attention.hidden_size_per_attention_head,
        transform=partial(_transform, attention, angles, rows),
        changes_queries=bool(norms) or angles is not None,
        norm_weights=tuple(weight for norm in norms for weight in in_turn(*linears.parameters_of(norm))),
    )


def read_weights(attention: nn.Module) -> tuple[AttentionWeights, Tensor | None]:
    """Shards of the weights, and the output's bias, which Megatron adds after the strategy. Call it before read_layer:
    gradients come as Megatron's do, first of proj, then of the norms, last of qkv and its bias."""
    qkv, qkv_bias = in_turn(*linears.opened(attention.linear_qkv))
    proj, proj_bias = linears.opened(attention.linear_proj)
    assert qkv is not None
    return AttentionWeights(qkv, qkv_bias, proj), proj_bias


def angles_of(attention: nn.Module, given: Any) -> tuple[Tensor, Tensor] | None:
    """The tables of a call's ``rotary_pos_emb``, where this layer uses them."""
    skipped = getattr(attention.config, "no_rope_freq", None)
    if given is None or (skipped and skipped[attention.layer_number - 1]):
        return None
    return given if isinstance(given, tuple) else (given, given)


def pattern_of(
    attention: nn.Module,
    mask: Tensor | None,
    length: int,
    documents: tuple[int, ...] | None,
    is_causal: Callable[[Tensor], bool],
) -> Pattern:
    """Which pairs this call sees. Megatron's local attention obeys a mask that it is given, whatever its kind, and is
    causal by itself where the kind is "causal"; Transformer Engine's obeys one where the kind speaks of padding. A mask
    that is the causal one is recognised, as most scripts hand one over."""
    config, kind = attention.config, attention.attn_mask_type.name
    engine = _is_engine(attention.core_attention)
    obeyed = mask is not None and documents is None and not (engine and kind in ("causal", "no_mask"))
    causal = kind == "causal" or (kind == "padding_causal" and (engine or documents is not None))
    if obeyed:
        assert mask is not None
        mask = _over_all_pairs(mask, length)
        if causal and engine:
            mask = mask | torch.ones(length, length, dtype=torch.bool, device=mask.device).triu_(1)
        causal_by_kind, causal = causal, is_causal(mask)
        if causal_by_kind and not causal and not engine and config.masked_softmax_fusion:
            raise ValueError(
                "attention_mask is not the causal one, which Megatron-core's fused causal softmax ignores or obeys "
                "depending on the sizes; set masked_softmax_fusion to False, or give the causal mask"
            )
    return Pattern(
        causal=causal,
        scale=getattr(config, "softmax_scale", None) or attention.hidden_size_per_attention_head**-0.5,
        documents=documents,
        mask=mask if obeyed and not causal else None,
        dropout=config.attention_dropout if attention.training else 0.0,
    )


def _over_all_pairs(mask: Tensor, length: int) -> Tensor:
    """A view [b or 1, 1, s, s] of a mask that Megatron would broadcast, such as one of padded keys [b, 1, 1, s]."""
    whole = mask[(None,) * max(0, 4 - mask.dim())]
    if whole.dim() != 4 or whole.shape[1] != 1 or not {*whole.shape[2:]} <= {1, length}:
        raise ValueError(
            f"attention_mask is {[*mask.shape]} with {length} tokens; allowed: [batch or 1, 1, {length} or 1, {length}]"
        )
    return whole.expand(-1, -1, length, length)


def _is_engine(core: nn.Module) -> bool:
    return type(core).__module__ == _ENGINE_CORE[0]


def is_local_core(core: nn.Module) -> bool:
    """Whether attention is Megatron's own, which refuses packed sequences."""
    return (type(core).__module__, type(core).__qualname__) == _LOCAL_CORE


def _transform(
    attention: nn.Module,
    angles: tuple[Tensor, Tensor] | None,
    rows: Rows,
    q: Tensor,
    k: Tensor,
    spans: Spans,
    norm_weights: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    q, k = _normed(attention, q, k, norm_weights)
    if angles is None:
        return q, k
    rotate = rotary.rotation_of(attention)
    of_queries, of_keys = (rows(table, spans) for table in angles)
    return rotary.Rotated.apply(q, of_queries, rotate), rotary.Rotated.apply(k, of_keys, rotate)


def _normed(attention: nn.Module, q: Tensor, k: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    taken = iter(weights)
    normed = []
    for norm, x in ((attention.q_layernorm, q), (attention.k_layernorm, k)):
        if norm is not None:
            own = {name: next(taken) for name, _ in norm.named_parameters()}
            x = torch.func.functional_call(norm, own, (x,))
        normed.append(x)
    return normed[0], normed[1]
