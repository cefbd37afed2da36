"""Every strategy, and every mix over layers, computes what a plain GPT in one process computes.

The plan is given by hand here, so that nothing is left to a cost model. Not covered: optimizer steps
(cases_megatron_training.py), what is sent and kept (cases_megatron_traffic.py), the planner's own choice
(cases_megatron_job.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megatron_ext.sequence_parallel.names import NATIVE, STRATEGIES
from tests import megatron_models, plain_gpt
from tests.distributed.cases_megatron_host import FULL, SELECTIVE
from tests.distributed.harness import Context
from tests.distributed.registry import case
from tests.plain_gpt import GPT, Batch

OTHERS = tuple(name for name in STRATEGIES if name != NATIVE)
FEATURES = {
    "groups": (None, 4, 1),
    "positions": ("rope", "learned"),
    "activation": ("gelu", "swiglu"),
    "bias": (True, False),
    "norm": ("LayerNorm", "RMSNorm"),
    "qk_norm": (False, True),
    "causal": (True, False),
}
RECOMPUTE = {"none": {}, "full": FULL, "selective": SELECTIVE}


@case(ranks=(8,), slow=True, **FEATURES)
@case(ranks=(4,), most_quick=3, **FEATURES)
@case(ranks=(2,), most_quick=12, **FEATURES)
@case(ranks=(1,), most_quick=2, **FEATURES)
def strategies_equal_the_plain_gpt(ctx: Context, **features: object) -> dict:
    """Losses and every gradient in fp64, each strategy on both layers."""
    gpt = GPT(**features)
    plans = [(name, name) for name in able(gpt, ctx.world_size)]
    return assert_plans_equal_the_plain_gpt(gpt, plans, ctx.world_size)


@case(ranks=(2, 4), most_quick=1, recompute=("full", "none", "selective"))
def mixes_equal_the_plain_gpt(ctx: Context, recompute: str) -> dict:
    """All pairs of two layers; a recomputed layer runs what it ran first."""
    gpt = GPT(groups=4, activation="swiglu")
    plans = list(itertools.product(able(gpt, ctx.world_size), repeat=2))
    return assert_plans_equal_the_plain_gpt(gpt, plans, ctx.world_size, recompute)


@case(ranks=(2, 4), most_quick=2, causal=(True, False), positions=("rope", "learned"))
def packed_documents_equal_documents_run_alone(ctx: Context, causal: bool, positions: str) -> dict:
    """Borders fall inside and between chunks; Megatron's local attention takes no packed rows and is stood in for."""
    gpt = GPT(causal=causal, positions=positions, groups=4)
    batches = [
        plain_gpt.make_packed_batch(gpt, 0, (5, 11, 1, 15)),
        plain_gpt.make_packed_batch(gpt, 1, (32,)),
    ]
    plans = [(name, name) for name in able(gpt, ctx.world_size)]
    return assert_plans_equal_the_plain_gpt(gpt, plans, ctx.world_size, batches=batches)


@case(ranks=(2, 4), most_quick=2, kind=("causal", "padding", "rows_that_see_nothing"))
def explicit_masks_equal_the_stock_model(ctx: Context, kind: str) -> dict:
    """A mask tensor: the causal one is recognised, others are obeyed, as by Megatron's local attention."""
    gpt = GPT(causal=kind == "causal")
    batch = plain_gpt.make_batch(gpt, 0)
    length = batch.tokens.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1).expand(2, 1, length, length).clone()
    if kind != "causal":
        mask[1, :, :, :7] = (
            True  # the second sequence is padded on the left: its first rows see nothing at all
        )
    if kind == "padding":
        mask[1, :, :7, 0] = False
    found = {}
    with megatron_models.parallel_state(tp=ctx.world_size):
        for name in able(gpt, ctx.world_size):
            chunks = megatron_models.build(gpt)
            with planned(chunks, (name, name)):
                loss = megatron_models.cross_entropy(
                    chunks[0](batch.tokens, batch.positions, mask), batch.labels
                )
                loss.backward()
            found[name] = megatron_models.gather_gradients(chunks)
    errors = {name: megatron_models.largest_difference(found[name], found[NATIVE]) for name in found}
    assert all(worst <= 1e-12 for worst, _ in errors.values()), errors
    return {name: worst for name, (worst, _) in errors.items()}


@case(ranks=(2, 4), most_quick=2, dtype=("fp32", "bf16"))
def rounding_is_at_most_twice_that_of_the_stock_model(ctx: Context, dtype: str) -> dict:
    """Errors against fp64 with the same weights and tokens: root mean square of all gradients, and the worst tensor."""
    gpt = GPT(layers=3, groups=4, activation="swiglu", norm="RMSNorm")
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    rounded = {name: tensor.to(kind).double() for name, tensor in plain_gpt.full_weights(gpt).items()}
    batches = [plain_gpt.make_batch(gpt, number, length=64) for number in range(4)]
    _, exact = plain_gpt.loss_and_gradients(gpt, rounded, batches)
    found = {}
    with megatron_models.parallel_state(tp=ctx.world_size):
        for name in able(gpt, ctx.world_size):
            chunks = megatron_models.build(gpt, dtype=kind)
            with planned(chunks, (name,) * 3):
                megatron_models.forward_backward(chunks, batches)
            found[name] = _rounding(megatron_models.gather_gradients(chunks), exact)
    stock = found[NATIVE]
    assert stock[0] > 0
    for name, (mean, worst) in found.items():
        assert mean <= 2 * stock[0], f"{name}: {mean:.2e} against {stock[0]:.2e}"
        assert worst <= 2 * stock[1], f"{name}: worst tensor {worst:.2e} against {stock[1]:.2e}"
    return found


@case(ranks=(2,))
def every_strategy_ran_by_its_name(ctx: Context) -> dict:
    """Counted where the layer's body is called, not where the plan is made."""
    from megatron_ext.sequence_parallel import strategies

    gpt, calls = GPT(), {name: [0, 0] for name in STRATEGIES}
    plain = dict(strategies.BODIES)

    def counted(name: str, place: int, body: object) -> object:
        def run(*args: object) -> Tensor:
            calls[name][place] += 1
            return body(*args)

        return run

    for name, body in plain.items():
        strategies.BODIES[name] = strategies.Strategy(counted(name, 0, body[0]), counted(name, 1, body[1]))
    try:
        assert_plans_equal_the_plain_gpt(gpt, [(name, NATIVE) for name in STRATEGIES], ctx.world_size)
    finally:
        strategies.BODIES.update(plain)
    assert calls == {name: [0, 0] if name == NATIVE else [2, 2] for name in STRATEGIES}, calls
    return calls


def able(gpt: GPT, ranks: int) -> list[str]:
    """Strategies that this model can run on so many ranks; METP needs whole KV heads."""
    return [name for name in STRATEGIES if name != "metp" or gpt.kv_groups % ranks == 0]


@contextmanager
def planned(chunks: Sequence[nn.Module], names: Sequence[str]) -> Iterator[list]:
    """Every micro-batch inside runs this plan; yields the micro-batches that ran."""
    from megatron_ext.sequence_parallel import switch
    from megatron_ext.sequence_parallel.block_policy import blocks_of

    ran: list = []
    blocks = [block for chunk in chunks for block in blocks_of(chunk)]
    for block in blocks:
        attached = switch.attach(block, lambda batch, length, documents: tuple(names))
        assert not attached.refusals(), attached.refusals()
        attached.finished = lambda micro_batch, *_: ran.append(micro_batch)
    try:
        yield ran
    finally:
        for block in blocks:
            switch.detach(block)


def assert_plans_equal_the_plain_gpt(
    gpt: GPT,
    plans: Sequence[Sequence[str]],
    ranks: int,
    recompute: str = "none",
    batches: Sequence[Batch] | None = None,
    most: float = 1e-12,
) -> dict[str, float]:
    """Run two micro-batches by each plan; the largest error of any gradient, over its largest entry."""
    batches = batches or [plain_gpt.make_batch(gpt, number) for number in range(2)]
    expected, exact = plain_gpt.loss_and_gradients(gpt, plain_gpt.full_weights(gpt), batches)
    errors = {}
    with megatron_models.parallel_state(tp=ranks):
        chunks = megatron_models.build(gpt, **RECOMPUTE[recompute])
        for names in plans:
            chunks[0].zero_grad()
            with planned(chunks, names) as ran:
                losses = megatron_models.forward_backward(chunks, batches)
            assert len(ran) == len(batches)
            for micro_batch, name in itertools.product(ran, set(names)):
                count = list(names).count(name)
                assert micro_batch.calls["forward", name] == count
                assert micro_batch.calls["recomputed", name] == (count if recompute == "full" else 0)
            apart = max(abs(ours - theirs) for ours, theirs in zip(losses, expected, strict=True))
            assert apart <= most * max(expected), f"{names}: losses {losses}, expected {expected}"
            worst, where = megatron_models.largest_difference(megatron_models.gather_gradients(chunks), exact)
            assert worst <= most, f"{names}: gradient of {where}: {worst:.1e}"
            errors[", ".join(names)] = worst
    return errors


def _rounding(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, float]:
    """Root mean square error over all entries, relative; and of the worst tensor."""
    errors = {name: (gradients[name].double() - exact[name]).square().sum() for name in exact}
    sizes = {name: exact[name].square().sum() for name in exact}
    whole = (sum(errors.values()) / sum(sizes.values())).sqrt()
    return float(whole), max(float((errors[name] / sizes[name]).sqrt()) for name in exact)
