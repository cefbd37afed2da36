"""Whatever a plan recomputes, losses and gradients are those of the stock model, to the bit, and what ran is counted.

Plans are given by hand or drawn. Not covered: how a plan is made (test_recompute_solver.py, cases_recompute_job.py).
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from megatron_ext.recompute.plan import FULL, NONE, ChunkPlan, Share
from tests import megatron_models, plain_gpt
from tests.distributed.cases_megatron_training import VARIED
from tests.distributed.harness import Context
from tests.distributed.registry import case
from tests.plain_gpt import GPT
from tests.random_plans import random_plans

PIPELINES: dict[str, dict] = {
    "pp2": {"ranks": 2, "pp": 2},
    "pp4": {"ranks": 4, "pp": 4},
    "pp2_vpp2": {"ranks": 2, "pp": 2, "vpp": 2},
    "tp2_pp2": {"ranks": 4, "tp": 2, "pp": 2},
}
KINDS = ("random", "share", "full", "none")
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


@case(ranks=(2,), most_quick=3, pipeline=("pp2", "pp2_vpp2"), kind=KINDS, dropout=(True, False))
@case(ranks=(4,), most_quick=2, pipeline=("tp2_pp2", "pp4"), kind=KINDS, dropout=(True, False))
def plans_change_nothing_but_memory(ctx: Context, pipeline: str, kind: str, dropout: bool) -> dict:
    """Two steps of six micro-batches; then everything is taken out, and in a third the model is the stock one."""
    sizes = {name: value for name, value in PIPELINES[pipeline].items() if name != "ranks"}
    gpt = GPT(layers=8, groups=4, activation="swiglu", bias=False)  # with biases `mlp` is refused
    config = DROPOUT if dropout else {}
    batches = [plain_gpt.make_batch(gpt, number) for number in range(6)]
    with megatron_models.parallel_state(**sizes):
        stock = _two_steps(gpt, batches, config, None)
        plan = random.Random(f"{pipeline} {kind} {ctx.rank // 2 if 'tp' in sizes else ctx.rank}")
        ours = _two_steps(gpt, batches, config, (kind, plan))
    assert stock[0] == ours[0], f"losses {ours[0]}, stock {stock[0]}"
    assert all(torch.equal(stock[1][name], ours[1][name]) for name in stock[1])
    return {"losses": ours[0], "calls": ours[2]}


def _two_steps(gpt: GPT, batches: Sequence, config: dict, drawn: tuple[str, random.Random] | None) -> tuple:
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(7)
    chunks = megatron_models.build(gpt, **config)
    before = [_state(chunk) for chunk in chunks]
    losses, calls = [], Counter()
    with contextlib.nullcontext() if drawn is None else planned(chunks, *drawn) as loops:
        for _ in range(2):
            losses += megatron_models.forward_backward(chunks, batches)
        for loop in loops or ():
            check_calls(loop, 2 * len(batches))
            calls.update({f"{phase} {choice}": n for (phase, choice), n in loop.calls.items()})
    if drawn is not None:
        assert [_state(chunk) for chunk in chunks] == before
    losses += megatron_models.forward_backward(chunks, batches)  # with nothing of ours left
    return losses, megatron_models.gather_gradients(chunks), dict(calls)


@contextlib.contextmanager
def planned(chunks: Sequence[nn.Module], kind: str, drawn: random.Random) -> Iterator[list]:
    """Every block of the chunks gets a plan of its own."""
    from megatron_ext.recompute import layer_loop
    from megatron_ext.sequence_parallel.block_policy import blocks_of

    blocks = [block for chunk in chunks for block in blocks_of(chunk)]
    loops = [layer_loop.attach(block) for block in blocks]
    try:
        for loop, block in zip(loops, blocks, strict=True):
            loop.plan = _drawn_plan(kind, len(block.layers), drawn)
        yield loops
    finally:
        for block in blocks:
            layer_loop.detach(block)


def _drawn_plan(kind: str, layers: int, drawn: random.Random) -> ChunkPlan:
    if kind in (NONE, FULL):
        return ChunkPlan((kind,) * layers)
    names = tuple(drawn.choice((NONE, FULL, "core_attn", "mlp", "core_attn+mlp")) for _ in range(layers))
    if kind == "random":
        return ChunkPlan(names)
    other = FULL if names[0] == NONE else NONE
    return ChunkPlan(names, Share(0, other, drawn.randint(1, 3), 4))


def check_calls(loop: object, passes: int) -> None:
    """Each layer ran once in forward for each pass, and those in full once more in backward."""
    expected: Counter = Counter()
    for number in range(passes):
        for layer in range(len(loop.plan.layers)):
            choice = loop.plan.choice(layer, number)
            expected["forward", choice] += 1
            if choice == FULL:
                expected["recomputed", choice] += 1
    assert loop.calls == expected, (loop.calls, expected)


def _state(chunk: nn.Module) -> list:
    """What could have been left behind: flags, configs, replaced methods."""
    return [
        (
            {name: value for name, value in vars(part).items() if isinstance(value, bool)},
            [name for name in vars(part) if "megatron_ext" in name or name == "_checkpointed_forward"],
            id(getattr(part, "config", None)),
        )
        for part in chunk.modules()
    ]


@case(ranks=(4,), most_quick=1, strength=1, kind=("full", "random"), varied=(True,))
def plans_and_strategies_together_change_nothing(ctx: Context, kind: str, varied: bool) -> dict:
    """Tensor x pipeline parallel 2 x 2: strategies drawn for each micro-batch, recomputation for each layer."""
    gpt = GPT(layers=4, groups=4, bias=False)  # with biases `mlp` is refused
    batches = [plain_gpt.make_batch(gpt, number, length=(16, 48, 32)[number % 3]) for number in range(6)]
    with megatron_models.parallel_state(tp=2, pp=2):
        stock = megatron_models.build(gpt, **VARIED)
        losses = megatron_models.forward_backward(stock, batches)
        chunks = megatron_models.build(gpt, **VARIED)
        with (
            planned(chunks, kind, random.Random(f"{kind} {ctx.rank // 2}")) as loops,
            random_plans(chunks) as ran,
        ):
            ours = megatron_models.forward_backward(chunks, batches)
            for loop in loops:
                check_calls(loop, len(batches))
        assert_close(dict(zip("abcdef", losses, strict=True)), dict(zip("abcdef", ours, strict=True)))
        worst, name = megatron_models.largest_difference(
            megatron_models.gather_gradients(chunks), megatron_models.gather_gradients(stock)
        )
    assert worst <= 1e-12, f"{name}: {worst:.1e}"
    recomputed = sum(loop.calls["recomputed", FULL] for loop in loops)
    assert sum(ran.recomputed().values()) == recomputed
    return {"worst": worst, "recomputed": recomputed}


def assert_close(expected: Mapping[str, float], found: Mapping[str, float]) -> None:
    for name, value in expected.items():
        assert abs(found[name] / value - 1) <= 1e-12, (expected, found)
