"""Five architectures, small: states, weights and activations each matter, and a step takes a tenth of a second."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """A model of transformers by its type and config, and the batch it is given."""

    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    rows: int = 2
    length: int = 128

    def config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, use_cache=False, **self.options)

    def build(self, dtype: torch.dtype, *, checkpointing: bool) -> nn.Module:
        """Random weights in `dtype`; buffers keep theirs."""
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        torch.manual_seed(0)
        config = self.config()
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_config(config)
        for param in model.parameters():
            param.data = param.data.to(dtype)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.train()

    def batch(self, rank: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(rank)
        tokens = torch.randint(0, self.options["vocab_size"], (self.rows, self.length), generator=generator)
        return {"input_ids": tokens, "labels": tokens}


MODELS = {
    "llama_gqa": Shape(
        "llama",
        {"vocab_size": 4000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
         "num_attention_heads": 8, "num_key_value_heads": 2, "architectures": ["LlamaForCausalLM"]},
    ),
    "gpt2_tied": Shape(
        "gpt2",
        {"vocab_size": 3000, "n_embd": 192, "n_layer": 5, "n_head": 6, "n_positions": 256, "resid_pdrop": 0.0,
         "embd_pdrop": 0.0, "attn_pdrop": 0.0, "architectures": ["GPT2LMHeadModel"]},
    ),
    "qwen3": Shape(
        "qwen3",
        {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "head_dim": 64,
         "num_attention_heads": 4, "num_key_value_heads": 2, "architectures": ["Qwen3ForCausalLM"]},
    ),
    "gpt_neox": Shape(
        "gpt_neox",
        {"vocab_size": 6000, "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4,
         "num_attention_heads": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0, "max_position_embeddings": 512,
         "architectures": ["GPTNeoXForCausalLM"]},
        rows=1,
        length=256,
    ),
    "opt": Shape(
        "opt",
        {"vocab_size": 1000, "hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 1024, "num_hidden_layers": 4,
         "num_attention_heads": 4, "max_position_embeddings": 512, "dropout": 0.1, "activation_dropout": 0.0,
         "architectures": ["OPTForCausalLM"]},
        rows=3,
        length=192,
    ),
}  # fmt: skip


def config_of(name: str) -> Any:
    """The Hugging Face config of one of them."""
    return MODELS[name].config()
