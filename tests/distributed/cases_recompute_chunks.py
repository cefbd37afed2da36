"""Interleaved pipelines with a chunk that has no layers: it holds the embedding or the loss, nothing to recompute."""

from __future__ import annotations

import itertools

import torch

import megatron_ext
from megatron_ext import job
from tests import megatron_models, plain_gpt
from tests.distributed.cases_recompute_job import applied, events
from tests.distributed.harness import Context
from tests.distributed.registry import case
from tests.plain_gpt import GPT

STEPS, MICRO_BATCHES = 3, 4


@case(ranks=(2,), slow=True, layout=("E|tt|tt|ttL", "Ett|tt|tt|L"))
def chunks_without_layers_are_planned_around(ctx: Context, layout: str) -> dict:
    """With plenty and with less: what the chunk keeps is counted, and losses stay the stock model's."""
    gpt = GPT(layers=6, hidden=64, ffn=256, length=64)
    batches = [plain_gpt.make_batch(gpt, number, length=64) for number in range(MICRO_BATCHES)]
    kept, verified, limit = [], [], 10**9
    with megatron_models.parallel_state(pp=2, vpp=2):
        stock = losses_of(gpt, batches, layout)
        for _ in range(2):
            with applied(ctx, {}, limit) as log:
                assert losses_of(gpt, batches, layout) == stock
                running = job.running().recomputation
                assert running.is_frozen
                told = running.stage_plan
                kept.append([plan.layers.count("none") for plan in running.plans])
            assert abs(told.error) <= 0.03, told
            assert told.measured_bytes <= limit
            torch.distributed.barrier()
            verified += events(log, "recompute_verified") if ctx.rank == 0 else []
            limit = (told.all_recomputed_bytes + told.nothing_recomputed_bytes) // 2
    empty = {("E|tt|tt|ttL", 0): 0, ("Ett|tt|tt|L", 1): 1}.get((layout, ctx.rank))
    assert kept[0] == [0 if number == empty else len(told.chunks[number]["layers"]) for number in range(2)]
    assert sum(kept[1]) < sum(kept[0])
    if empty is not None:
        assert told.outside_bytes[empty] > 0
    return {"kept": kept, "errors": [event["error"] for event in verified]}


@case(ranks=(4,), slow=True, layout=("E|tt|tt|ttL", "Ett|tt|tt|L"))
def chunks_without_layers_leave_measuring_to_those_that_run_strategies(ctx: Context, layout: str) -> dict:
    """The layers of the next chunk are measured under the strategy that they run."""
    gpt = GPT(layers=6, hidden=64, ffn=256, length=64)
    batches = [plain_gpt.make_batch(gpt, number, length=64) for number in range(MICRO_BATCHES)]
    with megatron_models.parallel_state(tp=2, pp=2, vpp=2):
        with applied(ctx, {}, "1GB", sequence_parallel={"strategy": "ulysses"}) as log:
            losses_of(gpt, batches, layout)
            running = job.running().recomputation
            assert running.is_frozen
            assert abs(running.stage_plan.error) <= 0.03, running.stage_plan
            assert set(megatron_ext.counters()) == {"ulysses"}
        torch.distributed.barrier()
        measured = [line["strategy"] for line in events(log, "recompute_measured")]
    assert set(measured) == {"ulysses"}, measured
    return {"measured": measured}


def losses_of(gpt: GPT, batches: list, layout: str) -> list[float]:
    chunks = megatron_models.build(gpt, pipeline_model_parallel_layout=layout)
    steps = itertools.repeat(batches, STEPS)
    return [loss for step in steps for loss in megatron_models.forward_backward(chunks, step)]
