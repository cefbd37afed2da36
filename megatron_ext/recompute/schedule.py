"""What a pipeline rank runs in a step, in order, and which activations are open meanwhile: from the schedule alone.

Contract: pure functions of integers. The order is the one in which Megatron-core 0.16.1 runs the passes of a rank
(`megatron/core/pipeline_parallel/schedules.py`): warm-up forwards, one forward and one backward in turn, the backwards
that are left. 1F1B (Narayanan et al., arXiv 2104.04473, section 2.2) with one chunk; interleaved with several, in
groups of micro-batches that a chunk runs in a row.

A pass is open from the end of its forward to the end of its backward: its activations are held.

Not covered: `overlap_moe_expert_parallel_comm` (one more warm-up forward), forward-only steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal


@dataclass(frozen=True)
class Pass:
    """One micro-batch through one chunk of a rank."""

    kind: Literal["forward", "backward"]
    micro_batch: int
    chunk: int


@dataclass(frozen=True)
class Pipeline:
    """A pipeline that Megatron-core would run; ValueError for one that it refuses."""

    stages: int
    """Ranks of the pipeline."""
    micro_batches: int
    """Of one step."""
    chunks: int = 1
    """Virtual stages of a rank; 1 is 1F1B."""
    group_size: int | None = None
    """`microbatch_group_size_per_vp_stage`: micro-batches that a chunk runs in a row; None: as many as stages. Without
    meaning for one chunk, as in Megatron."""

    def __post_init__(self) -> None:
        for key in ("stages", "micro_batches", "chunks"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be 1 or more")
        if self.chunks == 1:
            return
        if self.stages == 1:
            raise ValueError(f"chunks is {self.chunks} but stages is 1; use 1 chunk, or several stages")
        if not self.stages <= self.group <= self.micro_batches:
            raise ValueError(
                f"group_size is {self.group}; with {self.chunks} chunks Megatron allows {self.stages} (the stages) "
                f"to {self.micro_batches} (the micro-batches); give more micro-batches or another group size"
            )
        rest = self.micro_batches % self.group
        if 0 < rest < self.stages:
            raise ValueError(
                f"micro_batches is {self.micro_batches}, which leaves a last group of {rest} with group_size "
                f"{self.group}; Megatron allows 0, or {self.stages} (the stages) and more; change either"
            )

    @property
    def group(self) -> int:
        """The group size that is meant."""
        return self.stages if self.group_size is None else self.group_size

    @property
    def virtual_stages(self) -> int:
        """Chunks that a micro-batch passes through; chunk c of stage i is number `c * stages + i`."""
        return self.stages * self.chunks


@dataclass(frozen=True)
class Corner:
    """A moment at which memory may be at its peak: a backward of chunk `running` runs."""

    open: tuple[int, ...]
    """Open passes by chunk, the running one included."""
    running: int


def warm_up(pipeline: Pipeline, stage: int) -> int:
    """Forwards before the first backward of a stage, but for the one that comes right before it."""
    after = pipeline.stages - stage - 1
    if pipeline.chunks == 1:
        return min(after, pipeline.micro_batches)
    # twice the stages that follow: an interleaved rank waits for a backward of its last chunk, not of the next rank
    return min(2 * after + (pipeline.chunks - 1) * pipeline.group, pipeline.micro_batches * pipeline.chunks)


@lru_cache(maxsize=256)
def passes(pipeline: Pipeline, stage: int) -> tuple[Pass, ...]:
    """All passes of one step in the order in which `stage` runs them."""
    if not 0 <= stage < pipeline.stages:
        raise ValueError(f"stage is {stage}; with {pipeline.stages} stages use 0 to {pipeline.stages - 1}")
    table = list(_forward_order(pipeline))
    forwards = [Pass("forward", micro_batch, chunk) for micro_batch, chunk in table]
    # the gradient comes from the last chunk first
    backwards = [Pass("backward", micro_batch, pipeline.chunks - 1 - chunk) for micro_batch, chunk in table]
    ahead = warm_up(pipeline, stage)
    in_turn = len(table) - ahead
    order = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards[:in_turn], strict=True):
        order += [forward, backward]
    return (*order, *backwards[in_turn:])


def _forward_order(pipeline: Pipeline) -> Iterator[tuple[int, int]]:
    """Micro-batch and chunk of each forward: Megatron's schedule table. The last group may be smaller."""
    group = pipeline.micro_batches if pipeline.chunks == 1 else pipeline.group
    for first in range(0, pipeline.micro_batches, group):
        for chunk in range(pipeline.chunks):
            for micro_batch in range(first, min(first + group, pipeline.micro_batches)):
                yield micro_batch, chunk


def _moments(pipeline: Pipeline, stage: int) -> Iterator[tuple[Pass, tuple[int, ...]]]:
    """Each pass with the open passes by chunk: after a forward, during a backward (its own included)."""
    held = [0] * pipeline.chunks
    for current in passes(pipeline, stage):
        if current.kind == "forward":
            held[current.chunk] += 1
        yield current, tuple(held)
        if current.kind == "backward":
            held[current.chunk] -= 1


@lru_cache(maxsize=256)
def open_counts(pipeline: Pipeline, stage: int) -> tuple[int, ...]:
    """The most open passes of each chunk, not all of them at one moment where there are several chunks."""
    return tuple(max(counts) for counts in zip(*(held for _, held in _moments(pipeline, stage)), strict=True))


@lru_cache(maxsize=256)
def corners(pipeline: Pipeline, stage: int) -> tuple[Corner, ...]:
    """Moments of which one is the peak, whatever the chunks keep: no other with the same running chunk has as many of
    each chunk. Backwards only: what is open after a forward is open during the next backward as well."""
    moments = {
        Corner(held, current.chunk)
        for current, held in _moments(pipeline, stage)
        if current.kind == "backward"
    }
    most = [corner for corner in moments if not any(_dominates(other, corner) for other in moments)]
    return tuple(sorted(most, key=lambda corner: (corner.running, corner.open)))


def _dominates(other: Corner, corner: Corner) -> bool:
    return (
        other.running == corner.running
        and other.open != corner.open
        and all(more >= less for more, less in zip(other.open, corner.open, strict=True))
    )
