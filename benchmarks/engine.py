"""The state engine against the limits of the hardware, measured in the same run.

    python benchmarks/engine.py --json benchmarks/results/engine.jsonl

On any machine: AdamW on the CPU beside DeepSpeedCPUAdam, torch's fused AdamW and a triad (`engine_cpu.py`). With a
GPU: AdamW beside the device's copy, transfers beside one pinned copy, the zero-copy variant (`engine_cuda.py`), and
steps and memory of a LLaMA-2-7B-shaped model (`engine_model.py`). What cannot be measured here reads "not measured".

The row's keys: `cpu_adamw`, `cuda_adamw`, `cuda_transfer`, `cuda_zero_copy`, `cuda_model`. `--check` exits with an
error when what is promised did not hold.
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import rows
import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "deepspeed", "transformers", "ds-grass")
CPU_MILLIONS = (1, 4, 16, 64, 200)
BLOCK = 202_383_360  # elements of a block of LLaMA-2-7B
NOT_MEASURED = "not measured"
CUDA_PARTS = ("cuda_adamw", "cuda_transfer", "cuda_zero_copy", "cuda_model")
PROMISED = {
    # (work, figure): at least
    ("bare", "speedup_over_fastest_peer"): 0.97,
    ("full", "speedup_over_fastest_peer"): 1.2,
    ("full", "triad_fraction"): 0.8,
}


def main() -> None:
    settings = parse_arguments()
    sys.path.insert(0, str(ROOT))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    row = rows.new_row("engine.py", sys.argv[1:], PACKAGES)
    with console.status("measuring") as status:
        row |= measure(settings, status.update)
    print_tables(console, row)
    if settings.json:
        rows.append(settings.json, row)
    missed = list(broken_promises(row))
    if settings.check and missed:
        sys.exit("\n".join(missed))


def parse_arguments() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--millions", type=int, nargs="+", default=CPU_MILLIONS, help="sizes of shards, in elements"
    )
    parser.add_argument(
        "--skip-model", action="store_true", help="leave out the steps of the 7B-shaped model"
    )
    parser.add_argument("--json", metavar="FILE", help="append the row of this run")
    parser.add_argument("--check", action="store_true", help="fail when a promised figure does not hold")
    return parser.parse_args()


def measure(settings: Namespace, progress: Callable[[str], None]) -> dict[str, Any]:
    import engine_cpu

    sizes = [millions * 1_000_000 for millions in settings.millions]
    parts: dict[str, Any] = {"cpu_adamw": engine_cpu.measure(sizes, progress)}
    if not torch.cuda.is_available():
        return parts | dict.fromkeys(CUDA_PARTS, NOT_MEASURED)
    import engine_cuda
    import engine_model

    parts["cuda_adamw"] = engine_cuda.adamw_rows(sizes, progress)
    parts["cuda_transfer"] = engine_cuda.transfer_row(BLOCK, progress)
    parts["cuda_zero_copy"] = engine_cuda.zero_copy_row(BLOCK, progress)
    torch.cuda.empty_cache()
    parts["cuda_model"] = NOT_MEASURED
    if not settings.skip_model:
        parts["cuda_model"] = []
        for name in engine_model.JOBS:
            progress(f"7B-shaped model: {name}")
            parts["cuda_model"].append(engine_model.measure(name))
    return parts


def broken_promises(row: dict[str, Any]) -> Iterator[str]:
    for result in row["cpu_adamw"]:
        for (work, figure), least in PROMISED.items():
            if result["work"] == work and result[figure] < least:
                size = f"{result['elements'] / 1e6:.0f} M"
                yield f"cpu_adamw, {work}, {size} elements: {figure} is {result[figure]:.2f}, not at least {least}"


def print_tables(console: Console, row: dict[str, Any]) -> None:
    table = Table(title=f"AdamW on the CPU, {row['machine']['cpu']}, {row['machine']['cores']} cores")
    headings = ("work", "elements", "ms", "fastest peer, ms", "speedup", "GB/s", "triad, GB/s", "of triad")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "work" else "right")
    for result in row["cpu_adamw"]:
        peer, seconds = min(result["peer_seconds"].items(), key=lambda item: item[1])
        triad = result["triad_bytes_per_second"]
        table.add_row(
            result["work"],
            f"{result['elements'] / 1e6:.0f} M",
            f"{1e3 * result['seconds']:.2f}",
            f"{1e3 * seconds:.2f} ({peer})",
            f"{result['speedup_over_fastest_peer']:.2f}",
            f"{result['bytes_per_second'] / 1e9:.1f}",
            " / ".join(f"{triad[kind] / 1e9:.1f}" for kind in ("plain", "streaming")),
            f"{100 * result['triad_fraction']:.0f} %",
        )
    console.print(table)
    console.print("triad: with write-allocate / with streaming stores; the fraction is of the faster one")
    for part in CUDA_PARTS:
        if row[part] == NOT_MEASURED:
            console.print(f"{part}: {NOT_MEASURED}")
        else:
            console.print(part)
            for result in row[part] if isinstance(row[part], list) else [row[part]]:
                console.print(f"  {result}")


if __name__ == "__main__":
    main()
