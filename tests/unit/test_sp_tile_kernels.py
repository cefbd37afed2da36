"""Contracts of the tile kernels: they agree with the softmax and with each other, masks and dropout are Megatron's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ext.sequence_parallel import tile_kernels
from megatron_ext.sequence_parallel.tile_kernels import MASKED_SCORE, Blockwise, CpuFlash, choose

SCALE = 0.3


def tensors(
    heads: int = 6, groups: int = 2, rows: int = 10, columns: int = 10, dtype=torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, rows, 8), (2, groups, columns, 8), (2, groups, columns, 8)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention as it is written in papers."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * SCALE
    if mask is not None:
        scores = scores.masked_fill(mask, MASKED_SCORE)
    if causal:
        scores = scores.masked_fill(
            torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1), float("-inf")
        )
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", [CpuFlash(), Blockwise()], ids=lambda kernel: type(kernel).__name__)
def test_kernel_equals_the_softmax(kernel, causal, groups):
    leaves = [t.requires_grad_() for t in tensors(groups=groups)]
    out, lse = plain(*leaves, causal)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    expected = torch.autograd.grad(out, leaves, grad)
    q, k, v = (t.detach() for t in leaves)
    found, found_lse = kernel.forward(q, k, v, causal, SCALE)
    torch.testing.assert_close(found, out.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found_lse, lse.detach(), rtol=0, atol=1e-12)
    grads = kernel.backward(grad, q, k, v, out.detach(), lse.detach(), causal, SCALE)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", [CpuFlash(), Blockwise()], ids=lambda kernel: type(kernel).__name__)
def test_gradients_of_tiles_add_up_to_those_of_the_row(kernel):
    leaves = [t.requires_grad_() for t in tensors(columns=14)]
    out, lse = plain(*leaves, False)
    grad = torch.ones_like(out)
    expected = torch.autograd.grad(out, leaves, grad)
    q, k, v = (t.detach() for t in leaves)
    parts = [slice(0, 5), slice(5, 14)]
    grads = [
        kernel.backward(grad, q, k[:, :, part], v[:, :, part], out.detach(), lse.detach(), False, SCALE)
        for part in parts
    ]
    torch.testing.assert_close(grads[0][0] + grads[1][0], expected[0], rtol=0, atol=1e-12)
    for which in (1, 2):
        joined = torch.cat([grads[0][which], grads[1][which]], 2)
        torch.testing.assert_close(joined, expected[which], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", [CpuFlash(), Blockwise()], ids=lambda kernel: type(kernel).__name__)
def test_kernel_takes_tensors_as_they_are_strided(kernel):
    """Features that do not lie side by side, and a gradient that is one number in memory."""
    q, k, v = tensors()
    strided = [t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for t in (q, k, v)]
    out, lse = kernel.forward(q, k, v, True, SCALE)
    for found, expected in zip(kernel.forward(*strided, True, SCALE), (out, lse), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    ones = torch.ones((), dtype=q.dtype).expand(q.shape)
    expected = kernel.backward(ones.contiguous(), q, k, v, out, lse, True, SCALE)
    for ours, theirs in zip(kernel.backward(ones, *strided, out, lse, True, SCALE), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_are_computed_a_block_at_a_time(monkeypatch, masked, dropout):
    """More rows than a block holds; with dropout forward and backward agree about each block's draw."""
    monkeypatch.setattr(tile_kernels, "_BLOCK_ROWS", 4)
    q, k, v = tensors()
    mask = torch.rand(2, 1, 10, 10, generator=torch.Generator().manual_seed(2)) < 0.3 if masked else None
    kernel = Blockwise(mask, dropout, seed=5)
    out, lse = kernel.forward(q, k, v, not masked, SCALE)
    if not dropout:
        torch.testing.assert_close(out, plain(q, k, v, not masked, mask)[0], rtol=0, atol=1e-12)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    grads = kernel.backward(grad, q, k, v, out, lse, not masked, SCALE)
    step = 1e-6
    for which, (tensor, found) in enumerate(zip((q, k, v), grads, strict=True)):
        direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3), dtype=q.dtype)
        moved = [
            [t + sign * step * direction if place == which else t for place, t in enumerate((q, k, v))]
            for sign in (1, -1)
        ]
        above, below = (kernel.forward(*given, not masked, SCALE)[0] for given in moved)
        slope = ((above - below) * grad).sum() / (2 * step)
        torch.testing.assert_close((found * direction).sum(), slope, rtol=1e-7, atol=1e-7)


def test_rows_that_are_masked_everywhere_see_all_keys_alike():
    q, k, v = tensors()
    mask = torch.zeros(2, 1, 10, 10, dtype=torch.bool)
    mask[1, :, :3] = True
    mask[0, :, :, 4:] = True
    out, lse = plain(q, k, v, False, mask)
    found, found_lse = Blockwise(mask).forward(q, k, v, False, SCALE)
    torch.testing.assert_close(found, out, rtol=0, atol=1e-12)
    torch.testing.assert_close(found_lse, lse, rtol=0, atol=1e-11)
    mean = v[1].mean(1).repeat_interleave(3, 0)
    torch.testing.assert_close(found[1, :, 0], mean, rtol=0, atol=1e-12)


def test_dropout_is_replayed_by_its_seed_and_right_in_the_mean():
    q, k, v = tensors()
    out, _ = plain(q, k, v, True)
    kernel = Blockwise(dropout=0.25, seed=7)
    first, lse = kernel.forward(q, k, v, True, SCALE)
    assert torch.equal(first, kernel.forward(q, k, v, True, SCALE)[0])
    assert not torch.equal(first, Blockwise(dropout=0.25, seed=8).forward(q, k, v, True, SCALE)[0])
    many = [Blockwise(dropout=0.25, seed=seed).forward(q, k, v, True, SCALE)[0] for seed in range(400)]
    drawn = torch.stack(many)
    assert ((drawn.mean(0) - out).abs() <= 6 * drawn.std(0) / 20 + 1e-12).all()


def test_dropout_gradient_is_that_of_the_forward():
    q, k, v = tensors(rows=4, columns=4)
    kernel = Blockwise(dropout=0.4, seed=3)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *given):
            out, lse = kernel.forward(*given, True, SCALE)
            ctx.save_for_backward(*given, out, lse)
            return out

        @staticmethod
        def backward(ctx, grad):
            *given, out, lse = ctx.saved_tensors
            return kernel.backward(grad, *given, out, lse, True, SCALE)

    assert torch.autograd.gradcheck(Function.apply, [t.requires_grad_() for t in (q, k, v)])


def test_kernel_is_chosen_by_what_it_must_do():
    q = torch.zeros(1, 1, 1, 8)
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    assert isinstance(choose(q, None, 0.0, 0), CpuFlash)
    assert isinstance(choose(q, mask, 0.0, 0), Blockwise)
    assert isinstance(choose(q, None, 0.1, 0), Blockwise)
    assert isinstance(choose(q.to("meta"), None, 0.0, 0), Blockwise)
