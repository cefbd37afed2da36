"""Attention of a rank's queries over keys and values that arrive in blocks: the online softmax, and its backward.

A row's output is put together from tiles by their log-sum-exp, which carries the running maximum: no exponential is
taken of anything but differences, in fp32 or wider (Milakov and Gimelshein, arXiv 1805.02867; ring attention as in
arXiv 2310.01889). Kept between forward and backward are q, the rank's own keys and values, the output and the
log-sum-exp; never scores, never other ranks' keys.

Shapes: q and output [s, b, n, d], keys and values [t, b, g, 2 * d], log-sum-exp [b, n, s].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import tile_kernels
from .key_values import KeyValues
from .layout import Spans, Tile, tiles


@dataclass(frozen=True)
class Pattern:
    """Which pairs are seen, and the numbers of the softmax; the same for every layer and strategy of a micro-batch."""

    causal: bool
    scale: float
    documents: tuple[int, ...] | None = None
    """Boundaries of packed documents, (0, ..., total tokens)."""
    mask: Tensor | None = None
    """Bool [b or 1, 1, s, s] over the whole sequence, true where nothing is seen; `causal` is then false."""
    dropout: float = 0.0


@dataclass(frozen=True)
class Walk:
    """One attention: what is seen, which tokens the queries are, how keys and values come, the seed of dropout."""

    pattern: Pattern
    queries: Spans
    key_values: KeyValues
    seed: int = 0


def attention_forward(q: Tensor, kv: Tensor, walk: Walk) -> tuple[Tensor, Tensor]:
    """The output [s, b, n, d] in q's dtype, and the log-sum-exp [b, n, s]."""
    merged = _Merged(q)
    for number, (keys, block) in enumerate(walk.key_values.blocks(kv)):
        for tile, kernel in _tiles(walk, keys, number, q):
            k, v = _heads_first(block, tile.k_rows).chunk(2, -1)
            out, lse = kernel.forward(_heads_first(q, tile.q_rows), k, v, tile.causal, walk.pattern.scale)
            merged.add(tile.q_rows, out, lse)
    return merged.result()


def attention_backward(
    grad: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, walk: Walk
) -> tuple[Tensor, Tensor]:
    """Gradients of q and of this rank's keys and values, in fp32 or wider."""
    grad_q = torch.zeros(q.shape, dtype=tile_kernels.wide(q.dtype), device=q.device)
    done: list[Tensor] = []
    for number, (keys, block, grad_block) in enumerate(walk.key_values.blocks_for_backward(kv, done)):
        for tile, kernel in _tiles(walk, keys, number, q):
            rows = slice(*tile.q_rows)
            k, v = _heads_first(block, tile.k_rows).chunk(2, -1)
            grads = kernel.backward(
                _heads_first(grad, tile.q_rows), _heads_first(q, tile.q_rows), k, v,
                _heads_first(out, tile.q_rows), lse[:, :, rows], tile.causal, walk.pattern.scale,
            )  # fmt: skip
            _heads_first(grad_q, tile.q_rows).add_(grads[0])
            into_k, into_v = _heads_first(grad_block, tile.k_rows).chunk(2, -1)
            into_k.add_(grads[1])
            into_v.add_(grads[2])
    return grad_q, done[0]


class Attention(torch.autograd.Function):
    """:func:`attention_forward` with its gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, walk: Walk) -> Tensor:
        out, lse = attention_forward(q, kv, walk)
        ctx.save_for_backward(q, kv, out, lse)
        ctx.walk = walk
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        q, kv, out, lse = ctx.saved_tensors
        grad_q, grad_kv = attention_backward(grad, q, kv, out, lse, ctx.walk)
        return grad_q.to(q.dtype), grad_kv.to(kv.dtype), None


def _tiles(walk: Walk, keys: Spans, number: int, q: Tensor) -> list[tuple[Tile, tile_kernels.Kernel]]:
    """The tiles of one block, each with the kernel that computes it."""
    pattern = walk.pattern
    mask = None
    if pattern.mask is not None:
        mask = _rows_of(_rows_of(pattern.mask, walk.queries, -2), keys, -1)
    chosen = []
    for place, tile in enumerate(tiles(walk.queries, keys, pattern.causal, pattern.documents)):
        part = None
        if mask is not None:
            part = mask[:, :, slice(*tile.q_rows), slice(*tile.k_rows)]
        seed = (walk.seed * 1_000_003 + number * 4099 + place) % 2**63
        chosen.append((tile, tile_kernels.choose(q, part, pattern.dropout, seed)))
    return chosen


def _rows_of(mask: Tensor, spans: Spans, dim: int) -> Tensor:
    """The part of a mask over the whole sequence that belongs to tokens as they lie in memory."""
    in_memory = sorted(spans, key=lambda span: span.row)
    parts = [mask.narrow(dim, span.start, span.stop - span.start) for span in in_memory]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _heads_first(tensor: Tensor, rows: tuple[int, int]) -> Tensor:
    """[s, b, n, d] -> a view [b, n, rows, d]."""
    return tensor[slice(*rows)].permute(1, 2, 0, 3)


class _Merged:
    """Rows of output and log-sum-exp, put together from tiles."""

    def __init__(self, q: Tensor):
        self._q = q
        self._whole: tuple[Tensor, Tensor] | None = None
        self._sums: tuple[Tensor, Tensor] | None = None

    def add(self, rows: tuple[int, int], out: Tensor, lse: Tensor) -> None:
        if self._sums is None:
            if self._whole is None and rows == (0, self._q.shape[0]):
                self._whole = out, lse  # most often the only tile: then nothing is added or converted
                return
            self._open()
        self._mix(rows, out, lse)

    def result(self) -> tuple[Tensor, Tensor]:
        if self._sums is None and self._whole is not None:
            out, lse = self._whole
            return out.permute(2, 0, 1, 3).to(self._q.dtype).contiguous(), lse
        if self._sums is None:
            self._open()
        assert self._sums is not None
        return self._sums[0].to(self._q.dtype), self._sums[1].to(self._sums[0].dtype)

    def _open(self) -> None:
        length, batch, heads, _ = self._q.shape
        out = torch.zeros(self._q.shape, dtype=tile_kernels.wide(self._q.dtype), device=self._q.device)
        # in fp64: a hundredth of the output's size, and its rounding would be an error of every probability
        lse = torch.full((batch, heads, length), float("-inf"), dtype=torch.float64, device=self._q.device)
        self._sums = out, lse
        if self._whole is not None:
            self._mix((0, length), *self._whole)
            self._whole = None

    def _mix(self, rows: tuple[int, int], out: Tensor, lse: Tensor) -> None:
        assert self._sums is not None
        sum_out, sum_lse = _heads_first(self._sums[0], rows), self._sums[1][:, :, slice(*rows)]
        total = torch.logaddexp(sum_lse, lse.to(sum_lse.dtype))
        before, now = ((part - total).exp_().to(sum_out.dtype)[..., None] for part in (sum_lse, lse))
        sum_out.mul_(before).add_(out * now)
        sum_lse.copy_(total)
