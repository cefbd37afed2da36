"""From a `megatron_ext` block to plans that run: the planner's own choice, what it says, and its limits.

Not covered: what a plan computes (cases_megatron_strategies.py), optimizer steps (cases_megatron_training.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import megatron_ext
from megatron_ext import job
from megatron_ext.report import read_run
from megatron_ext.sequence_parallel import known_costs
from megatron_ext.sequence_parallel.held_out import HeldOutError
from megatron_ext.sequence_parallel.memory_forms import logits_bytes
from megatron_ext.sequence_parallel.names import NATIVE, STRATEGIES
from megatron_ext.sequence_parallel.profile import load_profiles
from tests import megatron_models, plain_gpt
from tests.distributed.harness import Context
from tests.distributed.registry import case
from tests.plain_gpt import GPT


@contextmanager
def applied(ctx: Context, sequence_parallel: dict, **block: object) -> Iterator[Path]:
    """Inside, blocks that are built are switched; yields the log's path. Afterwards nothing is left."""
    torch.distributed.barrier()  # the block before has written its file
    log = ctx.folder / f"{len(os.listdir(ctx.folder))}.jsonl"
    torch.distributed.barrier()  # all have counted the files before one is written
    block = {"sequence_parallel": sequence_parallel, "log": {"path": str(log)}, **block}
    megatron_ext.apply({"megatron_ext": block})
    try:
        yield log
    finally:
        megatron_ext.remove()


@case(ranks=(2, 4), strength=1, most_quick=1, kind=("analytical", "forest"))
def plans_fit_their_limit_and_lose_nothing(ctx: Context, kind: str) -> dict:
    """From plenty of memory to little: faster plans give way to leaner ones; gradients stay those of the plain GPT.

    On a small model and a busy machine any strategy may be measured the fastest, the leanest too: no limit would then
    change the plan. So the profile keeps its measured bytes, and its seconds are made to fall with them.
    """
    gpt = GPT(layers=4, hidden=64, length=256)
    weights, chosen = plain_gpt.full_weights(gpt), {}
    batch = plain_gpt.make_batch(gpt, 0, length=256)
    (expected,), exact = plain_gpt.loss_and_gradients(gpt, weights, [batch])
    profile = ctx.folder / "profile.json"
    with megatron_models.parallel_state(tp=ctx.world_size):
        with applied(ctx, {"cost_model": {"save": str(profile)}}):
            megatron_models.forward_backward(megatron_models.build(gpt), [batch])
            torch.distributed.barrier()
        if ctx.rank == 0:
            _make_leaner_slower(profile)
        torch.distributed.barrier()
        cost_model = {"kind": kind, "load": str(profile)}
        for limit in ("2GB", "20MB", "14MB"):
            with applied(ctx, {"smoothing": 0.0, "cost_model": cost_model}, memory={"limit": limit}) as log:
                chunks = megatron_models.build(gpt)
                loss = megatron_models.forward_backward(chunks, [batch])[0]
                torch.distributed.barrier()
                ran = {name for name, lengths in megatron_ext.counters().items() if lengths[256]["forward"]}
            worst, where = megatron_models.largest_difference(megatron_models.gather_gradients(chunks), exact)
            assert abs(loss - expected) <= 1e-12 * expected
            assert worst <= 1e-12, f"{limit}: {where}: {worst:.1e}"
            torch.distributed.barrier()
            told = [json.loads(line) for line in log.read_text().splitlines()]
            (plan,) = [line for line in told if line["event"] == "plan"]
            (budget,) = [line for line in told if line["event"] == "budget"]
            assert set(plan["layers"]) == ran
            assert plan["fits"] == (plan["predicted_bytes"] <= budget["planned_bytes"])
            chosen[limit] = plan["predicted_bytes"]
    assert chosen["2GB"] >= chosen["20MB"] >= chosen["14MB"], chosen
    assert chosen["2GB"] > chosen["14MB"], "no limit changed the plan"
    return chosen


@case(ranks=(2,))
def what_is_much_longer_is_profiled_when_it_comes(ctx: Context) -> None:
    """The first micro-batch is short; one a quarter longer follows from it, one beyond does not. Nothing is lost."""
    gpt, profile = GPT(length=256), ctx.folder / "profile.json"
    weights = plain_gpt.full_weights(gpt)
    batches = [plain_gpt.make_batch(gpt, n, length=n) for n in (16, 20, 256, 64)]
    expected, exact = plain_gpt.loss_and_gradients(gpt, weights, batches)
    with megatron_models.parallel_state(tp=2), applied(ctx, {"cost_model": {"save": str(profile)}}) as log:
        chunks = megatron_models.build(gpt)
        losses = megatron_models.forward_backward(chunks, batches)
        worst, where = megatron_models.largest_difference(megatron_models.gather_gradients(chunks), exact)
    assert losses == pytest.approx(expected, rel=1e-12)
    assert worst <= 1e-12, f"{where}: {worst:.1e}"
    assert _profiled(log) == [[16, 4], [256, 64]]
    (layer,) = json.loads(profile.read_text())["layers"]
    rows = layer["measurements"]
    assert [row["length"] for row in rows if row["strategy"] == "ring"] == [16, 4, 256, 64]


@case(ranks=(2, 4), strength=1, most_quick=1)
def a_saved_profile_has_every_layer(ctx: Context) -> None:
    """Of two chunks on a rank, or of two stages, that are not alike: none is lost, and each finds its own again."""
    narrow, wide = GPT(layers=2, ffn=32), GPT(layers=2, ffn=64)
    models = [narrow, wide] if ctx.world_size == 2 else [narrow if ctx.rank < 2 else wide]
    batch, profile = plain_gpt.make_batch(narrow, 0), ctx.folder / "profile.json"
    with megatron_models.parallel_state(tp=2, pp=ctx.world_size // 2):

        def run(**cost_model: str) -> None:
            with applied(ctx, {"cost_model": cost_model}):
                chunks = [megatron_models.build(gpt)[0] for gpt in models]
                for chunk in chunks:
                    megatron_models.forward_backward([chunk], [batch])
                torch.distributed.barrier()
                shapes = [found.shape.ffn_hidden_size for found in load_profiles(profile)]
                assert sorted(shapes) == [32, 64], shapes

        run(save=str(profile))
        run(load=str(profile))
        run(load=str(profile), save=str(profile))
        if ctx.world_size == 2:  # in a pipeline the other stage would wait for the one that refuses
            models = [GPT(layers=2, ffn=96)]
            closest = r"2 other layers; of the closest \(ffn_hidden_size \d+ instead of 96\)"
            with pytest.raises(ValueError, match=closest):
                run(load=str(profile))


@case(ranks=(2,), slow=True)
def a_held_out_error_is_warned_of_once(ctx: Context) -> None:
    """Not with every longer sequence: a warning that comes with each is read as one more fault."""
    gpt, said = GPT(length=256), []
    errors = {"ring": HeldOutError("ring", 0.3, 0.0, 1)}
    with pytest.MonkeyPatch.context() as patch, megatron_models.parallel_state(tp=2), applied(ctx, {}) as log:
        patch.setattr(known_costs, "held_out_error", lambda *_: errors)
        patch.setattr(known_costs.logger, "warning", lambda text, *values: said.append(text % values))
        chunks = megatron_models.build(gpt)
        for length in (16, 64, 256):
            megatron_models.forward_backward(chunks, [plain_gpt.make_batch(gpt, 0, length=length)])
        torch.distributed.barrier()
        told = [
            line
            for line in map(json.loads, log.read_text().splitlines())
            if line["event"] == "held_out_error"
        ]
    assert len(told) == 3
    assert len([text for text in said if "held-out error" in text]) == (1 if ctx.rank == 0 else 0), said


@case(ranks=(4,))
def a_stage_of_only_the_embedding_hides_nothing(ctx: Context) -> None:
    """Rank 0 of the world has no layer there: the first rank that has one writes the log and saves both files."""
    gpt, profile, plan = GPT(layers=3), ctx.folder / "profile.json", ctx.folder / "plan.json"
    batches = [plain_gpt.make_batch(gpt, number) for number in range(3)]
    recompute = {"policy": "uniform", "ratio": 0.5, "plan": {"save": str(plan)}}
    with megatron_models.parallel_state(tp=2, pp=2):
        with applied(ctx, {"cost_model": {"save": str(profile)}}, recompute=recompute) as log:
            chunks = megatron_models.build(gpt, pipeline_model_parallel_layout="E|tttL")
            layers = len(chunks[0].decoder.layers)
            for _ in range(2):
                megatron_models.forward_backward(chunks, batches)
        torch.distributed.barrier()
    assert layers == (0 if ctx.rank < 2 else 3)
    told = [json.loads(line) for line in log.read_text().splitlines()]
    assert len({line["run_id"] for line in told}) == 1
    assert {"start", "profile", "budget", "plan", "summary", "counters", "recompute_stages"} <= {
        line["event"] for line in told
    }
    assert read_run(log).rows[0].micro_batches == 6
    assert json.loads(profile.read_text())["format"] == "megatron_ext.sequence_parallel.profile"
    assert [len(stage["layers"]) for stage in json.loads(plan.read_text())["stages"]] == [0, 3]


@case(ranks=(2,))
def packed_documents_are_profiled_and_planned(ctx: Context) -> None:
    """Their table of rotary angles is as long as the longest of them, which is less than what is profiled."""
    gpt = GPT(groups=4)
    batches = [plain_gpt.make_packed_batch(gpt, 0, (5, 11, 1, 15))]
    expected, exact = plain_gpt.loss_and_gradients(gpt, plain_gpt.full_weights(gpt), batches)
    strategies = [
        name for name in STRATEGIES if name != NATIVE
    ]  # Megatron's own attention on CPUs takes none
    with megatron_models.parallel_state(tp=2), applied(ctx, {"strategies": strategies}) as log:
        chunks = megatron_models.build(gpt)
        losses = megatron_models.forward_backward(chunks, batches)
        worst, where = megatron_models.largest_difference(megatron_models.gather_gradients(chunks), exact)
    assert losses == pytest.approx(expected, rel=1e-12)
    assert worst <= 1e-12, f"{where}: {worst:.1e}"
    assert _profiled(log) == [[32, 8, 4]]


@case(ranks=(2,))
def logits_are_counted_however_the_model_came(ctx: Context) -> None:
    """Built under the block, or built before and handed over; for a rank, half of them."""
    gpt = GPT()
    settings = {"megatron_ext": {"log": {"enabled": False}}}
    with megatron_models.parallel_state(tp=2):
        for built_before in (False, True):
            megatron_ext.remove()
            if not built_before:
                megatron_ext.apply(settings)
            chunks = megatron_models.build(gpt)
            if built_before:
                megatron_ext.apply(settings, chunks[0])
            chunks[0](*_inputs(gpt, length=16))
            (policy,) = job.running()._policies.values()
            rows = plain_gpt.make_batch(gpt, 0, length=16).tokens.shape[0]
            assert policy._planner._outside_bytes(rows, 16) == logits_bytes(rows * 16 // 2, gpt.vocabulary, 8)
            megatron_ext.remove()


@case(ranks=(2,), most_quick=1, strength=1, policy=("none", "uniform"))
def layers_cost_what_the_recompute_block_makes_of_them(ctx: Context, policy: str) -> None:
    """Not what the copy of the config says by which they are recomputed."""
    gpt = GPT(layers=4)
    recompute = {"policy": policy, "ratio": None if policy == "none" else 0.5, "plan": {"save": None}}
    with megatron_models.parallel_state(tp=2), applied(ctx, {}, recompute=recompute):
        chunks = megatron_models.build(gpt)
        megatron_models.forward_backward(chunks, [plain_gpt.make_batch(gpt, 0)])
        (policy_of_block,) = job.running()._policies.values()
        assert sorted(policy_of_block._together) == ([0] * 4 if policy == "none" else [0, 0, 1, 1])


@case(ranks=(2,))
def a_profile_is_of_training_whatever_came_first(ctx: Context) -> None:
    """An evaluation may be first; its layers have no dropout, and everything is as it was afterwards."""
    gpt, seen = GPT(), set()
    with megatron_models.parallel_state(tp=2), applied(ctx, {}):
        chunks = megatron_models.build(gpt)
        chunks[0].eval()
        mlp = chunks[0].decoder.layers[0].mlp
        mlp.register_forward_pre_hook(lambda module, _: seen.add(module.training))
        with torch.no_grad():
            chunks[0](*_inputs(gpt, length=16))
        assert seen == {True, False}
        assert not any(module.training for module in chunks[0].modules())


def _profiled(log: Path) -> list[list[int]]:
    """Lengths of each profile."""
    told = [json.loads(line) for line in log.read_text().splitlines()]
    return [line["lengths"] for line in told if line["event"] == "profile"]


def _make_leaner_slower(file: Path) -> None:
    """Twice as slow from each strategy to the next that keeps less, and proportional to the length."""
    content = json.loads(file.read_text())
    (layer,) = content["layers"]
    rows = layer["measurements"]
    longest = max(row["length"] for row in rows)
    kept = {row["strategy"]: row["kept_bytes"] for row in rows if row["length"] == longest}
    heaviest_first = sorted(kept, key=kept.get, reverse=True)
    for row in rows:
        row["seconds"] = 1e-4 * row["length"] * 2.0 ** heaviest_first.index(row["strategy"])
    file.write_text(json.dumps(content))


@case(ranks=(2,), strength=1, name=STRATEGIES)
def a_fixed_strategy_runs_everywhere(ctx: Context, name: str) -> dict:
    """Forward, backward and recomputed, for every length."""
    gpt = GPT()
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    with megatron_models.parallel_state(tp=2), applied(ctx, {"strategy": name}):
        chunks = megatron_models.build(gpt, **full)
        for length in (16, 48):
            megatron_models.forward_backward(chunks, [plain_gpt.make_batch(gpt, length, length=length)])
        counters = megatron_ext.counters()
    once = {"forward": 2, "backward": 2, "recomputed": 2}
    assert counters == {name: {16: once, 48: once}}, counters
    return counters


@case(ranks=(2,))
def what_cannot_run_is_refused_before_any_collective(ctx: Context) -> None:
    """By name where it was asked for, left out with its reason where it was only allowed."""
    with megatron_models.parallel_state(tp=2):
        with applied(ctx, {"strategy": "metp"}), pytest.raises(ValueError, match="metp needs whole KV heads"):
            megatron_models.build(GPT(groups=1))
        with applied(ctx, {}), pytest.raises(ValueError, match="sequence_parallel is False"):
            megatron_models.build(GPT(), sequence_parallel=False)
        with applied(ctx, {}) as log:
            chunks = megatron_models.build(GPT(groups=1))
            torch.distributed.barrier()
            (start,) = [json.loads(line) for line in log.read_text().splitlines()]
            assert "metp" in start["refused"]
            assert "metp" not in start["allowed"]
        with applied(ctx, {"strategies": ["ring", "metp"]}) as log:
            chunks = megatron_models.build(GPT())
            for wrong, right in ((18, 16), (66, 64)):
                with pytest.raises(ValueError, match="no multiple of 4"):
                    chunks[0](*_inputs(GPT(length=66), length=wrong))
                chunks[0](*_inputs(GPT(length=66), length=right))
            torch.distributed.barrier()
            assert _profiled(log) == [[16, 4], [64]]
        with applied(ctx, {}), pytest.raises(ValueError, match="cannot switch any layer"):
            megatron_models.build(GPT(), window_size=(8, 0))


@case(ranks=(2,))
def removing_leaves_the_stock_model(ctx: Context) -> None:
    """Bit for bit: outputs and gradients before, and after a step with other strategies."""
    from megatron.core import tensor_parallel

    gpt, batch = GPT(), plain_gpt.make_batch(GPT(), 0)
    with megatron_models.parallel_state(tp=2):
        original = tensor_parallel.checkpoint
        chunks = megatron_models.build(gpt)
        stock = _losses_and_gradients(chunks, batch)
        parts = list(chunks[0].modules())
        before = [set(vars(part)) for part in parts]  # a first run leaves caches of Megatron-core's own
        with applied(ctx, {"strategy": "ring"}):
            megatron_ext.apply({"megatron_ext": {"sequence_parallel": {"strategy": "ring"}}}, chunks[0])
            switched = _losses_and_gradients(chunks, batch)
            assert "ring" in megatron_ext.counters()
        after = _losses_and_gradients(chunks, batch)
        assert tensor_parallel.checkpoint is original
        assert [set(vars(part)) for part in parts] == before
    assert all(torch.equal(stock[name], after[name]) for name in stock)
    assert not all(torch.equal(stock[name], switched[name]) for name in stock), "nothing else ran"


@case(ranks=(2,))
def without_a_block_nothing_is_touched(ctx: Context) -> None:
    """No attribute on a module, no wrapper around Megatron's functions."""
    from megatron.core import tensor_parallel

    megatron_ext.remove()
    with megatron_models.parallel_state(tp=2):
        chunks = megatron_models.build(GPT())
        assert not any("forward" in vars(part) for part in chunks[0].modules())
        assert not hasattr(tensor_parallel.checkpoint, "__wrapped__")
        assert megatron_ext.counters() == {}
    assert NATIVE == STRATEGIES[0]


def _losses_and_gradients(chunks: list, batch: plain_gpt.Batch) -> dict[str, torch.Tensor]:
    for chunk in chunks:
        chunk.zero_grad()
    losses = megatron_models.forward_backward(chunks, [batch])
    return megatron_models.gather_gradients(chunks) | {"loss": torch.tensor(losses)}


def _inputs(gpt: GPT, length: int) -> tuple:
    batch = plain_gpt.make_batch(gpt, 0, length=length)
    return batch.tokens, batch.positions, None
