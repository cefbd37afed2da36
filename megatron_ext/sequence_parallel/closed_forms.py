"""What each strategy sends and computes in one layer, as closed forms of its shape.

Contract: pure; T below is `tokens`, the tokens on this rank (b s / p). An event's elements are those of the local input
of the collective: the shard of an all-gather, the full tensor of a reduce-scatter, the local tensor of an all-to-all or
exchange, the message of a send, broadcast or reduce. Counted on real process groups these must come out exactly.
Sources: section 1.3 of the ParaDySe paper (arXiv 2511.13198) for what is sent, METP (doi 10.1631/FITEE.2400602) for the
walk over weight shards; GEMMs are 2 m n k. Memory is in `memory_forms`.

`kernel_launches` and `touched_elements` are estimates by counting kernels, for the prior of time alone.

Not covered: loads that differ between ranks of packed sequences.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from megatron_ext.sequence_parallel.layer_shape import LayerShape

Part = Literal["attention", "feed_forward"]
Phase = Literal["forward", "backward"]
PARTS: tuple[Part, ...] = ("attention", "feed_forward")
PHASES: tuple[Phase, ...] = ("forward", "backward")

BACKWARD_OF_FUSED_ATTENTION = 2.5
"""Five products of scores' size against two: backward computes the scores again."""


class Event(NamedTuple):
    """One collective or message of this rank."""

    kind: str
    """all_gather, reduce_scatter, all_to_all, exchange, send, broadcast or reduce."""
    elements: int
    bytes: int


def collectives(shape: LayerShape, strategy: str, part: Part, phase: Phase, tokens: int) -> tuple[Event, ...]:
    """In the order in which the strategy issues them; a group of one sends nothing."""
    if shape.group_size == 1:
        return ()
    events = _EVENTS[strategy][part](shape, tokens, phase == "backward")
    return tuple(events)


def all_collectives(shape: LayerShape, strategy: str, tokens: int) -> tuple[Event, ...]:
    """Of the whole layer, forward and backward."""
    return sum((collectives(shape, strategy, part, phase, tokens) for phase in PHASES for part in PARTS), ())


def wire_elements(event: Event, group_size: int) -> float:
    """Elements that leave this rank, with the ring algorithm where the event is a collective."""
    if event.kind == "all_gather":
        return event.elements * (group_size - 1)
    if event.kind in ("reduce_scatter", "all_to_all"):
        return event.elements * (group_size - 1) / group_size
    return event.elements


def gemm_flops(shape: LayerShape, strategy: str, part: Part, phase: Phase, tokens: int) -> int:
    """Of this rank's linears: 2 T W forward and 4 T W backward; METP computes QKV and fc1 again."""
    first, second = _weights(shape, part)
    if phase == "forward":
        return 2 * tokens * (first + second)
    again = 2 * tokens * first if strategy == "metp" else 0
    return 4 * tokens * (first + second) + again


def attention_flops(shape: LayerShape, strategy: str, phase: Phase, pairs: int) -> float:
    """Of this rank's share of `pairs` (query, key) pairs, b s^2 in all or the sum of squares of packed documents.

    A causal mask halves them and zigzag chunks share them equally. Unfused scores are computed in full and kept.
    """
    forward = 4.0 * shape.head_dim * pairs * shape.num_heads / shape.group_size
    if strategy == "megatron_ts" and shape.unfused_attention:
        return forward if phase == "forward" else 2 * forward
    forward = forward / 2 if shape.causal else forward
    return forward if phase == "forward" else BACKWARD_OF_FUSED_ATTENTION * forward


def kernel_launches(shape: LayerShape, strategy: str) -> int:
    """Of one layer, forward and backward: about 15 + 30 for the host's own, and what walks in steps adds."""
    p = shape.group_size
    if strategy == "ring":
        return 45 + 15 * p  # a tile forward, one backward, and merging them
    return 45 + 15 * p * p if strategy == "metp" else 45


def touched_elements(shape: LayerShape, strategy: str, tokens: int) -> int:
    """Read or written by norms, residuals, activation and rotations, forward and backward; by weights put in order."""
    hidden = tokens * (
        3 * (8 * shape.hidden_size + shape.qkv_size) + 4 * (shape.fc1_size + shape.ffn_hidden_size)
    )
    ordered = 0 if strategy in ("megatron_ts", "metp") else 6 * (shape.proj_weight + shape.fc2_weight)
    return hidden + ordered


def _weights(shape: LayerShape, part: Part) -> tuple[int, int]:
    """Elements of the column-cut and the row-cut weight of a part."""
    if part == "attention":
        return shape.qkv_weight, shape.proj_weight
    return shape.fc1_weight, shape.fc2_weight


def _event(shape: LayerShape, kind: str, elements: int, element_bytes: int | None = None) -> Event:
    return Event(kind, elements, elements * (element_bytes or shape.element_bytes))


# -- tensor parallelism with sequence parallelism: gathers tokens -----------------------------------------------------


def _megatron_ts(shape: LayerShape, tokens: int, backward: bool) -> list[Event]:
    """Row MegatronTS of the table: 2 AG + 2 RS forward, 4 AG + 2 RS backward for a layer."""
    gather = _event(shape, "all_gather", tokens * shape.hidden_size)
    scatter = _event(shape, "reduce_scatter", tokens * shape.hidden_size * shape.group_size)
    return [gather, gather, scatter] if backward else [gather, scatter]


def _megatron_ts_attention(shape: LayerShape, tokens: int, backward: bool) -> list[Event]:
    """With fewer KV heads than ranks a shard ends inside a group: features are gathered, a rank takes its own."""
    events = _megatron_ts(shape, tokens, backward)
    if not shape.cuts_kv_groups:
        return events
    features = tokens * shape.qkv_size
    if backward:
        return [*events, _event(shape, "reduce_scatter", features * shape.group_size)]
    return [*events, _event(shape, "all_gather", features)]


# -- gathered weights -----------------------------------------------------------------------------------------------


def _gathered(shape: LayerShape, weight: int, backward: bool) -> list[Event]:
    """A weight gathered, in backward again with its gradient summed and cut."""
    gather = _event(shape, "all_gather", weight // shape.group_size)
    return [gather, _event(shape, "reduce_scatter", weight)] if backward else [gather]


def _gathered_bias(shape: LayerShape, size: int, backward: bool) -> list[Event]:
    """Backward needs no bias, only the sum of its gradients."""
    if backward:
        return [_event(shape, "reduce_scatter", size)]
    return [_event(shape, "all_gather", size // shape.group_size)]


def _gathered_feed_forward(shape: LayerShape, tokens: int, backward: bool) -> list[Event]:
    bias = _gathered_bias(shape, shape.fc1_size, backward) if shape.linear_bias else []
    return [
        *_gathered(shape, shape.fc1_weight, backward),
        *bias,
        *_gathered(shape, shape.fc2_weight, backward),
    ]


def _ulysses_attention(shape: LayerShape, tokens: int, backward: bool) -> list[Event]:
    """Row UlyssesZ: heads are dealt out by one all-to-all and come home by another."""
    there = _event(shape, "all_to_all", tokens * (shape.query_size + 2 * shape.dealt_kv_size))
    home = _event(shape, "all_to_all", tokens * shape.query_size)
    qkv, proj = (_gathered(shape, weight, backward) for weight in (shape.qkv_weight, shape.proj_weight))
    if shape.cuts_kv_groups and shape.has_qkv_bias:  # the bias is then added before heads are dealt out
        qkv += _gathered_bias(shape, shape.qkv_size, backward)
    return [*proj, home, there, *qkv] if backward else [*qkv, there, home, *proj]


def _weights_of_sequence_cut(shape: LayerShape, tokens: int, backward: bool) -> list[Event]:
    """What `context` and `ring` share: weights, bias and, for causal masks, the way into zigzag order and back."""
    bias = _gathered_bias(shape, shape.qkv_size, backward) if shape.has_qkv_bias else []
    return [
        *_exchanges(shape, tokens),
        *_gathered(shape, shape.qkv_weight, backward),
        *bias,
        *_gathered(shape, shape.proj_weight, backward),
    ]


def _exchanges(shape: LayerShape, tokens: int) -> list[Event]:
    return [_event(shape, "exchange", tokens * shape.hidden_size)] * (2 if shape.causal else 0)


def _context_attention(shape: LayerShape, tokens: int, backward: bool) -> list[Event]:
    """Context parallelism with gathered keys and values; their gradients add up in fp32 or wider."""
    kv = 2 * tokens * shape.kv_size
    events = [*_weights_of_sequence_cut(shape, tokens, backward), _event(shape, "all_gather", kv)]
    if not backward:
        return events
    return [*events, _event(shape, "reduce_scatter", kv * shape.group_size, shape.wide_bytes)]


def _ring_attention(shape: LayerShape, tokens: int, backward: bool) -> list[Event]:
    """Row MegatronCZ: keys and values go round; in backward their gradients too, in fp32 or wider, one hop further."""
    kv = 2 * tokens * shape.kv_size
    return [*_weights_of_sequence_cut(shape, tokens, backward), *_ring(shape, kv, backward)]


def _ring(shape: LayerShape, elements: int, backward: bool) -> list[Event]:
    hops = [_event(shape, "send", elements)] * (shape.group_size - 1)
    return (
        [*hops, *[_event(shape, "send", elements, shape.wide_bytes)] * shape.group_size] if backward else hops
    )


# -- METP: walks over weight shards -----------------------------------------------------------------------------------


def _metp_attention(shape: LayerShape, tokens: int, backward: bool) -> list[Event]:
    """Row METP: each shard is broadcast, and its few heads' keys and values make a ring of their own."""
    p = shape.group_size
    bias = shape.qkv_size if shape.has_qkv_bias else 0
    shard = (shape.qkv_weight + shape.proj_weight + bias) // p
    events = [
        *_exchanges(shape, tokens),
        *[_event(shape, "broadcast", shard)] * p,
        *_ring(shape, 2 * tokens * shape.kv_size // p, backward) * p,
    ]
    return [*events, *[_event(shape, "reduce", shard)] * p] if backward else events


def _metp_feed_forward(shape: LayerShape, tokens: int, backward: bool) -> list[Event]:
    """Shards go round; in backward their gradients too, one hop further."""
    p = shape.group_size
    bias = shape.fc1_size if shape.linear_bias else 0
    hop = _event(shape, "send", (shape.fc1_weight + shape.fc2_weight + bias) // p)
    return [hop] * (2 * p - 1 if backward else p - 1)


_EVENTS = {
    "megatron_ts": {"attention": _megatron_ts_attention, "feed_forward": _megatron_ts},
    "ulysses": {"attention": _ulysses_attention, "feed_forward": _gathered_feed_forward},
    "context": {"attention": _context_attention, "feed_forward": _gathered_feed_forward},
    "ring": {"attention": _ring_attention, "feed_forward": _gathered_feed_forward},
    "metp": {"attention": _metp_attention, "feed_forward": _metp_feed_forward},
}
