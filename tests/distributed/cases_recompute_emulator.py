"""What a stage holds at its peak is what was predicted: one layer of each class measured, each stage run by itself.

Counted by the allocator. Not covered: messages between stages (cases_recompute_plans.py runs real pipelines).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from megatron_ext.recompute.plan import FULL, NONE, ChunkPlan
from megatron_ext.recompute.schedule import Pipeline
from tests import audit, megatron_models, plain_gpt
from tests.distributed.harness import Context
from tests.distributed.registry import case
from tests.plain_gpt import GPT

LAYERS = 4
"""Of a chunk."""
LENGTH, ROWS = 256, 2
"""Large enough for random states, 10 kB for each recomputed layer, which only on a CPU lie on the device."""
STAGES, MICRO_BATCHES = 4, 8
PIPELINES = {
    "1f1b": Pipeline(STAGES, MICRO_BATCHES),
    "few": Pipeline(STAGES, 2),
    "interleaved": Pipeline(STAGES, MICRO_BATCHES, chunks=2),
}
PLANS = {
    "none": ChunkPlan((NONE,) * LAYERS),
    "full": ChunkPlan((FULL,) * LAYERS),
    "mixed": ChunkPlan((FULL, "core_attn", FULL, NONE)),
    "modules": ChunkPlan(("mlp", "core_attn", "core_attn+mlp", NONE)),
    "solved": None,
}
"""None: what the solver makes of half the room between full recomputation and none."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = 0.03


@case(
    ranks=(1,),
    most_quick=1,
    thorough=2,
    timeout_seconds=240,
    pipeline=tuple(PIPELINES),
    plan=tuple(PLANS),
    dtype=("fp32", "bf16"),
    model=("llama", "gelu"),
)
def predicted_peaks_are_the_measured_ones(
    ctx: Context, pipeline: str, plan: str, dtype: str, model: str
) -> dict:
    """Of every stage, above weights and gradients, within 3 %. What ran is counted, and the model is as before.

    A layer that is shared between micro-batches may be predicted to hold more than it does where chunks are
    interleaved: how its micro-batches and the corners of the schedule meet is not looked at.
    """
    from megatron_ext.recompute.emulator import PeakCounter, emulate
    from megatron_ext.recompute.measured_stage import measured_classes, stage_problem

    audit.start()
    shape, gpt = PIPELINES[pipeline], _gpt(model)
    counter, batch = PeakCounter(audit.reset_peak, audit.peak_bytes), _batch(gpt)
    found: dict[str, float] = {}
    shared = []
    classes: dict = {}
    with megatron_models.parallel_state(), audit.collectives_that_let_go():
        for stage in range(STAGES):
            chunks = stage_chunks(gpt, shape, stage, DTYPES[dtype])
            if not classes:  # layers of all stages are alike
                classes = measured_classes(chunks, batch, ("core_attn", "mlp"))
            problem = stage_problem(chunks, classes, shape, stage, batch, 0, 0)
            plans, predicted = _planned(chunks, PLANS[plan], problem)
            before = [_state(chunk) for chunk in chunks]
            ran = emulate(chunks, plans, shape, stage, batch, counter)
            assert [_state(chunk) for chunk in chunks] == before
            found[f"stage {stage}"] = predicted / (ran.peak_bytes - ran.static_bytes)
            if any(each.share is not None for each in plans) and shape.chunks > 1:
                shared.append(f"stage {stage}")
            for times, each in zip(ran.times, plans, strict=True):
                again = times.recompute if isinstance(times.recompute, tuple) else (times.recompute,)
                assert min(times.forward, times.backward) > 0
                assert (max(again) > 0) == (set(each.layers) != {NONE} or each.share is not None)
            del chunks
    assert all(ratio >= 1 - TOLERANCE for ratio in found.values()), found
    assert all(ratio <= 1 + TOLERANCE for stage, ratio in found.items() if stage not in shared), found
    return found


def _planned(chunks: list[nn.Module], plan: ChunkPlan | None, problem: Any) -> tuple[list[ChunkPlan], int]:
    """Plans of the chunks, and the peak that is predicted."""
    from megatron_ext.recompute.measured_stage import names_of, without_edges
    from megatron_ext.recompute.stage import chunk_plans
    from megatron_ext.recompute.stage_peak import peak_in_order, solve_in_order

    def peak(plan: ChunkPlan) -> int:
        return peak_in_order(problem, names_of(chunks, [plan] * len(chunks)))

    if plan is not None:
        return [plan] * len(chunks), peak(plan)
    limit = (peak(PLANS["full"]) + peak(PLANS["none"])) // 2
    solution = solve_in_order(replace(problem, limit_bytes=limit))
    assert solution.fits
    return list(without_edges(chunks, chunk_plans(problem, solution))), solution.peak_bytes


def _gpt(model: str) -> GPT:
    sizes: dict[str, Any] = {
        "layers": LAYERS,
        "hidden": 256,
        "ffn": 512,
        "vocabulary": 1024,
        "length": LENGTH,
    }
    if model == "llama":
        sizes |= {"groups": 4, "activation": "swiglu", "norm": "RMSNorm"}
    return GPT(**sizes, bias=False)  # with one, Megatron-core's recomputation of mlp never ends


def _batch(gpt: GPT) -> Any:
    from megatron_ext.recompute.emulator import Batch

    drawn = plain_gpt.make_batch(gpt, 0, rows=ROWS, length=LENGTH)
    return Batch(drawn.tokens, drawn.labels, drawn.positions.contiguous())


def stage_chunks(gpt: GPT, pipeline: Pipeline, stage: int, dtype: torch.dtype) -> list[nn.Module]:
    """The chunks of a stage of a pipeline that is not there; `gpt` has the layers of one chunk."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    config = megatron_models.transformer_config(gpt, dtype)
    return [
        GPTModel(
            config,
            megatron_models._layer_spec(gpt, False),
            gpt.vocabulary,
            gpt.length,
            pre_process=(stage, chunk) == (0, 0),
            post_process=(stage, chunk) == (pipeline.stages - 1, pipeline.chunks - 1),
            position_embedding_type="rope",
        ).to(dtype)
        for chunk in range(pipeline.chunks)
    ]


def _state(chunk: nn.Module) -> list:
    """What could have been left behind: flags, configs, replaced methods; weights, which nothing trains."""
    return [
        (
            {name: value for name, value in vars(part).items() if isinstance(value, bool)},
            sorted(vars(part)),
            id(getattr(part, "config", None)),
        )
        for part in chunk.modules()
    ] + [float(parameter.detach().double().sum()) for parameter in chunk.parameters()]
