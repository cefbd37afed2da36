"""What the package's entry point costs every program on the machine: the time it adds to `import torch`.

    python benchmarks/autoload.py --json benchmarks/results/autoload.jsonl

PyTorch calls the entry points of the group `torch.backends` at the end of its own import. Each sample is a fresh
interpreter, with them and without them (`TORCH_DEVICE_BACKEND_AUTOLOAD=0`) in turn. Two numbers: the difference of the
medians, which drowns in the noise of the import itself, and the time inside the entry point, loading its module
included, which does not; the second is the claim.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from importlib.metadata import entry_points
from typing import Any

import rows
from rich.console import Console
from rich.table import Table

IMPORT = """
import time
begin = time.perf_counter()
import torch
print(time.perf_counter() - begin)
"""
ENTRY_POINT = """
import time
from importlib.metadata import entry_points
import torch
(entry,) = [e for e in entry_points(group="torch.backends") if e.name == "ds_grass"]
begin = time.perf_counter()
entry.load()()
print(time.perf_counter() - begin)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=15, help="fresh interpreters of each kind")
    parser.add_argument("--json", metavar="FILE", help="append the row of this run")
    options = parser.parse_args()
    if not any(entry.name == "ds_grass" for entry in entry_points(group="torch.backends")):
        parser.error("ds_grass is not installed in this environment")
    kinds = {
        "import torch, without plugins": (IMPORT, "0"),
        "import torch, with plugins": (IMPORT, "1"),
        "the entry point alone": (ENTRY_POINT, "0"),
    }
    samples: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(options.samples + 1):
        for kind, (source, autoload) in kinds.items():
            samples[kind].append(seconds(source, autoload))
    # the first of each reads the files from disk
    row = describe({kind: values[1:] for kind, values in samples.items()})
    print_table(row)
    if options.json:
        rows.append(options.json, row)


def seconds(source: str, autoload: str) -> float:
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
    done = subprocess.run(
        [sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def describe(samples: dict[str, list[float]]) -> dict[str, Any]:
    row = rows.new_row("autoload.py", sys.argv[1:], ("torch", "ds-grass"))
    row["results"] = [
        {
            "name": name,
            "median_seconds": statistics.median(values),
            "min_seconds": min(values),
            "max_seconds": max(values),
            "samples": len(values),
        }
        for name, values in samples.items()
    ]
    return row


def print_table(row: dict[str, Any]) -> None:
    table = Table(title="Milliseconds in a fresh interpreter", title_justify="left")
    for column in ("", "median", "least", "most"):
        table.add_column(column, justify="left" if not column else "right")
    for result in row["results"]:
        values = (result[f"{key}_seconds"] * 1000 for key in ("median", "min", "max"))
        table.add_row(result["name"], *(f"{value:.2f}" for value in values))
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
