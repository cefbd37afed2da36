"""A GPT in plain PyTorch with Megatron-core's maths, parameter names and parameter layouts: the single-process oracle.

Contract: `GPT` says everything about a model, `full_weights` gives the same numbers for the same names in every
process, and `loss_and_gradients` is what any number of ranks must arrive at, in fp64. Packed documents are run one by
one. Nothing here imports Megatron-core. Not covered: dropout, and anything about speed or memory.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-5
ROTARY_BASE = 10000
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class GPT:
    """The shape and the maths of one model; sizes are small, and multiples of eight where ranks may share them."""

    layers: int = 2
    hidden: int = 64
    heads: int = 8
    groups: int | None = None
    """Key and value heads; None = as many as `heads`."""
    ffn: int = 96
    vocabulary: int = 64
    length: int = 128
    """The longest sequence: learned positions have as many rows."""
    positions: Literal["rope", "learned"] = "rope"
    activation: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True
    norm: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    qk_norm: bool = False
    """The same kind of norm over each head's queries and keys."""
    causal: bool = True

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.hidden // self.heads

    @property
    def kv_groups(self) -> int:
        """Number of key and value heads."""
        return self.groups or self.heads


@dataclass(frozen=True)
class Batch:
    """One micro-batch: int64 `tokens` and `labels` of shape (rows, length); packed when `documents` has lengths."""

    tokens: Tensor
    labels: Tensor
    documents: tuple[int, ...] | None = None

    @property
    def positions(self) -> Tensor:
        """Each token's place in its own document, in the shape of `tokens`."""
        lengths = self.documents or (self.tokens.shape[1],)
        return torch.cat([torch.arange(length) for length in lengths]).expand_as(self.tokens)


def make_batch(model: GPT, seed: int, *, rows: int = 2, length: int = 32) -> Batch:
    """Return random tokens and labels."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(model.vocabulary, (2, rows, length), generator=generator)
    return Batch(drawn[0], drawn[1])


def make_packed_batch(model: GPT, seed: int, documents: Sequence[int]) -> Batch:
    """Return one row that holds documents of these lengths."""
    whole = make_batch(model, seed, rows=1, length=sum(documents))
    return Batch(whole.tokens, whole.labels, tuple(documents))


def shapes(model: GPT) -> dict[str, tuple[int, ...]]:
    """Return the name and the unsharded shape of every parameter, in Megatron's order of stages."""
    result: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (model.vocabulary, model.hidden)
    }
    if model.positions == "learned":
        result["embedding.position_embeddings.weight"] = (model.length, model.hidden)
    for layer in range(model.layers):
        result |= {f"decoder.layers.{layer}.{name}": shape for name, shape in _layer_shapes(model).items()}
    result |= _norm_shapes(model, "decoder.final_layernorm", model.hidden)
    return result | {"output_layer.weight": (model.vocabulary, model.hidden)}


def _layer_shapes(model: GPT) -> dict[str, tuple[int, ...]]:
    queries, keys = model.heads * model.head_dim, model.kv_groups * model.head_dim
    wide = 2 * model.ffn if model.activation == "swiglu" else model.ffn
    result = _norm_shapes(model, "input_layernorm", model.hidden)
    if model.qk_norm:
        result |= _norm_shapes(model, "self_attention.q_layernorm", model.head_dim)
        result |= _norm_shapes(model, "self_attention.k_layernorm", model.head_dim)
    result |= _linear_shapes(model, "self_attention.linear_qkv", queries + 2 * keys, model.hidden)
    result |= _linear_shapes(model, "self_attention.linear_proj", model.hidden, queries)
    result |= _norm_shapes(model, "pre_mlp_layernorm", model.hidden)
    result |= _linear_shapes(model, "mlp.linear_fc1", wide, model.hidden)
    return result | _linear_shapes(model, "mlp.linear_fc2", model.hidden, model.ffn)


def _linear_shapes(model: GPT, name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    weight = {f"{name}.weight": (outputs, inputs)}
    return weight | {f"{name}.bias": (outputs,)} if model.bias else weight


def _norm_shapes(model: GPT, name: str, size: int) -> dict[str, tuple[int, ...]]:
    weight = {f"{name}.weight": (size,)}
    return weight | {f"{name}.bias": (size,)} if model.norm == "LayerNorm" else weight


def full_weights(model: GPT, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return every unsharded parameter. A name's numbers depend on the seed and on nothing else.

    Large enough that attention is far from uniform and no gradient is all rounding; norms near 1, biases near 0.
    """
    return {name: _drawn(name, shape, seed).to(dtype) for name, shape in shapes(model).items()}


def _drawn(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    if len(shape) == 1:
        return 0.1 * drawn + (1.0 if name.endswith("norm.weight") else 0.0)
    return drawn if name.startswith("embedding") else drawn * 1.5 / math.sqrt(shape[1])


def loss_and_gradients(
    model: GPT, weights: Weights, batches: Sequence[Batch]
) -> tuple[list[float], dict[str, Tensor]]:
    """Return the loss of each micro-batch, and the fp64 gradients of their mean by parameter name."""
    wide = {name: weight.detach().double().requires_grad_() for name, weight in weights.items()}
    losses = [loss(model, wide, batch) for batch in batches]
    gradients = torch.autograd.grad(torch.stack(losses).mean(), list(wide.values()))
    return [value.item() for value in losses], dict(zip(wide, gradients, strict=True))


def loss(model: GPT, weights: Weights, batch: Batch) -> Tensor:
    """Return the cross entropy, the mean over all tokens, a scalar."""
    return F.cross_entropy(logits(model, weights, batch).flatten(0, 1), batch.labels.flatten())


def logits(model: GPT, weights: Weights, batch: Batch) -> Tensor:
    """Return (rows, length, vocabulary)."""
    parts = batch.tokens.split(list(batch.documents or batch.tokens.shape[1:]), dim=1)
    return torch.cat([_document_logits(model, weights, tokens) for tokens in parts], dim=1)


def _document_logits(model: GPT, weights: Weights, tokens: Tensor) -> Tensor:
    x = F.embedding(tokens, weights["embedding.word_embeddings.weight"])
    if model.positions == "learned":
        x = x + weights["embedding.position_embeddings.weight"][: tokens.shape[1]]
    for layer in range(model.layers):
        prefix = f"decoder.layers.{layer}."
        of_layer = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        x = x + _attention(model, of_layer, _norm(model, of_layer, "input_layernorm", x))
        x = x + _feed_forward(model, of_layer, _norm(model, of_layer, "pre_mlp_layernorm", x))
    return F.linear(_norm(model, weights, "decoder.final_layernorm", x), weights["output_layer.weight"])


def _norm(model: GPT, weights: Weights, name: str, x: Tensor) -> Tensor:
    if model.norm == "RMSNorm":
        return F.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"], EPSILON)
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], EPSILON)


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _attention(model: GPT, weights: Weights, x: Tensor) -> Tensor:
    rows, length, _ = x.shape
    per_group = model.heads // model.kv_groups
    # rows of the weight: for each group its queries, then its key, then its value
    qkv = _linear(weights, "self_attention.linear_qkv", x).view(
        rows, length, model.kv_groups, per_group + 2, model.head_dim
    )
    query, key, value = qkv.split([per_group, 1, 1], dim=3)
    query = query.reshape(rows, length, model.heads, model.head_dim)
    key, value = key.squeeze(3), value.squeeze(3)
    if model.qk_norm:
        query = _norm(model, weights, "self_attention.q_layernorm", query)
        key = _norm(model, weights, "self_attention.k_layernorm", key)
    if model.positions == "rope":
        query, key = _rotate(query), _rotate(key)
    key, value = (part.repeat_interleave(per_group, dim=2) for part in (key, value))
    scores = torch.einsum("bqnd,bknd->bnqk", query, key) / math.sqrt(model.head_dim)
    if model.causal:
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    mixed = torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), value)
    return _linear(weights, "self_attention.linear_proj", mixed.flatten(2))


def _rotate(x: Tensor) -> Tensor:
    """Rotate (rows, length, heads, head_dim) by position; Megatron-core has the angles in fp32 whatever x is."""
    half = torch.arange(0, x.shape[-1], 2, dtype=torch.float32) / x.shape[-1]
    angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float32), 1.0 / ROTARY_BASE**half)
    cos, sin = (part.repeat(1, 2)[:, None].to(x.dtype) for part in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _feed_forward(model: GPT, weights: Weights, x: Tensor) -> Tensor:
    hidden = _linear(weights, "mlp.linear_fc1", x)
    if model.activation == "swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        hidden = F.silu(gate) * up
    else:
        hidden = F.gelu(hidden)
    return _linear(weights, "mlp.linear_fc2", hidden)
