"""What the demo's runs left behind, read back: losses, bytes, blocks, and the checks that decide its exit code.

The weights are compared through what was saved, tensor by tensor and bit by bit, not through what the package says
of itself; only which blocks were drawn when is taken from grass.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Run:
    """One run of the training script."""

    title: str
    folder: Path
    seconds: float
    """Wall time of the whole job, start of the processes included."""
    train_seconds: float
    steps: int
    eval_steps: list[int]
    losses: list[float]
    """Held-out loss in nats a token, at `eval_steps`."""
    start: dict[str, Any] = field(default_factory=dict)
    """First line of grass.jsonl; empty without GRASS."""
    draws: list[dict[str, Any]] = field(default_factory=list)
    """Its lines of draws."""

    @property
    def draw_steps(self) -> list[int]:
        """The Trainer's step after which each draw was made; probing uses steps up too."""
        return [draw["probe_steps"] + draw["applied_steps"] for draw in self.draws]


@dataclass(frozen=True)
class Check:
    text: str
    passed: bool
    detail: str = ""


def read_run(title: str, folder: Path, seconds: float) -> Run:
    metrics = json.loads((folder / "metrics.json").read_text())
    evaluations = [entry for entry in metrics["log_history"] if "eval_loss" in entry]
    train_seconds = next(e["train_runtime"] for e in metrics["log_history"] if "train_runtime" in e)
    log = folder / "grass.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return Run(
        title=title,
        folder=folder,
        seconds=seconds,
        train_seconds=train_seconds,
        steps=metrics["steps"],
        eval_steps=[entry["step"] for entry in evaluations],
        losses=[entry["eval_loss"] for entry in evaluations],
        start=next((event for event in events if event["event"] == "start"), {}),
        draws=[event for event in events if event["event"] == "draw"],
    )


# -- bytes ----------------------------------------------------------------------------------------------------------


def device_bytes(run: Run) -> dict[str, tuple[int, int]]:
    """Bytes a rank for optimizer states and for gradients: (plain AdamW, GRASS).

    Plain AdamW by calculation, ZeRO-2 in fp32: two moments and a gradient for its share of every parameter; buffers
    are left out in its favour. GRASS: the most its state store ever held, from the log; gradients by calculation,
    its share of what trains at once and one whole unit in flight.
    """
    ranks, managed, active = run.start["num_ranks"], run.start["managed_params"], run.start["active_params"]
    states = max(draw["states"]["device_bytes_peak"] for draw in run.draws)
    num_blocks, active_blocks = run.start["num_blocks"], run.start["active_layers"]
    largest_unit = max(run.start["outer_params"], (managed - run.start["outer_params"]) // num_blocks)
    assert active_blocks < num_blocks
    return {
        "moments": (2 * FLOAT_BYTES * managed // ranks, states),
        "gradients": (FLOAT_BYTES * managed // ranks, FLOAT_BYTES * (active // ranks + largest_unit)),
    }


# -- checks ---------------------------------------------------------------------------------------------------------


def run_checks(grass: Run, outer: Run, pretrained: Path) -> list[Check]:
    before, after = load_file(pretrained / "model.safetensors"), load_file(grass.folder / "model.safetensors")
    blocks = grass.start["blocks"]
    drawn = sorted({block for draw in effective_draws(grass) for block in draw["active"]})
    never = [index for index in range(len(blocks)) if index not in drawn]
    still = [blocks[i] for i in drawn if not all(changed(before, after, blocks[i]))]
    moved = [blocks[i] for i in never if any(changed(before, after, blocks[i]))]
    gain = outer.losses[-1] - grass.losses[-1]
    return [
        Check("held-out loss: GRASS is better than the outer parameters only", gain > 0, f"by {gain:.3f}"),
        Check(f"each of the {len(drawn)} drawn blocks changed, in every tensor", not still, ", ".join(still)),
        Check(f"each of the {len(never)} others is as pre-trained, bit by bit", not moved, ", ".join(moved)),
        *interval_checks(grass, before),
    ]


def effective_draws(run: Run) -> list[dict[str, Any]]:
    """Draws that were trained: one made after the last step was not."""
    return [draw for draw, step in zip(run.draws, run.draw_steps, strict=True) if step < run.steps]


def interval_checks(grass: Run, pretrained: dict[str, torch.Tensor]) -> Iterator[Check]:
    """Between two saved checkpoints exactly the active blocks changed; while probing nothing did."""
    probe_steps = grass.start["planned_probe_steps"]
    wrong: list[str] = []
    probe_is_still, intervals = True, 0
    last_step, last = 0, pretrained
    for step, path in checkpoints(grass.folder):
        weights = load_file(path / "model.safetensors")
        if step <= probe_steps:
            probe_is_still &= not any(changed(last, weights, ""))
        else:
            intervals += 1
            wrong += wrong_blocks(grass, last_step, last, step, weights)
        last_step, last = step, weights
    yield Check("nothing changed while probing, bit by bit", probe_is_still, f"{probe_steps} steps")
    yield Check(
        f"in each of {intervals} spans between checkpoints only the active blocks changed",
        not wrong and intervals > 0,
        "; ".join(wrong[:4]),
    )


def wrong_blocks(
    grass: Run, first: int, before: dict[str, torch.Tensor], last: int, after: dict[str, torch.Tensor]
) -> list[str]:
    """Blocks that moved though frozen, or did not though active, in the steps first + 1 to last."""
    spans = zip(grass.draws, grass.draw_steps, [*grass.draw_steps[1:], grass.steps], strict=True)
    active = {block for draw, begin, end in spans if begin < last and end > first for block in draw["active"]}
    found = []
    for index, name in enumerate(grass.start["blocks"]):
        moved = changed(before, after, name)
        if any(moved) != (index in active):
            found.append(f"{name} {'moved' if any(moved) else 'did not move'} in steps {first + 1} to {last}")
    return found


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    return sorted((int(path.name.split("-")[1]), path) for path in folder.glob("checkpoint-*"))


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], block: str) -> list[bool]:
    """Per tensor of `block` ("" = of the whole model): whether any bit differs."""
    prefix = f"{block}." if block else ""
    return [
        not torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
        for name in before
        if name.startswith(prefix)
    ]


# -- printing -------------------------------------------------------------------------------------------------------


def print_losses(console: Console, runs: list[Run]) -> None:
    table = Table(
        title="Fine-tuning on code: equal tokens, learning rate chosen for each", title_justify="left"
    )
    for column in ("", "held-out loss before", "after", "best", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    for run in runs:
        values = (
            f"{run.losses[0]:.4f}",
            f"{run.losses[-1]:.4f}",
            f"{min(run.losses):.4f}",
            f"{run.train_seconds:.1f}",
        )
        table.add_row(run.title, *values)
    console.print(table)


def print_bytes(console: Console, grass: Run) -> None:
    table = Table(title="Bytes on the device of each rank", title_justify="left")
    for column in ("", "plain AdamW", "GRASS", "share"):
        table.add_column(column, justify="left" if not column else "right")
    rows = device_bytes(grass)
    rows["both"] = (sum(plain for plain, _ in rows.values()), sum(held for _, held in rows.values()))
    for name, (plain, held) in rows.items():
        table.add_row(name, f"{plain:,}", f"{held:,}", f"{held / plain:.0%}")
    console.print(table)
    host = grass.draws[-1]["states"]["host_bytes"]
    console.print(f"and {host:,} bytes on the host, where the states of resting blocks are kept\n")


def print_blocks(console: Console, grass: Run) -> None:
    table = Table(title="Which blocks trained", title_justify="left")
    for column in ("block", "draws", "steps", "importance", ""):
        table.add_column(column, justify="left" if not column else "right")
    draws = effective_draws(grass)
    steps = steps_per_block(grass)
    for index in range(grass.start["num_blocks"]):
        visits = sum(index in draw["active"] for draw in draws)
        importance = grass.draws[-1]["importance"][index]
        row = (
            str(index),
            str(visits),
            str(steps[index]),
            f"{importance:.2e}",
            "[green]" + "#" * (4 * visits),
        )
        table.add_row(*row)
    console.print(table)


def steps_per_block(grass: Run) -> list[int]:
    ends = [*grass.draw_steps[1:], grass.steps]
    steps = [0] * grass.start["num_blocks"]
    for draw, begin, end in zip(grass.draws, grass.draw_steps, ends, strict=True):
        for block in draw["active"]:
            steps[block] += end - begin
    return steps


def print_checks(console: Console, checks: list[Check]) -> None:
    for check in checks:
        mark = "[green]ok[/]    " if check.passed else "[red]FAILED[/]"
        console.print(f"{mark} {check.text}" + (f" ({check.detail})" if check.detail else ""))
