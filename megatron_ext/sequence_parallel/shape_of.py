"""The :class:`LayerShape` of a Megatron transformer layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from .host import attention as host_attention
from .layer_shape import LayerShape


def shape_of(layer: nn.Module, group_size: int) -> LayerShape:
    """Read from the layer's own config, which may differ from its neighbours' in heterogeneous models."""
    config: Any = layer.config
    attention = layer.self_attention
    return LayerShape(
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_query_groups,
        head_dim=attention.hidden_size_per_attention_head,
        group_size=group_size,
        gated=bool(config.gated_linear_unit),
        causal=attention.attn_mask_type.name in host_attention.CAUSAL_KINDS,
        linear_bias=bool(config.add_bias_linear),
        qkv_bias=bool(getattr(config, "add_qkv_bias", False)),
        element_bytes=attention.linear_qkv.weight.element_size(),
        unfused_attention=host_attention.is_local_core(attention.core_attention),
        hidden_dropout=config.hidden_dropout > 0,
    )
