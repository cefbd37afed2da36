"""What resuming takes out of grass.jsonl: the lines of steps that will be made again.

Contract: only lines of the resumed run, and of the process that resumes it, are ever dropped; a line of another run, or
of another program, stays byte for byte. The file is cut in place, because other engines hold it open to append; what
one of them appends while it is read is read again. Nearly always the dropped lines are the end of the file, and one
`truncate` does it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Position = Mapping[str, int]
"""The counters in `PLACE`, of a line or of a checkpoint. Each only grows in a run."""

PLACE = ("probe_steps", "applied_steps", "skipped_steps")
_ATTEMPTS = 8


def cut(path: Path, run_id: str, own_run_id: str, position: Position) -> None:
    """Drop what the resumption of `run_id` at `position`, by the process that began as `own_run_id`, undoes.

    OSError where the file cannot be read or rewritten.
    """
    for _ in range(_ATTEMPTS):
        with open(path, "r+b") as file:
            content = file.read()
            begin, rest = what_stays(content, run_id, own_run_id, position)
            if os.fstat(file.fileno()).st_size != len(content):
                continue  # somebody appended; their line would be lost
            if begin < len(content):
                file.seek(begin)
                file.write(rest)
                file.truncate()
            return
    raise OSError(f"others appended to it {_ATTEMPTS} times while it was read")


def what_stays(content: bytes, run_id: str, own_run_id: str, position: Position) -> tuple[int, bytes]:
    """Where the first dropped line begins (the end of `content` if none is), and the lines behind it that stay."""
    raw_lines = [raw + b"\n" for raw in content.split(b"\n")]
    raw_lines[-1] = raw_lines[-1][:-1]  # what follows the last line break, mostly nothing
    lines = [_read(raw) for raw in raw_lines]
    drops_own = not any(_has_trained(line) for line in lines if line.get("run_id") == own_run_id)
    begin, at, rest = len(content), 0, []
    for raw, line in zip(raw_lines, lines, strict=True):
        if line.get("run_id") == run_id:
            is_dropped = is_undone(line, position)
        elif line:
            is_dropped = line.get("run_id") == own_run_id and drops_own
        else:  # cut short when the job was killed
            is_dropped = _head(run_id) in raw
        if is_dropped:
            begin = min(begin, at)
        elif at > begin:
            rest.append(raw)
        at += len(raw)
    return begin, b"".join(rest)


def is_undone(line: Mapping[str, Any], position: Position) -> bool:
    """Whether the line tells of something after `position`; an earlier resumption at the very place counts as such."""
    place = _place(line)
    beyond = any(place[name] > position.get(name, 0) for name in PLACE)
    return beyond or (line.get("event") == "resume" and all(place[n] == position.get(n, 0) for n in PLACE))


def _has_trained(line: Mapping[str, Any]) -> bool:
    return any(_place(line).values())


def _place(line: Mapping[str, Any]) -> dict[str, int]:
    values = {name: line.get(name) for name in PLACE}
    return {name: value if isinstance(value, int) else 0 for name, value in values.items()}


def _read(raw: bytes) -> dict[str, Any]:
    """The line; empty for what is none."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return line if isinstance(line, dict) else {}


def _head(run_id: str) -> bytes:
    """How every line of the run begins, after its time; what a line cut short still shows."""
    return f'"run_id": {json.dumps(run_id)}'.encode()
