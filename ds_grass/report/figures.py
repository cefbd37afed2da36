"""The figures of a report: one function each, from runs to a figure; a run is a column.

Contract: matplotlib draws without a display, without pyplot, and with its own defaults, whatever the user's
matplotlibrc says. A figure whose data no run has is left out. Text from a log is drawn as it is, never as
mathematics.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import offset_copy

from ds_grass.report.axes import (
    BLACK,
    BLUE,
    BYTES,
    GREEN,
    ORANGE,
    REFERENCE,
    RESTING,
    SECONDS,
    STYLE,
    are_thinned,
    block_ticks,
    columns,
    heat_maps,
    largest,
    legend_below,
    legend_beside,
    masked,
    of_periods,
    one_hot,
    positive_or_nan,
    unit_of,
)
from ds_grass.report.page import Picture
from ds_grass.report.run import Run

_TRAINED = LinearSegmentedColormap.from_list("trained", [RESTING, BLUE])


def draw_all(runs: Sequence[Run]) -> list[Picture]:
    """Every figure that the logs have data for, as PNGs."""
    pictures = []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        for plan in _PLANS:
            figure = plan.draw(runs)
            if figure is not None:
                image = io.BytesIO()
                figure.savefig(image, format="png")
                pictures.append(Picture(plan.name, plan.title, plan.caption, image.getvalue()))
    return pictures


def draw_blocks(runs: Sequence[Run]) -> Figure:
    """Which block trained when: blocks over steps."""
    maps = [of_periods(run, [one_hot(run, state.active) for state in run.states]) for run in runs]
    figure = heat_maps(
        runs, maps, Normalize(0, 1), _TRAINED, "share of steps trained" if are_thinned(runs) else None
    )
    for run, axes in zip(runs, figure.axes, strict=False):
        if any(other.skipped or other.resumed for other in runs):
            axes.set_title(axes.get_title(loc="left"), loc="left", pad=14)  # points; above the marks
        if run.skipped:
            _mark_above(axes, sorted(set(run.skipped)), f"skipped steps: {len(run.skipped)}", "v", ORANGE)
        if run.resumed:
            _mark_above(axes, run.resumed, "resumed", "D", BLACK)
    return figure


def _mark_above(axes: Axes, steps: Sequence[int], label: str, marker: str, color: str) -> None:
    """A mark at each step, 4 points above the axes, whatever their height."""
    above = offset_copy(axes.get_xaxis_transform(), axes.figure, y=4, units="points")
    look = {"color": color, "markersize": 4, "markeredgewidth": 0, "linestyle": ""}
    axes.plot(steps, [1.0] * len(steps), marker=marker, transform=above, clip_on=False, label=label, **look)
    spacing = {"borderpad": 0, "borderaxespad": 1.2, "handletextpad": 0.2, "columnspacing": 1.5}
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, **spacing)


def draw_importance(runs: Sequence[Run]) -> Figure | None:
    """Importance by block over steps, on a logarithmic scale of colours."""
    maps = [of_periods(run, [state.importance for state in run.states]) for run in runs]
    positive = np.concatenate([values[values > 0] for values in maps])
    if positive.size == 0:
        return None
    low, high = float(positive.min()), float(positive.max())
    if high < low * 1.02:  # one value, as before anything was measured
        low, high = low / 1.1, high * 1.1
    maps = [np.where(values <= 0, low, values) for values in maps]
    return heat_maps(runs, maps, LogNorm(low, high), "viridis", "RMS of the gradient (log scale)")


def draw_probabilities(runs: Sequence[Run]) -> Figure | None:
    """Probability of being drawn first, by block over steps."""
    maps = [of_periods(run, [state.probabilities for state in run.states]) for run in runs]
    known = np.concatenate([values[np.isfinite(values)] for values in maps])
    if known.size == 0:
        return None
    return heat_maps(
        runs, maps, PowerNorm(0.5, 0, float(known.max()) or 1.0), "cividis", "probability (square-root scale)"
    )


def draw_effective_blocks(runs: Sequence[Run]) -> Figure | None:
    """exp of the entropy of the probabilities, over steps."""
    if not any(math.isfinite(state.effective_blocks) for run in runs for state in run.states):
        return None
    figure, grid = columns(runs, height=2.4)
    for run, axes in zip(runs, grid[0], strict=True):
        values = masked(run, [state.effective_blocks for state in run.states])
        axes.stairs(values, run.edges, baseline=None, color=BLUE, linewidth=1.4, label="this run")
        axes.axhline(run.num_blocks, color=REFERENCE, linestyle="--", linewidth=1, label="uniform draw")
        axes.axhline(
            len(run.last.active), color=REFERENCE, linestyle=":", linewidth=1, label="active at once"
        )
        axes.set_ylim(0, max(other.num_blocks for other in runs) * 1.08)
    grid[0][0].set_ylabel("effective number\nof blocks")
    legend_below(figure, grid[0][0])
    return figure


def draw_visits(runs: Sequence[Run]) -> Figure:
    """How often each block was drawn."""
    figure, grid = columns(runs, height=2.4, over_steps=False)
    for run, axes in zip(runs, grid[0], strict=True):
        visits = run.last.visits
        axes.bar(range(run.num_blocks), visits, width=0.8, color=BLUE)
        axes.axhline(
            sum(visits) / run.num_blocks,
            color=REFERENCE,
            linestyle="--",
            linewidth=1,
            label="mean over blocks",
        )
        axes.set(xlabel="block", xlim=(-0.7, run.num_blocks - 0.3))
        axes.set_xticks(block_ticks(run.num_blocks, at_most=26 if len(runs) == 1 else 14))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    grid[0][0].set_ylabel("draws")
    grid[0][-1].legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderpad=0)
    return figure


def draw_memory(runs: Sequence[Run]) -> Figure | None:
    """Bytes of rank 0: optimizer states on the device and on the host, and what the start line planned."""
    kinds = [
        [("device_bytes", "states", BLUE), ("device_bytes_peak", "states, peak\nso far", GREEN)],
        [("host_bytes", "states", BLUE)],
    ]
    plans = [
        ("device_bytes", "planned, with\ngradients"),
        ("host_bytes", "planned, once all\nblocks were drawn"),
    ]
    if not any(
        name in state.costs for row in kinds for name, _, _ in row for run in runs for state in run.states
    ):
        return None
    figure, grid = columns(runs, height=4.0, rows=2)
    for place, row, (plan, plan_label), drawn in zip(("device", "host"), kinds, plans, grid, strict=True):
        rows = [
            [masked(run, [state.costs.get(name, math.nan) for state in run.states]) for name, _, _ in row]
            for run in runs
        ]
        planned = [positive_or_nan(run.facts.get(plan)) for run in runs]
        unit, size = unit_of(
            largest([*planned, *(value for one in rows for line in one for value in line)]), BYTES
        )
        for run, axes, lines, total in zip(runs, drawn, rows, planned, strict=True):
            for number, (values, (_, label, color)) in enumerate(zip(lines, row, strict=True)):
                style = {"linewidth": 1.4, "linestyle": "--"} if number else {"linewidth": 1.8}
                axes.stairs(values / size, run.edges, baseline=None, color=color, label=label, **style)
            if math.isfinite(total):
                axes.axhline(total / size, color=REFERENCE, linestyle=":", linewidth=1.2, label=plan_label)
        drawn[0].set_ylim(0, largest([axes.dataLim.y1 for axes in drawn]) * 1.1 or 1)
        drawn[0].set_ylabel(f"{place} ({unit})")
        legend_beside(drawn)
    return figure


def draw_transfers(runs: Sequence[Run]) -> Figure | None:
    """Bytes moved and seconds spent in each period between two draws."""
    moved = [("bytes_to_device", "to the device", BLUE), ("bytes_to_host", "to the host", ORANGE)]
    spent = [
        ("wait_seconds", "waiting for\ntransfers", BLUE),
        ("measuring_seconds", "measuring", GREEN),
        ("switching_seconds", "switching\nblocks", ORANGE),
        ("telemetry_seconds", "telling", BLACK),
    ]
    kinds = [("moved per period", BYTES, moved), ("time per period", SECONDS, spent)]
    if not any(
        math.isfinite(value)
        for _, _, row in kinds
        for name, _, _ in row
        for run in runs
        for value in run.cost_by_period(name)
    ):
        return None
    figure, grid = columns(runs, height=4.0, rows=2)
    for (what, units, row), drawn in zip(kinds, grid, strict=True):
        rows = [[np.array(run.cost_by_period(name), dtype=float) for name, _, _ in row] for run in runs]
        unit, size = unit_of(largest([value for one in rows for line in one for value in line]), units)
        for run, axes, lines in zip(runs, drawn, rows, strict=True):
            for number, (values, (_, label, color)) in enumerate(zip(lines, row, strict=True)):
                width = (
                    2.4 if number == 0 and len(run.states) < 100 else 1.2
                )  # seen also where the next covers it
                look = {"color": color, "linewidth": width, "label": label}
                if np.isfinite(values).any():
                    axes.stairs(values / size, run.edges[:-1], baseline=None, **look)
        drawn[0].set_ylim(0, largest([axes.dataLim.y1 for axes in drawn]) * 1.1 or 1)
        drawn[0].set_ylabel(f"{what} ({unit})")
        legend_beside(drawn)
    return figure


def draw_loss(runs: Sequence[Run]) -> Figure | None:
    """Loss over steps, where a log carries it."""
    if not any(run.losses for run in runs):
        return None
    figure, grid = columns(runs, height=2.6 if len(runs) == 1 else 2.9)
    for run, axes in zip(runs, grid[0], strict=True):
        for other in runs:  # in grey, to be compared with
            if other is not run and other.losses:
                axes.plot(*zip(*other.losses, strict=True), color=REFERENCE, linewidth=1, label="other run")
        if run.losses:
            look = {"color": BLUE, "linewidth": 1.4, "marker": "." if len(run.losses) < 60 else ""}
            axes.plot(*zip(*run.losses, strict=True), **look, label="this run", clip_on=False)
    grid[0][0].set_ylabel("training loss\n(mean, rank 0)")
    if len(runs) > 1:
        legend_below(figure, next(axes for axes, run in zip(grid[0], runs, strict=True) if run.losses))
    return figure


@dataclass(frozen=True)
class _Plan:
    name: str
    title: str
    caption: str
    draw: Callable[[Sequence[Run]], Figure | None]


_OPEN = " Hatched: the period of the newest line; its end is planned, not logged."
_PLANS = (
    _Plan(
        "blocks",
        "Blocks trained",
        "A block is coloured in the steps in which it trained; in a long run a column holds several periods, and its "
        "shade is the share of them. Grey: not known." + _OPEN,
        draw_blocks,
    ),
    _Plan(
        "loss",
        "Training loss",
        "What the first rank gave to backward, averaged over the steps since the point before; the first point is the "
        "average over the probe, in which nothing was updated.",
        draw_loss,
    ),
    _Plan(
        "importance",
        "Importance",
        "Root mean square of each block's gradient, averaged as the run does: what the next draw goes by. A block "
        "never measured counts as just above the largest." + _OPEN,
        draw_importance,
    ),
    _Plan(
        "probabilities",
        "Probabilities",
        "How likely each block was the first to be drawn. Of a draw without chance: 1 chosen, 0 not." + _OPEN,
        draw_probabilities,
    ),
    _Plan(
        "effective-blocks",
        "Effective number of blocks",
        "exp of the entropy of the probabilities: all blocks when the draw is uniform, 1 when always the same comes "
        "first.",
        draw_effective_blocks,
    ),
    _Plan("visits", "Visits", "Draws that chose each block, up to the newest line.", draw_visits),
    _Plan(
        "memory",
        "Memory of optimizer states",
        "Bytes on the device and the host of rank 0, as they were when each line was written; dotted, what the start "
        "line planned.",
        draw_memory,
    ),
    _Plan(
        "transfers",
        "Transfers and time",
        "Bytes that rank 0 moved, for checkpoints too, and seconds that its host spent, between each two draws. "
        "Work queued on a device is not waited for, and so not in the seconds.",
        draw_transfers,
    ),
)
