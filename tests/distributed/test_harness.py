"""No case can spoil another or keep the session waiting."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.distributed.harness import CaseResult, run_cases
from tests.distributed.registry import Case

pytestmark = pytest.mark.distributed


def _run(folder: Path, *names: str, timeout_seconds: int = 60) -> list[CaseResult]:
    cases = [
        Case(
            f"{number}-{name}",
            f"tests.distributed.harness_samples:{name}",
            2,
            {},
            timeout_seconds=timeout_seconds,
        )
        for number, name in enumerate(names)
    ]
    results = run_cases(2, cases, folder)
    return [results[case.id] for case in cases]


def test_case_after_a_failure_runs_and_the_reason_is_reported(tmp_path: Path) -> None:
    first, failed, last = _run(tmp_path, "passes", "fails_on_rank_1", "passes")
    assert first.passed
    assert last.passed
    assert [rank.value for rank in last.ranks] == [0, 1]
    assert [rank.status for rank in failed.ranks][1] == "failed"
    assert "ValueError: the reason" in failed.report()


@pytest.mark.slow
def test_rank_that_hangs_is_reported_with_its_stack(tmp_path: Path) -> None:
    begin = time.monotonic()
    hung, last = _run(tmp_path, "hangs_on_rank_1", "passes", timeout_seconds=20)
    assert time.monotonic() - begin < 120
    assert not hung.passed
    assert "in hangs_on_rank_1" in hung.report()
    assert last.passed


@pytest.mark.slow
def test_rank_that_dies_is_reported_and_the_rest_runs(tmp_path: Path) -> None:
    died, last = _run(tmp_path, "dies_on_rank_1", "passes")
    assert not died.passed
    assert died.ranks[1].status == "ended"
    assert "Aborted" in died.ranks[1].detail
    assert last.passed
