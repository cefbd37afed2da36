"""Contracts of the board: equal facts pass, others are named on every rank, nobody waits for ever."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from megatron_ext.board import Board


def compared(
    facts: dict[int, object], *, ranks=(4, 5, 6), timeout_s=1.0, what="the plan"
) -> dict[int, object]:
    """What each rank that has a fact got: None or the error."""
    store = dist.HashStore()

    def run(rank: int) -> object:
        try:
            return Board(store, ranks, rank, "test", timeout_s).compare(what, facts[rank])
        except (ValueError, RuntimeError) as error:
            return error

    with ThreadPoolExecutor(len(facts)) as pool:
        return dict(zip(facts, pool.map(run, facts), strict=True))


def test_equal_facts_pass():
    assert set(compared({rank: ["metp", "ring"] for rank in (4, 5, 6)}).values()) == {None}


def test_ranks_that_differ_are_named_by_key_on_both_sides():
    found = compared({4: {"a": 1, "b": 2}, 5: {"a": 1, "b": 2}, 6: {"a": 1, "b": 3}})
    for rank, other in ((4, 6), (5, 6), (6, 4)):
        assert isinstance(found[rank], ValueError)
        assert f"rank {other} and rank {rank}" in str(found[rank])
        assert "b " in str(found[rank])
        assert "a 1" not in str(found[rank])


def test_rank_that_does_not_answer_is_named_within_the_time():
    found = compared({4: 1, 6: 1}, timeout_s=0.2)
    assert all(isinstance(error, RuntimeError) for error in found.values())
    assert all("rank 5 did not answer" in str(error) for error in found.values())
    assert all("told last is nothing" in str(error) for error in found.values())


def test_rank_that_is_elsewhere_is_named_with_what_it_told_last():
    store = dist.HashStore()
    boards = {rank: Board(store, (0, 1), rank, "test", 0.2) for rank in (0, 1)}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda board: board.compare("the plan for 1 x 16 tokens", 0), boards.values()))
    with pytest.raises(
        RuntimeError, match="rank 1 did not answer .* told last is the plan for 1 x 16 tokens"
    ):
        boards[0].compare("the plan for 1 x 32 tokens", 0)


def test_same_question_asked_again_is_not_answered_by_old_answers():
    """A plan that smoothing brought back: the rank that is first finds what the other posted the last time."""
    store = dist.HashStore()
    boards = [Board(store, (0, 1), rank, "test", 5.0) for rank in (0, 1)]
    barrier = threading.Barrier(2)

    def run(rank: int) -> None:
        for number, names in enumerate((["metp"], ["ring"], ["metp"])):
            if rank != number % 2:
                barrier.wait(5)  # the other is waiting by now, or will find everything there
            else:
                threading.Timer(0.05, barrier.wait).start()
            boards[rank].compare("the plan for 1 x 16 tokens", names)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, (0, 1)))


def test_ranks_that_differ_the_second_time_are_named():
    store = dist.HashStore()
    boards = [Board(store, (0, 1), rank, "test", 5.0) for rank in (0, 1)]

    def run(board: Board) -> object:
        board.compare("the plan", "ring")
        try:
            return board.compare("the plan", "metp" if board is boards[0] else "ring")
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, boards))
    assert all("differ about the plan (time 2): " in text for text in found)


def test_group_of_one_asks_nobody():
    Board(None, (3,), 3, "test").compare("anything", 1)
