"""What the figures of a report share: style, a column of axes for each run, heat maps of blocks over steps.

Contract: periods are true to scale on the step axis; more of them than a picture has columns for are averaged, so
that no block is lost between two pixels. Unknown is grey. Two runs share their scales, and the block axis where they
have as many blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ds_grass.report.page import title
from ds_grass.report.run import Run

# From the palette of Okabe and Ito, told apart with any kind of colour blindness and in print.
BLUE, ORANGE, GREEN, BLACK = "#0072b2", "#d55e00", "#009e73", "#1b1f24"
RESTING, UNKNOWN, REFERENCE = "#edf0f3", "#b9bec5", "#8a8f98"
_MAX_COLUMNS = 700  # of a heat map; about two pixels each
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "text.parse_math": False,
    "savefig.dpi": 200,
}


def columns(
    runs: Sequence[Run], height: float, rows: int = 1, over_steps: bool = True, share_y: str = "row"
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of `height` inches with a column of axes for each run, which share scales; [row][run]."""
    figure = Figure(figsize=(7.2 if len(runs) == 1 else 10.8, height), layout="constrained")
    grid = figure.subplots(rows, len(runs), squeeze=False, sharex=over_steps, sharey=share_y).tolist()
    if len(runs) > 1:
        for index, axes in enumerate(grid[0]):
            axes.set_title(title(runs, index), loc="left", color=BLACK)
    if over_steps:
        for axes in (axes for row in grid for axes in row):
            axes.set_xlim(min(run.edges[0] for run in runs), max(run.edges[-1] for run in runs))
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 2.5, 5, 10]))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        for axes in grid[-1]:
            axes.set_xlabel("applied optimizer steps")
    return figure, grid


def heat_maps(
    runs: Sequence[Run],
    maps: Sequence[np.ndarray],
    norm: Normalize,
    colors: str | Colormap,
    label: str | None,
) -> Figure:
    """Blocks over steps, `maps[run]` (blocks, periods); `label` of the colour bar, None for none."""
    most = max(run.num_blocks for run in runs)
    alike = len({run.num_blocks for run in runs}) == 1
    figure, grid = columns(
        runs, height=min(max(1.2 + 0.13 * most, 2.4), 5.6), share_y="row" if alike else "none"
    )
    for run, values, axes in zip(runs, maps, grid[0], strict=True):
        edges, values = thinned(np.array(run.edges, dtype=float), values)
        rows = np.arange(run.num_blocks + 1) - 0.5
        axes.fill_between(edges[[0, -1]], -0.5, run.num_blocks - 0.5, color=UNKNOWN, linewidth=0, zorder=0)
        axes.pcolormesh(edges, rows, np.ma.masked_invalid(values), norm=norm, cmap=colors, zorder=1)
        if run.num_blocks <= 40:  # with more, lines would hide what they part
            axes.hlines(rows[1:-1], edges[0], edges[-1], color="white", linewidth=0.6, zorder=2)
        axes.fill_between(run.edges[-2:], -0.5, run.num_blocks - 0.5, facecolor="none", edgecolor="white",
                          hatch="////", linewidth=0, zorder=3)  # fmt: skip
        axes.set_ylim(-0.5, run.num_blocks - 0.5)
        axes.set_yticks(block_ticks(run.num_blocks, at_most=13))
    grid[0][0].set_ylabel("block")
    if label is not None:
        _color_bar(figure, grid[0], norm, colors, label)
    return figure


def _color_bar(figure: Figure, axes: list[Axes], norm: Normalize, colors: str | Colormap, label: str) -> None:
    bar = figure.colorbar(ScalarMappable(norm, colors), ax=axes, pad=0.015, aspect=28)
    bar.set_label(label)
    bar.outline.set_visible(False)
    if isinstance(norm, LogNorm) and norm.vmax < 30 * norm.vmin:  # hardly a power of ten within
        bar.set_ticks(np.geomspace(norm.vmin, norm.vmax, 5))
        digits = 2 if norm.vmax > 2 * norm.vmin else 4
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.{digits}g}"))
        bar.minorticks_off()


def legend_below(figure: Figure, axes: Axes) -> None:
    """One legend for the whole figure, in a line under it, of what `axes` labels."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=len(labels))


def legend_beside(row: Sequence[Axes]) -> None:
    """The legend of a row of axes, right of the last, of what any of them labels."""
    by_label = {}
    for axes in row:
        handles, labels = axes.get_legend_handles_labels()
        by_label |= dict(zip(labels, handles, strict=True))
    if by_label:
        row[-1].legend(by_label.values(), by_label.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5))


def block_ticks(num_blocks: int, at_most: int) -> range:
    """Numbers of blocks to write on an axis."""
    every = next(step for power in range(9) for step in (10**power, 2 * 10**power, 5 * 10**power)
                 if num_blocks <= step * at_most)  # fmt: skip
    return range(0, num_blocks, every)


# Units of an axis, largest first, with their sizes.
BYTES = (("TiB", 2.0**40), ("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10), ("B", 1.0))
SECONDS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def unit_of(value: float, units: Sequence[tuple[str, float]]) -> tuple[str, float]:
    """The unit, with its size, that writes `value` as a number of at least 1; of zero the middle one."""
    if value <= 0:
        return units[len(units) // 2]
    return next((unit for unit in units if value >= unit[1]), units[-1])


def largest(values: Sequence[float]) -> float:
    """The largest finite value, 0 where there is none."""
    return max((float(value) for value in values if math.isfinite(value)), default=0.0)


def positive_or_nan(value: object) -> float:
    """A positive integer of a log as a float, nan for all else."""
    fits = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63
    return float(value) if fits else math.nan


def one_hot(run: Run, blocks: Sequence[int]) -> list[float]:
    """(blocks,); 1 for those in `blocks`, 0 for the others."""
    return [float(block in blocks) for block in range(run.num_blocks)]


def of_periods(run: Run, by_state: Sequence[Sequence[float]]) -> np.ndarray:
    """(blocks, periods); nan where a state has no values, or the log does not hold the whole period."""
    values = np.full((run.num_blocks, len(run.states)), np.nan)
    for period, (column, known) in enumerate(zip(by_state, run.is_known, strict=True)):
        if known and column:
            values[:, period] = column
    return values


def masked(run: Run, by_state: Sequence[float]) -> np.ndarray:
    """(periods,); nan where the log does not hold the whole period."""
    return np.where(run.is_known, np.array(by_state, dtype=float), np.nan)


def are_thinned(runs: Sequence[Run]) -> bool:
    """Whether a column of a heat map holds several periods."""
    return any(len(run.states) > _MAX_COLUMNS for run in runs)


def thinned(edges: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most _MAX_COLUMNS columns: the mean over the known steps of each; nan where none is known."""
    if values.shape[1] <= _MAX_COLUMNS:
        return edges, values
    new_edges = np.linspace(edges[0], edges[-1], _MAX_COLUMNS + 1)
    sums = _by_column(edges, np.nan_to_num(values), new_edges)
    weights = _by_column(edges, np.isfinite(values).astype(float), new_edges)
    return new_edges, np.divide(sums, weights, out=np.full_like(sums, np.nan), where=weights > 1e-9)


def _by_column(edges: np.ndarray, values: np.ndarray, new_edges: np.ndarray) -> np.ndarray:
    """Integral of each row, constant between `edges`, over each column between `new_edges`."""
    totals = np.concatenate([np.zeros((len(values), 1)), np.cumsum(values * np.diff(edges), axis=1)], axis=1)
    return np.diff(np.array([np.interp(new_edges, edges, row) for row in totals]), axis=1)
