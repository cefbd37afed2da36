"""What a run tells about itself: a line of resolved facts at start, grass.jsonl, warnings, time in own calls.

Contract: telling never harms the job. A log that cannot be written is one warning and then silence; values
that are not JSON are turned into some that are. Nothing is written per step unless the engine asks for it.

Not here: what is worth telling (the controller's `log_fields`, the engine's events) and reading the log back.
"""

from __future__ import annotations

import json
import logging
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

from ds_grass.config import GrassConfig

logger = logging.getLogger(__name__)

DEFAULT_LOG_NAME = "grass.jsonl"


class GrassLog:
    """Appends JSON lines to one file, from one rank.

    Each line is one unbuffered write, so that a killed job loses no line that was reported, several engines
    may share a file, and nothing is left to fail at exit. `run_id` tells the runs of a file apart.
    """

    def __init__(self, path: str | None, enabled: bool, is_writer: bool) -> None:
        """`path` None: grass.jsonl in the working directory. Only `is_writer` touches the file system."""
        self.path = Path(path or DEFAULT_LOG_NAME)
        self.run_id = uuid.uuid4().hex
        self._file: BinaryIO | None = None
        if enabled and is_writer:
            self._open()

    @property
    def is_open(self) -> bool:
        """Whether lines are being written by this process."""
        return self._file is not None

    def write(self, event: str, **fields: Any) -> None:
        """Append `{"time", "run_id", "event", **fields}`; non-finite numbers become "nan", "inf", "-inf"."""
        if self._file is None:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": now, "run_id": self.run_id, "event": event, **_plain(fields)}
        try:
            self._write_all(json.dumps(line).encode() + b"\n")
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Close the file; later writes are ignored."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except OSError as error:  # a network file system may report the last write only here
                logger.warning("grass.log: closing %s failed: %s", self.path, error)

    def _open(self) -> None:
        try:
            self.path = self.path.absolute()  # the script may change its directory later
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)
            self._end_torn_line()
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            self._give_up(error)

    def _end_torn_line(self) -> None:
        """A job killed, or a disk full, in the middle of a line must not spoil the first line of this run."""
        assert self._file is not None
        if self._file.seekable() and self._file.seek(0, 2) > 0:
            self._file.seek(-1, 2)
            if self._file.read(1) != b"\n":
                self._write_all(b"\n")

    def _write_all(self, line: bytes) -> None:
        assert self._file is not None
        rest = memoryview(line)
        while rest:  # an unbuffered write may take a part only
            rest = rest[self._file.write(rest) :]

    def _give_up(self, error: OSError | ValueError) -> None:
        logger.warning(
            "grass.log.path: %s cannot be written (%s); training goes on without this log", self.path, error
        )
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:  # already reported; the descriptor is released all the same
                pass


def _plain(value: Any) -> Any:
    """`value` in terms of JSON; what has no counterpart becomes its text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


class OwnTime:
    """Adds up the seconds between entering and leaving; entering again inside counts once.

    Put around the package's own bookkeeping, it lets a benchmark report its share of a step. It measures the
    host's time, work that was queued on a device is not waited for, and serves one thread at a time.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0
        self._depth = 0
        self._entered = 0.0

    def __enter__(self) -> OwnTime:
        if self._depth == 0:
            self._entered = time.perf_counter()
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._entered
            self.calls += 1

    def reset(self) -> None:
        """Start counting from zero; not while entered."""
        assert self._depth == 0, "reset inside the measured time"
        self.seconds, self.calls = 0.0, 0


def human_count(number: int) -> str:
    """`1_234_567_890` -> `1.23 B`; K, M, B, T are powers of 1000."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def human_bytes(number: int) -> str:
    """`1_610_612_736` -> `1.50 GiB`; powers of 1024."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if number >= 1 << power:
            return f"{number / (1 << power):.2f} {unit}"
    return f"{number} B"


def few_draws_warning(num_steps: int, config: GrassConfig, num_blocks: int, probe_steps: int) -> str | None:
    """Text when a run of `num_steps` optimizer steps holds fewer than 2 L / active_layers draws, else None.

    `probe_steps`: the resolved number, which is a part of `num_steps`. No warning where all blocks are
    active or `sampling_period` is null: then there is nothing to draw again.
    """
    train_steps = num_steps - probe_steps
    if train_steps <= 0:
        return (
            f"grass.probe_steps resolves to {probe_steps} but the run has {num_steps} steps: nothing would "
            "be trained; use fewer probe_steps, or more steps"
        )
    if config.sampling_period is None or config.active_layers >= num_blocks:
        return None
    num_draws = -(-train_steps // config.sampling_period)
    wanted_draws = -(-2 * num_blocks // config.active_layers)
    if num_draws >= wanted_draws:
        return None
    period = train_steps // wanted_draws
    advice = f"use a sampling_period of at most {period}, or" if period >= 1 else "use"
    return (
        f"grass.sampling_period is {config.sampling_period}: {train_steps} training steps hold {num_draws} "
        f"draws of {config.active_layers} of {num_blocks} blocks, fewer than the {wanted_draws} that let "
        f"each be drawn about twice; {advice} more active_layers"
    )


def start_line(
    *,
    policy: str,
    num_blocks: int,
    lists: Sequence[str],
    other_lists: Sequence[str] = (),
    active_layers: int,
    managed_params: int,
    active_params: int,
    outer: str | Sequence[str],
    outer_params: int,
    probe_steps: int,
    sampling_period: int | None,
    refresh_period: int | None,
    states_mode: str | None,
    states_dtype: str,
    master_weights: bool,
    device_bytes: int,
    host_bytes: int,
    zero_stage: int,
    zero_stage_given: int,
    num_ranks: int,
    grass_version: str,
    deepspeed_version: str,
) -> str:
    """One line of resolved facts. The same keywords make the log's `start` event, so both tell the same.

    `managed_params`: all that may train in the run, `active_params`: what trains at once (the largest blocks
    and outer), `outer_params`: the part of both that always trains. `device_bytes`, `host_bytes`: gradients
    and states on this rank's device at once, and states on its host once every block was drawn. `states_mode`
    None: not decided yet. `zero_stage_given`: what ds_config asks for.
    """
    others = f" (not drawn: {', '.join(other_lists)})" if other_lists else ""
    outer_text = outer if isinstance(outer, str) else ", ".join(outer)
    draws = "once" if sampling_period is None else f"every {sampling_period} steps"
    refresh = "never" if refresh_period is None else f"every {refresh_period} steps"
    probe = f"{probe_steps} steps without update" if probe_steps else "none"
    promoted = f" (promoted from {zero_stage_given})" if zero_stage != zero_stage_given else ""
    facts = (
        f"policy {policy}",
        f"{active_layers} of {num_blocks} blocks of {', '.join(lists)} active{others}",
        f"parameters managed {_exact_count(managed_params)}, active at once {_exact_count(active_params)}",
        f"outer {outer_text}, {_exact_count(outer_params)}",
        f"probe {probe}, draw {draws}, refresh {refresh}",
        f"states {states_mode or 'stream until measured'} {states_dtype} "
        f"{'with' if master_weights else 'without'} master weights, "
        f"device {human_bytes(device_bytes)} ({device_bytes} bytes), "
        f"host up to {human_bytes(host_bytes)} ({host_bytes} bytes)",
        f"ZeRO stage {zero_stage}{promoted}, {num_ranks} rank{'s' if num_ranks != 1 else ''}",
        f"ds_grass {grass_version}, deepspeed {deepspeed_version}",
    )
    return "GRASS: " + "; ".join(facts)


def _exact_count(number: int) -> str:
    return f"{human_count(number)} ({number:,})" if number >= 1000 else str(number)
