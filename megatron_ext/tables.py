"""What the command prints for people: a planned crossover, and what a run did.

Contract: one function for each, which writes to a rich console and nowhere else. Sizes are in GB of 10^9 bytes, lengths
in tokens, K = 1024.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ds_grass.telemetry.human import gigabytes
from megatron_ext.described_job import Job
from megatron_ext.plan import Crossover, Point, title
from megatron_ext.report import Run
from megatron_ext.telemetry import runs_of


def show_crossover(crossover: Crossover, console: Console) -> None:
    """Print the lengths that were asked for, and where the plan changes."""
    job = crossover.job
    console.print(f"[bold]{title(crossover)}[/]")
    console.print(
        f"a rank holds {gigabytes(job.state_bytes)} of weights, gradients and optimizer (data parallel "
        f"{job.data_parallel}), and may hold {gigabytes(job.limit_bytes)}; times from {crossover.source}"
    )
    for name, reason in job.refused.items():
        console.print(f"[yellow]without {name}[/]: {reason}")
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("length", justify="right", no_wrap=True)
    for name in job.strategies:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("plan, all layers", justify="right", no_wrap=True)
    table.add_column("peak", justify="right", no_wrap=True)
    table.add_column("layers")
    for point in crossover.points:
        table.add_row(*_cells(job, point))
    console.print(
        "\npredicted milliseconds of one layer, forward and backward ([red]x[/]: all layers alike do not fit)"
    )
    console.print(table)
    console.print("\nwhat the plan is made of")
    for first, last, made_of in crossover.stretches:
        console.print(f"  {_tokens(first):>8} to {_tokens(last):>8}  {made_of}", highlight=False)
    fitting = ", ".join(f"{name} {_tokens(length)}" for name, length in crossover.longest.items())
    console.print(f"\nlongest that fits (tokens): {fitting}")


def show_run(run: Run, console: Console) -> None:
    """Print the rows as a table."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for name in ("length", "batch", "ran", "predicted", "measured", "predicted", "measured"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("layers")
    for row in run.rows:
        table.add_row(
            f"{row.length:,}",
            str(row.batch),
            f"{row.micro_batches:,}",
            _milliseconds(row.predicted_seconds),
            _beside(row.measured_seconds, row.predicted_seconds, _milliseconds),
            gigabytes(row.predicted_bytes) + ("" if row.fits else " [bold red]over the limit[/]"),
            _beside(row.measured_bytes, row.predicted_bytes, gigabytes),
            escape(row.plan),
        )
    console.print(table)
    console.print(
        "[dim]micro-batches of rank 0; medians; seconds of its layers, bytes at the peak of its device[/]"
    )
    if run.broken_lines:
        console.print(f"{run.broken_lines} lines of {escape(str(run.path))} could not be used")


def _cells(job: Job, point: Point) -> list[str]:
    cells = [_tokens(point.length)]
    for name in job.strategies:
        cost = point.costs.get(name)
        over = name in point.peaks and point.peaks[name] > job.limit_bytes
        cells.append("-" if cost is None else f"{1e3 * cost.seconds:,.2f}" + ("[red]x[/]" if over else ""))
    if point.plan is None:
        return [*cells, "-", "-", point.reason]
    peak = gigabytes(job.state_bytes + point.plan.peak_bytes)
    over = "" if point.plan.fits else " [bold red]does not fit[/]"
    return [*cells, f"{1e3 * point.plan.seconds:,.1f} ms", peak, runs_of(point.plan.names) + over]


def _tokens(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"


def _beside(measured: Any, predicted: float, text: Any) -> str:
    """The measured value, and how far it is from what was predicted."""
    if measured is None:
        return "-"
    return f"{text(measured)} ({(measured - predicted) / predicted:+.0%})" if predicted else text(measured)
