"""A plan as one picture: the device's memory through a training step, and at the peak of other settings.

Contract: drawn without a display and with matplotlib's own defaults, whatever the user's matplotlibrc says; colours are
told apart with any kind of colour blindness. The step is drawn over the tensors it makes and frees, not over time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ds_grass.plan import Plan
from ds_grass.plan.ledger import KINDS, Moment
from ds_grass.report.axes import BLACK, REFERENCE, STYLE
from ds_grass.telemetry.human import human_count

_COLORS = ("#0072b2", "#56b4e9", "#cc79a7", "#009e73", "#f0e442", "#e69f00")
_BEHIND = {
    "facecolor": "white",
    "edgecolor": "none",
    "pad": 0.6,
}  # a number stays readable on the limit's line
_MAX_COLUMNS = 500


def draw(plan: Plan, path: Path) -> None:
    """Write the picture as PNG. OSError when `path` cannot be written."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        rows = len(plan.alternatives) + 2
        figure = Figure(figsize=(7.2, 3.1 + 0.22 * rows), layout="constrained")
        step, settings = figure.subplots(2, 1, height_ratios=[2.6, 0.22 * rows])
        _draw_step(step, plan)
        _draw_settings(settings, plan)
        handles, labels = step.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, handlelength=1.2)
        figure.savefig(path, format="png")


def _draw_step(axes: Axes, plan: Plan) -> None:
    phases, columns = _columns(plan.history)
    values = np.array([moment.held for moment in columns], dtype=float).T / 1e9
    x = np.arange(len(columns) + 1) / len(columns)
    base = np.zeros(len(columns))
    for kind, color, row in zip(KINDS, _COLORS, values, strict=True):
        if row.max() > 0:
            axes.stairs(base + row, x, baseline=base, fill=True, color=color, linewidth=0, label=kind)
        base = base + row
    top = int(base.argmax())
    moment = columns[top]
    axes.annotate(
        f"{base[top]:.1f} GB in {moment.phase}, {moment.place}",
        ((top + 0.5) / len(columns), base[top]),
        xytext=(0, 6),
        textcoords="offset points",
        ha="left" if top < 0.35 * len(columns) else "right" if top > 0.65 * len(columns) else "center",
        color=BLACK,
    )
    limit = (plan.limits.device or 0) / 1e9
    if limit:
        axes.axhline(limit, color=BLACK, linestyle="--", linewidth=1)
    axes.set(ylim=(0, 1.15 * max(base[top], limit)), xlim=(0, 1), ylabel="memory of one rank (GB)")
    axes.set_title(f"One training step of {_job(plan)}", loc="left", color=BLACK)
    axes.set_xticks(
        [(start + stop) / 2 / len(columns) for _, start, stop in phases], [name for name, _, _ in phases]
    )
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("as tensors are made and freed")
    for _, start, _ in phases[1:]:
        axes.axvline(start / len(columns), color=REFERENCE, linewidth=0.6)


def _draw_settings(axes: Axes, plan: Plan) -> None:
    named = [
        ("as given", plan.base),
        *((a.change, a.budget) for a in plan.alternatives),
        ("the floor", plan.floor),
    ]
    for kind, color in zip(KINDS, _COLORS, strict=True):
        lengths = [budget.peak.of(kind) / 1e9 for _, budget in named]
        below = [
            sum(budget.peak.of(other) for other in KINDS[: KINDS.index(kind)]) / 1e9 for _, budget in named
        ]
        axes.barh(range(len(named)), lengths, left=below, color=color, height=0.72)
    for row, (_, budget) in enumerate(named):
        total = budget.peak.total_bytes / 1e9
        axes.annotate(
            f"{total:.1f}",
            (total, row),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox=_BEHIND,
        )
    limit = (plan.limits.device or 0) / 1e9
    if limit:
        axes.axvline(limit, color=BLACK, linestyle="--", linewidth=1, zorder=1.5)
        axes.annotate(f"{limit:.0f} GB of device memory", (limit, -0.6), xytext=(3, 2), textcoords="offset points",
                      ha="left", fontsize=8)  # fmt: skip
    most = max(budget.peak.total_bytes for _, budget in named) / 1e9
    axes.set(
        xlim=(0, 1.1 * max(most, limit)),
        ylim=(len(named) - 0.4, -0.6),
        xlabel="memory of one rank at the peak (GB)",
    )
    axes.set_yticks(range(len(named)), [name for name, _ in named])
    axes.tick_params(axis="y", length=0)
    axes.set_title("What another setting would take", loc="left", color=BLACK)


def _columns(history: Sequence[Moment]) -> tuple[list[tuple[str, int, int]], list[Moment]]:
    """The step in at most _MAX_COLUMNS columns, each at its fullest; and (phase, first column, last) of its phases."""
    runs: list[tuple[str, list[Moment]]] = []
    for moment in history:
        if moment.phase == "draw":
            continue
        if not runs or runs[-1][0] != moment.phase:
            runs.append((moment.phase, []))
        runs[-1][1].append(moment)
    total = sum(len(moments) for _, moments in runs)
    phases: list[tuple[str, int, int]] = []
    columns: list[Moment] = []
    for name, moments in runs:
        wanted = max(round(_MAX_COLUMNS * len(moments) / total), _MAX_COLUMNS // 14)
        groups = np.array_split(np.arange(len(moments)), min(wanted, len(moments)))
        start = len(columns)
        columns += [
            max((moments[i] for i in group), key=lambda moment: moment.total_bytes) for group in groups
        ]
        phases.append((name, start, len(columns)))
    return phases, columns


def _job(plan: Plan) -> str:
    job = plan.base.job
    return (
        f"a {human_count(plan.shape.numel)} {plan.model.model_type}, {job.grass.active_layers} of "
        f"{len(plan.shape.block_numels)} blocks active, {job.micro_batch} x {job.seq_length} tokens, {job.dtype}"
    )
