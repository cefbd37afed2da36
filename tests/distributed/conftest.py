"""One run of all selected cases per world size, shared by the tests that look at one case each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.harness import CaseResult, run_cases
from tests.distributed.registry import Case


class Batches:
    """Runs the cases that this pytest session selected, once per world size, when the first of them is asked for."""

    def __init__(self, cases: list[Case], folder: Path) -> None:
        self._cases, self._folder = cases, folder
        self._results: dict[int, dict[str, CaseResult]] = {}

    def result(self, case: Case) -> CaseResult:
        """Return the result of `case`, running its whole batch if that has not happened yet."""
        size = case.world_size
        if size not in self._results:
            batch = [c for c in self._cases if c.world_size == size]
            self._results[size] = run_cases(size, batch, self._folder)
        return self._results[size][case.id]


@pytest.fixture(scope="session")
def batches(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Batches:
    """All selected cases of this session."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    cases = [p["distributed_case"] for p in params if "distributed_case" in p]
    return Batches(cases, tmp_path_factory.mktemp("distributed"))
