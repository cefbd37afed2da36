"""In-flight counts against the schedules themselves, written down from their definition."""

from __future__ import annotations

import pytest

from megatron_ext.in_flight import in_flight


def most_held(warm_up: int, total: int) -> int:
    """1F1B: so many forwards, then one forward and one backward in turn, then the backwards that are left."""
    held = most = forwards = min(warm_up, total)
    held = most = forwards
    while forwards < total:
        held, forwards = held + 1, forwards + 1
        most = max(most, held)
        held -= 1
    return most


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_1f1b_holds_what_its_schedule_holds(stages, micro_batches):
    for stage in range(stages):
        held = most_held(stages - stage - 1, micro_batches)
        assert in_flight(stages, stage, micro_batches=micro_batches) == held


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("stages", [2, 4])
def test_interleaved_holds_what_its_schedule_holds(stages, chunks):
    for group_size, groups in ((stages, 1), (stages, 4), (2 * stages, 2)):
        micro_batches = group_size * groups
        for stage in range(stages):
            warm_up = (stages - stage - 1) * 2 + (chunks - 1) * group_size
            held = most_held(warm_up, chunks * micro_batches)
            assert in_flight(stages, stage, chunks, group_size, micro_batches) == held


def test_interleaved_counts_are_those_measured_on_megatron_core():
    assert [in_flight(4, stage, 2) for stage in range(4)] == [11, 9, 7, 5]
