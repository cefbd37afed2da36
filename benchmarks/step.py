"""Cost of a training step: GRASS beside plain AdamW, a LISA callback and the badam package, in one run.

    python benchmarks/step.py --json benchmarks/results/step.jsonl
    python benchmarks/step.py --device cuda --hidden 2048 --blocks 16 --dtype bf16 --sequence 1024 --isolate

Seconds: contestants take turns step by step, so that a machine that slows down slows all of them; `--isolate`
gives each a process of its own where the device cannot hold all models. Median and 10th and 90th percentile over the
timed steps; warm-up, probing included, is not counted, draws and switches are. "measuring" is the mean time in norms,
importance and draws over the median step, "switching" that of exchanging the active set, "telling" that of the log
(a line each draw, in a temporary folder) and the loss. Bytes: a process of its own
for each, untimed, from before the model is built until every block was active: CUDA's own peak, or on a CPU the
tensors alive, seen by a counting allocator (`tests/audit.py`). "resting" are the bytes between two steps, weights left
out: states and whatever else stays. Host bytes are those of optimizer states. Single process.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import subprocess
import sys
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
OWN_KINDS = ("measuring_seconds", "switching_seconds", "telemetry_seconds")
KINDS = ("seconds", *OWN_KINDS)
PACKAGES = ("torch", "deepspeed", "transformers", "badam", "ds-grass")


def main() -> None:
    settings = parse_arguments()
    sys.path.insert(0, str(ROOT))
    prepare_process(settings)
    if settings.worker:
        print("RESULT", json.dumps(work(settings)), flush=True)
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    chosen = settings.only or contestants.names(settings)
    bytes_of = {name: ask_worker(name, settings, "bytes", console) for name in chosen}
    if settings.isolate:
        timings = {name: ask_worker(name, settings, "seconds", console) for name in chosen}
    else:
        with console.status("timing, contestants in turn"):
            timings = time_steps(chosen, settings)
    row = rows.new_row("step.py", sys.argv[1:], PACKAGES)
    hidden = {"worker", "only", "json", "isolate", "check"}
    row["settings"] = {key: value for key, value in vars(settings).items() if key not in hidden}
    row["results"] = [
        {"name": name, **summary(timings[name], timings.get("plain"), settings), **bytes_of[name]}
        for name in chosen
    ]
    print_tables(console, row)
    if settings.json:
        rows.append(settings.json, row)
    if settings.check and (missed := missed_claims(row)):
        sys.exit("\n".join(missed))


def missed_claims(row: dict[str, Any]) -> list[str]:
    """What is promised of GRASS on a CPU and did not hold in this run."""
    missed = []
    for result in row["results"]:
        if not result["name"].startswith("grass"):
            continue
        if result["ratio_to_plain"] is None or result["ratio_to_plain"] > 1.0:
            missed.append(
                f"{result['name']}: {result['ratio_to_plain']} of plain AdamW's step, not at most 1.0"
            )
        for kind, what, limit in (
            ("measuring", "measuring importance", 0.01),
            ("telemetry", "telling", 0.005),
        ):
            share = result[f"{kind}_share"]
            if share >= limit:
                missed.append(f"{result['name']}: {what} is {share:.2%} of a step, not under {limit:.1%}")
    return missed


def parse_arguments() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--blocks", type=int, default=12)
    add("--active", type=int, default=2, help="blocks that train at a time")
    add("--hidden", type=int, default=256)
    add("--vocabulary", type=int, default=2048)
    add("--sequence", type=int, default=128)
    add("--batch", type=int, default=4)
    add("--dtype", choices=sorted(contestants.DTYPES), default="fp32")
    add("--stage", type=int, choices=(0, 1, 2, 3), default=2, help="ZeRO stage of the engines")
    add("--period", type=int, default=10, help="steps between switches")
    add("--steps", type=int, default=40, help="timed steps of each")
    add("--warm-up", type=int, default=6, help="steps before, probing included")
    add("--checkpointing", action="store_true", help="recompute activations")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=1, help="of the CPU")
    add("--only", nargs="+", metavar="NAME", help="some of the contestants")
    add("--isolate", action="store_true", help="time each in a process of its own, one after the other")
    add("--json", metavar="FILE", help="append the row of this run")
    add(
        "--check",
        action="store_true",
        help="exit code 1 unless GRASS costs at most plain AdamW, measuring under 1%% and telling under 0.5%%",
    )
    add("--worker", choices=("bytes", "seconds"), help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.steps < 10 or settings.warm_up <= contestants.PROBE_STEPS:
        parser.error(f"it takes at least 10 timed steps and {contestants.PROBE_STEPS + 1} steps of warm-up")
    return settings


def prepare_process(settings: Namespace) -> None:
    """A group of one rank, quiet logs, few threads."""
    torch.set_num_threads(settings.threads)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("ds_grass").setLevel(logging.ERROR)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    if settings.device == "cuda":
        torch.cuda.set_device(0)


def batches(settings: Namespace, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (settings.batch, settings.sequence)
    drawn = [torch.randint(0, settings.vocabulary, shape, generator=generator) for _ in range(count)]
    return [batch.to(settings.device) for batch in drawn]


# -- seconds --------------------------------------------------------------------------------------------------------


def time_steps(chosen: list[str], settings: Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds of every timed step, and what parts of our own took of it, by contestant."""
    group = [contestants.build(name, settings) for name in chosen]
    data = batches(settings, settings.warm_up + settings.steps)
    for batch in data[: settings.warm_up]:
        for contestant in group:
            contestant.step(batch)
    timings: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in chosen}
    order = random.Random(0)
    for batch in data[settings.warm_up :]:
        for contestant in order.sample(group, len(group)):  # nobody always follows the same one's caches
            for kind, seconds in time_step(contestant, batch, settings).items():
                timings[contestant.name][kind].append(seconds)
    return timings


def time_step(
    contestant: contestants.Contestant, batch: torch.Tensor, settings: Namespace
) -> dict[str, float]:
    before = {kind: getattr(contestant, kind)() for kind in OWN_KINDS}
    synchronize(settings)
    begin = time.perf_counter()
    contestant.step(batch)
    synchronize(settings)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, **{kind: getattr(contestant, kind)() - before[kind] for kind in OWN_KINDS}}


def synchronize(settings: Namespace) -> None:
    """Everything queued on the device has run, so that a step's work is counted in that step."""
    if settings.device == "cuda":
        torch.cuda.synchronize()


def summary(timing: dict[str, Any], plain: dict[str, Any] | None, settings: Namespace) -> dict[str, Any]:
    median = statistics.median(timing["seconds"])
    deciles = statistics.quantiles(timing["seconds"], n=10, method="inclusive")
    return {
        "median_seconds": median,
        "p10_seconds": deciles[0],
        "p90_seconds": deciles[-1],
        "timed_steps": len(timing["seconds"]),
        "tokens_per_second": settings.batch * settings.sequence / median,
        "ratio_to_plain": median / statistics.median(plain["seconds"]) if plain else None,
        "measuring_share": statistics.fmean(timing["measuring_seconds"]) / median,
        "switching_share": statistics.fmean(timing["switching_seconds"]) / median,
        "telemetry_share": statistics.fmean(timing["telemetry_seconds"]) / median,
    }


# -- bytes ----------------------------------------------------------------------------------------------------------


def ask_worker(name: str, settings: Namespace, what: str, console: Console) -> dict[str, Any]:
    command = [sys.executable, *sys.argv, "--worker", what, "--only", name]
    with console.status(f"{what} of {name}"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise RuntimeError(f"measuring {what} of {name} failed:\n{done.stderr[-2000:]}")


def work(settings: Namespace) -> dict[str, Any]:
    (name,) = settings.only
    if settings.worker == "seconds":
        return time_steps([name], settings)[name]
    return measure_bytes(name, settings)


def measure_bytes(name: str, settings: Namespace) -> dict[str, int]:
    """Until every block was active: enough draws for that, one step after the other."""
    from tests import audit

    audit.start()
    before = audit.live_bytes()
    audit.reset_peak()
    settings = Namespace(**{**vars(settings), "period": 2})
    contestant = contestants.build(name, settings)
    num_steps = contestants.PROBE_STEPS + 2 * 3 * -(-settings.blocks // settings.active)
    data = batches(settings, 2)
    for index in range(num_steps):
        contestant.step(data[index % 2])
    weights = sum(p.numel() * p.element_size() for p in contestant.model.parameters())
    inputs = sum(batch.numel() * batch.element_size() for batch in data)
    return {
        "peak_device_bytes": audit.peak_bytes() - before,
        "resting_device_bytes": audit.live_bytes() - before - weights - inputs,
        "weight_bytes": weights,
        "host_bytes": contestant.host_bytes(),
    }


# -- output ---------------------------------------------------------------------------------------------------------


def print_tables(console: Console, row: dict[str, Any]) -> None:
    settings, machine = row["settings"], row["machine"]
    console.print(
        f"{settings['blocks']} blocks, {settings['active']} active, hidden {settings['hidden']}, "
        f"{settings['batch']} x {settings['sequence']} tokens, {settings['dtype']}, ZeRO-{settings['stage']}, "
        f"{machine['device'] or machine['cpu']}"
    )
    results = row["results"]
    seconds = table_of(
        "median",
        "p10",
        "p90",
        "of plain",
        "tokens/s",
        "measuring",
        "switching",
        "telling",
        title="Milliseconds a step",
    )
    for result in results:
        seconds.add_row(
            result["name"],
            *(f"{1000 * result[f'{key}_seconds']:.1f}" for key in ("median", "p10", "p90")),
            "" if result["ratio_to_plain"] is None else f"{result['ratio_to_plain']:.3f}",
            f"{result['tokens_per_second']:.0f}",
            *(
                f"{result[f'{kind}_share']:.2%}" if result[f"{kind}_share"] else ""
                for kind in ("measuring", "switching", "telemetry")
            ),
        )
    console.print(seconds)
    held = table_of("weights", "resting beside them", "peak", "host", title="MiB on the device")
    for result in results:
        kinds = ("weight", "resting_device", "peak_device", "host")
        held.add_row(result["name"], *(f"{result[f'{kind}_bytes'] / 2**20:.1f}" for kind in kinds))
    console.print(held)


def table_of(*columns: str, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


if __name__ == "__main__":
    main()
