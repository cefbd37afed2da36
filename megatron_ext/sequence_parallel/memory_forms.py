"""Bytes that each strategy keeps from forward to backward, and holds for a moment, in one layer.

Contract: pure; T is `tokens` on this rank. *Kept* adds up over layers; *transient* is the most that one layer holds on
top of what is kept, and only the largest of all layers counts. Weights, gradients and optimizer states of the rank's
own shards are in neither. `calibrated` models put measured numbers in their place.

Not covered: the allocator's rounding and fragmentation, workspaces of kernels, attention dropout's masks.
"""

from __future__ import annotations

from megatron_ext.sequence_parallel.layer_shape import LayerShape

SOFTMAX_BYTES = 4
"""An fp32 number for each query and head: the logarithm of its sum of exponentials."""


def kept_bytes(shape: LayerShape, strategy: str, tokens: int, pairs: int) -> int:
    """Of one layer; `pairs` = b s^2, only read where scores are written out."""
    e, hidden = shape.element_bytes, tokens * shape.hidden_size
    alike = (4 * e + (2 if shape.hidden_dropout else 0)) * hidden  # inputs of both norms, and what they give
    outputs = tokens * (shape.query_size * e + shape.num_heads * SOFTMAX_BYTES)
    if strategy == "metp":
        return alike + outputs
    kv = shape.dealt_kv_size if strategy in ("megatron_ts", "ulysses") else shape.kv_size
    qkv = tokens * (shape.query_size + 2 * kv) * e
    feed_forward = tokens * (shape.fc1_size + shape.ffn_hidden_size) * e  # before and after the activation
    unfused = _scores_bytes(shape, pairs) if strategy == "megatron_ts" and shape.unfused_attention else 0
    return alike + outputs + qkv + feed_forward + unfused


def transient_bytes(shape: LayerShape, strategy: str, tokens: int, pairs: int) -> int:
    """Of one layer: the larger of its attention's and its feed-forward part's, in backward."""
    return max(_ATTENTION[strategy](shape, tokens, pairs), _FEED_FORWARD[strategy](shape, tokens))


def logits_bytes(tokens: int, vocabulary: int, element_bytes: int) -> int:
    """Held at the end of forward, once for a micro-batch: T V logits (a rank has 1/p of the vocabulary for p T tokens)
    as computed, in fp32, and the gradient of these."""
    return tokens * vocabulary * (element_bytes + 4 + 4)


def _scores_bytes(shape: LayerShape, pairs: int) -> int:
    """Probabilities of a rank's heads; where weights are narrower than fp32, those of the fp32 softmax as well."""
    narrow = shape.element_bytes < 4
    return pairs * shape.num_heads // shape.group_size * (shape.element_bytes + (4 if narrow else 0))


def _gradients_of_hidden(shape: LayerShape, tokens: int) -> int:
    """Elements of the gradients before and after the activation function."""
    return tokens * (shape.fc1_size + shape.ffn_hidden_size)


def _megatron_ts_attention(shape: LayerShape, tokens: int, pairs: int) -> int:
    """All tokens' input gathered again, their gradient before it is scattered, and that of q, k and v."""
    gathered = shape.group_size * tokens * shape.hidden_size
    fused = (2 * gathered + tokens * shape.qkv_size) * shape.element_bytes
    if not shape.unfused_attention:
        return fused
    return max(fused, 2 * pairs * shape.num_heads // shape.group_size * shape.wide_bytes)


def _megatron_ts_feed_forward(shape: LayerShape, tokens: int) -> int:
    gathered = shape.group_size * tokens * shape.hidden_size
    first = gathered + _gradients_of_hidden(shape, tokens)
    return max(first, 2 * gathered + tokens * shape.fc1_size) * shape.element_bytes


def _gathered_weight(column: int, row: int) -> int:
    """Elements in backward: a column-cut weight and its gradient; a row-cut one's are put in order, one at a time."""
    return max(2 * column, 3 * row)


def _ulysses_attention(shape: LayerShape, tokens: int, pairs: int) -> int:
    """The gradient of q, k and v before and after the all-to-all, or a weight's."""
    moved = 2 * tokens * (shape.query_size + 2 * shape.dealt_kv_size)
    weights = _gathered_weight(shape.qkv_weight, shape.proj_weight) + tokens * shape.qkv_size
    return max(moved, weights) * shape.element_bytes


def _context_attention(shape: LayerShape, tokens: int, pairs: int) -> int:
    """All keys and values, and their gradients in fp32 or wider."""
    kv = 2 * shape.group_size * tokens * shape.kv_size
    return _sequence_cut(shape, tokens, kv * (shape.element_bytes + shape.wide_bytes))


def _ring_attention(shape: LayerShape, tokens: int, pairs: int) -> int:
    """Two buffers of keys and values, two of their gradients."""
    return _sequence_cut(shape, tokens, 4 * tokens * shape.kv_size * (shape.element_bytes + shape.wide_bytes))


def _sequence_cut(shape: LayerShape, tokens: int, kv_bytes: int) -> int:
    queries = tokens * shape.query_size * (shape.element_bytes + shape.wide_bytes)
    weights = _gathered_weight(shape.qkv_weight, shape.proj_weight) + tokens * shape.qkv_size
    return max(kv_bytes + queries, weights * shape.element_bytes)


def _gathered_feed_forward(shape: LayerShape, tokens: int) -> int:
    weights = _gathered_weight(shape.fc1_weight, shape.fc2_weight)
    return (weights + _gradients_of_hidden(shape, tokens)) * shape.element_bytes


def _metp_attention(shape: LayerShape, tokens: int, pairs: int) -> int:
    """Two shards and two gradients, q, k, v of a shard's heads with gradients, their ring, and the sum over shards."""
    p, e = shape.group_size, shape.element_bytes
    shards = 4 * (shape.qkv_weight + shape.proj_weight) // p * e
    heads = 2 * tokens * shape.qkv_size // p * e
    ring = 4 * tokens * shape.kv_size // p * (e + shape.wide_bytes)
    return shards + heads + ring + tokens * shape.hidden_size * e


def _metp_feed_forward(shape: LayerShape, tokens: int) -> int:
    """Two shards and two gradients, a slice of the hidden layer with gradients, and the sum over slices."""
    p = shape.group_size
    shards = 4 * (shape.fc1_weight + shape.fc2_weight) // p
    slices = 2 * _gradients_of_hidden(shape, tokens) // p
    return (shards + slices + tokens * shape.hidden_size) * shape.element_bytes


_ATTENTION = {
    "megatron_ts": _megatron_ts_attention,
    "ulysses": _ulysses_attention,
    "context": _context_attention,
    "ring": _ring_attention,
    "metp": _metp_attention,
}
_FEED_FORWARD = {
    "megatron_ts": _megatron_ts_feed_forward,
    "ulysses": _gathered_feed_forward,
    "context": _gathered_feed_forward,
    "ring": _gathered_feed_forward,
    "metp": _metp_feed_forward,
}
