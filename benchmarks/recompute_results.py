"""What is made of the stages that `recompute.py` ran: composed step times, the row, tables and the picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_ext.recompute.emulator import Emulated
from megatron_ext.recompute.plan import NONE, ChunkPlan
from megatron_ext.recompute.schedule import Pipeline
from megatron_ext.recompute.timeline import StageTimes, compose

AWARE = "stage-aware"
GOAL_ERROR, GOAL_GAIN = 0.03, 1.15


@dataclass(frozen=True)
class Result:
    """One stage under one plan."""

    plan: ChunkPlan
    predicted_bytes: int
    ran: Emulated

    @property
    def error(self) -> float:
        """Of the prediction, of what is on top of weights and gradients."""
        static = self.ran.static_bytes
        return (self.predicted_bytes - static) / (self.ran.peak_bytes - static) - 1


Results = dict[str, list[Result]]
"""By plan; one for each stage."""


def medians(ran: Sequence[Emulated]) -> Emulated:
    """The largest peak, and the median of each time."""
    rows = [each.times[0] for each in ran]
    again = [row.recompute if isinstance(row.recompute, tuple) else (row.recompute,) for row in rows]
    recompute = tuple(median(each) for each in zip(*again, strict=True))
    times = StageTimes(
        median(row.forward for row in rows),
        median(row.backward for row in rows),
        recompute if len(recompute) > 1 else recompute[0],
    )
    worst = max(ran, key=lambda each: each.peak_bytes - each.static_bytes)
    return replace(worst, times=(times,))


def composed(results: Results, limit: int, micro_batches: int) -> dict[str, Any]:
    """Seconds of a step under each plan, and the gain over the best uniform count that fits."""
    pipeline = Pipeline(len(results[AWARE]), micro_batches)
    seconds = {
        name: compose(pipeline, [result.ran.times for result in row]).seconds for name, row in results.items()
    }
    fitting = [
        name
        for name, row in results.items()
        if name != AWARE and max(r.predicted_bytes for r in row) <= limit
    ]
    full = f"N = {len(results[AWARE][0].plan.layers)}"
    best = min(fitting, key=seconds.__getitem__)
    return {
        "micro_batches": micro_batches,
        "composed_seconds": seconds,
        "best_uniform": best,
        "gain": seconds[best] / seconds[AWARE],
        "gain_over_full": seconds[full] / seconds[AWARE] if full in seconds else None,
    }


def described(result: Result) -> dict[str, Any]:
    (times,) = result.ran.times
    return {
        "layers": list(result.plan.layers),
        "share": None if result.plan.share is None else asdict(result.plan.share),
        "static_bytes": result.ran.static_bytes,
        "predicted_bytes": result.predicted_bytes,
        "measured_bytes": result.ran.peak_bytes,
        "error": result.error,
        "forward_seconds": times.forward,
        "backward_seconds": times.backward,
        "recompute_seconds": times.recompute,
    }


def show(console: Console, results: Results, steps: Sequence[dict[str, Any]], limit: int) -> None:
    table = Table(title=f"one stage at a time; limit {limit / 1e6:,.1f} MB")
    for column in (
        "plan",
        "stage",
        "recomputed",
        "predicted MB",
        "measured MB",
        "error %",
        "F ms",
        "B ms",
        "R ms",
    ):
        table.add_column(column, justify="left" if column in ("plan", "recomputed") else "right")
    for name, row in results.items():
        for stage, result in enumerate(row):
            (times,) = result.ran.times
            again = times.recompute if isinstance(times.recompute, tuple) else (times.recompute,)
            table.add_row(
                name if stage == 0 else "",
                str(stage),
                told(result.plan),
                f"{result.predicted_bytes / 1e6:,.1f}",
                f"{result.ran.peak_bytes / 1e6:,.1f}",
                f"{100 * result.error:+.2f}",
                *(
                    f"{1e3 * seconds:.1f}"
                    for seconds in (times.forward, times.backward, sum(again) / len(again))
                ),
                end_section=stage == len(row) - 1,
            )
    console.print(table)
    worst = max(abs(result.error) for row in results.values() for result in row)
    console.print(
        f"largest error {100 * worst:.2f} % of what is on top of weights and gradients; goal {100 * GOAL_ERROR:.0f} %"
    )
    table = Table(title="composed step times, not measured end to end")
    for column in (
        "micro-batches",
        "best uniform that fits",
        "composed s",
        "stage-aware s",
        "gain",
        "goal",
        "over full",
    ):
        table.add_column(column, justify="right")
    for step in steps:
        seconds, full = step["composed_seconds"], step["gain_over_full"]
        table.add_row(
            str(step["micro_batches"]),
            step["best_uniform"],
            f"{seconds[step['best_uniform']]:.4f}",
            f"{seconds[AWARE]:.4f}",
            f"{step['gain']:.3f}x",
            f"{GOAL_GAIN:.2f}x",
            "" if full is None else f"{full:.3f}x",
        )
    console.print(table)


def told(plan: ChunkPlan) -> str:
    """Choices with their counts, and the layer that changes."""
    counted = Counter(choice for choice in plan.layers if choice != NONE)
    words = [f"{count} {choice}" for choice, count in counted.items()]
    if plan.share is not None:
        words.append(f"{plan.share.micro_batches}/{plan.share.window} {plan.share.choice}")
    return " + ".join(words) or "nothing"


def draw(results: Results, before: str, limit: int, path: Path) -> None:
    """Bars of each stage: weights and gradients, and on top what the plan holds; dashes: predicted."""
    import matplotlib
    from matplotlib.figure import Figure

    from ds_grass.report.axes import BLACK, BLUE, ORANGE, REFERENCE, STYLE

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.subplots()
        for shift, name, color in ((-0.2, before, ORANGE), (0.2, AWARE, BLUE)):
            for stage, result in enumerate(results[name]):
                static, peak = result.ran.static_bytes / 1e6, result.ran.peak_bytes / 1e6
                place, first = stage + shift, stage == 0
                axes.bar(place, static, 0.36, color=REFERENCE, alpha=0.5,
                         label="weights and gradients" if first and shift < 0 else None)  # fmt: skip
                axes.bar(
                    place, peak - static, 0.36, bottom=static, color=color, label=name if first else None
                )
                axes.plot([place - 0.18, place + 0.18], [result.predicted_bytes / 1e6] * 2, color=BLACK, linewidth=1.2,
                          linestyle=":", label="predicted" if first and shift < 0 else None)  # fmt: skip
                axes.annotate(
                    told(result.plan), (place, static / 2), rotation=90, ha="center", va="center", fontsize=6
                )
        axes.axhline(limit / 1e6, color=BLACK, linestyle="--", linewidth=1, label="limit")
        most = max(limit, *(result.ran.peak_bytes for name in (before, AWARE) for result in results[name]))
        axes.set(
            xticks=range(len(results[AWARE])),
            xlabel="pipeline stage, each run by itself",
            ylim=(0, 1.1 * most / 1e6),
        )
        axes.set(ylabel="peak (MB)")
        figure.legend(loc="outside lower center", ncols=5, handlelength=1.4)
        figure.savefig(path, format="png")
