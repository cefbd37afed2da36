"""Runs many distributed cases in one process group per world size, over gloo and a `file://` store.

Contract: `run_cases` starts `world_size` processes once and runs the cases in order, each in its own folder. A case
that fails, hangs or kills its process ends that group; the rest continues in a fresh one, so no case can spoil another.
A rank that hangs leaves the stacks of its threads in the result. Only processes started here are ended. Workers are
started with `python -m`, so coverage's subprocess support counts them.
Not covered: which cases exist (registry.py) and what they promise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import faulthandler
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed.registry import Case

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 8.0
COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=45)


@dataclass(frozen=True)
class Context:
    """What a case knows of its place: its rank, the number of ranks, and a folder all ranks of this case share."""

    rank: int
    world_size: int
    folder: Path


@dataclass(frozen=True)
class RankResult:
    """How one rank fared: status is passed, failed, hung, ended (by us, after another rank failed) or not run."""

    status: str
    value: Any = None
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class CaseResult:
    """The results of all ranks of one case."""

    case: Case
    ranks: tuple[RankResult, ...]

    @property
    def passed(self) -> bool:
        """Whether every rank passed."""
        return all(rank.status == "passed" for rank in self.ranks)

    def report(self) -> str:
        """Return the failure of every rank, the ones that failed first."""
        order = sorted(range(len(self.ranks)), key=lambda r: self.ranks[r].status != "failed")
        parts = [f"rank {r}: {self.ranks[r].status}\n{self.ranks[r].detail}" for r in order]
        return f"{self.case.id}\n" + "\n".join(parts)


def run_cases(
    world_size: int, cases: Sequence[Case], folder: Path, stop: threading.Event | None = None
) -> dict[str, CaseResult]:
    """Run `cases` on `world_size` ranks and return a result for each, whatever happens to the processes.

    Once `stop` is set, processes are ended and what has no result yet is left out.
    """
    stop = stop or threading.Event()
    results: dict[str, CaseResult] = {}
    groups = [[c] for c in cases if c.alone] + [[c for c in cases if not c.alone]]
    number = 0
    for group in groups:
        left = list(group)
        while left and not stop.is_set():
            work = folder / f"ranks{world_size}-group{number}"
            number += 1
            done = _run_group(world_size, left, work, stop)
            results |= done
            left = [c for c in left if c.id not in done]
    return results


def _run_group(
    world_size: int, cases: Sequence[Case], work: Path, stop: threading.Event
) -> dict[str, CaseResult]:
    """Run cases until one breaks; return the results of those that ran, at least one."""
    with started(world_size, cases, work) as processes:
        _wait(processes, work, stop)
    return _collect(cases, work, world_size, [p.returncode for p in processes])


@contextlib.contextmanager
def started(world_size: int, cases: Sequence[Case], work: Path) -> Iterator[list[subprocess.Popen]]:
    """The processes of a group, running; rank r writes `rank<r>.log` in `work`. What still runs at the end is ended."""
    work.mkdir(parents=True)
    (work / "cases.json").write_text(json.dumps([dataclasses.asdict(c) for c in cases]))
    logs = [(work / f"rank{r}.log").open("w") for r in range(world_size)]
    extra = cases[0].environment or [{}] * world_size
    processes = [_start(work, r, world_size, logs[r], extra[r]) for r in range(world_size)]
    try:
        yield processes
    finally:
        _end(processes)
        for log in logs:
            log.close()


def _start(work: Path, rank: int, world_size: int, log, extra: dict[str, str]) -> subprocess.Popen:
    place = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",  # never opened: the store is a file; DeepSpeed only looks whether the name is set
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, "-m", "tests.distributed.harness", str(work), str(rank), str(world_size)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | place | extra,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _wait(processes: Sequence[subprocess.Popen], work: Path, stop: threading.Event) -> None:
    """Return when all have ended, or when one failed and the others had their time to notice."""
    deadline = None
    while any(p.poll() is None for p in processes) and not stop.is_set():
        time.sleep(0.05)
        broken = any(p.poll() for p in processes) or (work / "failed").exists()
        if broken and deadline is None:
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            return


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """End what still runs; SIGABRT first, at which faulthandler writes the stacks into the log."""
    for sig in (signal.SIGABRT, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                process.send_signal(sig)
        stop = time.monotonic() + 5
        while any(p.poll() is None for p in processes) and time.monotonic() < stop:
            time.sleep(0.05)


def _collect(
    cases: Sequence[Case], work: Path, world_size: int, codes: Sequence[int | None]
) -> dict[str, CaseResult]:
    results = {}
    for index, case in enumerate(cases):
        files = [work / f"result-{index}-{r}.json" for r in range(world_size)]
        started = (work / f"started-{index}").exists()
        if not started and (index > 0 or any(f.exists() for f in files)):
            break
        ranks = tuple(_rank_result(f, work / f"rank{r}.log", codes[r]) for r, f in enumerate(files))
        results[case.id] = CaseResult(case, ranks)
    return results


def _rank_result(file: Path, log: Path, code: int | None) -> RankResult:
    if file.exists():
        return RankResult(**json.loads(file.read_text()))
    tail = log.read_text(errors="replace")[-6000:]
    status = "hung" if "Timeout (" in tail else "ended"
    return RankResult(status, detail=f"exit code {code}; end of its output:\n{tail}")


def _write(path: Path, text: str) -> None:
    """Write so that a reader sees all of it or nothing."""
    path.with_suffix(f".{os.getpid()}").write_text(text)
    path.with_suffix(f".{os.getpid()}").rename(path)


def _worker(work: Path, rank: int, world_size: int) -> int:
    faulthandler.enable()
    cases = [Case(**fields) for fields in json.loads((work / "cases.json").read_text())]
    faulthandler.dump_traceback_later(120, exit=True)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    _init_distributed(work, rank, world_size)
    meeting = dist.FileStore(str(work / "meeting"), world_size)
    for index, case in enumerate(cases):
        faulthandler.dump_traceback_later(case.timeout_seconds, exit=True)
        result = _run_one(case, Context(rank, world_size, work / f"case{index}"), work / f"started-{index}")
        _write(work / f"result-{index}-{rank}.json", json.dumps(dataclasses.asdict(result)))
        if result.status != "passed":
            _write(work / "failed", case.id)
            return 3
        meeting.set(f"{index}/{rank}", "passed")
        meeting.wait([f"{index}/{r}" for r in range(world_size)])
    faulthandler.dump_traceback_later(30, exit=True)
    with contextlib.suppress(RuntimeError):  # a case may have taken the group down itself
        dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
    return 0


def _init_distributed(work: Path, rank: int, world_size: int) -> None:
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # A C++ kernel that only inference uses: without this every fresh machine compiles it here, under a file lock
    # that a killed process leaves behind for all later ones to wait on.
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="gloo",
        auto_mpi_discovery=False,
        init_method=f"file://{work / 'store'}",
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
        verbose=False,
    )


def _run_one(case: Case, context: Context, started: Path) -> RankResult:
    import torch

    context.folder.mkdir(exist_ok=True)
    started.touch()
    sys.stdout.write(f"==== {case.id}\n")
    begin = time.monotonic()
    torch.manual_seed(0)
    try:
        with contextlib.chdir(context.folder) if hasattr(contextlib, "chdir") else _chdir(context.folder):
            module, name = case.target.split(":")
            value = getattr(importlib.import_module(module), name)(context, **case.kwargs)
    except BaseException:  # the worker reports whatever a case raised, SystemExit of a host included
        return RankResult("failed", detail=traceback.format_exc(), seconds=time.monotonic() - begin)
    gc.collect()
    return RankResult("passed", value=value, seconds=time.monotonic() - begin)


@contextlib.contextmanager
def _chdir(folder: Path):
    """contextlib.chdir, which Python 3.10 lacks."""
    old = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(old)


if __name__ == "__main__":
    sys.exit(_worker(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
