"""grass.jsonl, and the logs like it: what a run has to tell, a JSON object a line.

Contract: telling never harms the job. A log that cannot be written is one warning and then silence; values
that are not JSON are turned into some that are. Nothing is written per step unless the engine asks for it.

Not here: what is worth telling, and when (`zero/journal.py`), and reading the log back (`report/log.py`).
"""

from __future__ import annotations

import json
import logging
import math
import uuid
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from ds_grass.telemetry import log_cut

logger = logging.getLogger(__name__)

DEFAULT_LOG_NAME = "grass.jsonl"


class JsonLog:
    """Appends JSON lines to one file, from one rank.

    Each line is one unbuffered write, so that a killed job loses no line that was reported, several engines
    may share a file, and nothing is left to fail at exit. `run_id` tells the runs of a file apart.
    """

    block: ClassVar[str]
    """The block of ds_config whose `log` it is; warnings name it."""

    default_name: ClassVar[str]
    """Of the file."""

    def __init__(self, path: str | None, enabled: bool, is_writer: bool) -> None:
        """`path` None: `default_name` in the working directory. Only `is_writer` touches the file system."""
        self.path = Path(path or self.default_name)
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
                logger.warning("%s.log: closing %s failed: %s", self.block, self.path, error)

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
        logger.warning("%s.log.path: %s cannot be written (%s); training goes on without this log",
                       self.block, self.path, error)  # fmt: skip
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:  # already reported; the descriptor is released all the same
                pass


class GrassLog(JsonLog):
    """The log of the `grass` block, which follows a resumed run back to its checkpoint."""

    block, default_name = "grass", DEFAULT_LOG_NAME

    def resume(self, run_id: str, position: log_cut.Position) -> None:
        """Go on as run `run_id`, whose lines beyond `position` are undone and leave the file, as do those that
        this process wrote under another id and without having trained. Lines of other runs stay."""
        before, self.run_id = self.run_id, run_id
        if self._file is None:
            return
        try:
            if self.path.is_file():  # not a pipe or a device
                log_cut.cut(self.path, run_id, before, position)
        except OSError as error:
            logger.warning(
                "grass.log.path: %s cannot be rewritten (%s); lines beyond the resumed step stay in it",
                self.path,
                error,
            )


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
