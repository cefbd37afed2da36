"""Ranks of one group that would run different plans: an error with the rank and the key, on all of them, in seconds.

Where they can differ: the block, the cost model, the lengths that they are given, and whether the package is on at all.
Not covered: ranks of different groups, which may differ.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import megatron_ext
from megatron_ext import job
from megatron_ext.board import Board
from tests import megatron_models
from tests.distributed.harness import Context
from tests.distributed.registry import case
from tests.plain_gpt import GPT

SECONDS = 1.0
BLOCKS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "smoothing": (
        {},
        {"smoothing": 0.25},
        r"megatron_ext\.sequence_parallel\.smoothing 0\.\d+ against 0\.\d+",
    ),
    "strategies": (
        {"strategies": ["metp", "ring"]},
        {"strategies": ["metp"]},
        r"megatron_ext\.sequence_parallel\.strategies \['metp'",
    ),
    "strategy": ({}, {"strategy": "ring"}, r"megatron_ext\.sequence_parallel\.strategy "),
    "granularity": ({}, {"granularity": "model"}, r"megatron_ext\.sequence_parallel\.granularity "),
}


@case(ranks=(2, 4), strength=1, most_quick=1, key=tuple(BLOCKS))
def another_block_is_named_by_key(ctx: Context, key: str) -> str:
    """The last rank has another value: told when the model is built."""
    usual, odd, said = BLOCKS[key]
    with megatron_models.parallel_state(tp=2):
        with applied(odd if _is_last(ctx) else usual):
            if not _has_last(ctx):
                megatron_models.build(GPT())  # another tensor-parallel group is none of theirs
                return ""
            with told(ValueError, said) as message:
                megatron_models.build(GPT())
    assert _names_the_pair(ctx, message[0]), message
    return message[0]


@case(ranks=(2,))
def another_limit_is_named_by_key(ctx: Context) -> None:
    """Of memory, outside of the sequence_parallel object."""
    with (
        megatron_models.parallel_state(tp=2),
        applied({}, limit=f"{1 + ctx.rank}GB"),
        told(ValueError, r"megatron_ext\.memory\.limit [12]000000000 against"),
    ):
        megatron_models.build(GPT())


@case(ranks=(2,))
def a_rank_that_is_switched_off_is_named(ctx: Context) -> None:
    """It posts nothing: the other says so after its time, and does not wait for a collective."""
    with (
        megatron_models.parallel_state(tp=2),
        applied({"enabled": ctx.rank == 0}),
        told(RuntimeError, "rank 1 did not answer rank 0 about the start")
        if ctx.rank == 0
        else contextlib.nullcontext(),
    ):
        megatron_models.build(GPT())


@case(ranks=(2,))
def another_cost_model_is_named(ctx: Context) -> None:
    """Files of one name with other measurements in them: told at the first micro-batch, before the first layer."""
    gpt, profile = GPT(), str(ctx.folder / "profile.json")
    with megatron_models.parallel_state(tp=2):
        with applied({"cost_model": {"save": profile}}):
            _forward(megatron_models.build(gpt)[0].decoder, 32)
        torch.distributed.barrier()
        if ctx.rank == 1:
            _edit(profile, ctx)
        mine = str(ctx.folder / f"profile{'-1' if ctx.rank else ''}.json")
        with applied({"cost_model": {"load": profile}}):
            decoder = megatron_models.build(gpt)[0].decoder
            policy = job.current()._policies[decoder]
            # the same block, another disk
            cost_model = policy._config.cost_model.model_copy(update={"load": mine})
            policy._config = policy._config.model_copy(update={"cost_model": cost_model})
            with told(ValueError, "differ about what plans follow from: the cost model"):
                _forward(decoder, 32)


@case(ranks=(2,), when=("first", "planned", "profiled"))
def another_length_is_named(ctx: Context, when: str) -> None:
    """A rank whose stage was handed another micro-batch: the first, one to plan, or one that is much longer."""
    before, mine, other = {"first": (None, 32, 64), "planned": (64, 32, 48), "profiled": (16, 64, 96)}[when]
    if ctx.rank:
        mine, other = other, mine
    with megatron_models.parallel_state(tp=2), applied({}):
        decoder = megatron_models.build(GPT())[0].decoder
        if before is None:
            with told(ValueError, "about the first micro-batch: length (32 against 64|64 against 32)"):
                _forward(decoder, mine)
            return
        _forward(decoder, before)
        what = {"planned": "the plan for", "profiled": "a profile of"}[when]
        silent = rf"rank {1 - ctx.rank} did not answer rank {ctx.rank} about {what} 2 x {mine} tokens"
        with told(RuntimeError, f"{silent}.* last is {what} 2 x {other} tokens"):
            _forward(decoder, mine)


@contextlib.contextmanager
def applied(sequence_parallel: dict[str, Any], limit: str = "2GB") -> Iterator[None]:
    """Inside, blocks that are built are switched, and ranks wait for each other for `SECONDS` only."""
    block = {
        "sequence_parallel": sequence_parallel,
        "memory": {"limit": limit},
        "log": {"enabled": False},
    }
    with patch.object(Board.__init__, "__defaults__", (SECONDS,)):
        megatron_ext.apply({"megatron_ext": block})
        try:
            yield
        finally:
            megatron_ext.remove()


@contextlib.contextmanager
def told(kind: type[Exception], pattern: str) -> Iterator[list[str]]:
    """An error of this kind and text, and soon; yields a list that has its text afterwards."""
    messages: list[str] = []
    start = time.monotonic()
    with pytest.raises(kind, match=pattern) as caught:
        yield messages
    messages.append(str(caught.value))
    assert time.monotonic() - start < SECONDS + 15


def _is_last(ctx: Context) -> bool:
    return ctx.rank == ctx.world_size - 1


def _has_last(ctx: Context) -> bool:
    """Whether this rank is in the tensor-parallel group of the last one."""
    return ctx.rank // 2 == (ctx.world_size - 1) // 2


def _names_the_pair(ctx: Context, message: str) -> bool:
    return f"rank {ctx.rank ^ 1} and rank {ctx.rank}, whose layers run together," in message


def _forward(decoder: nn.Module, length: int) -> Tensor:
    """A block by itself: a length that differs would stop Megatron-core's embedding before it."""
    hidden = torch.randn(length // 2, 2, decoder.config.hidden_size, dtype=torch.float64)
    return decoder(hidden.requires_grad_(), None)


def _edit(profile: str, ctx: Context) -> None:
    """A profile of another machine: every time twice as long."""
    with open(profile) as file:
        saved = json.load(file)
    for layer in saved["layers"]:
        for row in layer["measurements"]:
            row["seconds"] *= 2
    (ctx.folder / "profile-1.json").write_text(json.dumps(saved))
