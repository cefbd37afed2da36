"""A benchmark's row: when, where, with which versions and by which command its numbers came about."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def new_row(script: str, arguments: Sequence[str], packages: Sequence[str]) -> dict[str, Any]:
    """A row without results. The command leaves out where files are written to."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in packages}},
        "command": " ".join([f"python benchmarks/{script}", *without_paths(arguments)]),
    }


def append(file: str, row: dict[str, Any]) -> None:
    with open(file, "a") as stream:
        stream.write(json.dumps(row) + "\n")


PATHS = ("--json", "--folder")
"""Options that say where this machine keeps things."""


def without_paths(arguments: Sequence[str]) -> list[str]:
    kept, skip_next = [], False
    for argument in arguments:
        if not skip_next and not argument.startswith(PATHS):
            kept.append(argument)
        skip_next = argument in PATHS
    return kept


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": next(names, platform.machine()), "cores": os.cpu_count(), "device": device}


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
