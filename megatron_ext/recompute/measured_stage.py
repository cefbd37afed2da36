"""A pipeline stage's problem from the chunks themselves, on one device: layers are measured one of each class, and what
a chunk does around its layers by running it without any.

Embedding and head stand in the problem as layers that have no choice, the first and the last of their chunk: the head's
logits lie on top of all that a micro-batch keeps, the gradient of the embedding on top of nothing but itself.
Not covered: bytes of other sizes than the given micro-batch (:mod:`.sizes`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..sequence_parallel import memory_probe
from ..sequence_parallel.switch import group_of
from . import layer_loop
from .emulator import Batch, forward_of, random_message
from .layer_classes import allowed_modules, choices, signature
from .plan import NONE, ChunkPlan
from .probe import measure_layer, most_of_group
from .schedule import Pipeline, corners, open_counts
from .stage import layer_class
from .stage_memory import ChunkLayers, LayerClass, Names, Option, StageProblem


def measured_classes(
    chunks: Sequence[nn.Module], batch: Batch, modules: Sequence[str] | None = ()
) -> dict[Hashable, LayerClass]:
    """By signature. `modules`: that layers may recompute by themselves; None for all that they can."""
    found: dict[Hashable, LayerClass] = {}
    for chunk in chunks:
        fresh = {signature(layer): layer for layer in chunk.decoder.layers if signature(layer) not in found}
        if not fresh:
            continue
        hidden, options = _arguments(chunk, batch)
        group = group_of(chunk.decoder)
        for key, layer in fresh.items():
            able = allowed_modules(layer, modules)
            rows = most_of_group(measure_layer(layer, choices(able), hidden, options), group, hidden.device)
            found[key] = layer_class(f"layer {layer.layer_number}", rows)
    return found


def stage_problem(
    chunks: Sequence[nn.Module],
    classes: Mapping[Hashable, LayerClass],
    pipeline: Pipeline,
    stage: int,
    batch: Batch,
    static_bytes: int,
    limit_bytes: int,
) -> StageProblem:
    """What `stage`, made of these chunks, may do."""
    return StageProblem(
        tuple(
            ChunkLayers(
                with_edges(
                    chunk, [classes[signature(layer)] for layer in chunk.decoder.layers], edge(chunk, batch)
                )
            )
            for chunk in chunks
        ),
        corners(pipeline, stage),
        open_counts(pipeline, stage),
        static_bytes,
        limit_bytes,
    )


def edge(chunk: nn.Module, batch: Batch) -> LayerClass | None:
    """What the chunk does around its layers, None where that is nothing."""
    if not (chunk.pre_process or chunk.post_process):
        return None
    came = None if chunk.pre_process else random_message(chunk, batch).requires_grad_()
    there = [*chunk.parameters(), *chunk.buffers(), batch.tokens, batch.labels, batch.positions]
    there += [parameter.grad for parameter in chunk.parameters() if parameter.grad is not None]
    with torch.enable_grad(), without_layers(chunk):
        kept, transient = memory_probe.measure(
            lambda: forward_of(chunk, came, batch), batch.tokens.new_empty(0) if came is None else came, there
        )
    name = "head" if chunk.post_process else "embedding"
    return LayerClass(name, (Option(NONE, 0.0, kept, transient),))


@contextmanager
def without_layers(chunk: nn.Module) -> Iterator[None]:
    """Inside, the chunk only embeds, or only computes its loss."""
    block = chunk.decoder
    layers, block.layers = block.layers, nn.ModuleList()
    try:
        yield
    finally:
        block.layers = layers
        chunk.set_input_tensor(None)


def with_edges(chunk: nn.Module, layers: Sequence[Any], around: Any) -> tuple[Any, ...]:
    """`around` where it runs: after the layers where there is a head, else before them; nothing where it is None."""
    if around is None:
        return tuple(layers)
    return (*layers, around) if chunk.post_process else (around, *layers)


def names_of(chunks: Sequence[nn.Module], plans: Sequence[ChunkPlan]) -> Names:
    """Plans of the layers as options of the problem; without shares."""
    return [
        with_edges(chunk, plan.layers, NONE if chunk.pre_process or chunk.post_process else None)
        for chunk, plan in zip(chunks, plans, strict=True)
    ]


def without_edges(chunks: Sequence[nn.Module], plans: Sequence[ChunkPlan]) -> tuple[ChunkPlan, ...]:
    """Plans of the problem as plans of the layers."""
    found = []
    for chunk, plan in zip(chunks, plans, strict=True):
        before = int(chunk.pre_process and not chunk.post_process)
        share = plan.share
        if share is not None:
            share = replace(share, layer=share.layer - before)
        found.append(ChunkPlan(plan.layers[before : before + len(chunk.decoder.layers)], share))
    return tuple(found)


class _Arrived(Exception):
    """Ends a forward before its first layer."""


def _arguments(chunk: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
    """What the chunk gives its layers, none of which runs."""
    caught: list[tuple[Tensor, dict[str, Any]]] = []

    def arrived(_block: nn.Module, hidden: Tensor, options: dict[str, Any]) -> None:
        caught.append((hidden.detach(), options))
        raise _Arrived

    loop = layer_loop.attach(chunk.decoder)
    try:
        loop.arrived = arrived
        with torch.enable_grad(), suppress(_Arrived):
            forward_of(chunk, None if chunk.pre_process else random_message(chunk, batch), batch)
    finally:
        layer_loop.detach(chunk.decoder)
        chunk.set_input_tensor(None)
    return caught[0]
