"""Two pictures of a pipeline's recomputation: memory by stage before and after, and the schedule with it marked.

Contract: drawn without a display and with matplotlib's own defaults, as in :mod:`megatron_ext.picture`. What is
predicted or composed says so. A picture for which nothing was told is not drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ds_grass.report.axes import (
    BLACK,
    BLUE,
    ORANGE,
    REFERENCE,
    RESTING,
    SECONDS,
    STYLE,
    UNKNOWN,
    unit_of,
)
from ds_grass.telemetry.human import gigabytes
from megatron_ext.recompute.stage_plan import StagePlan
from megatron_ext.recompute.timeline import Interval, Timeline
from megatron_ext.recompute_report import Stages, error_of, layer_counts

_SKY = "#56b4e9"
_BARS = (
    ("nothing recomputed", "nothing_recomputed_bytes", UNKNOWN),
    ("everything recomputed", "all_recomputed_bytes", REFERENCE),
    ("the plan, predicted", "predicted_bytes", _SKY),
    ("the plan, measured", "measured_bytes", BLUE),
)
_KINDS = {"forward": _SKY, "recompute": ORANGE, "backward": BLUE}
_MOST_PASSES = 96
"""Forwards of a stage that a timeline shows; of a longer step, the beginning."""
_WIDE = 10.0
"""Inches of a timeline."""
_MOST_NAMED = 8
"""Stages that have room for words under their bars."""
_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))


def draw_stages(stages: Stages, path: Path) -> list[Path]:
    """Write what can be drawn beside `path`, as PNG: "run.png" gives run_memory.png and run_timeline.png. The files
    that were written. OSError when they cannot be."""
    written = []
    if any(getattr(plan, name) is not None for plan in stages.plans for _, name, _ in _BARS):
        written.append(path.with_name(f"{path.stem}_memory.png"))
        draw_memory(stages, written[-1])
    if stages.timeline is not None and stages.timeline.seconds:
        written.append(path.with_name(f"{path.stem}_timeline.png"))
        draw_timeline(stages, stages.timeline, written[-1])
    return written


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(path, format="png")


# -- memory -----------------------------------------------------------------------------------------------------------


def draw_memory(stages: Stages, path: Path) -> None:
    """Peak bytes of each stage, with the limit."""
    width = min(max(7.2, 1.2 + 0.8 * len(stages.plans)), 14.0)
    with _figure(path, width, 3.9) as figure:
        axes = figure.subplots()
        sizes = [
            getattr(plan, name) or 0
            for plan in stages.plans
            for name in ("static_bytes", *(name for _, name, _ in _BARS))
        ]
        unit, size = unit_of(max(sizes), _UNITS)
        top = _top(stages, max(sizes)) / size
        for plan in stages.plans:
            _draw_stage(axes, stages, plan, size, top)
        _draw_limit(axes, stages, unit, size, top)
        axes.set(ylim=(0, top), xlim=(-0.6, len(stages.plans) - 0.4), ylabel=f"peak of a rank ({unit})")
        in_short = len(stages.plans) > _MOST_NAMED
        axes.set_xticks(range(len(stages.plans)), [_stage_label(plan, in_short) for plan in stages.plans])
        if in_short:
            axes.set_xlabel("stage, its recomputed layers of all, and its open micro-batches")
        axes.tick_params(axis="x", length=0)
        axes.set_title(
            f"memory by stage, policy {stages.plans[0].policy}: {stages.pipeline.micro_batches} micro-batches a step",
            loc="left",
            color=BLACK,
        )
        _legend(figure, stages)


def _top(stages: Stages, tallest: float) -> float:
    """Of the axis: a bar that is far above all else is cut, a limit that is far above the bars is left out."""
    needed = max(
        getattr(plan, name) or 0
        for plan in stages.plans
        for name in ("all_recomputed_bytes", "predicted_bytes", "measured_bytes")
    )
    limit = max(plan.limit_bytes for plan in stages.plans)
    needed = max(needed, limit) if limit <= 2.5 * tallest else needed
    return 1.14 * min(max(tallest, needed), 2.2 * needed or tallest) or 1.0


def _draw_stage(axes: Axes, stages: Stages, plan: StagePlan, size: float, top: float) -> None:
    each = 0.84 / len(_BARS)
    for number, (_, name, color) in enumerate(_BARS):
        nbytes = getattr(plan, name)
        if nbytes is None:
            continue
        left, height = plan.stage - 0.42 + number * each, nbytes / size
        bar = dict(width=0.92 * each, align="edge", linewidth=0)
        within = min(height, plan.limit_bytes / size)
        axes.bar(left, within, color=color, **bar)
        if height > within:
            axes.bar(left, height - within, bottom=within, color=ORANGE, alpha=0.45, **bar)
        if plan.static_bytes:
            axes.bar(left, min(plan.static_bytes / size, height), facecolor="none", edgecolor="white",
                     hatch="/////", **bar)  # fmt: skip
        middle = left + 0.46 * each
        if height > top:
            axes.text(middle, 0.985 * top, gigabytes(nbytes), rotation=90, ha="center", va="top", fontsize=6.5,
                      color=BLACK)  # fmt: skip
        elif name == "measured_bytes":
            upright = len(stages.plans) > _MOST_NAMED
            _label_error(
                axes, plan, (middle, within), (within - (plan.static_bytes or 0) / size) / top, upright
            )


def _label_error(axes: Axes, plan: StagePlan, end: tuple[float, float], room: float, upright: bool) -> None:
    """How far the prediction is off: inside the bar, in nobody's way, where there is room."""
    error = error_of(plan)
    if error is None:
        return
    inside = room > (0.16 if upright else 0.07)
    axes.annotate(f"{error:+.1%}", end, xytext=(0, -3 if inside else 3), textcoords="offset points", ha="center",
                  va="top" if inside else "bottom", rotation=90 if upright else 0, fontsize=6.5,
                  color="white" if inside else BLUE)  # fmt: skip


def _draw_limit(axes: Axes, stages: Stages, unit: str, size: float, top: float) -> None:
    """A line through all stages, in steps where they differ."""
    limits = [plan.limit_bytes / size for plan in stages.plans]
    for stage, limit in enumerate(limits):
        if limit < top:
            axes.hlines(limit, stage - 0.5, stage + 0.5, color=BLACK, linestyle="--", linewidth=1)
    last = len(limits) - 1
    if limits[last] < top:
        axes.annotate(f"limit {limits[last]:.4g} {unit}", (last + 0.6, limits[last]), xytext=(-2, 3), ha="right",
                      textcoords="offset points", fontsize=8)  # fmt: skip
    else:
        axes.annotate(f"limit {gigabytes(stages.plans[last].limit_bytes)}, far above", (1, 1), ha="right", va="top",
                      xycoords="axes fraction", fontsize=8)  # fmt: skip


def _stage_label(plan: StagePlan, in_short: bool) -> str:
    recomputed, layers = layer_counts(plan)
    held = "+".join(map(str, plan.open))
    if in_short:
        return f"{plan.stage}\n{recomputed:.3g}/{layers}\n{held}"
    return f"stage {plan.stage}\n{recomputed:.3g} of {layers} layers\n{held} open"


def _legend(figure: Figure, stages: Stages) -> None:
    told = [
        Patch(facecolor=color, label=label)
        for label, name, color in _BARS
        if any(getattr(plan, name) is not None for plan in stages.plans)
    ]
    if any(plan.static_bytes for plan in stages.plans):
        label = "hatched: weights, gradients, optimizer"
        told.append(Patch(facecolor=REFERENCE, edgecolor="white", hatch="//////", linewidth=0, label=label))
    if any((getattr(plan, name) or 0) > plan.limit_bytes for plan in stages.plans for _, name, _ in _BARS):
        told.append(Patch(facecolor=ORANGE, alpha=0.45, label="over the limit"))
    figure.legend(handles=told, loc="outside lower center", ncols=3, handlelength=1.4)


# -- timeline ---------------------------------------------------------------------------------------------------------


def draw_timeline(stages: Stages, timeline: Timeline, path: Path) -> None:
    """What each stage runs when, composed; one row for each."""
    count = len(stages.plans)
    with _figure(path, _WIDE, min(1.3 + 0.36 * count, 10.0)) as figure:
        axes = figure.subplots()
        end = _shown_until(stages, timeline)
        unit, size = unit_of(end, SECONDS)
        axes.set_xlim(0, end / size)
        axes.set_ylim(count - 0.5, -0.5)
        for stage, row in enumerate(timeline.intervals):
            axes.barh(stage, end / size, height=0.8, color=RESTING, linewidth=0, zorder=0)
            _draw_row(axes, stage, [each for each in row if each.start < end], end, size)
            axes.annotate(_beside(stages, timeline, stage), (1.0, stage), xycoords=axes.get_yaxis_transform(),
                          xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)  # fmt: skip
        axes.set_yticks(range(count), [f"stage {plan.stage}" for plan in stages.plans])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8))
        axes.set_xlabel(f"time in the step ({unit})")
        axes.set_title(_timeline_title(stages, timeline, end), loc="left", color=BLACK)
        told = [Patch(facecolor=color, label=kind) for kind, color in _KINDS.items()]
        if stages.pipeline.chunks > 1:
            told.append(Patch(facecolor=BLUE, alpha=_alpha(1), label="paler: a later chunk"))
        told.append(Patch(facecolor=RESTING, label="idle"))
        figure.legend(handles=told, loc="outside lower center", ncols=5, handlelength=1.4)


def _shown_until(stages: Stages, timeline: Timeline) -> float:
    """The end of the step, or of as many passes of the first stage as can be told apart; always beyond the warm-up."""
    forwards = [each for each in timeline.intervals[0] if each.kind == "forward"]
    shown = max(_MOST_PASSES // 2, 2 * stages.pipeline.virtual_stages)
    return timeline.seconds if len(forwards) <= max(_MOST_PASSES, shown) else forwards[shown].start


def _draw_row(axes: Axes, stage: int, row: list[Interval], end: float, size: float) -> None:
    """Micro-batches are numbered where the number has room."""
    for each in row:
        stop = min(each.end, end)
        share = (stop - each.start) / end
        edge = min(0.5, 0.1 * 72 * _WIDE * share)  # a thin bar would be all edge
        axes.broken_barh([(each.start / size, (stop - each.start) / size)], (stage - 0.4, 0.8), edgecolor="white",
                         color=_KINDS[each.kind], alpha=_alpha(each.chunk), linewidth=edge)  # fmt: skip
        number = str(each.micro_batch)
        if each.kind != "recompute" and share > 0.009 * len(number):
            axes.text((each.start + stop) / 2 / size, stage, number, ha="center", va="center_baseline", fontsize=6.5,
                      color="white" if each.kind == "backward" and each.chunk == 0 else BLACK)  # fmt: skip


def _alpha(chunk: int) -> float:
    return max(1.0 - 0.35 * chunk, 0.3)


def _beside(stages: Stages, timeline: Timeline, stage: int) -> str:
    recomputing = (
        "" if stages.recompute_shares is None else f"{stages.recompute_shares[stage]:.0%} recompute, "
    )
    return f"{recomputing}{timeline.idle_shares[stage]:.0%} idle"


def _timeline_title(stages: Stages, timeline: Timeline, end: float) -> str:
    unit, size = unit_of(timeline.seconds, SECONDS)
    whole = f"{timeline.seconds / size:.4g} {unit}"
    part = "" if end == timeline.seconds else f", the first {end / size:.3g} {unit} of it"
    against = ""
    if stages.all_recomputed_timeline is not None:
        against = f" ({stages.all_recomputed_timeline.seconds / size:.4g} {unit} with every layer recomputed)"
    return f"one step, composed from the stages' own times: {whole}{part}{against}"
