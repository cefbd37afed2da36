"""The numbers of a log line as curves: for DeepSpeed's monitor, and for the Trainer's log.

Contract: pure. What a line does not hold is left out, so any line may be given; every value is a finite float.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Event = tuple[str, float, int]
"""Label, value and place on the x axis: what `write_events` of DeepSpeed's monitors takes."""

PREFIX = "Train/GRASS"
_OF_LINE = (
    "loss",
    "effective_blocks",
    "applied_steps",
    "probe_steps",
    "skipped_steps",
    "draws",
    "refreshes",
    "switches",
    "measuring_seconds",
    "switching_seconds",
    "telemetry_seconds",
)
_OF_STATES = (
    "bytes_to_device",
    "bytes_to_host",
    "device_bytes",
    "device_bytes_peak",
    "host_bytes",
    "wait_seconds",
)
_BY_BLOCK = {"importance": "importance", "probabilities": "probability"}
_OF_TRAINER = (
    "phase_probe",
    "active_layers",
    "effective_blocks",
    "applied_steps",
    "draws",
    "bytes_to_device",
    "bytes_to_host",
    "device_bytes",
    "host_bytes",
    "wait_seconds",
)


def events(line: Mapping[str, Any], samples: int) -> list[Event]:
    """What the monitor is told of a line; `samples`: training samples seen, DeepSpeed's own x axis."""
    found = [*_scalars(line), *_by_block(line)]
    return [(f"{PREFIX}/{name}", value, samples) for name, value in found]


def trainer_logs(line: Mapping[str, Any]) -> dict[str, float]:
    """What the Trainer's log is told, under names that cannot meet its own."""
    found = dict(_scalars(line))
    return {f"grass_{name}": found[name] for name in _OF_TRAINER if name in found}


def _scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    if "phase" in line:
        yield "phase_probe", float(line["phase"] == "probe")
    if "active" in line:
        yield "active_layers", float(len(line["active"]))
    yield from _finite(line, _OF_LINE)
    yield from _finite(line.get("states", {}), _OF_STATES)


def _by_block(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers of blocks have as many digits as the largest, so that a list of labels is in order."""
    for key, name in _BY_BLOCK.items():
        values: Sequence[float] = line.get(key) or ()
        digits = len(str(max(len(values) - 1, 0)))
        for block, value in enumerate(values):
            if math.isfinite(value):
                yield f"{name}/block_{block:0{digits}d}", float(value)


def _finite(source: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, float]]:
    for name in names:
        value = source.get(name)
        if value is not None and math.isfinite(value):
            yield name, float(value)
