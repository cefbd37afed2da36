"""From a `recompute` block to plans that run: measured, solved under a limit, verified, frozen; nothing else changes.

Not covered: what a plan computes (cases_recompute_plans.py), one stage at a time (cases_recompute_emulator.py).
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import megatron_ext
from megatron_ext import job
from tests import megatron_models, plain_gpt
from tests.distributed.cases_megatron_training import VARIED
from tests.distributed.harness import Context
from tests.distributed.registry import case
from tests.plain_gpt import GPT
from tests.pretended_device import pretended_device

STEPS, MICRO_BATCHES = 3, 6


@contextmanager
def applied(ctx: Context, recompute: dict, limit: str | int, **block: object) -> Iterator[Path]:
    """Inside, blocks that are built are planned; yields the log's path."""
    torch.distributed.barrier()  # the block before has written its file
    log = ctx.folder / f"{len(os.listdir(ctx.folder))}.jsonl"
    torch.distributed.barrier()  # all have counted the files before one is written
    recompute = {"plan": {"save": None}, **recompute}
    block = {"sequence_parallel": {"enabled": False}, **block}
    block |= {"memory": {"limit": limit}, "recompute": recompute, "log": {"path": str(log)}}
    megatron_ext.apply({"megatron_ext": block})
    try:
        yield log
    finally:
        megatron_ext.remove()


def events(log: Path, name: str) -> list[dict]:
    return [line for line in map(json.loads, log.read_text().splitlines()) if line["event"] == name]


@case(ranks=(2,), most_quick=1, pipeline=("pp2_vpp2", "pp2"))
def plans_hold_their_limit_and_change_nothing(ctx: Context, pipeline: str) -> dict:
    """From plenty to hardly enough: less and less is kept, losses and gradients stay the stock model's to the bit."""
    sizes = {"pp2": {"pp": 2}, "pp2_vpp2": {"pp": 2, "vpp": 2}}[pipeline]
    gpt = GPT(layers=8, hidden=64, ffn=256, length=64)
    batches = [plain_gpt.make_batch(gpt, number, length=64) for number in range(MICRO_BATCHES)]
    kept, found = [], {}
    with megatron_models.parallel_state(**sizes):
        stock = _steps(gpt, batches)
        for limit in ("1GB", "11MB", "9MB"):
            with applied(ctx, {}, limit) as log:
                losses, gradients = _steps(gpt, batches)
                counters = megatron_ext.recompute_counters()
                plans = job.running().recomputation.plans
                frozen = job.running().recomputation.is_frozen
            assert losses == stock[0]
            assert all(torch.equal(stock[1][name], gradients[name]) for name in gradients)
            assert frozen
            assert (
                sum(counts["forward"] for counts in counters.values())
                == _layers(sizes) * STEPS * MICRO_BATCHES
            )
            assert counters["full"]["forward"] == counters["full"]["recomputed"]
            kept.append(sum(choice == "none" for plan in plans for choice in plan.layers))
            torch.distributed.barrier()
            verified = events(log, "recompute_verified") if ctx.rank == 0 else []
            for event in verified:
                assert event["measured_bytes"] <= event["limit_bytes"], event
                assert abs(event["error"]) <= 0.03, event
            found[limit] = [event["error"] for event in verified]
    assert kept[0] == _layers(sizes), kept
    assert kept[0] > kept[2], kept
    return {"kept": kept, "errors": found}


def _layers(sizes: dict) -> int:
    """Of one rank."""
    return 8 // sizes["pp"]


def _steps(gpt: GPT, batches: list) -> tuple:
    chunks = megatron_models.build(gpt)
    losses = []
    for _ in range(STEPS):
        for chunk in chunks:
            chunk.zero_grad()
        losses += megatron_models.forward_backward(chunks, batches)
    return losses, megatron_models.gather_gradients(chunks)


@case(ranks=(2,), most_quick=1, strength=1, policy=("merak", "uniform", "level", "none", "load"))
def rules_and_saved_plans_run_as_written(ctx: Context, policy: str) -> dict:
    """Layers that are recomputed by the ratio rules; a saved plan runs again; a plan of another pipeline is refused."""
    gpt = GPT(layers=8)
    batches = [plain_gpt.make_batch(gpt, number) for number in range(MICRO_BATCHES)]
    path = ctx.folder / "plan.json"
    with megatron_models.parallel_state(pp=2):
        stock = _steps(gpt, batches)
        recompute = {
            "policy": policy,
            "ratio": None if policy == "none" else 0.5,
            "plan": {"save": str(path)},
        }
        if policy == "load":
            recompute |= {"policy": "uniform"}
        with applied(ctx, recompute, "1GB"):
            losses, gradients = _steps(gpt, batches)
            first = megatron_ext.recompute_counters()
        torch.distributed.barrier()
        assert losses == stock[0]
        assert all(torch.equal(stock[1][name], gradients[name]) for name in gradients)
        counts = {"merak": (2, 0), "uniform": (2, 2), "level": (2, 0), "none": (0, 0), "load": (2, 2)}[policy]
        expected = {"full": counts[ctx.rank], "none": 4 - counts[ctx.rank]}
        passes = STEPS * MICRO_BATCHES
        for choice, layers in expected.items():
            assert first.get(choice, {"forward": 0})["forward"] == layers * passes, (first, expected)
        assert first.get("full", {"recomputed": 0})["recomputed"] == expected["full"] * passes
        saved = json.loads(path.read_text())
        assert [stage["layers"].count("full") for stage in saved["stages"]] == list(counts)
        assert all(stage["measured"]["measured_bytes"] for stage in saved["stages"])
        if policy == "load":
            again = {"plan": {"load": str(path), "save": None}}
            with applied(ctx, again, "1GB"):
                _steps(gpt, batches)
                assert megatron_ext.recompute_counters() == first
            with applied(ctx, again, "1GB"), pytest.raises(ValueError, match="start with the same pipeline"):
                _steps(GPT(layers=4), batches)
    return {"counters": first}


@case(ranks=(2,))
def a_limit_that_nothing_fits_is_one_clear_error(ctx: Context) -> None:
    """At the start of the second step, before any message."""
    gpt = GPT(layers=4, hidden=64, ffn=256, length=64)
    batches = [plain_gpt.make_batch(gpt, number, length=64) for number in range(4)]
    with megatron_models.parallel_state(pp=2), applied(ctx, {}, "1MB"):
        chunks = megatron_models.build(gpt)
        megatron_models.forward_backward(chunks, batches)
        message = r"stage \d needs .* with every layer recomputed .* allows 976.56 KiB; give it .* or more"
        with pytest.raises(ValueError, match=message):
            megatron_models.forward_backward(chunks, batches)


@case(ranks=(2,), most_quick=1, strength=1, groups=(4, None))
def longer_sequences_and_more_micro_batches_are_planned_for(ctx: Context, groups: int | None) -> dict:
    """Measured at one length, predicted for twice that; with more micro-batches more are open. Both hold the limit."""
    gpt = GPT(layers=8, hidden=64, ffn=256, length=128, groups=groups)
    steps = [(1, 64), (1, 64), (1, 64), (1, 128), (1, 128), (6, 128), (6, 128)]
    batches = [[plain_gpt.make_batch(gpt, n, length=length) for n in range(count)] for count, length in steps]
    kept = []
    with megatron_models.parallel_state(pp=4 if ctx.world_size == 4 else 2):
        stock = _run(megatron_models.build(gpt, **VARIED), batches)
        with applied(ctx, {}, "16MB") as log:
            chunks = megatron_models.build(gpt, **VARIED)
            losses = []
            for step in batches:
                losses += _run(chunks, [step])
                plans = job.running().recomputation.plans
                kept.append(sum(plan.layers.count("none") for plan in plans))
        assert losses == stock
        torch.distributed.barrier()
        verified = events(log, "recompute_verified") if ctx.rank == 0 else []
        plans = events(log, "recompute_plan") if ctx.rank == 0 else [0] * 2
    assert len(plans) >= 2, plans
    assert kept[2] > kept[4] or kept[4] > kept[6], kept
    for event in verified:
        assert event["measured_bytes"] <= event["limit_bytes"], event
        assert abs(event["error"]) <= 0.03, event
    return {"kept": kept, "errors": [event["error"] for event in verified]}


@case(ranks=(2,))
def ranks_that_may_hold_different_bytes_plan_alike(ctx: Context) -> dict:
    """Two ranks of a tensor-parallel group recompute together, so the least limit of them is everybody's."""
    gpt = GPT(layers=8, hidden=64, ffn=256, length=64)
    batches = [plain_gpt.make_batch(gpt, number, length=64) for number in range(2)]
    limits = (9_000_000, 8_000_000)
    with megatron_models.parallel_state(tp=2), applied(ctx, {}, limits[ctx.rank]):
        losses, _ = _steps(gpt, batches)
        plan = job.running().recomputation.stage_plan
    assert plan.frozen
    assert plan.limit_bytes == min(limits)
    assert 0 < plan.chunks[0]["layers"].count("none") < 8, plan
    told: list = [None] * 2
    torch.distributed.all_gather_object(told, plan.chunks)
    assert told[0] == told[1]
    return {"losses": losses}


@case(ranks=(2,))
def late_states_and_steps_over_the_limit_are_planned_for(ctx: Context) -> dict:
    """What a device would count is pretended: optimizer states come late, then one rank goes over in a frozen step."""
    gpt = GPT(layers=8, hidden=64, ffn=256, length=64)
    batches = [plain_gpt.make_batch(gpt, number, length=64) for number in range(2)]
    said, spent = {"allocated": 1_000_000, "peak": 0}, []
    with (
        megatron_models.parallel_state(tp=2),
        pretended_device(lambda: said["allocated"], lambda: said["peak"]),
    ):
        with applied(ctx, {}, "5MB"):
            chunks = megatron_models.build(gpt)

            def steps(count: int) -> None:
                for _ in range(count):
                    megatron_models.forward_backward(chunks, batches)
                running = job.running().recomputation
                assert running.is_frozen
                spent.append(running.stage_plan.recompute_seconds[0])

            steps(3)
            steps(1)  # nothing has changed
            said["allocated"] += 1_000_000
            steps(2)
            steps(1)
            if ctx.rank == 1:
                chunks[0].register_forward_pre_hook(lambda *_: said.update(peak=6_000_000))
            steps(1)
            chunks[0]._forward_pre_hooks.clear()
            said["peak"] = 3_000_000  # as if the step after it held less
            steps(1)
            said["allocated"] += 10_000_000  # more than any plan is good for
            steps(2)
            assert set(job.running().recomputation.plans[0].layers) == {"full"}
    assert spent[0] == spent[1] < spent[2] == spent[3] == spent[4] < spent[5], spent
    told: list = [None] * 2
    torch.distributed.all_gather_object(told, spent)
    assert told[0] == told[1]
    return {"seconds": spent}


@case(ranks=(2,), most_quick=1, strength=1, kind=("forward_only", "no_grad"))
def evaluation_in_training_mode_is_no_micro_batch(ctx: Context, kind: str) -> dict:
    """Before the first step and between steps, on longer sequences: nothing is planned for them, nothing counts."""
    gpt = GPT(layers=8, hidden=64, ffn=256, length=128)
    batches = [plain_gpt.make_batch(gpt, number, length=64) for number in range(MICRO_BATCHES)]
    longer = [plain_gpt.make_batch(gpt, 9, length=128)]
    found = []
    with megatron_models.parallel_state(pp=2):
        for recompute in ({"enabled": False}, {}):
            with applied(ctx, recompute, "16MB") as log:
                chunks = megatron_models.build(gpt)
                losses = []
                for _ in range(STEPS):
                    with torch.set_grad_enabled(kind == "forward_only"):
                        losses += megatron_models.forward_backward(chunks, longer, forward_only=True)
                    losses += megatron_models.forward_backward(chunks, batches)
                found.append(losses)
                counters = megatron_ext.recompute_counters()
    assert found[0] == found[1]
    forward = sum(counts["forward"] for counts in counters.values())
    assert forward == 4 * STEPS * MICRO_BATCHES, counters
    torch.distributed.barrier()
    if ctx.rank == 0:
        assert {event["length"] for event in events(log, "recompute_measured")} == {64}
        assert len(events(log, "recompute_plan")) == 1
    return {"counters": counters}


@case(ranks=(1,))
def saved_plan_is_refused_where_layers_cannot_run_it(ctx: Context) -> None:
    """`mlp` with biases never ends in Megatron-core, so a file is as little trusted as a key."""
    path = ctx.folder / "plan.json"
    with megatron_models.parallel_state():
        gpt = GPT(layers=2)
        batches = [plain_gpt.make_batch(gpt, 0)]
        with applied(ctx, {"policy": "none", "plan": {"save": str(path)}}, "1GB"):
            _steps(gpt, batches)
        plan = json.loads(path.read_text())
        plan["stages"][0]["layers"][1] = "mlp"
        path.write_text(json.dumps(plan))
        message = "recomputes mlp of layer 2, but its linear_fc2 has a bias"
        with applied(ctx, {"plan": {"load": str(path), "save": None}}, "1GB"):
            with pytest.raises(ValueError, match=message):
                _steps(gpt, batches)


@case(ranks=(1,))
def frozen_blocks_are_measured_as_they_are(ctx: Context) -> dict:
    """Without weight gradients a layer keeps less; when others train, layers are measured anew."""
    gpt = GPT(layers=4, hidden=64, ffn=256, length=64)
    batches = [plain_gpt.make_batch(gpt, number, length=64) for number in range(2)]
    with megatron_models.parallel_state(), applied(ctx, {}, "1GB") as log:
        chunk = megatron_models.build(gpt)[0]
        for trained in (range(4), range(1)):
            for place, layer in enumerate(chunk.decoder.layers):
                layer.requires_grad_(place in trained)
            for _ in range(3):
                megatron_models.forward_backward([chunk], batches)
    measured = [event["choices"][0]["kept_bytes"] for event in events(log, "recompute_measured")]
    assert len(measured) == 3, measured  # all train; then one class that trains and one that does not
    assert measured[0] == measured[1] > measured[2], measured
    errors = [event["error"] for event in events(log, "recompute_verified")]
    assert len(errors) == 2
    assert all(abs(error) <= 0.03 for error in errors), errors
    return {"kept": measured, "errors": errors}


@case(ranks=(2,), slow=True)
def a_frozen_plan_costs_next_to_nothing(ctx: Context) -> dict:
    """Time inside our own calls, over the time of the steps; slow, for the quick run traces every line."""
    gpt = GPT(layers=8, hidden=128, ffn=512, length=128)
    batches = [plain_gpt.make_batch(gpt, number, length=128) for number in range(4)]
    with megatron_models.parallel_state(pp=2), applied(ctx, {}, "1GB"):
        chunks = megatron_models.build(gpt, dtype=torch.float32)
        for _ in range(3):
            megatron_models.forward_backward(chunks, batches)
        running = job.running().recomputation
        assert running.is_frozen
        spent, start = running.own_seconds, time.perf_counter()
        for _ in range(4):
            megatron_models.forward_backward(chunks, batches)
        taken, own = time.perf_counter() - start, running.own_seconds - spent
        layers = 4 * len(batches) * len(running.plans[0].layers)
        own += layers * seconds_of_a_layer()
    assert own / taken < 1e-3, f"{own / taken:.1e}"
    return {"share": own / taken}


def seconds_of_a_layer() -> float:
    """What going through layers one by one takes for each, more than calling them."""
    from types import SimpleNamespace

    from megatron_ext.recompute import layer_loop
    from megatron_ext.recompute.plan import ChunkPlan

    count, rounds = 100, 20
    layers = [lambda **arguments: (arguments["hidden_states"], None)] * count
    block = SimpleNamespace(layers=layers, config=None)
    loop = layer_loop.LayerLoop(block)
    loop.plan, loop.chosen = ChunkPlan(("none",) * count), dict.fromkeys(range(count), "none")
    setattr(block, layer_loop._MARK, loop)
    start = time.perf_counter()
    for _ in range(rounds):
        layer_loop._run_layers(block, None, None, None, None, None)
    ours, start = time.perf_counter() - start, time.perf_counter()
    for _ in range(rounds):
        for layer in layers:
            layer(hidden_states=None)
    return (ours - (time.perf_counter() - start)) / count / rounds


def _run(chunks: list, steps: list) -> list[float]:
    losses = []
    for step in steps:
        losses += megatron_models.forward_backward(chunks, step)
    return losses


@case(ranks=(2,), seed=tuple(range(8)), jobs=(25,), slow=True, timeout_seconds=600)
def random_jobs_never_exceed_their_limit(ctx: Context, seed: int, jobs: int) -> dict:
    """Sizes, layers, micro-batches, virtual stages and limits are drawn; all of a limit is used, and no byte more."""
    drawn, used = random.Random(seed), []
    for _ in range(jobs):
        vpp, count = drawn.choice((None, 2)), drawn.choice((2, 4, 6))
        gpt = GPT(
            layers=4 * drawn.randint(1, 3),
            groups=drawn.choice((None, 4, 1)),
            activation=drawn.choice(("gelu", "swiglu")),
            bias=drawn.choice((True, False)),
            length=drawn.choice((16, 32, 64)),
        )
        batches = [[plain_gpt.make_batch(gpt, number) for number in range(count)]] * 3
        share = drawn.random()
        with megatron_models.parallel_state(pp=2, vpp=vpp):
            with applied(ctx, {}, "1GB"):
                _run(megatron_models.build(gpt), batches[:2])
                plenty = job.running().recomputation.stage_plan
            ends = torch.tensor([plenty.all_recomputed_bytes, plenty.nothing_recomputed_bytes])
            torch.distributed.all_reduce(ends, op=torch.distributed.ReduceOp.MAX)
            least, most = ends.tolist()
            limit = int(least + share * (most - least))
            with applied(ctx, {}, limit):
                _run(megatron_models.build(gpt), batches)
                told = job.running().recomputation.stage_plan
        assert told.frozen
        assert told.measured_bytes <= limit, (gpt, told)
        assert told.predicted_bytes <= limit, (gpt, told)
        used.append(told.predicted_bytes / min(limit, told.nothing_recomputed_bytes))
    return {"used": sum(used) / len(used), "least": min(used)}
