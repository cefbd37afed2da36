"""Contracts of attention in tiles: what is put together from blocks of keys is the softmax over all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_ext.sequence_parallel import layout
from megatron_ext.sequence_parallel.attention import Attention, Pattern, Walk
from megatron_ext.sequence_parallel.tile_kernels import MASKED_SCORE, wide

LENGTH = 24
SCALE = 0.25


@dataclass(frozen=True)
class Blocks:
    """Keys and values that are all here, handed out as a ring would: block after block, each with its tokens."""

    parts: tuple[layout.Spans, ...]

    def blocks(self, kv: Tensor) -> Iterator[tuple[layout.Spans, Tensor]]:
        for spans, rows in self._rows():
            yield spans, kv[rows]

    def blocks_for_backward(
        self, kv: Tensor, done: list[Tensor]
    ) -> Iterator[tuple[layout.Spans, Tensor, Tensor]]:
        total = torch.zeros(kv.shape, dtype=wide(kv.dtype))
        for spans, rows in self._rows():
            yield spans, kv[rows], total[rows]
        done.append(total)

    def _rows(self) -> Iterator[tuple[layout.Spans, slice]]:
        start = 0
        for spans in self.parts:
            size = len(positions(spans))
            yield spans, slice(start, start + size)
            start += size


def positions(spans: layout.Spans) -> list[int]:
    """The position of every row of memory."""
    return [p for span in sorted(spans, key=lambda span: span.row) for p in range(span.start, span.stop)]


def ring(rank: int, size: int, order=layout.zigzag) -> tuple[layout.Spans, Blocks]:
    """The queries of a rank, and the blocks in the order in which they reach it."""
    blocks = Blocks(tuple(order((rank - step) % size, size, LENGTH) for step in range(size)))
    return order(rank, size, LENGTH), blocks


def plain(q: Tensor, kv: Tensor, queries: list[int], keys: list[int], pattern: Pattern) -> Tensor:
    """The softmax over a whole row of scores, as Megatron's own attention writes it."""
    k, v = (t.repeat_interleave(q.shape[2] // kv.shape[2], 2) for t in kv.chunk(2, -1))
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) * pattern.scale
    at_q, at_k = torch.tensor(queries)[:, None], torch.tensor(keys)[None]
    unseen = torch.zeros(len(queries), len(keys), dtype=torch.bool)
    if pattern.causal:
        unseen |= at_k > at_q
    if pattern.documents:
        borders = torch.tensor(pattern.documents[1:])
        unseen |= torch.bucketize(at_q, borders, right=True) != torch.bucketize(at_k, borders, right=True)
    scores = scores.masked_fill(unseen, float("-inf"))
    if pattern.mask is not None:
        scores = scores.masked_fill(pattern.mask[:, :, at_q, at_k], MASKED_SCORE)
    return torch.einsum("bnst,tbnd->sbnd", scores.softmax(-1), v)


def drawn(queries: int, *, heads: int = 4, groups: int = 2, dim: int = 8, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(queries, 2, heads, dim), (LENGTH, 2, groups, 2 * dim), (queries, 2, heads, dim)]
    q, kv, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [size * q, kv, grad]


def computed(function, q: Tensor, kv: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients, in fp64 for comparing."""
    leaves = [t.detach().requires_grad_() for t in (q, kv)]
    out = function(*leaves)
    return [t.double() for t in (out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype)))]


def in_blocks(pattern: Pattern, queries: layout.Spans, blocks: Blocks, given: list[Tensor]) -> list[Tensor]:
    return computed(lambda q, kv: Attention.apply(q, kv, Walk(pattern, queries, blocks)), *given)


def by_softmax(pattern: Pattern, queries: layout.Spans, blocks: Blocks, given: list[Tensor]) -> list[Tensor]:
    at, keys = positions(queries), [p for spans in blocks.parts for p in positions(spans)]
    return computed(lambda q, kv: plain(q, kv, at, keys, pattern), *given)


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest, over the tensor's largest entry."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("documents", [None, (0, 5, 6, 17, 24)], ids=["one document", "packed"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_blocks_of_a_ring_add_up_to_the_softmax(groups, causal, documents):
    pattern = Pattern(causal, SCALE, documents)
    for size in (1, 2, 4):
        for rank in range(size):
            queries, blocks = ring(rank, size, layout.zigzag if causal else layout.contiguous)
            given = drawn(LENGTH // size, groups=groups)
            found = in_blocks(pattern, queries, blocks, given)
            assert error(found, by_softmax(pattern, queries, blocks, given)) < 1e-12


def mask_with_padding() -> Tensor:
    """Causal, with padding on the left of the second sequence: its first rows see nothing."""
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1).expand(2, 1, LENGTH, LENGTH).clone()
    mask[1, :, :, :7] = True
    return mask


@pytest.mark.parametrize("batch", [1, 2])
def test_explicit_mask_is_cut_by_blocks_and_rows_that_see_nothing_are_as_megatrons(batch):
    pattern = Pattern(False, SCALE, mask=mask_with_padding()[2 - batch :][:batch])
    for rank in range(3):
        queries, blocks = ring(rank, 3)
        given = drawn(LENGTH // 3)
        found = in_blocks(pattern, queries, blocks, given)
        # A masked score of -10000 leaves twelve digits after the point of its exponential.
        assert error(found, by_softmax(pattern, queries, blocks, given)) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_against_fp64_is_at_most_twice_that_of_plain_attention(dtype):
    """Of the rounding of inputs nothing is counted: fp64 computes with the rounded ones."""
    pattern = Pattern(True, SCALE)
    for rank in range(4):
        queries, blocks = ring(rank, 4)
        given = [t.to(dtype) for t in drawn(LENGTH // 4)]
        true = by_softmax(pattern, queries, blocks, [t.double() for t in given])
        allowed = 2 * error(by_softmax(pattern, queries, blocks, given), true)
        assert error(in_blocks(pattern, queries, blocks, given), true) <= allowed


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_ten_thousand_neither_overflow_nor_vanish_in_fp32(sign):
    """Every row's scores lie about 1e4 from zero, where fp32 has three digits after the point. The output is no worse
    than a plain softmax's. Tiles' log-sum-exps are rounded one by one, to 5e-4, which leaves that share of what should
    cancel in a gradient: here of keys a hundred times larger than the gradient."""
    pattern = Pattern(True, 1.0)
    q, kv, grad = drawn(LENGTH)
    q[..., 0], kv[..., 0] = 100.0, sign * 100.0
    given = [t.float() for t in (q, kv, grad)]
    scores = torch.einsum("sbnd,tbgd->bngst", given[0], given[1].chunk(2, -1)[0])
    assert 9_900 < sign * scores.mean() < 10_100
    case = (
        pattern,
        layout.whole(LENGTH),
        Blocks(tuple(layout.contiguous(rank, 2, LENGTH) for rank in range(2))),
    )
    true, found = by_softmax(*case, [t.double() for t in given]), in_blocks(*case, given)
    assert all(t.isfinite().all() for t in found)
    assert error(found[:1], true[:1]) <= 2 * error(by_softmax(*case, given)[:1], true[:1])
    assert error(found[1:], true[1:]) < 100 * 5e-4


def test_scores_ten_thousand_apart_between_blocks_keep_the_larger_in_any_order():
    """A block that comes first and is next to nothing, and one that makes all before it nothing."""
    pattern = Pattern(False, 1.0)
    queries = layout.contiguous(0, 2, LENGTH)
    q, kv, grad = (t.float() for t in drawn(LENGTH // 2))
    for order in ((0, 1), (1, 0)):
        blocks = Blocks(tuple(layout.contiguous(rank, 2, LENGTH) for rank in order))
        one_sided = kv.clone()
        q[..., 0], one_sided[..., 0] = 100.0, 0.0
        one_sided[: LENGTH // 2, ..., 0], one_sided[LENGTH // 2 :, ..., 0] = 100.0, -100.0
        found = in_blocks(pattern, queries, blocks, [q, one_sided, grad])
        assert all(t.isfinite().all() for t in found)
        first = Blocks((layout.contiguous(0, 2, LENGTH),))
        alone = in_blocks(pattern, queries, first, [q, one_sided[: LENGTH // 2], grad])
        assert error(found[:2], alone[:2]) < 1e-5
        assert found[2][LENGTH // 2 :].abs().max() == 0


def test_dropout_of_blocks_is_replayed_in_backward_and_differs_between_them():
    queries, blocks = ring(1, 2)
    pattern = Pattern(True, SCALE, dropout=0.3)
    q, kv, _ = drawn(LENGTH // 2, dim=2)
    walk = Walk(pattern, queries, blocks, seed=11)
    assert torch.autograd.gradcheck(
        lambda q, kv: Attention.apply(q, kv, walk), (q.requires_grad_(), kv.requires_grad_()), fast_mode=True
    )
    ones = torch.ones_like(kv)
    alike = Walk(Pattern(False, 0.0, dropout=0.5), layout.contiguous(0, 2, LENGTH), blocks, seed=11)
    kept = Attention.apply(torch.zeros_like(q), ones, alike)
    assert kept.unique().numel() > 4, "every row kept as much, as if all had drawn the same"


def test_dropout_is_right_in_the_mean_over_seeds():
    queries, blocks = ring(0, 2)
    q, kv, _ = drawn(LENGTH // 2)
    without = Attention.apply(q, kv, Walk(Pattern(True, SCALE), queries, blocks))
    pattern = Pattern(True, SCALE, dropout=0.25)
    many = torch.stack([Attention.apply(q, kv, Walk(pattern, queries, blocks, seed)) for seed in range(100)])
    deviation = many.std(0) / 10
    assert ((many.mean(0) - without).abs() <= 6 * deviation + 1e-12).all()
    assert deviation.max() > 0


def test_features_need_not_lie_side_by_side_in_memory():
    """Tensors that were gathered along their features are strided; a kernel may not see it."""
    pattern, queries, blocks = Pattern(True, SCALE), *ring(0, 2)
    given = drawn(LENGTH // 2)
    strided = [t.movedim(-1, 0).contiguous().movedim(0, -1) for t in given]
    assert strided[0].stride(-1) != 1
    found = in_blocks(pattern, queries, blocks, strided)
    assert error(found, in_blocks(pattern, queries, blocks, given)) < 1e-14


@pytest.mark.parametrize("size", [1, 4])
def test_no_more_is_kept_than_queries_keys_output_and_log_sum_exp(size):
    queries, blocks = ring(0, size)
    q, kv, _ = (t.bfloat16().requires_grad_() for t in drawn(LENGTH // size))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = Attention.apply(q, kv, Walk(Pattern(True, SCALE), queries, blocks))
    assert out.dtype == torch.bfloat16
    rows = LENGTH // size * 2 * 4
    expected = {(tuple(t.shape), t.dtype) for t in (q, kv, out)} | {((2, 4, LENGTH // size), torch.float32)}
    assert {(tuple(t.shape), t.dtype) for t in saved} == expected
    assert sum(t.untyped_storage().nbytes() for t in saved) == 2 * rows * 8 * 2 + kv.numel() * 2 + rows * 4
