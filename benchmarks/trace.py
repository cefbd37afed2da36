"""One streaming step as a Chrome trace, and a picture of it: which copies run under which computing.

    python benchmarks/trace.py --trace step.json --picture step.png

The trace opens in chrome://tracing or https://ui.perfetto.dev. On a GPU the copies are those of the device's copy
engines, as the profiler saw them. On a CPU that plays the device, two threads stand in for the two copy streams, so
that copies run beside computing as they do on a GPU; they are as fast as the CPU's memory, which says nothing of a bus.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import contestants
import torch
from torch.profiler import ProfilerActivity, profile, record_function

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 4
LANES = ("computing", "update", "to device", "to host")
COLORS = {
    "forward": "#9ecae1",
    "next forward": "#9ecae1",
    "backward": "#4292c6",
    "update": "#fd8d3c",
    "to device": "#41ab5d",
    "to host": "#807dba",
}


class Span(NamedTuple):
    """What ran from `start` for `length`, in seconds since the step began."""

    lane: str
    name: str
    start: float
    length: float


def main() -> None:
    settings = parse_arguments()
    sys.path.insert(0, str(ROOT))
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    record(settings)
    spans = list(read_spans(json.loads(Path(settings.trace).read_text())["traceEvents"]))
    draw(spans, settings)
    hidden, total = hidden_seconds(spans)
    print(f"{settings.trace}, {settings.picture}")
    print(f"{1e3 * hidden:.1f} of {1e3 * total:.1f} ms of copies to the device run under backward")


def parse_arguments() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--active", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--buffers", type=int, default=2, help="states.buffers: device slots")
    parser.add_argument("--dtype", choices=sorted(contestants.DTYPES), default="fp32")
    parser.add_argument("--trace", default="step.json", metavar="FILE")
    parser.add_argument("--picture", default="step.png", metavar="FILE")
    settings = parser.parse_args()
    settings.stage, settings.period, settings.checkpointing = 1, 1000, False
    return settings


# -- recording ----------------------------------------------------------------------------------------------------


def record(settings: Namespace) -> None:
    from ds_grass import state_store

    engine_maker = state_store.make_engine if settings.device == "cuda" else threaded_engine
    activities = [ProfilerActivity.CPU]
    if settings.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    states = {"grass-stream": {"mode": "stream", "buffers": settings.buffers}}
    with (
        mock.patch.object(state_store, "make_engine", engine_maker),
        mock.patch.dict(contestants.GRASS_STATES, states),
    ):
        contestant = contestants.build("grass-stream", settings)
    engine = contestant.model
    batch = torch.randint(0, settings.vocabulary, (settings.batch, settings.sequence), device=settings.device)
    for _ in range(WARM_UP + contestants.PROBE_STEPS):
        contestant.step(batch)
    every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with profile(activities=activities, experimental_config=every_thread) as profiler:
        with record_function("forward"):
            loss = engine(input_ids=batch, labels=batch).loss
        with record_function("backward"):
            engine.backward(loss)
            if settings.device == "cuda":
                torch.cuda.synchronize()  # so that the span ends when the device has done it
        with record_function("update"):
            engine.step()
        with record_function("next forward"):
            engine(input_ids=batch, labels=batch)
        engine.optimizer.core.store.synchronize()
    profiler.export_chrome_trace(settings.trace)


def threaded_engine(device: torch.device) -> Any:
    """Two threads as copy streams. What computes is this thread, which is done with whatever it has enqueued."""
    from ds_grass.copy_engine import CopyEngine

    class Ticket:
        def __init__(self, work: Future) -> None:
            self._work = work

        def synchronize(self) -> None:
            self._work.result()

    class ThreadedEngine(CopyEngine):
        def __init__(self) -> None:
            super().__init__(device)
            self._streams = {lane: ThreadPoolExecutor(1, lane) for lane in ("to device", "to host")}
            self._last: Future | None = None

        def _copy_in(self, work: Callable[[], None], after: Iterable[Any]) -> Ticket:
            return self._enqueue("to device", work, after)

        def _copy_out(self, work: Callable[[], None], after: Iterable[Any]) -> Ticket:
            ticket = self._enqueue("to host", work, after)
            self._last = ticket._work
            return ticket

        def _order(self, ticket: Any) -> None:
            if ticket is not None:
                ticket.synchronize()

        def _drain(self) -> None:
            if self._last is not None:
                self._last.result()

        def _enqueue(self, lane: str, work: Callable[[], None], after: Iterable[Any]) -> Ticket:
            tickets = [ticket for ticket in after if ticket is not None]

            def run() -> None:
                for ticket in tickets:
                    ticket.synchronize()
                with torch.no_grad(), record_function(lane):
                    work()

            return Ticket(self._streams[lane].submit(run))

    return ThreadedEngine()


# -- reading and drawing ------------------------------------------------------------------------------------------


def read_spans(events: Iterable[dict[str, Any]]) -> Iterator[Span]:
    """The phases, the updates of units and the copies of a trace."""
    events = [event for event in events if event.get("ph") == "X"]
    phases = [e for e in events if e.get("cat") == "user_annotation" and e["name"] in COLORS]
    begin = min(event["ts"] for event in phases)

    def span(lane: str, event: dict[str, Any]) -> Span:
        return Span(lane, event["name"], (event["ts"] - begin) / 1e6, event["dur"] / 1e6)

    for event in phases:
        yield span(event["name"] if event["name"] in LANES[2:] else "computing", event)
    for event in events:
        if event["name"] == "grass::adamw_" and event.get("cat") == "cpu_op":
            yield span("update", event)
        for direction, lane in (("HtoD", "to device"), ("DtoH", "to host")):
            if event.get("cat") == "gpu_memcpy" and direction in event["name"]:
                yield span(lane, event)


def hidden_seconds(spans: list[Span]) -> tuple[float, float]:
    """How long copies to the device ran while backward did, and how long in all."""
    (backward,) = [span for span in spans if span.name == "backward"]
    copies = [span for span in spans if span.lane == "to device"]
    end = backward.start + backward.length
    under = [min(end, s.start + s.length) - max(backward.start, s.start) for s in copies]
    return sum(max(0.0, seconds) for seconds in under), sum(span.length for span in copies)


def draw(spans: list[Span], settings: Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
    for span in spans:
        place = len(LANES) - 1 - LANES.index(span.lane)
        color = COLORS[span.name if span.lane == "computing" else span.lane]
        left, width = 1e3 * span.start, max(1e3 * span.length, 0.05)
        axes.broken_barh(
            [(left, width)], (place - 0.35, 0.7), facecolors=color, edgecolors="white", linewidth=0.4
        )
        if span.lane == "computing":
            axes.text(left + width / 2, place, span.name, ha="center", va="center", fontsize=9)
    axes.set_yticks(
        range(len(LANES)), labels=["states to host", "states to device", "AdamW kernels", "the job"]
    )
    axes.set_xlabel("time since the step began (ms)")
    where = (
        torch.cuda.get_device_name()
        if settings.device == "cuda"
        else "a CPU as the device, a thread each way"
    )
    what = f"{settings.active} of {settings.blocks} blocks and outer, {settings.buffers} slots"
    axes.set_title(f"One streaming step: {what}; {where}", fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(settings.picture, dpi=150)


if __name__ == "__main__":
    main()
