"""A model to plan with, by a name or by its Hugging Face config.json: numbers only, nothing is built.

Contract: :func:`read_model` takes the keys that the usual model families have in common; what it cannot plan (experts,
latent attention) it refuses. A name is one of :data:`PRESETS`; anything else is a file or a folder.
Not covered: models on the hub, and ones whose layers differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.sequence_parallel.layer_shape import LayerShape

_NOT_GATED = (
    "bert",
    "roberta",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "gpt_bigcode",
    "opt",
    "bloom",
    "falcon",
    "phi",
)
_NOT_CAUSAL = ("bert", "roberta", "modernbert")
_WITHOUT_BIAS = (
    "llama",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "qwen2",
    "qwen3",
    "falcon",
    "olmo2",
    "phi3",
)
_WITH_QKV_BIAS = ("qwen2",)
_REFUSED = {
    "num_local_experts": "mixtures of experts",
    "num_experts": "mixtures of experts",
    "n_routed_experts": "mixtures of experts",
    "kv_lora_rank": "latent attention",
}


@dataclass(frozen=True)
class DescribedModel:
    """Unsharded sizes, in elements."""

    name: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool = False
    """The embedding is the head's weight, too."""
    gated: bool = False
    causal: bool = True
    linear_bias: bool = True
    qkv_bias: bool = False

    def shape(self, group_size: int, element_bytes: int = 2) -> LayerShape:
        """One layer over `group_size` ranks. ValueError where they cannot share it."""
        return LayerShape(
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            group_size=group_size,
            gated=self.gated,
            causal=self.causal,
            linear_bias=self.linear_bias,
            qkv_bias=self.qkv_bias,
            element_bytes=element_bytes,
        )

    def rank_parameters(self, group_size: int, num_layers: int) -> int:
        """Parameters that one rank holds of `num_layers` layers, the embedding and the head; biases left out."""
        sharded = num_layers * self.shape(group_size).weight
        sharded += (1 if self.tied else 2) * self.vocab_size * self.hidden_size
        norms = (2 * num_layers + 1) * self.hidden_size
        return -(-sharded // group_size) + norms


def _paper(name: str, num_layers: int, hidden_size: int, num_heads: int, **more: Any) -> DescribedModel:
    """A shape of arXiv 2511.13198, with its layers on a node; GELU and 4 h throughout, and GPT-2's vocabulary."""
    return DescribedModel(
        name=name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=4 * hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        vocab_size=50304,
        tied=True,
        **more,
    )


PRESETS = {
    model.name: model
    for model in (
        _paper("paper-bert", 24, 1024, 16, causal=False),
        _paper("paper-llama", 8, 8192, 64, linear_bias=False),
        _paper("paper-gpt", 8, 12288, 96),
    )
}


def read_model(name: str) -> DescribedModel:
    """A preset, or what a config.json describes. ValueError says in one line what is wrong with it."""
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(
            f"--model is {name!r}, which is no preset and cannot be read ({reason}); allowed: {', '.join(PRESETS)}, a "
            "config.json, or a folder that holds one"
        ) from None
    if not isinstance(config, dict):
        raise ValueError(f"--model is {name!r}, which holds no object; give the model's config.json")
    return _from_config(config.get("text_config") or config, path.resolve().parent.name)


def _from_config(config: Mapping[str, Any], name: str) -> DescribedModel:
    for key, what in _REFUSED.items():
        if (config.get(key) or 0) > 1:
            raise ValueError(
                f"--model has {key} {config[key]}, and {what} are not planned for; give a dense model"
            )
    family = str(config.get("model_type"))
    hidden, heads = _number(config, "hidden_size", "n_embd"), _number(config, "num_attention_heads", "n_head")
    bias = bool(config.get("attention_bias") or config.get("mlp_bias"))
    return DescribedModel(
        name=name,
        num_layers=_number(config, "num_hidden_layers", "n_layer"),
        hidden_size=hidden,
        ffn_hidden_size=_number(config, "intermediate_size", "n_inner", "ffn_dim", default=4 * hidden),
        num_heads=heads,
        num_kv_heads=_number(config, "num_key_value_heads", default=heads),
        head_dim=_number(config, "head_dim", default=hidden // heads),
        vocab_size=_number(config, "vocab_size"),
        tied=config.get("tie_word_embeddings", True) is not False,
        gated=family not in _NOT_GATED,
        causal=family not in _NOT_CAUSAL,
        linear_bias=family not in _WITHOUT_BIAS or bias,
        qkv_bias=family in _WITH_QKV_BIAS,
    )


def _number(config: Mapping[str, Any], *keys: str, default: int | None = None) -> int:
    """The first of `keys` that is there and not null, else the default."""
    for key in keys:
        value = config.get(key)
        if value is not None:
            if type(value) is not int or value < 1:
                raise ValueError(f"--model has {key} {value!r}; allowed: an integer from 1")
            return value
    if default is None:
        raise ValueError(f"--model has no {' or '.join(keys)}; give the config.json of a transformer")
    return default
