"""One run of all selected cases per world size, shared by the tests that look at one case each."""

from __future__ import annotations

import faulthandler
from pathlib import Path

import pytest

from tests.distributed.harness import CaseResult, run_cases
from tests.distributed.registry import Case

CASES_AT_ONCE = 150
"""Most cases for one start of the processes: the quick run needs one a world size, and a full run that is interrupted
loses no more than these."""


class Batches:
    """Runs the cases that this pytest session selected, many at once, when the first of them is asked for."""

    def __init__(self, cases: list[Case], folder: Path) -> None:
        self._cases, self._folder = cases, folder
        self._results: dict[str, CaseResult] = {}
        self._runs = 0

    def result(self, case: Case) -> CaseResult:
        """Return the result of `case`, running it with those that follow it if that has not happened yet."""
        if case.id not in self._results:
            faulthandler.cancel_dump_traceback_later()  # pytest's alarm is for one test; the harness has its own
            left = [c for c in self._cases if c.world_size == case.world_size and c.id not in self._results]
            left = left[left.index(case) :][:CASES_AT_ONCE]
            self._runs += 1
            self._results |= run_cases(case.world_size, left, self._folder / str(self._runs))
        return self._results[case.id]


@pytest.fixture(scope="session")
def batches(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Batches:
    """All selected cases of this session."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    cases = [p["distributed_case"] for p in params if "distributed_case" in p]
    return Batches(cases, tmp_path_factory.mktemp("distributed"))
