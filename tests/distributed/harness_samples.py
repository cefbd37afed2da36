"""Cases that pass, fail, hang and die, for the tests of the harness; not part of the registry."""

from __future__ import annotations

import os
import threading

import torch.distributed as dist

from tests.distributed.harness import Context


def passes(ctx: Context) -> int:
    """Communicates, and returns a value of its rank."""
    dist.barrier()
    return ctx.rank


def fails_on_rank_1(ctx: Context) -> None:
    """Rank 0 waits for a rank that has given up."""
    if ctx.rank == 1:
        raise ValueError("the reason")
    dist.barrier()


def hangs_on_rank_1(ctx: Context) -> None:
    """Rank 1 waits for ever, and rank 0 for it."""
    if ctx.rank == 1:
        threading.Event().wait()
    dist.barrier()


def dies_on_rank_1(ctx: Context) -> None:
    """Rank 1 ends as a crash would end it."""
    if ctx.rank == 1:
        os.abort()
    dist.barrier()
