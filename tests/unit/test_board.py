"""Contracts of the board: equal facts pass, others are named on every rank, nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

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


def compared_with_first(facts: dict[int, object], store: dist.Store, timeout_s: float = 1.0) -> list[object]:
    """What each of ranks 4 to 7 that has a fact got: None or the error as text."""

    def run(rank: int) -> object:
        try:
            return Board(store, (4, 5, 6, 7), rank, "test", timeout_s).compare_with_first(
                "the settings", facts[rank]
            )
        except (ValueError, RuntimeError) as error:
            return str(error)

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(run, facts))


def test_each_rank_against_the_first_names_the_one_that_differs_there_and_on_the_first():
    settings = {rank: {"policy": "stage_aware"} for rank in (4, 5, 6)} | {7: {"policy": "uniform"}}
    first, *others, last = compared_with_first(settings, dist.HashStore())
    assert others == [None, None]
    assert "rank 7 and rank 4" in first
    assert "rank 4 and rank 7" in last
    assert "policy 'stage_aware' against 'uniform'" in last


def test_each_rank_against_the_first_reads_little_and_misses_nobody():
    class Counting(dist.HashStore):
        reads = 0

        def get(self, key: str) -> bytes:
            Counting.reads += 1
            return super().get(key)

    assert compared_with_first(dict.fromkeys(range(4, 8), 1), Counting()) == [None] * 4
    assert Counting.reads == 2 * 3
    first, *others = compared_with_first({4: 1, 5: 1, 6: 1}, dist.HashStore(), 0.2)
    assert "rank 7 did not answer rank 4" in first
    assert others == [None, None]


def test_rank_that_did_not_read_all_deletes_nothing_yet():
    """What it has posted may still be waited for."""
    store = dist.HashStore()
    boards = [Board(store, (0, 1, 2), rank, "test", 5.0) for rank in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda board: board.compare("the start", 1), boards))
        list(pool.map(lambda board: board.compare_with_first("the settings", 1), boards))
        assert store.check(["test/the start/1", "test/the settings/1"])
        list(pool.map(lambda board: board.compare("the plan", 1), boards))
    assert not store.check(["test/the start/1"])
    assert not store.check(["test/the settings/1"])


def test_group_of_one_asks_nobody():
    Board(None, (3,), 3, "test").compare("anything", 1)


@pytest.fixture(params=("hash", "file", "tcp"))
def stores(request, tmp_path):
    """One store as two ranks see it, under a prefix, as a job does."""
    if request.param == "hash":
        both = [dist.HashStore()] * 2
    elif request.param == "file":
        both = [dist.FileStore(str(tmp_path / "store"), 2) for _ in range(2)]
    else:
        server = dist.TCPStore("localhost", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
        both = [server, dist.TCPStore("localhost", server.port, None, False, timedelta(seconds=30))]
    return [dist.PrefixStore("ds_grass", store) for store in both]


def compare_all(boards: Sequence[Board], numbers: Sequence[int]) -> list[list[object]]:
    """What each rank got from a comparison of each plan: None or the error."""

    def run(board: Board) -> list[object]:
        found: list[object] = []
        for number in numbers:
            try:
                found.append(board.compare(f"the plan for 1 x {number} tokens", ["ring"] * 4))
            except RuntimeError as error:
                found.append(error)
        return found

    with ThreadPoolExecutor(len(boards)) as pool:
        return list(pool.map(run, boards))


def test_store_does_not_grow_with_the_number_of_plans(stores):
    boards = [Board(store, (0, 1), rank, "test", 30.0) for rank, store in enumerate(stores)]
    assert compare_all(boards, range(5)) == [[None] * 5] * 2
    few = stores[0].num_keys()
    assert compare_all(boards, range(5, 100)) == [[None] * 95] * 2
    assert stores[0].num_keys() == few
    assert stores[0].check(["test/latest/0", "test/latest/1", "test/the plan for 1 x 99 tokens/0"])
    assert not stores[0].check(["test/the plan for 1 x 98 tokens/0"])


def test_what_a_peer_has_not_read_stays(stores):
    """A rank that is late reads what was posted for it, though the one that posted it has given up and gone on."""
    boards = [
        Board(store, (0, 1), rank, "test", timeout)
        for rank, store, timeout in zip((0, 1), stores, (0.1, 30.0), strict=True)
    ]
    with pytest.raises(RuntimeError, match="rank 1 did not answer"):
        boards[0].compare("the plan for 1 x 16 tokens", 0)
    with pytest.raises(RuntimeError, match="rank 1 did not answer"):
        boards[0].compare("the plan for 1 x 32 tokens", 0)
    for length in (16, 32):
        boards[1].compare(f"the plan for 1 x {length} tokens", 0)


def test_ranks_that_differed_leave_no_more_than_others(stores):
    """An error that was caught: what it was about goes with the next comparison that passes."""
    boards = [Board(store, (0, 1), rank, "test", 30.0) for rank, store in enumerate(stores)]
    compare_all(boards, [1, 2])
    few = stores[0].num_keys()

    def differ(board: Board) -> str:
        with pytest.raises(ValueError, match="differ about the start") as caught:
            board.compare("the start", boards.index(board))
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        assert all("0 against 1" in text or "1 against 0" in text for text in pool.map(differ, boards))
    assert stores[0].num_keys() == few + 2
    compare_all(boards, [3])
    assert stores[0].num_keys() == few


def test_store_that_cannot_delete_is_used_all_the_same():
    class Keeping(dist.HashStore):
        def delete_key(self, key: str) -> bool:
            raise RuntimeError('Tried to call pure virtual function "::c10d::Store::deleteKey"')

    store = Keeping()
    boards = [Board(store, (0, 1), rank, "test", 30.0) for rank in (0, 1)]
    assert compare_all(boards, range(3)) == [[None] * 3] * 2
    assert store.num_keys() == 8
