"""Contracts of the gathered linears: weights from shards, nothing gathered kept, frozen ones left alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megatron_ext.sequence_parallel import collectives, linears
from megatron_ext.sequence_parallel.linears import ColumnLinear, RowLinear, in_turn
from megatron_ext.sequence_parallel.strategies import megatron_ts
from megatron_ext.sequence_parallel.strategies.megatron_ts import GatheredInputLinear, PartialLinear

SIZE = 2
LINEARS = {"column": ColumnLinear, "row": RowLinear}


@pytest.fixture(scope="module")
def alone():
    """A process group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def pair(monkeypatch):
    """This rank of a group of two ranks whose other rank has the same tensors; `calls` counts collectives."""
    calls = []

    def gather(shard, group):
        calls.append("all_gather")
        return collectives.Pending(torch.cat([shard.detach()] * SIZE))

    def scatter(full, group):
        calls.append("reduce_scatter")
        return collectives.Pending(SIZE * full[: full.shape[0] // SIZE])

    for module in (linears, megatron_ts):
        monkeypatch.setattr(module, "start_all_gather", gather)
        monkeypatch.setattr(module, "start_reduce_scatter", scatter)
    return SimpleNamespace(size=lambda: SIZE, rank=lambda: 0, calls=calls)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def whole(kind: str, shard: torch.Tensor) -> torch.Tensor:
    return torch.cat([shard] * SIZE, 0 if kind == "column" else 1)


@pytest.mark.parametrize("kind", LINEARS)
def test_second_derivatives_are_refused_not_wrong(alone, kind):
    x, weight = drawn(3, 2, 4).requires_grad_(), drawn(6, 4).requires_grad_()
    (grad,) = torch.autograd.grad(LINEARS[kind].apply(x, weight, alone).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("kind", LINEARS)
def test_linear_of_one_rank_is_the_linear(alone, kind):
    x, weight = drawn(3, 2, 4).requires_grad_(), drawn(6, 4).requires_grad_()
    y = LINEARS[kind].apply(x, weight, alone)
    expected = F.linear(x, weight)
    assert torch.equal(y, expected)
    grad = drawn(3, 2, 6)
    for ours, theirs in zip(
        torch.autograd.grad(y, (x, weight), grad),
        torch.autograd.grad(expected, (x, weight), grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("kind", LINEARS)
def test_shards_are_put_together_and_their_gradients_summed_over_ranks(pair, kind):
    inputs = {"column": 4, "row": 8}[kind]
    x, shard = drawn(3, 2, inputs).requires_grad_(), drawn(6, 4).requires_grad_()
    full = whole(kind, shard.detach()).requires_grad_()
    y, expected = LINEARS[kind].apply(x, shard, pair), F.linear(x, full)
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)
    grad = drawn(*y.shape)
    ours = torch.autograd.grad(y, (x, shard), grad)
    theirs = torch.autograd.grad(expected, (x, full), grad)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-13, atol=1e-13)
    mine = theirs[1].chunk(SIZE, 0 if kind == "column" else 1)[0]
    torch.testing.assert_close(ours[1], SIZE * mine, rtol=1e-13, atol=1e-13)
    assert pair.calls == ["all_gather", "all_gather", "reduce_scatter"]


@pytest.mark.parametrize("kind", LINEARS)
def test_nothing_gathered_is_kept_for_backward(pair, kind):
    x, shard = drawn(3, 2, {"column": 4, "row": 8}[kind]).requires_grad_(), nn.Parameter(drawn(6, 4))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        LINEARS[kind].apply(x, shard, pair)
    places = {t.untyped_storage().data_ptr() for t in saved}
    assert places == {t.untyped_storage().data_ptr() for t in (x, shard)}


@pytest.mark.parametrize("kind", LINEARS)
def test_frozen_weight_takes_no_gradient_and_no_reduction(pair, kind):
    x, shard = drawn(3, 2, {"column": 4, "row": 8}[kind]).requires_grad_(), drawn(6, 4)
    shard.grad_added_to_main_grad = True
    LINEARS[kind].apply(x, shard, pair).sum().backward()
    assert shard.grad is None
    assert x.grad is not None
    assert pair.calls == ["all_gather", "all_gather"]
    assert shard.grad_added_to_main_grad, "a mark that is none of ours was changed"


@pytest.mark.parametrize("kind", LINEARS)
def test_input_without_gradient_takes_no_second_gather(pair, kind):
    x, shard = drawn(3, 2, {"column": 4, "row": 8}[kind]), nn.Parameter(drawn(6, 4))
    LINEARS[kind].apply(x, shard, pair).sum().backward()
    assert shard.grad is not None
    assert pair.calls == ["all_gather", "reduce_scatter"]


def apply_all(weight: nn.Parameter, group: object) -> list[torch.Tensor]:
    """Every linear of a strategy that autograd takes a weight gradient from."""
    x = drawn(4, 2, 4).requires_grad_()
    wide = drawn(4, 2, 8).requires_grad_()
    return [
        ColumnLinear.apply(x, weight, group),
        RowLinear.apply(wide, weight, group),
        GatheredInputLinear.apply(x, weight, group),
        PartialLinear.apply(x, weight),
    ]


@pytest.mark.parametrize("which", range(4), ids=["column", "row", "gathered_input", "partial"])
def test_mark_of_fused_accumulation_is_taken_off_before_the_gradient_is_handed_over(pair, which):
    """Megatron's DDP ignores a gradient while the mark of an earlier micro-batch's fused kernel is there."""
    weight = nn.Parameter(drawn(6, 4))
    weight.grad_added_to_main_grad = True
    seen = []
    weight.register_hook(lambda grad: seen.append(weight.grad_added_to_main_grad))
    apply_all(weight, pair)[which].sum().backward()
    assert seen == [False]


def test_weight_without_the_mark_is_given_none(pair):
    weight = nn.Parameter(drawn(6, 4))
    torch.stack([y.sum() for y in apply_all(weight, pair)]).sum().backward()
    assert not hasattr(weight, "grad_added_to_main_grad")


def test_native_bodies_linears_do_nothing_for_frozen_weights(pair):
    """The input is gathered again for the weight gradient only."""
    x, weight = drawn(4, 2, 4).requires_grad_(), drawn(6, 4)
    y = PartialLinear.apply(x, weight) + GatheredInputLinear.apply(x, weight, pair)[:4]
    y.sum().backward()
    assert pair.calls == ["all_gather", "reduce_scatter"]


def test_parameters_in_turn_hand_their_gradients_over_after_those_of_what_is_made_later():
    """Autograd runs the newest node that is ready; the mark of fused accumulation is off by then."""
    weight, bias, later = (nn.Parameter(drawn(6, 4)) for _ in range(3))
    weight.grad_added_to_main_grad = True
    order = []
    for name, parameter in (("weight", weight), ("bias", bias), ("later", later)):
        parameter.register_hook(lambda grad, name=name: order.append((name, weight.grad_added_to_main_grad)))
    aliases = in_turn(weight, None, bias)
    assert aliases[1] is None
    assert aliases[0].data_ptr() == weight.data_ptr()
    (aliases[0] * aliases[2] * later).sum().backward()
    assert order[0] == ("later", True)
    assert sorted(order[1:]) == [("bias", False), ("weight", False)]
    assert torch.equal(weight.grad, bias * later)


def test_frozen_weight_in_turn_with_a_trained_bias_stays_frozen(pair):
    x, shard, bias = drawn(3, 2, 4).requires_grad_(), nn.Parameter(drawn(6, 4)), nn.Parameter(drawn(12))
    shard.requires_grad_(False)
    weight, added = in_turn(shard, bias)
    (ColumnLinear.apply(x, weight, pair) + added).sum().backward()
    assert shard.grad is None
    assert torch.equal(bias.grad, torch.full((12,), 6.0))
    assert pair.calls == ["all_gather", "all_gather"]


def test_native_bodies_linears_are_the_linear(alone):
    x, weight = drawn(4, 2, 4).requires_grad_(), drawn(6, 4).requires_grad_()
    expected = torch.autograd.grad(F.linear(x, weight), (x, weight), drawn(4, 2, 6))
    for y in (PartialLinear.apply(x, weight), GatheredInputLinear.apply(x, weight, alone)):
        for ours, theirs in zip(torch.autograd.grad(y, (x, weight), drawn(4, 2, 6)), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)
