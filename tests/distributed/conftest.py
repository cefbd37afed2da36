"""One run of all selected cases per world size, shared by the tests that look at one case each."""

from __future__ import annotations

import faulthandler
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.harness import CaseResult, run_cases
from tests.distributed.registry import Case

CASES_AT_ONCE = 150
"""Most cases for one start of the processes: the quick run needs one a world size, and a full run that is interrupted
loses no more than these."""


class Batches:
    """Runs the cases that this pytest session selected, many at once, when the first of them is asked for.

    Those on one rank run in a thread beside the others, for ranks that wait for each other leave time on two cores.
    """

    def __init__(self, cases: list[Case], folder: Path) -> None:
        self._beside = [case for case in cases if case.world_size == 1]
        self._cases, self._folder = [case for case in cases if case.world_size > 1], folder
        self._results: dict[str, CaseResult] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run_beside)
        self._finished: dict[str, threading.Event] = {case.id: threading.Event() for case in self._beside}

    def result(self, case: Case) -> CaseResult:
        """Return the result of `case`, running it with those that follow it if that has not happened yet."""
        faulthandler.cancel_dump_traceback_later()  # pytest's alarm is for one test; the harness has its own
        if self._thread.ident is None:
            self._thread.start()
        if case.id in self._finished:
            while not self._finished[case.id].is_set() and (left := self._not_run()):
                self._run_from(left[0])
            self._finished[case.id].wait()
        elif case.id not in self._results:
            self._run_from(case)
        return self._results[case.id]

    def _not_run(self) -> list[Case]:
        return [case for case in self._cases if case.id not in self._results]

    def _run_from(self, case: Case) -> None:
        """Run `case` and those that follow it on as many ranks."""
        left = [other for other in self._not_run() if other.world_size == case.world_size]
        self._run(left[left.index(case) :][:CASES_AT_ONCE])

    def stop(self) -> None:
        """End what still runs."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run_beside(self) -> None:
        for first in range(0, len(self._beside), CASES_AT_ONCE):
            batch = self._beside[first : first + CASES_AT_ONCE]
            try:
                self._run(batch)
            finally:
                for case in batch:
                    self._finished[case.id].set()

    def _run(self, batch: list[Case]) -> None:
        folder = (
            self._folder / f"ranks{batch[0].world_size}-{batch[0].id.partition('[')[0]}-{len(self._results)}"
        )
        self._results.update(run_cases(batch[0].world_size, batch, folder, self._stop))


@pytest.fixture(scope="session")
def batches(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Batches]:
    """All selected cases of this session."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    cases = [p["distributed_case"] for p in params if "distributed_case" in p]
    batches = Batches(cases, tmp_path_factory.mktemp("distributed"))
    yield batches
    batches.stop()
