"""What the command prints for people: a planned crossover, what a run did, and what its stages recompute.

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
from megatron_ext.recompute_report import Stages, error_of, in_words, layer_counts
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
    """Print the rows, and the stages, as tables."""
    if run.rows:
        _show_rows(run, console)
    if run.stages is not None:
        show_stages(run.stages, console)
    if run.broken_lines:
        console.print(f"{run.broken_lines} lines of {escape(str(run.path))} could not be used")


def show_stages(stages: Stages, console: Console) -> None:
    """Print what each pipeline stage recomputes, and its memory."""
    pipeline = stages.pipeline
    schedule = "1F1B" if pipeline.chunks == 1 else f"{pipeline.chunks} chunks a stage, interleaved"
    console.print(
        f"[bold]recomputation by stage[/]: policy {escape(stages.plans[0].policy)}, {pipeline.stages} stages, "
        f"{pipeline.micro_batches} micro-batches a step, {schedule}"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for name in ("stage", "layers", "open", "predicted", "measured", "error", "limit", "of the step"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("recomputed")
    for plan, share in zip(stages.plans, stages.recompute_shares or [None] * pipeline.stages, strict=True):
        (recomputed, layers), error = layer_counts(plan), error_of(plan)
        most = max(plan.predicted_bytes or 0, plan.measured_bytes or 0)
        table.add_row(
            str(plan.stage),
            f"{recomputed:.3g} of {layers}",
            " + ".join(map(str, plan.open)),
            _known(plan.predicted_bytes, gigabytes),
            _known(plan.measured_bytes, gigabytes),
            _known(error, "{:+.1%}".format),
            gigabytes(plan.limit_bytes) + (" [bold red]exceeded[/]" if most > plan.limit_bytes else ""),
            _known(share, "{:.1%}".format),
            escape(in_words(plan)),
        )
    console.print(table)
    console.print(
        "[dim]layers: recomputed in full or in part, of all; open: micro-batches whose activations are held, by chunk; "
        "bytes at the peak; error: of the prediction for what the device counts (on a CPU without what is held for a "
        "moment); of the step: seconds of recomputation[/]"
    )
    if stages.timeline is not None and stages.all_recomputed_timeline is not None:
        console.print(
            f"step, composed from the stages' own times: {_seconds(stages.timeline.seconds)}; with every layer "
            f"recomputed {_seconds(stages.all_recomputed_timeline.seconds)}"
        )
    if stages.advice is not None:
        console.print(
            f"faster with layers on other stages, predicted: {_seconds(stages.advice.seconds)} "
            f"({stages.advice.gain:.2f} times as fast) with pipeline_model_parallel_layout {stages.advice.layout}",
            soft_wrap=True,
        )
    unverified = [str(plan.stage) for plan in stages.plans if not plan.frozen]
    if unverified:
        console.print(f"[yellow]not verified yet[/]: stage {', '.join(unverified)}")


def _show_rows(run: Run, console: Console) -> None:
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
        "[dim]micro-batches of the rank that told; medians; seconds of its layers, bytes at the peak of its device[/]"
    )


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


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 10 else _milliseconds(seconds)


def _known(value: Any, text: Any) -> str:
    return "-" if value is None else text(value)


def _beside(measured: Any, predicted: float, text: Any) -> str:
    """The measured value, and how far it is from what was predicted."""
    if measured is None:
        return "-"
    return f"{text(measured)} ({(measured - predicted) / predicted:+.0%})" if predicted else text(measured)
