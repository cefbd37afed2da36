"""What one stage plans to recompute, as the stages of a pipeline tell each other (:mod:`megatron_ext.stage_facts`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StagePlan:
    """One stage's plan and what it was made from, as it is told, logged, saved and drawn."""

    stage: int
    policy: str
    chunks: tuple[dict[str, Any], ...]
    """{"layers": [choice of each layer], "share": null or its fields} of each chunk."""
    open: tuple[int, ...]
    """Most micro-batches of each chunk whose activations are held."""
    pipeline: dict[str, Any]
    """Fields of :class:`.schedule.Pipeline`."""
    limit_bytes: int
    static_bytes: int | None = None
    """Weights, gradients, optimizer states. This and what follows: None where the policy does not measure."""
    unforeseen_bytes: int | None = None
    """Held by a step beside what was predicted for it, and counted with in what is predicted now."""
    predicted_bytes: int | None = None
    """At the peak."""
    measured_bytes: int | None = None
    """At the peak of the step that verified the plan; None before."""
    error: float | None = None
    """Of that measurement: measured over predicted, less one. On a CPU, where nothing else is counted, both are of what
    autograd holds beside the static bytes."""
    nothing_recomputed_bytes: int | None = None
    """What the peak would be with every activation kept."""
    all_recomputed_bytes: int | None = None
    """What the peak would be with every layer recomputed in full."""
    forward_seconds: tuple[float, ...] | None = None
    """Of one micro-batch through each chunk's layers."""
    backward_seconds: tuple[float, ...] | None = None
    """The same, without what is recomputed."""
    recompute_seconds: tuple[float, ...] | None = None
    outside_seconds: tuple[float, ...] | None = None
    """Of one forward of each chunk, outside of its layers: embedding, head, loss."""
    layer_options: tuple[dict[str, Any], ...] | None = None
    """Fields of each :class:`.stage_memory.Option` of the stage's most frequent layer."""
    layer_static_bytes: int | None = None
    """Weights, gradients and optimizer states of one such layer."""
    outside_bytes: tuple[int, ...] | None = None
    """Kept by a micro-batch of each chunk, outside of its layers."""
    frozen: bool = False
