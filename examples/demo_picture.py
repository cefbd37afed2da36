"""The demo's picture: held-out losses, what trained when, importance, and bytes on the device."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from demo_report import Run, device_bytes
from matplotlib.axes import Axes

matplotlib.use("Agg")
from matplotlib import pyplot as plt

GREEN, GREY, BLUE = "#2a9d5c", "#8a8f98", "#3465a4"


def draw_picture(path: Path, grass: Run, outer: Run, adamw: Run) -> Path:
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), width_ratios=(3, 2), layout="constrained")
        draw_losses(axes[0, 0], ((grass, GREEN), (outer, GREY), (adamw, BLUE)))
        draw_bytes(axes[0, 1], grass)
        draw_active(axes[1, 0], grass)
        draw_importance(axes[1, 1], grass)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


def draw_losses(axes: Axes, runs: tuple[tuple[Run, str], ...]) -> None:
    for run, color in runs:
        axes.plot(run.eval_steps, run.losses, marker="o", markersize=3, color=color, label=run.title)
    axes.axvspan(
        0, runs[0][0].start["planned_probe_steps"], color=GREEN, alpha=0.12, linewidth=0, label="GRASS probes"
    )
    axes.set(title="Held-out loss on Python code", xlabel="step", ylabel="nats a token")
    axes.legend(frameon=False)


def draw_bytes(axes: Axes, grass: Run) -> None:
    bottoms = [0.0, 0.0]
    for (name, values), color in zip(device_bytes(grass).items(), (BLUE, "#9dbbe0"), strict=True):
        mebibytes = [value / 2**20 for value in values]
        axes.bar(["plain AdamW", "GRASS"], mebibytes, bottom=bottoms, width=0.55, color=color, label=name)
        bottoms = [bottom + value for bottom, value in zip(bottoms, mebibytes, strict=True)]
    for index, total in enumerate(bottoms):
        axes.annotate(f"{total:.2f}", (index, total), ha="center", va="bottom")
    axes.set(title="Device bytes of each rank", ylabel="MiB")
    axes.legend(frameon=False)


def draw_active(axes: Axes, grass: Run) -> None:
    for draw, begin, end in zip(
        grass.draws, grass.draw_steps, [*grass.draw_steps[1:], grass.steps], strict=True
    ):
        for block in draw["active"]:
            axes.broken_barh([(begin, end - begin)], (block - 0.42, 0.84), facecolor=GREEN, edgecolor="white")
    num_blocks, probe_steps = grass.start["num_blocks"], grass.start["planned_probe_steps"]
    axes.axvspan(0, probe_steps, color=GREEN, alpha=0.12, linewidth=0)
    axes.set(title="Active blocks", xlabel="step", ylabel="block", xlim=(0, grass.steps))
    axes.set(ylim=(-0.6, num_blocks - 0.4), yticks=range(0, num_blocks, 2))


def draw_importance(axes: Axes, grass: Run) -> None:
    first, last = grass.draws[0], grass.draws[-1]
    blocks = range(grass.start["num_blocks"])
    for draw, color, label in ((first, GREY, "after probing"), (last, GREEN, "at the last draw")):
        mean = sum(draw["importance"]) / len(draw["importance"])
        relative = [value / mean for value in draw["importance"]]
        axes.plot(blocks, relative, color=color, marker="o", markersize=3, label=label)
    axes.set(title="Importance: mean gradient norm", xlabel="block", ylabel="of the mean", ylim=(0, None))
    axes.legend(frameon=False)
