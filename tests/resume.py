"""The pytest option ``--resume=DIR``: an interrupted run of the whole product goes on where it stopped.

Purpose: ``make test-full`` takes an hour and more; a machine may be taken away before that. Every test that passed is
written to a file in DIR at once, under a fingerprint of everything its result depends on; the next run with the same
fingerprint leaves those tests out. Failed and skipped tests run again. Without the option nothing happens.

Contract: the fingerprint covers this repository's sources, the interpreter and the installed versions of torch and
DeepSpeed. Any change of them starts from nothing, and results of other fingerprints stay for when it is undone.
Write the option with its equals sign: pytest takes a separate DIR for a folder of tests before it knows the option.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

SOURCES = ("ds_grass", "megatron_ext", "csrc", "configs", "examples", "benchmarks", "tests")
SUFFIXES = {".py", ".cpp", ".cu", ".h", ".json", ".toml", ".txt"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--resume", metavar="DIR", help="leave out tests that passed before, as written in DIR")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--resume")
    if folder is not None:
        journal = Path(folder) / f"{fingerprint(config.rootpath)}.jsonl"
        config.pluginmanager.register(Resume(journal), "resume-run")


class Resume:
    """Leaves out what the journal says has passed, and adds to it what passes now."""

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.passed = read_journal(journal)
        self.left_out = 0
        self._clean: dict[str, bool] = {}

    @pytest.hookimpl(trylast=True)  # after -m and -k have chosen
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = [item for item in items if item.nodeid in self.passed]
        items[:] = [item for item in items if item.nodeid not in self.passed]
        self.left_out = len(done)
        config.hook.pytest_deselected(items=done)

    def pytest_report_collectionfinish(self) -> str:
        return f"resume: {self.left_out} tests left out that passed before, journal {self.journal}"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        clean = self._clean.get(report.nodeid, True) and report.passed and not hasattr(report, "wasxfail")
        self._clean[report.nodeid] = clean
        if report.when == "teardown" and clean:
            self.journal.parent.mkdir(parents=True, exist_ok=True)
            with self.journal.open("a") as file:
                file.write(json.dumps({"passed": report.nodeid}) + "\n")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.left_out:
            session.exitstatus = pytest.ExitCode.OK


def read_journal(journal: Path) -> set[str]:
    """Node ids that passed. The last line may be cut short by whatever ended the run; it is ignored then."""
    if not journal.exists():
        return set()
    *complete, _ = journal.read_text().split("\n")
    return {json.loads(line)["passed"] for line in complete}


def fingerprint(root: Path) -> str:
    """Sixteen hex digits over the names and contents of all sources, the interpreter and the hosts' versions."""
    digest = hashlib.sha256()
    for part in (platform.python_version(), *(_version(package) for package in ("torch", "deepspeed"))):
        digest.update(f"{part}\0".encode())
    for path in _sources(root):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _sources(root: Path) -> Iterator[Path]:
    yield from (path for path in (root / "setup.py", root / "pyproject.toml") if path.exists())
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SUFFIXES and path.is_file():
                yield path


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
