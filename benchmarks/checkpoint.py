"""What an atomic, verified checkpoint costs: saving and loading, GRASS beside plain DeepSpeed AdamW.

    python benchmarks/checkpoint.py --json benchmarks/results/checkpoint.jsonl

Seconds: medians; a save ends when everything is on the disk (plain DeepSpeed does not sync, so a sync is added to its
time). "checksum" is the part of a save that SHA-256 took, "verify" that of a load. "host rise" is how far the resident
memory of the process rises above what it was, while saving. All blocks have been drawn. Single process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import contestants
import rows
import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "deepspeed", "transformers", "ds-grass")
COLUMNS = (
    "files_bytes",
    "save_seconds",
    "checksum_seconds",
    "load_seconds",
    "verify_seconds",
    "host_rise_bytes",
)


def main() -> None:
    settings = parse_arguments()
    sys.path.insert(0, str(ROOT))
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    results = [measure(name, settings) for name in ("plain", "grass")]
    row = rows.new_row("checkpoint.py", sys.argv[1:], PACKAGES)
    row["settings"] = {key: value for key, value in vars(settings).items() if key not in ("json", "folder")}
    row["results"] = results
    if settings.json:
        rows.append(settings.json, row)
    print_table(results)
    torch.distributed.destroy_process_group()


def parse_arguments() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--sequence", type=int, default=16)
    parser.add_argument("--dtype", choices=sorted(contestants.DTYPES), default="bf16")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where to save; default: a temporary one")
    parser.add_argument("--json", metavar="FILE", help="append the row of this run")
    return parser.parse_args()


def measure(name: str, settings: Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        engine = build(name, settings)
        train(engine, settings)
        saves, rises, loads = [], [], []
        for number in range(settings.repeats):
            os.sync()
            before = reset_peak_resident()
            saves.append(
                seconds_of(lambda number=number: (engine.save_checkpoint(folder, tag=str(number)), os.sync()))
            )
            rises.append(peak_resident() - before)
            loads.append(seconds_of(lambda number=number: engine.load_checkpoint(folder, tag=str(number))))
        files_bytes = sum(path.stat().st_size for path in Path(folder, "0").iterdir() if path.is_file())
        events = [json.loads(line) for line in log_lines()]
        checksums = [event["checksum_seconds"] for event in events if event["event"] == "saved"]
        verify = seconds_of(lambda: verify_all(Path(folder, "0"))) if name == "grass" else 0.0
        engine.destroy()
    return {
        "name": name,
        "files_bytes": files_bytes,
        "save_seconds": statistics.median(saves),
        "checksum_seconds": statistics.median(checksums) if checksums else 0.0,
        "load_seconds": statistics.median(loads),
        "verify_seconds": verify,
        "host_rise_bytes": int(statistics.median(rises)),
    }


def build(name: str, settings: Namespace) -> Any:
    import deepspeed

    import ds_grass  # noqa: F401  hooks DeepSpeed where the package is not installed

    model = contestants.make_model(Namespace(**vars(settings), device="cpu", checkpointing=False))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": settings.stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "steps_per_print": 10**9,
    }
    if settings.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if name == "grass":
        config["grass"] = {"policy": "cyclic", "active_layers": settings.blocks, "log": {"path": log_path()}}
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def log_path() -> str:
    return str(Path(tempfile.gettempdir()) / f"grass-checkpoint-benchmark-{os.getpid()}.jsonl")


def log_lines() -> list[str]:
    path = Path(log_path())
    return path.read_text().splitlines() if path.exists() else []


def verify_all(folder: Path) -> None:
    from ds_grass import manifest

    for name, record in manifest.read(folder).files.items():
        manifest.verify_file(folder, name, record)


def train(engine: Any, settings: Namespace) -> None:
    for _ in range(2):
        tokens = torch.randint(0, settings.vocabulary, (1, settings.sequence))
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()


def seconds_of(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def reset_peak_resident() -> int:
    """Bytes resident now; the kernel's peak begins again."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_resident() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def print_table(results: list[dict[str, Any]]) -> None:
    table = Table("", *(column.replace("_", " ") for column in COLUMNS))
    for result in results:
        cells = [
            f"{result[column] / 1e6:.0f} MB" if column.endswith("bytes") else f"{result[column]:.2f}"
            for column in COLUMNS
        ]
        table.add_row(result["name"], *cells)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


if __name__ == "__main__":
    main()
