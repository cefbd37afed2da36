"""The pipeline that this rank is in, as Megatron-core's parallel state has it."""

from __future__ import annotations

from typing import Any

from .schedule import Pipeline, open_counts


def opens_more(before: Pipeline, after: Pipeline) -> bool:
    """Whether a chunk of this stage would hold more micro-batches at once."""
    if before == after:
        return False
    pairs = zip(open_counts(before, own_stage()), open_counts(after, own_stage()), strict=True)
    return any(held < would for held, would in pairs)


def own_stage() -> int:
    """Its place among the stages, from 0."""
    from megatron.core import parallel_state

    return parallel_state.get_pipeline_model_parallel_rank()


def pipeline_of(micro_batches: int, config: Any) -> Pipeline:
    """A step of so many micro-batches; `config`: the model's TransformerConfig."""
    from megatron.core import parallel_state

    chunks = own_chunks()
    return Pipeline(
        parallel_state.get_pipeline_model_parallel_world_size(),
        micro_batches,
        chunks,
        getattr(config, "microbatch_group_size_per_vp_stage", None) if chunks > 1 else None,
    )


def own_chunks() -> int:
    """Virtual stages of this rank."""
    from megatron.core import parallel_state

    return parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1
