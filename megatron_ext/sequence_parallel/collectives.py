"""Collectives over one tensor-parallel group, as functions and as differentiable functions.

All take and return tensors whose first dimension is cut over the group. A group of one rank communicates nothing.
Only calls that gloo and NCCL both have are used. What a `start_*` function begins is finished by
:meth:`Pending.wait`, so that it overlaps with compute in between.

Contract: every rank of the group calls the same functions in the same order. Sizes are checked by the caller, before
the first of them (:mod:`megatron_ext.sequence_parallel.layer_shape`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layout import zigzag_owner

# PyTorch 2.13 renamed both and warns at every call of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending:
    """A tensor that a collective is still filling."""

    def __init__(self, tensor: Tensor, works: Sequence[Any] = (), keep: Sequence[Tensor] = ()):
        self._tensor, self._works, self._keep = tensor, works, keep

    def wait(self) -> Tensor:
        """The finished tensor. On a GPU the current stream waits, the host does not."""
        for work in self._works:
            work.wait()
        self._works, self._keep = (), ()
        return self._tensor


def start_all_gather(shard: Tensor, group: Any) -> Pending:
    """[n, ...] of each rank -> [p * n, ...]."""
    if group.size() == 1:
        return Pending(shard)
    shard = shard.contiguous()
    full = shard.new_empty(group.size() * shard.shape[0], *shard.shape[1:])
    work = _all_gather(full, shard, group=group, async_op=True)
    return Pending(full, (work,), (shard,))


def start_reduce_scatter(full: Tensor, group: Any) -> Pending:
    """[p * n, ...] of each rank -> the sum's [n, ...]."""
    if group.size() == 1:
        return Pending(full)
    full = full.contiguous()
    shard = full.new_empty(full.shape[0] // group.size(), *full.shape[1:])
    work = _reduce_scatter(shard, full, group=group, async_op=True)
    return Pending(shard, (work,), (full,))


def start_broadcast(tensor: Tensor, source: int, group: Any) -> Pending:
    """The tensor of rank `source` of the group, on all ranks, in place."""
    if group.size() == 1:
        return Pending(tensor)
    work = dist.broadcast(tensor, dist.get_global_rank(group, source), group=group, async_op=True)
    return Pending(tensor, (work,))


def start_reduce(tensor: Tensor, target: int, group: Any) -> Pending:
    """The sum on rank `target` of the group, in place; on the others the content is undefined afterwards."""
    if group.size() == 1:
        return Pending(tensor)
    work = dist.reduce(tensor, dist.get_global_rank(group, target), group=group, async_op=True)
    return Pending(tensor, (work,))


def start_shift(tensor: Tensor, group: Any) -> Pending:
    """Send to the next rank of the ring; what the previous one sends, in a new tensor."""
    size, rank = group.size(), group.rank()
    if size == 1:
        return Pending(tensor)
    tensor = tensor.contiguous()
    received = torch.empty_like(tensor)
    following, previous = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
    operations = [
        dist.P2POp(dist.isend, tensor, following, group),
        dist.P2POp(dist.irecv, received, previous, group),
    ]
    return Pending(received, dist.batch_isend_irecv(operations), (tensor,))


def all_to_all(tensor: Tensor, group: Any) -> Tensor:
    """[p, ...] of each rank: row i goes to rank i, rows come back in the order of the ranks that sent them."""
    if group.size() == 1:
        return tensor
    tensor = tensor.contiguous()
    received = torch.empty_like(tensor)
    dist.all_to_all_single(received, tensor, group=group)
    return received


def exchange_chunks(x: Tensor, group: Any, *, to_zigzag: bool) -> Tensor:
    """[2 * n, ...] in contiguous order <-> the same tokens in zigzag order: each rank sends its two halves on."""
    size, rank = group.size(), group.rank()
    if size == 1:
        return x
    mine, theirs = (2 * rank, 2 * rank + 1), (rank, 2 * size - 1 - rank)
    if to_zigzag:
        held, wanted = mine, theirs
        owner, source = (lambda chunk: zigzag_owner(chunk, size)), (lambda chunk: chunk // 2)
    else:
        held, wanted = theirs, mine
        owner, source = (lambda chunk: chunk // 2), (lambda chunk: zigzag_owner(chunk, size))
    half = x.shape[0] // 2
    # An all-to-all wants what it sends in the order of the receivers, and hands out in the order of the senders.
    sending = sorted(range(2), key=lambda place: owner(held[place]))
    receiving = sorted(range(2), key=lambda place: source(wanted[place]))
    outgoing = x.contiguous() if sending == [0, 1] else torch.cat((x[half:], x[:half]))
    incoming = torch.empty_like(outgoing)
    splits = [[0] * size, [0] * size]
    for place in range(2):
        splits[0][owner(held[place])] += half
        splits[1][source(wanted[place])] += half
    dist.all_to_all_single(incoming, outgoing, splits[1], splits[0], group=group)
    return incoming if receiving == [0, 1] else torch.cat((incoming[half:], incoming[:half]))


class AllGather(torch.autograd.Function):
    """:func:`start_all_gather`; the gradient is reduce-scattered."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return start_all_gather(shard, group).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return start_reduce_scatter(grad, ctx.group).wait(), None


class ReduceScatter(torch.autograd.Function):
    """:func:`start_reduce_scatter`; the gradient is all-gathered."""

    @staticmethod
    def forward(ctx: Any, full: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return start_reduce_scatter(full, group).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return start_all_gather(grad, ctx.group).wait(), None


class AllToAll(torch.autograd.Function):
    """:func:`all_to_all`, which is its own transpose."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return all_to_all(tensor, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_to_all(grad, ctx.group), None


class Exchange(torch.autograd.Function):
    """:func:`exchange_chunks`; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, to_zigzag: bool) -> Tensor:
        ctx.group, ctx.to_zigzag = group, to_zigzag
        return exchange_chunks(x, group, to_zigzag=to_zigzag)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return exchange_chunks(grad, ctx.group, to_zigzag=not ctx.to_zigzag), None, None
