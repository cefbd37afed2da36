"""``megatron_ext report``: which strategy ran for which length, what each pipeline stage recomputes, and what both took
beside what was predicted.

Contract: :func:`read_run` takes any megatron_ext.jsonl, also one that is still being written or was cut by a killed
job. What it cannot use it counts; it fails, with a ReportError of one line, only where nothing is left to report.
Not covered: showing it (:mod:`megatron_ext.tables`, :mod:`megatron_ext.picture`,
:mod:`megatron_ext.recompute_pictures`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds_grass.report.log import ReportError, read_lines
from megatron_ext import recompute_report
from megatron_ext.recompute_report import Stages
from megatron_ext.telemetry import DEFAULT_LOG_NAME

__all__ = ["ReportError", "Row", "Run", "document", "read_run"]


@dataclass(frozen=True)
class Row:
    """One plan for one batch and length: predicted, and measured where it ran and was measured."""

    batch: int
    length: int
    plan: str
    layers: Mapping[str, int]
    fits: bool
    predicted_seconds: float
    predicted_bytes: int
    micro_batches: int = 0
    measured_seconds: float | None = None
    measured_bytes: int | None = None


@dataclass(frozen=True)
class Run:
    """All lines of one `run_id`."""

    path: Path
    run_id: str
    facts: Mapping[str, Any]
    """The line that the run began with; empty where the file has none."""
    rows: tuple[Row, ...]
    """By length, then by batch. At least one where `stages` is None."""
    calls: Mapping[str, Mapping[str, Mapping[str, int]]]
    """Of layers on the rank that wrote: strategy -> length -> phase -> count."""
    broken_lines: int
    """Lines of the file, of whichever run, that could not be used."""
    stages: Stages | None = None
    """What the pipeline's stages recompute; None where that was not told."""


def read_run(path: str | Path, run_id: str | None = None) -> Run:
    """The run of a log, or of the megatron_ext.jsonl in a folder; by default the last that began.

    `run_id` may be the beginning of one. ReportError: no such file or run, or nothing was planned yet.
    """
    path = Path(path)
    path = path / DEFAULT_LOG_NAME if path.is_dir() else path
    by_run: dict[str, list[dict[str, Any]]] = {}
    broken = 0
    try:
        for line in read_lines(path):
            if line is None:
                broken += 1
            else:
                by_run.setdefault(line["run_id"], []).append(line)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ReportError(f"{path} cannot be read: {error}") from error
    chosen = _choose(path, list(by_run), run_id)
    return _run(path, chosen, by_run[chosen], broken)


def document(run: Run) -> dict[str, Any]:
    """The run as one JSON document."""
    return {
        "path": str(run.path),
        "run_id": run.run_id,
        "facts": dict(run.facts),
        "rows": [asdict(row) for row in run.rows],
        "calls": dict(run.calls),
        "recompute": None if run.stages is None else recompute_report.document(run.stages),
    }


def _choose(path: Path, run_ids: list[str], wanted: str | None) -> str:
    if not run_ids:
        raise ReportError(f"{path} has no line of a run; give the file that megatron_ext.log.path names")
    found = run_ids[-1:] if wanted is None else [run_id for run_id in run_ids if run_id.startswith(wanted)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(ascii(run_id)[1:-1][:40] for run_id in run_ids[-8:])
    raise ReportError(
        f"--run-id {wanted!r} is the beginning of {len(found)} runs of {path}; use one that it has: {listed}"
    )


def _run(path: Path, run_id: str, lines: list[dict[str, Any]], broken: int) -> Run:
    rows: dict[tuple[int, int, str], Row] = {}
    facts: Mapping[str, Any] = {}
    calls: dict[str, dict[str, Any]] = {}
    stages: Stages | None = None
    unusable = ""
    for line in lines:
        if line["event"] == "start":
            facts = line
        elif line["event"] == "counters" and isinstance(line.get("calls"), dict):
            _count(line["calls"], calls)
        elif line["event"] == "recompute_stages":
            try:
                stages = recompute_report.parse_stages(line.get("stages"))
            except ValueError as error:
                broken, unusable = broken + 1, f"; what it tells of stages cannot be used: {error}"
        elif line["event"] in ("plan", "summary"):
            row = _row(line)
            if row is None:
                broken += 1
                continue
            key = row.batch, row.length, row.plan
            rows[key] = Row(**{**asdict(row), "fits": rows[key].fits}) if key in rows else row
    if not rows and stages is None:
        why = unusable or "; report it when a micro-batch ran"
        raise ReportError(f"run {run_id} of {path} has planned nothing yet{why}")
    ordered = sorted(rows.values(), key=lambda row: (row.length, row.batch))
    return Run(path, run_id, facts, tuple(ordered), calls, broken, stages)


def _count(news: Mapping[str, Any], calls: dict[str, dict[str, Any]]) -> None:
    """A line holds totals of what changed since the line before it, or of everything (`complete`)."""
    for strategy, by_length in news.items():
        if isinstance(by_length, dict):
            calls.setdefault(strategy, {}).update(by_length)


def _row(line: Mapping[str, Any]) -> Row | None:
    """None where the line lacks something."""
    layers, fits = line.get("layers"), line.get("fits", True)
    numbers = [line.get(key) for key in ("batch", "length", "predicted_bytes", "predicted_seconds")]
    if not (all(_is_number(value) for value in numbers) and isinstance(layers, dict)):
        return None
    measured = {key: line.get(key) for key in ("measured_seconds", "measured_bytes")}
    times = line.get("micro_batches", 0)
    return Row(
        batch=int(line["batch"]),
        length=int(line["length"]),
        plan=str(line.get("plan")),
        layers={str(name): count for name, count in layers.items() if _is_number(count)},
        fits=fits is not False,
        predicted_seconds=float(line["predicted_seconds"]),
        predicted_bytes=int(line["predicted_bytes"]),
        micro_batches=times if _is_number(times) else 0,
        **{key: value if _is_number(value) else None for key, value in measured.items()},
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 2**63
