"""Reading grass.jsonl back: the lines of one run, as plain values.

Contract: `read_run` takes any file, also one that is still being written or was cut by a killed job. What it
cannot use it counts; it fails, with a ReportError of one line, only where nothing is left to report. A run that was
resumed is one run: what it did beyond the checkpoint is dropped, what it cost goes on adding up. A stretch of steps
whose draws the file does not hold is marked as unknown. Strings are those of the file, untouched: whoever shows them
escapes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ds_grass.report.run import Run, State, is_count
from ds_grass.telemetry.log import DEFAULT_LOG_NAME

_STATE_EVENTS = ("draw", "refresh")
_BEGIN_EVENTS = ("start", "resume")
_ADDING_UP = (
    "bytes_to_device",
    "bytes_to_host",
    "wait_seconds",
    "fetches",
    "stashes",
    "measuring_seconds",
    "switching_seconds",
    "telemetry_seconds",
)
"""Costs that count from the start of a process; the others are what is held now."""


class ReportError(Exception):
    """Why there is nothing to report, and what to do: one line."""


def read_run(path: str | Path, run_id: str | None = None) -> Run:
    """The run of a log, or of the grass.jsonl in a folder; by default the last that began or was resumed.

    `run_id` may be the beginning of one. ReportError: no such file or run, or nothing was drawn yet.
    """
    path = Path(path)
    path = path / DEFAULT_LOG_NAME if path.is_dir() else path
    by_run: dict[str, list[dict]] = {}
    broken = 0
    try:
        for line in read_lines(path):
            if line is None:
                broken += 1
            else:
                lines = by_run.setdefault(line["run_id"], [])
                lines.append(line)
                if line["event"] in _BEGIN_EVENTS:
                    by_run[line["run_id"]] = by_run.pop(line["run_id"])  # the newest comes last
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ReportError(f"{path} cannot be read: {error}") from error
    chosen = _choose(path, list(by_run), run_id)
    return _run(path, chosen, by_run[chosen], broken)


def read_lines(path: Path) -> Iterator[dict | None]:
    """Every line with a run and an event, None for one that is broken. One being written is left out."""
    with open(path, "rb") as file:
        for raw in file:
            if not raw.strip():
                continue
            try:
                line = json.loads(raw)
            except (ValueError, RecursionError):
                line = None
            fits = isinstance(line, dict) and all(
                isinstance(line.get(key), str) for key in ("run_id", "event")
            )
            if fits:
                yield line
            elif raw.endswith(b"\n"):
                yield None


def _choose(path: Path, run_ids: list[str], wanted: str | None) -> str:
    if not run_ids:
        raise ReportError(f"{path} has no line of a GRASS run; give the file that grass.log.path names")
    if wanted is None:
        return run_ids[-1]
    found = [run_id for run_id in run_ids if run_id.startswith(wanted)]
    if wanted in run_ids or len(found) == 1:
        return wanted if wanted in run_ids else found[0]
    listed = ", ".join(ascii(run_id)[1:-1][:40] for run_id in run_ids[-8:])
    more = "the last of them are" if len(run_ids) > 8 else "it has"
    raise ReportError(
        f"--run-id {wanted!r} is the beginning of {len(found)} runs of {path}; use one that it has: "
        f"{more} {listed}"
    )


def _run(path: Path, run_id: str, lines: list[dict], broken: int) -> Run:
    reader = _Reader(broken)
    for line in lines:
        reader.take(line)
    if not reader.states:
        raise ReportError(_why_nothing(path, run_id, has_draws=reader.broken > broken))
    times = tuple(time for time in (_time(lines[0]), _time(lines[-1])) if time is not None)
    return Run(
        path=path,
        run_id=run_id,
        facts=reader.facts,
        states=tuple(reader.states),
        resumed=tuple(reader.resumed),
        skipped=tuple(reader.skipped),
        losses=tuple(sorted(reader.losses.items())),
        times=times if len(times) == 2 else (),
        broken_lines=reader.broken,
    )


def _why_nothing(path: Path, run_id: str, *, has_draws: bool) -> str:
    name = ascii(run_id)[1:-1]
    if has_draws:
        return (
            f"{path} has draws of run {name}, but none that can be read; it was written by another "
            "version of ds_grass, use that one's report"
        )
    return (
        f"{path} has no draw of run {name} yet; wait until its probe is over, or choose an "
        "earlier run with --run-id"
    )


class _Reader:
    """Takes the lines of one run in the order in which they were written."""

    def __init__(self, broken: int) -> None:
        self.broken = broken
        self.facts: Mapping[str, Any] = {}
        self.states: list[State] = []
        self.resumed: list[int] = []
        self.skipped: list[int] = []
        self.losses: dict[int, float] = {}
        self._before: dict[str, float] = {}
        """What earlier processes of the run had cost, less what this one had when it resumed."""

    def take(self, line: Mapping[str, Any]) -> None:
        step = line.get("applied_steps")
        if line["event"] in _BEGIN_EVENTS:
            self.facts = line
        if line["event"] == "resume":
            self._resume(line)
        elif line["event"] in _STATE_EVENTS:
            self._add(_state(line))
        elif line["event"] == "skipped" and is_count(step):
            self.skipped.append(step)
        if is_count(step) and math.isfinite(_number(line.get("loss"))):
            self.losses[step] = _number(line["loss"])

    def _add(self, state: State | None) -> None:
        if state is None or (self.states and len(state.visits) != len(self.states[0].visits)):
            self.broken += 1
            return
        while self.states and self.states[-1].step >= state.step:  # an older checkpoint was loaded
            self.states.pop()
        added = {name: self._before.get(name, 0.0) for name in _ADDING_UP if name in state.costs}
        costs = {name: value + added.get(name, 0.0) for name, value in state.costs.items()}
        self.states.append(replace(state, costs=costs))

    def _resume(self, line: Mapping[str, Any]) -> None:
        """Lines beyond it are undone, should the log still have them; its own costs come before the run goes on."""
        step, state = line.get("applied_steps"), _state(line)
        if not is_count(step):
            self.broken += 1
            return
        self.states = [known for known in self.states if known.step <= step]
        self.skipped = [skipped for skipped in self.skipped if skipped <= step]
        self.losses = {at: loss for at, loss in self.losses.items() if at <= step}
        self.resumed = [*(at for at in self.resumed if at < step), step]
        if state is None:
            return
        so_far = self.states[-1].costs if self.states else {}
        self._before = {
            name: so_far.get(name, 0.0) - state.costs[name] for name in _ADDING_UP if name in state.costs
        }
        drawn = self.states[-1].counters.get("draws") if self.states else None
        if line.get("phase") == "train" and drawn != state.counters.get("draws"):
            self._add(state)  # the log does not hold the draw of what trains now


def _state(line: Mapping[str, Any]) -> State | None:
    """None where the line does not say what trains."""
    step, active, visits = line.get("applied_steps"), line.get("active"), line.get("visits")
    if not (is_count(step) and _are_counts(active) and _are_counts(visits) and visits):
        return None
    if any(block >= len(visits) for block in active):
        return None
    states = line.get("states") if isinstance(line.get("states"), dict) else {}
    costs = {name: _number(value) for name, value in states.items()}
    for name in ("measuring_seconds", "switching_seconds", "telemetry_seconds"):
        costs[name] = _number(line.get(name))
    mode = states.get("mode")
    return State(
        step=step,
        counters={name: value for name, value in line.items() if is_count(value)},
        active=tuple(active),
        importance=_by_block(line.get("importance"), len(visits)),
        probabilities=_by_block(line.get("probabilities"), len(visits)),
        effective_blocks=_number(line.get("effective_blocks")),
        visits=tuple(visits),
        costs={name: value for name, value in costs.items() if math.isfinite(value)},
        mode=mode if isinstance(mode, str) else "",
    )


def _by_block(values: Any, num_blocks: int) -> tuple[float, ...]:
    if not isinstance(values, list) or len(values) != num_blocks:
        return ()
    return tuple(_number(value) for value in values)


def _number(value: Any) -> float:
    """A finite float, else nan."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:  # an integer beyond floats
        return math.nan


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(is_count(value) for value in values)


def _time(line: Mapping[str, Any]) -> datetime | None:
    try:
        time = datetime.fromisoformat(str(line.get("time")))
    except ValueError:
        return None
    return time if time.tzinfo is not None else None
