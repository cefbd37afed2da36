"""Layers that talk to other tensor-parallel groups: all ranks of a stage hold one plan, whatever each of them sees.

Experts are spread over ranks with their own micro-batches; context parallelism runs with a core attention of the tests'
own, for Megatron-core's needs Transformer Engine. Not covered: the dispatchers on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megatron_ext
from megatron_ext import job
from tests import megatron_models, plain_gpt, spread_models
from tests.distributed.cases_recompute_job import applied, events
from tests.distributed.harness import Context
from tests.distributed.registry import case
from tests.plain_gpt import GPT
from tests.pretended_device import pretended_device

STEPS, MICRO_BATCHES = 3, 2
EXPERTS = spread_models.EXPERTS
GLOBAL = EXPERTS | {"moe_router_load_balancing_type": "global_aux_loss"}
LAYOUTS: dict[str, tuple[dict, dict]] = {
    "ep2": ({"ep": 2}, EXPERTS),
    "ep2_allgather": ({"ep": 2}, EXPERTS | {"moe_token_dispatcher_type": "allgather"}),
    "global_loss": ({}, GLOBAL),
    "cp2": ({"cp": 2}, {}),
    "ep2_pp2": ({"ep": 2, "pp": 2}, EXPERTS),
    # Experts shared over tensor-parallel ranks gather parts of different sizes, which gloo does not.
    "tp2_ep4": ({"tp": 2, "ep": 4, "expert_tensor_parallel_size": 1}, EXPERTS),
}
"""Sizes of groups, and the model's config."""


def gpt_of(layout: str) -> GPT:
    """Rotary angles of a part of the context need pinned memory."""
    is_context = layout.startswith("cp")
    return GPT(
        layers=8,
        ffn=128,
        length=64,
        bias=False,
        positions="learned" if is_context else "rope",
        causal=not is_context,
    )


def batches_of(gpt: GPT, lengths: Sequence[int] = (32,) * MICRO_BATCHES, **rows: int) -> list:
    """Others on each data-parallel rank, the same on the tensor-parallel ranks and stages of one."""
    from megatron.core import parallel_state as state

    replica = 100 * state.get_data_parallel_rank(with_context_parallel=True)
    return [plain_gpt.make_batch(gpt, replica + n, length=length, **rows) for n, length in enumerate(lengths)]


def train(chunks: list, steps: Sequence[list], after: Callable[[], None] = lambda: None) -> list[float]:
    """The losses; gradients of the last step stay."""
    losses = []
    for batches in steps:
        for chunk in chunks:
            chunk.zero_grad()
        losses += megatron_models.forward_backward(chunks, batches)
        after()
    return losses


def plans() -> list[Any]:
    """What this rank's chunks run now."""
    return [(plan.layers, plan.share) for plan in job.running().recomputation.plans]


def same_on_all_ranks_of_a_stage(fact: Any) -> Any:
    """`fact`, where all of them have the same."""
    from megatron.core import parallel_state as state

    group = state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    told: list[Any] = [None] * group.size()
    dist.all_gather_object(told, fact, group=group)
    assert all(other == told[0] for other in told), told
    return fact


@contextmanager
def limits(limit_of: Callable[[int], int], rank: int) -> Iterator[None]:
    """Each rank may hold something else."""
    from megatron_ext.rank_memory import RankMemory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankMemory, "limit", lambda _self: limit_of(rank))
        yield


@case(ranks=(2,), most_quick=2, strength=1, layout=("ep2", "cp2", "ep2_allgather", "global_loss"))
@case(ranks=(4,), slow=True, layout=("tp2_ep4", "ep2_pp2"))
def spread_layers_hold_one_plan_and_change_nothing(ctx: Context, layout: str) -> dict:
    """From plenty to less, on one rank less than on the others: one plan, and the stock model's numbers to the bit."""
    sizes, config = LAYOUTS[layout]
    gpt, found = gpt_of(layout), []
    with spread_models.parallel_state(**sizes):
        steps = [batches_of(gpt)] * STEPS
        stock = _run(gpt, config, steps)
        with applied(ctx, {}, "1GB"):
            ours = _run(gpt, config, steps)
            told = job.running().recomputation.stage_plan
            _equal(stock, ours)
            assert {choice for layers, _ in same_on_all_ranks_of_a_stage(plans()) for choice in layers} == {
                "none"
            }
        least, most = told.all_recomputed_bytes, told.nothing_recomputed_bytes
        enough = int(least + 0.75 * (most - least))
        with limits(lambda rank: enough if rank == ctx.world_size - 1 else 10**9, ctx.rank):
            with applied(ctx, {}, "1GB"):
                ours = _run(gpt, config, steps)
                running = job.running().recomputation
                assert running.is_frozen
                _equal(stock, ours)
                found = same_on_all_ranks_of_a_stage(plans())
                counters = megatron_ext.recompute_counters()
        is_tight = ctx.rank >= ctx.world_size // 2 or sizes.get("pp", 1) == 1
        assert is_tight == any(layers.count("none") < len(layers) for layers, _ in found), found
        assert sum(counts["forward"] for counts in counters.values()) == STEPS * MICRO_BATCHES * len(
            found[0][0]
        )
    return {"plan": found}


def _run(gpt: GPT, config: dict, steps: list) -> tuple:
    """Losses, this rank's gradients, and what Megatron-core would log of the routers' losses."""
    return _trained(spread_models.build(gpt, **config), steps)


def _trained(chunks: list, steps: list) -> tuple:
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    tracker = get_moe_layer_wise_logging_tracker()
    tracker.clear()
    losses = train(chunks, steps)
    logged = {name: entry["values"].clone() for name, entry in tracker.items()}
    return losses, spread_models.gradients(chunks), logged


def _equal(stock: tuple, ours: tuple) -> None:
    assert stock[0] == ours[0], (stock[0], ours[0])
    for theirs, mine in zip(stock[1:], ours[1:], strict=True):
        assert theirs.keys() == mine.keys()
        different = [name for name in theirs if not torch.equal(theirs[name], mine[name])]
        assert not different, different


@case(ranks=(2,))
@case(ranks=(4,), slow=True)
def longer_sequences_of_one_rank_are_planned_for_by_all_at_the_next_step(ctx: Context) -> dict:
    """In the step in which they come they run under the plan that is there; nobody plans alone."""
    gpt, kept = gpt_of("ep2"), []
    config = EXPERTS | {"variable_seq_lengths": True}
    with spread_models.parallel_state(**({"ep": 2} if ctx.world_size == 2 else {"ep": 2, "pp": 2})):
        is_longer = dist.get_rank() % 2 == 1
        lengths = [(32, 32)] * 3 + [(32, 64 if is_longer else 32)] + [(32, 32)] * 2
        steps = [batches_of(gpt, each) for each in lengths]
        stock = _run(gpt, config, steps)
        with applied(ctx, {}, "1GB"):
            _run(gpt, config, steps[:2])
            told = job.running().recomputation.stage_plan
        least, most = told.all_recomputed_bytes, told.nothing_recomputed_bytes
        with applied(ctx, {}, "1GB") as log, limits(lambda _: least + 2 * (most - least), 0):
            chunks = spread_models.build(gpt, **config)
            losses = train(chunks, steps, lambda: kept.append(same_on_all_ranks_of_a_stage(plans())))
            assert job.running().recomputation.is_frozen
        assert losses == stock[0]
        dist.barrier()
        planned = [line["length"] for line in events(log, "recompute_measured")] if ctx.rank == 0 else [32]
    assert set(planned) == {32}, planned
    assert kept[1] == kept[2] == kept[3] != kept[4] == kept[5], kept
    return {"kept": kept[3:5]}


@case(ranks=(2,), most_quick=1, strength=1, shapes=(((8, 16), (1, 64)), ((2, 16), (2, 48))))
def ranks_that_begin_with_different_sizes_plan_for_one_that_covers_them(ctx: Context, shapes: tuple) -> dict:
    """Of the first pair neither covers the other: (8, 16) has more tokens, (1, 64) longer rows."""
    gpt = gpt_of("ep2")
    rows, length = shapes[ctx.rank]
    with spread_models.parallel_state(ep=2):
        steps = [batches_of(gpt, (length,) * MICRO_BATCHES, rows=rows)] * STEPS
        stock = _run(gpt, EXPERTS, steps)
        with applied(ctx, {}, "1GB") as log:
            _equal(stock, _run(gpt, EXPERTS, steps))
            told = job.running().recomputation.stage_plan
            same_on_all_ranks_of_a_stage((plans(), told.predicted_bytes))
        dist.barrier()
        measured = events(log, "recompute_measured")[0] if ctx.rank == 0 else None
    if measured is not None:
        largest = max(shapes, key=lambda shape: shape[0] * shape[1])
        assert measured["batch"] * measured["length"] >= largest[0] * largest[1], measured
    assert told.frozen
    return {"told": told.predicted_bytes}


@case(ranks=(2,))
def ranks_of_a_stage_that_plan_differently_are_named(ctx: Context) -> None:
    """Before the plan runs, so that nobody waits in a collective."""
    from megatron_ext.recompute import recomputation
    from megatron_ext.recompute.stage import all_layers

    gpt = gpt_of("ep2")
    with pytest.MonkeyPatch.context() as patch, spread_models.parallel_state(ep=2):
        if ctx.rank == 1:
            patch.setattr(recomputation, "chunk_plans", lambda *_: [all_layers(8)])
        with applied(ctx, {}, "1GB"):
            chunks = spread_models.build(gpt, **EXPERTS)
            train(chunks, [batches_of(gpt)])
            with pytest.raises(
                ValueError, match=r"rank \d and rank \d, .* differ about recomputation plan 1"
            ):
                train(chunks, [batches_of(gpt)])


@case(ranks=(2,), slow=True)
def layers_frozen_on_one_rank_alone_are_named(ctx: Context) -> dict:
    """Frozen on all, they are measured anew by all; on one, the ranks' layers differ, and no rank measures."""
    gpt, found = gpt_of("ep2"), []
    with spread_models.parallel_state(ep=2), applied(ctx, {}, "1GB") as log:
        chunks = spread_models.build(gpt, **EXPERTS)
        steps = [batches_of(gpt)] * 3
        for layer in (None, 0):
            if layer is not None:
                chunks[0].decoder.layers[layer].requires_grad_(False)
            train(chunks, steps)
            found.append(same_on_all_ranks_of_a_stage(plans()))
        if ctx.rank == 1:
            chunks[0].decoder.layers[2].requires_grad_(False)
        with pytest.raises(ValueError, match=r"differ about the layers that are measured"):
            train(chunks, steps)
        dist.barrier()
        measured = len(events(log, "recompute_measured")) if ctx.rank == 0 else 5
    assert measured == 5, measured  # dense and experts; then the frozen one, too
    return {"plans": found}


@case(ranks=(2,), most_quick=1, strength=1, policy=("uniform", "load"))
def rules_and_saved_plans_run_where_layers_are_spread(ctx: Context, policy: str) -> dict:
    """Nothing is measured, and nothing is asked of other ranks when a longer sequence comes."""
    gpt, path = gpt_of("ep2"), ctx.folder / "plan.json"
    with spread_models.parallel_state(ep=2):
        steps = [batches_of(gpt)] * 2 + [batches_of(gpt, (32, 64 if ctx.rank else 32))]
        stock = _run(gpt, EXPERTS, steps)
        with applied(ctx, {"policy": "uniform", "ratio": 0.5, "plan": {"save": str(path)}}, "1GB"):
            _equal(stock, _run(gpt, EXPERTS, steps))
            counted = megatron_ext.recompute_counters()
        dist.barrier()
        if policy == "load":
            assert json.loads(path.read_text())["stages"][0]["layers"].count("full") == 4
            with applied(ctx, {"plan": {"load": str(path), "save": None}}, "1GB"):
                _equal(stock, _run(gpt, EXPERTS, steps))
                assert megatron_ext.recompute_counters() == counted
    assert counted["full"]["recomputed"] == 4 * len(steps) * MICRO_BATCHES
    return {"counters": counted}


@case(ranks=(2,), slow=True)
def late_states_and_steps_over_the_limit_of_one_rank_are_planned_for_by_all(ctx: Context) -> dict:
    """What a device would count is pretended, other bytes on each rank."""
    gpt, spent = gpt_of("ep2"), []
    said = {"allocated": 1_000_000, "peak": 0}
    with (
        spread_models.parallel_state(ep=2),
        pretended_device(lambda: said["allocated"], lambda: said["peak"]),
    ):
        with applied(ctx, {}, "1GB"):
            chunks = spread_models.build(gpt, **EXPERTS)
            train(chunks, [batches_of(gpt)] * 3)
            told = job.running().recomputation.stage_plan
        more = (told.nothing_recomputed_bytes - told.all_recomputed_bytes) // 3
        with applied(ctx, {}, told.nothing_recomputed_bytes):
            chunks = spread_models.build(gpt, **EXPERTS)

            def steps(count: int) -> None:
                train(chunks, [batches_of(gpt)] * count)
                running = job.running().recomputation
                assert running.is_frozen
                spent.append(
                    same_on_all_ranks_of_a_stage((plans(), running.stage_plan.recompute_seconds))[1][0]
                )

            steps(3)
            steps(1)  # nothing has changed
            said["allocated"] += more * (ctx.rank == 0)
            steps(2)
            if ctx.rank == 1:
                chunks[0].register_forward_pre_hook(
                    lambda *_: said.update(peak=told.nothing_recomputed_bytes + more)
                )
            steps(1)
            chunks[0]._forward_pre_hooks.clear()
            said["peak"] = 0  # as if the steps after it held less
            steps(2)
    assert spent[0] == spent[1] < spent[2] == spent[3] < spent[4], spent
    return {"seconds": spent}


@case(ranks=(1,))
def measuring_experts_leaves_no_trace(ctx: Context) -> dict:
    """In a group of one, with all that a router counts: logged losses, tokens by expert, random jitter."""
    config = EXPERTS | {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_z_loss_coeff": 1e-3,
        "moe_input_jitter_eps": 0.01,
    }
    gpt, found = gpt_of("ep1"), []
    for recompute in ({"enabled": False}, {}):
        with spread_models.parallel_state(), applied(ctx, recompute, "1GB"):
            chunks = spread_models.build(gpt, **config)
            result = _trained(chunks, [batches_of(gpt)] * STEPS)
            buffers = {name: buffer for name, buffer in chunks[0].named_buffers() if "router" in name}
            found.append((*result, buffers))
    _equal(*found)
    assert found[0][3]["decoder.layers.1.mlp.router.local_tokens_per_expert"].sum() > 0
    assert set(found[0][2]) == {"load_balancing_loss", "z_loss"}
    return {"losses": found[0][0]}
