"""The crossover chart: what each strategy is predicted to take over the length, the plan that follows, and the limit;
and what a run measured beside what was predicted.

Contract: drawn without a display and with matplotlib's own defaults, whatever the user's matplotlibrc says; a strategy
has the same colour in every picture, told apart with any kind of colour blindness. What is predicted says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ds_grass.report.axes import BLACK, BLUE, GREEN, ORANGE, REFERENCE, RESTING, STYLE
from megatron_ext.plan import Crossover, Point, title
from megatron_ext.recompute_pictures import draw_stages
from megatron_ext.report import Row, Run
from megatron_ext.sequence_parallel.names import STRATEGIES

COLORS = dict(zip(STRATEGIES, (BLACK, BLUE, "#56b4e9", GREEN, ORANGE), strict=True))
_OTHER = "#cc79a7"


def draw_crossover(crossover: Crossover, path: Path) -> list[Path]:
    """Write the chart as PNG; which files were written. OSError when `path` cannot be."""
    _draw(path, 6.6, (2.4, 1.0, 1.8), lambda axes: _fill_crossover(axes, crossover))
    return [path]


def draw_run(run: Run, path: Path) -> list[Path]:
    """Write what ran, measured and predicted, as PNG, and what the stages recompute beside it
    (:func:`.recompute_pictures.draw_stages`); which files were written. OSError when one cannot be."""
    written = []
    if run.rows:
        _draw(path, 6.0, (1.8, 1.8, 1.0), lambda axes: _fill_run(axes, run))
        written.append(path)
    return written if run.stages is None else [*written, *draw_stages(run.stages, path)]


def _draw(path: Path, height: float, ratios: Sequence[float], fill: Callable[[list[Axes]], None]) -> None:
    """Three axes over one another that share the length."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(7.2, height), layout="constrained")
        axes = figure.subplots(3, 1, sharex=True, height_ratios=ratios).tolist()
        fill(axes)
        handles: dict[str, object] = {}
        for each in axes:
            handles |= dict(zip(*reversed(each.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, handlelength=1.4)
        figure.savefig(path, format="png")


# -- planned ----------------------------------------------------------------------------------------------------------


def _fill_crossover(axes: list[Axes], crossover: Crossover) -> None:
    times, shares, memory = axes
    times.set_title(title(crossover), loc="left", color=BLACK)
    _draw_times(times, crossover)
    _draw_shares(shares, crossover)
    _draw_memory(memory, crossover)
    _length_axis(memory, [point.length for point in crossover.curve])


def _draw_times(axes: Axes, crossover: Crossover) -> None:
    """Time for each token, so that lines cross where the fastest changes; dashed where all layers alike do not fit."""
    job = crossover.job
    for name in job.strategies:
        points = [point for point in crossover.curve if name in point.costs]
        lengths = np.array([point.length for point in points])
        each_token = np.array([point.costs[name].seconds for point in points]) / (lengths * job.micro_batch)
        over = np.array([point.peaks[name] > job.limit_bytes for point in points])
        line = dict(color=COLORS[name], linewidth=1.6)
        axes.plot(lengths, np.where(over, np.nan, each_token) * 1e6, label=name, **line)
        axes.plot(
            lengths, np.where(over, each_token, np.nan) * 1e6, **{**line, "linewidth": 0.8}, linestyle=":"
        )
    planned = [point for point in crossover.curve if point.plan is not None and point.plan.fits]
    axes.plot(
        [point.length for point in planned],
        [1e6 * point.plan.seconds / job.num_layers / (point.length * job.micro_batch) for point in planned],
        color=REFERENCE,
        alpha=0.35,
        linewidth=6,
        zorder=1,
        solid_capstyle="butt",
        label="the plan",
    )
    axes.set(ylabel="predicted time of a layer\n(us a token; dotted: does not fit)")
    _log_axis(axes)


def _draw_shares(axes: Axes, crossover: Crossover) -> None:
    lengths = [point.length for point in crossover.curve]
    shares = np.array([_shares(point, crossover.job.strategies) for point in crossover.curve]).T
    bottom = np.zeros(len(lengths))
    for name, share in zip(crossover.job.strategies, shares, strict=True):
        axes.fill_between(lengths, bottom, bottom + share, color=COLORS[name], linewidth=0, step="mid")
        bottom = bottom + share
    axes.fill_between(lengths, bottom, 1, color=RESTING, linewidth=0, step="mid")
    fits = [point.length for point in crossover.curve if point.plan is not None and point.plan.fits]
    if fits and fits[-1] < lengths[-1]:
        middle = (fits[-1] * lengths[-1]) ** 0.5
        axes.annotate("nothing fits", (middle, 0.5), ha="center", va="center", fontsize=8)
    axes.set(ylim=(0, 1), ylabel="share of layers\nin the plan")


def _shares(point: Point, names: Sequence[str]) -> list[float]:
    if point.plan is None or not point.plan.fits:
        return [0.0] * len(names)
    return [point.plan.names.count(name) / len(point.plan.names) for name in names]


def _draw_memory(axes: Axes, crossover: Crossover) -> None:
    job = crossover.job
    for index, name in enumerate(job.strategies):  # ever thinner: some take the same and lie on one another
        points = [point for point in crossover.curve if name in point.peaks]
        axes.plot(
            [point.length for point in points],
            [point.peaks[name] / 1e9 for point in points],
            color=COLORS[name],
            linewidth=1.2 + 0.6 * (len(job.strategies) - 1 - index),
        )
    planned = [point for point in crossover.curve if point.plan is not None]
    axes.plot(
        [point.length for point in planned],
        [(job.state_bytes + point.plan.peak_bytes) / 1e9 for point in planned],
        color=REFERENCE,
        alpha=0.35,
        linewidth=6,
        zorder=1,
        solid_capstyle="butt",
    )
    limit = job.limit_bytes / 1e9
    axes.axhline(limit, color=BLACK, linestyle="--", linewidth=1)
    axes.annotate(f"limit {limit:.1f} GB", (crossover.curve[0].length, limit), xytext=(2, 3),
                  textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set(ylim=(0, 1.35 * limit), ylabel="predicted peak\nof a rank (GB)")


# -- run --------------------------------------------------------------------------------------------------------------


def _fill_run(axes: list[Axes], run: Run) -> None:
    times, memory, counts = axes
    times.set_title(
        f"{run.path.name}: measured (dots, medians) beside predicted (rings)", loc="left", color=BLACK
    )
    _draw_pairs(times, run, lambda row: (row.predicted_seconds, row.measured_seconds), 1e3)
    times.set(ylabel="a rank's layers,\none micro-batch (ms)")
    _log_axis(times)
    _draw_pairs(memory, run, lambda row: (row.predicted_bytes, row.measured_bytes), 1e-9)
    limit = run.facts.get("limit_bytes")
    if isinstance(limit, int) and 0 < limit < 2**63:
        memory.axhline(limit / 1e9, color=BLACK, linestyle="--", linewidth=1)
    memory.set(ylim=(0, None), ylabel="peak of a rank (GB)")
    for name in dict.fromkeys(_main(row) for row in run.rows):
        rows = [row for row in run.rows if _main(row) == name]
        counts.vlines([row.length for row in rows], 0, [row.micro_batches for row in rows], color=_color(name),
                      linewidth=2)  # fmt: skip
    counts.set(ylim=(0, None), ylabel="micro-batches")
    _length_axis(counts, [row.length for row in run.rows], margin=1.15)


def _draw_pairs(
    axes: Axes, run: Run, values: Callable[[Row], tuple[float, float | None]], scale: float
) -> None:
    """A ring for what was predicted, a dot for what was measured, in the colour of the strategy of most layers."""
    for name in dict.fromkeys(_main(row) for row in run.rows):
        rows = [row for row in run.rows if _main(row) == name]
        lengths, pairs = [row.length for row in rows], [values(row) for row in rows]
        axes.plot(lengths, [scale * predicted for predicted, _ in pairs], "o", color=_color(name), markersize=6,
                  fillstyle="none")  # fmt: skip
        measured = [np.nan if value is None else scale * value for _, value in pairs]
        axes.plot(lengths, measured, "o", color=_color(name), markersize=3, label=f"mostly {name}")


def _main(row: Row) -> str:
    return max(row.layers, key=lambda name: row.layers[name], default="unknown")


def _color(name: str) -> str:
    return COLORS.get(name, _OTHER)


def _length_axis(axes: Axes, lengths: Sequence[int], margin: float = 1.0) -> None:
    """Powers of two; the axis goes on beyond both ends by the factor `margin`."""
    axes.set_xscale("log", base=2)
    first, last = min(lengths), max(lengths)
    margin = margin if first < last else 2.0
    axes.set_xlim(first / margin, last * margin)
    axes.xaxis.set_major_locator(FixedLocator([2**power for power in range(40)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(round(value))))
    axes.set_xlabel("length of the sequence (tokens)")


def _log_axis(axes: Axes) -> None:
    """Plain numbers, also at 2 and 5 where there are few powers of ten."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    digits = (2, 5) if high < 300 * low else ()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(
        FuncFormatter(lambda value, _: f"{value:g}" if _leading(value) in digits else "")
    )


def _short(length: int) -> str:
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if length >= size and length % size == 0:
            return f"{length // size}{unit}"
    return str(length)


def _leading(value: float) -> int:
    """The first digit."""
    return int(f"{value:e}"[0])
