"""Killed with -9, at random and in every phase, and resumed: the end has the same bits, and no rank is left hanging."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import harness, jobs
from tests.distributed.cases_schedule import WARMUP
from tests.distributed.harness import Context
from tests.distributed.registry import Case, case

RANKS = 2
TOTAL_STEPS, SAVE_EVERY = 39, 3
SURVIVORS_HAVE_SECONDS = 60
"""More than the time limit of a collective in the harness."""


def life(ctx: Context, *, stage: int, folder: str, kill: dict | None) -> None:
    """What a job does each time it is launched: resume if it can, train, save; `kill` says how it ends."""
    job = jobs.Job(stage=stage, extra={"scheduler": WARMUP}, dtype="bf16" if stage == 1 else "fp32")
    doomed = kill is not None and ctx.rank == kill["rank"]
    with contextlib.ExitStack() as stack:
        if doomed and "phase" in kill:
            stack.enter_context(killed_in(PHASES[kill["phase"]], kill["at_step"]))
        engine = stack.enter_context(jobs.engine_of(job))
        engine.load_checkpoint(folder)
        for number in range(engine.global_steps, TOTAL_STEPS):
            _now["step"] = number
            if doomed and number >= kill.get("timer_at_step", TOTAL_STEPS):
                threading.Timer(kill.pop("after_seconds"), _kill).start()
                doomed = False
            jobs.train_step(engine, job, ctx, number)
            if (number + 1) % SAVE_EVERY == 0:
                engine.save_checkpoint(folder, tag="same" if stage == 2 else None)
        moments = {key: jobs.moments(engine, key) for key in ("exp_avg", "exp_avg_sq")}
        end = {"masters": jobs.masters(engine), "weights": jobs.weights(engine), **moments}
        grass = jobs.controller(engine)
        end["sampling"] = {"counters": dict(grass.counters), "active": list(grass.active)}
    if ctx.rank == 0:
        torch.save(end, Path(folder) / "end.pt")


_now = {"step": -1}


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def killed_in(place: Callable[[], tuple[Any, str]], at_step: int) -> Iterator[None]:
    """Die at the first call of a function of the package from step `at_step` on."""
    owner, name = place()
    original = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        if _now["step"] >= at_step:
            _kill()
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, dying)
        yield


def _of(module: str, owner: str, name: str) -> Callable[[], tuple[Any, str]]:
    def find() -> tuple[Any, str]:
        import importlib

        found: Any = importlib.import_module(module)
        return (getattr(found, owner) if owner else found), name

    return find


PHASES = {
    "a checkpoint is verified": _of("ds_grass.manifest", "", "verify_file"),
    "states are put back": _of("ds_grass.state_store", "StateStore", "restore"),
    "a unit is reduced": _of("ds_grass.zero.reducer", "GradientReducer", "_launch"),
    "norms meet": _of("ds_grass.zero.core", "GrassCore", "_global_squares"),
    "a unit is updated": _of("ds_grass.ops", "", "adamw_"),
    "the next set is drawn": _of("ds_grass.sampler", "Sampler", "draw"),
    "states change places": _of("ds_grass.state_store", "StateStore", "activate"),
    "a file is written": _of("ds_grass.durable_files", "ChecksumWriter", "write"),
    "the manifest is written": _of("ds_grass.zero.saving", "", "write_text"),
    "the older one is put aside": _of("ds_grass.zero.saving", "Place", "put_aside"),
    "the new one takes the name": _of("ds_grass.zero.saving", "Place", "take_the_name"),
    "latest is replaced": _of("ds_grass.zero.saving", "Place", "name_latest"),
    "the older one is removed": _of("ds_grass.zero.saving", "Place", "clear"),
    "the save is told": _of("ds_grass.zero.saving", "", "_tell"),
}


def launch(ctx: Context, name: str, stage: int, folder: Path, kill: dict | None) -> list[int]:
    """One launch of `life` on two ranks; return the exit codes. Nobody is ended from outside but by `kill`."""
    elsewhere = Case("life", f"{__name__}:life", RANKS, {"stage": stage, "folder": str(folder), "kill": kill})
    with harness.started(RANKS, [elsewhere], ctx.folder / name) as processes:
        deadline = time.monotonic() + 90
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
            if any(p.poll() for p in processes):
                deadline = min(deadline, time.monotonic() + SURVIVORS_HAVE_SECONDS)
        codes = [p.poll() for p in processes]
    logs = [
        (ctx.folder / name / f"rank{rank}.log").read_text(errors="replace")[-3000:] for rank in range(RANKS)
    ]
    assert None not in codes, f"a rank outlived another one for {SURVIVORS_HAVE_SECONDS} s: {codes}\n{logs}"
    if kill is None:
        assert codes == [0] * RANKS, logs
        return codes
    assert codes[kill["rank"]] == -signal.SIGKILL, (codes, logs)
    result = ctx.folder / name / f"result-0-{1 - kill['rank']}.json"
    assert result.exists(), f"the other rank ended without a word: {codes}\n{logs}"
    assert '"status": "failed"' in result.read_text()
    return codes


def assert_same_end(ctx: Context, stage: int, folder: Path) -> None:
    """Against the run that nobody killed."""
    calm = ctx.folder / "calm"
    calm.mkdir()
    launch(ctx, "calm-launch", stage, calm, None)
    ours, theirs = (torch.load(path / "end.pt", weights_only=True) for path in (folder, calm))
    assert ours["sampling"] == theirs["sampling"]
    for what in ("weights", "masters", "exp_avg", "exp_avg_sq"):
        jobs.assert_identical(ours[what], theirs[what], what)


@case(ranks=(1,), slow=True, strength=1, stage=(1, 2, 3), timeout_seconds=900)
def killed_ten_times_at_random_a_run_ends_with_the_same_bits(ctx: Context, stage: int) -> list[int]:
    """Some time within ten random steps, saving included; each time launched again as it was the first time."""
    folder, dice = ctx.folder / "saved", random.Random(stage)
    folder.mkdir()
    steps = sorted(dice.sample(range(TOTAL_STEPS - 8), 10))
    for count, step in enumerate(steps):
        kill = {"rank": dice.randrange(RANKS), "timer_at_step": step, "after_seconds": dice.random() * 0.12}
        launch(ctx, f"launch{count}", stage, folder, kill)
    launch(ctx, "last", stage, folder, None)
    assert_same_end(ctx, stage, folder)
    return steps


@case(ranks=(1,), slow=True, strength=1, stage=(1, 2, 3), timeout_seconds=900)
def killed_in_every_phase_a_run_ends_with_the_same_bits(ctx: Context, stage: int) -> list[str]:
    """A rank dies where it hurts: the other one ends with an error by itself, and the resumed run loses nothing."""
    folder = ctx.folder / "saved"
    folder.mkdir()
    launch(ctx, "first", stage, folder, {"rank": 1, "timer_at_step": 2 * SAVE_EVERY, "after_seconds": 0.01})
    for count, phase in enumerate(PHASES):
        at_step = -1 if phase in WHILE_LOADING else 3 * count - 5
        kill = {"rank": 0 if phase in ON_RANK_0 else count % RANKS, "phase": phase, "at_step": at_step}
        launch(ctx, f"launch{count}", stage, folder, kill)
    launch(ctx, "last", stage, folder, None)
    assert_same_end(ctx, stage, folder)
    return list(PHASES)


WHILE_LOADING = ("a checkpoint is verified", "states are put back")
ON_RANK_0 = (
    "the manifest is written",
    "the older one is put aside",
    "the new one takes the name",
    "latest is replaced",
    "the older one is removed",
)
