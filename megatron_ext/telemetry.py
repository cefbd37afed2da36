"""What a job with a ``megatron_ext`` block tells: megatron_ext.jsonl, one line on the console, counters.

Purpose: in this field a feature that silently does not run still shows a falling loss, so every plan is told when it
is first made, with what it should take, and what it took is told beside it.

Contract: telling never harms the job (:class:`ds_grass.telemetry.log.JsonLog`), and nothing is written per
micro-batch. One rank writes (:func:`megatron_ext.speakers.speaks_for_job`); its lines are about the layers of its own
pipeline stage. Every rank counts.
Not covered: measuring (whoever runs the layers), and reading the log back (:mod:`megatron_ext.report`).
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, Literal

from ds_grass.telemetry.human import human_bytes
from ds_grass.telemetry.log import JsonLog
from megatron_ext.config import LogConfig

logger = logging.getLogger("megatron_ext")

DEFAULT_LOG_NAME = "megatron_ext.jsonl"
_SUMMARY_SECONDS = 60.0
_MOST_SUMMARY_SECONDS = 3600.0  # a job of weeks may have thousands of plans, and a line for each at a time
_KEPT_MEASUREMENTS = 64  # of a plan: about 5 kB, and a job may have thousands of plans

Phase = Literal["forward", "backward", "recomputed"]
PHASES: tuple[Phase, ...] = ("forward", "backward", "recomputed")
Calls = dict[str, dict[int, dict[str, int]]]
"""{strategy: {length: {"forward": calls, "backward": calls, "recomputed": calls}}}"""


class MegatronLog(JsonLog):
    """The log of the `megatron_ext` block."""

    block, default_name = "megatron_ext", DEFAULT_LOG_NAME


class Counters:
    """Calls of layers on this rank, by strategy and sequence length. No tensor, no clock, no file."""

    def __init__(self) -> None:
        self._calls: defaultdict[tuple[str, int, Phase], int] = defaultdict(int)
        self._changed: set[tuple[str, int]] = set()

    def count(self, strategy: str, length: int, phase: Phase, calls: int = 1) -> None:
        """Layers ran `calls` times. `length`: tokens of the sequence before it is cut."""
        self._calls[strategy, length, phase] += calls
        self._changed.add((strategy, length))

    def snapshot(self) -> Calls:
        """All calls since the start, a copy."""
        return self._of({(strategy, length) for strategy, length, _ in self._calls})

    def take_changed(self) -> Calls:
        """As :meth:`snapshot`, but only of what has changed since this was asked the last time."""
        changed, self._changed = self._changed, set()
        return self._of(changed)

    def _of(self, entries: set[tuple[str, int]]) -> Calls:
        found: Calls = {}
        for strategy, length in sorted(entries):
            by_phase = {phase: self._calls.get((strategy, length, phase), 0) for phase in PHASES}
            found.setdefault(strategy, {})[length] = by_phase
        return found


@dataclass(frozen=True)
class StartFacts:
    """What is known before the first micro-batch; the start line and the log's first event tell the same."""

    source: str
    """How the block was found, as :class:`megatron_ext.locate.Located` prints itself."""
    config: Mapping[str, Any]
    """The whole block, every key."""
    versions: Mapping[str, str]
    """Of ds-grass, torch, megatron-core, and what else matters."""
    world_size: int
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    num_layers: int
    """On this rank."""
    allowed: tuple[str, ...]
    """Strategies that the planner chooses from."""
    refused: Mapping[str, str]
    """Strategy -> why the model cannot run it here."""
    limit_bytes: int
    """Of one rank's device, for all that the job holds there."""
    cost_model: str
    """Which one, and where its numbers come from."""


def start_line(facts: StartFacts) -> str:
    """One line of resolved facts, for people."""
    refused = "".join(f"; not {name}: {reason}" for name, reason in facts.refused.items())
    versions = ", ".join(f"{package} {version}" for package, version in facts.versions.items())
    parts = (
        f"{facts.num_layers} layers on this rank choose from {', '.join(facts.allowed)}{refused}",
        f"tensor parallel {facts.tensor_parallel} x pipeline parallel {facts.pipeline_parallel} x data parallel "
        f"{facts.data_parallel} of {facts.world_size} rank{'s' if facts.world_size != 1 else ''}",
        f"memory limit {human_bytes(facts.limit_bytes)} ({facts.limit_bytes} bytes) a rank",
        f"cost model {facts.cost_model}",
        f"block from {facts.source}",
        versions,
    )
    return "megatron_ext: " + "; ".join(parts)


def runs_of(names: Sequence[str]) -> str:
    """The strategies of successive layers, in short: "20 x megatron_ts, 12 x metp"."""
    return ", ".join(f"{len(list(run))} x {name}" for name, run in groupby(names))


def layers_by_strategy(names: Sequence[str]) -> dict[str, int]:
    """How many layers use each strategy, in the order of their first layer."""
    return {name: list(names).count(name) for name in dict.fromkeys(names)}


@dataclass
class _Plan:
    """One (batch, length, plan): what it should take and what it took."""

    batch: int
    length: int
    names: tuple[str, ...]
    predicted_seconds: float
    predicted_bytes: int
    times: int = 0
    told: int = 0
    """`times` when it was last summarised."""
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT_MEASUREMENTS))
    peak_bytes: deque[int] = field(default_factory=lambda: deque(maxlen=_KEPT_MEASUREMENTS))

    def summary(self) -> dict[str, Any]:
        """`micro_batches` are all since the start; the medians are over the newest that were measured, as many as
        `medians_over` says."""
        return {
            "batch": self.batch,
            "length": self.length,
            "plan": runs_of(self.names),
            "layers": layers_by_strategy(self.names),
            "micro_batches": self.times,
            "predicted_seconds": self.predicted_seconds,
            "measured_seconds": median(self.seconds) if self.seconds else None,
            "predicted_bytes": self.predicted_bytes,
            "measured_bytes": int(median(self.peak_bytes)) if self.peak_bytes else None,
            "medians_over": {"seconds": len(self.seconds), "bytes": len(self.peak_bytes)},
        }


class Telemetry:
    """Tells the start, each new plan once, and from time to time, and at exit, what ran.

    `counters` count on every rank; all else is for the writer.
    """

    def __init__(
        self,
        config: LogConfig,
        *,
        is_writer: bool = False,
        summary_seconds: float = _SUMMARY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`is_writer`: from the beginning, see :meth:`become_writer`. The first summary is written after
        `summary_seconds`, each next one after twice as long, up to an hour."""
        self.counters = Counters()
        self._config, self._path = config, config.path or DEFAULT_LOG_NAME
        with contextlib.suppress(OSError):  # a working directory that was deleted
            self._path = str(Path(self._path).absolute())  # the script may change it before it builds a model
        self.log = MegatronLog(self._path, config.enabled, is_writer=False)
        self.is_writer = False
        self._plans: dict[tuple[int, int, tuple[str, ...]], _Plan] = {}
        self._summary_seconds, self._clock = summary_seconds, clock
        self._next_summary = clock() + summary_seconds
        atexit.register(self.close)
        if is_writer:
            self.become_writer()

    def become_writer(self) -> None:
        """This rank writes from now on; nothing that was told before is in the log."""
        if not self.is_writer:
            self.is_writer = True
            self.log = MegatronLog(self._path, self._config.enabled, is_writer=True)

    def start(self, facts: StartFacts) -> None:
        """Say on the console and in the log what was decided."""
        if not self.is_writer:
            return
        _make_visible()
        logger.info("%s", start_line(facts))
        self.log.write("start", **asdict(facts))

    def planned(
        self,
        batch: int,
        length: int,
        names: Sequence[str],
        *,
        seconds: float,
        peak_bytes: int,
        fits: bool = True,
        documents: Sequence[int] | None = None,
    ) -> None:
        """A plan was made: the strategy of each layer; what one micro-batch should take on this rank, in seconds and
        in bytes at the peak; the lengths of packed `documents`. One that is known is not told again."""
        key = (batch, length, tuple(names))
        if not self.log.is_open or key in self._plans:
            return
        self._plans[key] = _Plan(*key, predicted_seconds=seconds, predicted_bytes=peak_bytes)
        packed = {} if documents is None else {"documents": len(documents), "longest": max(documents)}
        self.log.write(
            "plan",
            batch=batch,
            length=length,
            plan=runs_of(names),
            layers=layers_by_strategy(names),
            predicted_seconds=seconds,
            predicted_bytes=peak_bytes,
            fits=fits,
            **packed,
        )

    def ran(
        self,
        batch: int,
        length: int,
        names: Sequence[str],
        *,
        seconds: float | None = None,
        peak_bytes: int | None = None,
    ) -> None:
        """A micro-batch ran by a plan that was told; what it took where that was measured."""
        plan = self._plans.get((batch, length, tuple(names)))
        if plan is None:
            return
        plan.times += 1
        if seconds is not None:
            plan.seconds.append(seconds)
        if peak_bytes is not None:
            plan.peak_bytes.append(peak_bytes)
        if self._clock() >= self._next_summary:
            self.summarise()

    def summarise(self) -> None:
        """Write a line for each plan that ran since the last summary, and one with the counters that changed.

        Counters are totals since the start: of each strategy and length the last line that has it is right.
        """
        if self._tell_plans():
            self.log.write("counters", calls=self.counters.take_changed(), complete=False)

    def _tell_plans(self) -> int:
        """How many were told."""
        self._summary_seconds = min(2 * self._summary_seconds, _MOST_SUMMARY_SECONDS)
        self._next_summary = self._clock() + self._summary_seconds
        news = [plan for plan in self._plans.values() if plan.times > plan.told]
        for plan in news:
            self.log.write("summary", **plan.summary())
            plan.told = plan.times
        return len(news)

    def close(self) -> None:
        """Write the last summary and all counters, and close the log; once."""
        atexit.unregister(self.close)
        told, calls = self._tell_plans(), self.counters.snapshot()
        if told or calls:
            self.log.write("counters", calls=calls, complete=True)
        self._plans.clear()
        self.log.close()


def _make_visible() -> None:
    """One line at start is the contract, also in a script that configured no logging."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
