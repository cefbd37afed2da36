"""How far the probe is, on the terminal of whoever started the job."""

from __future__ import annotations

import sys
import time
import weakref
from typing import Any

_REDRAW_SECONDS = 0.1


class ProbeBar:
    """One line on standard error that vanishes when it is closed; nothing where that is no terminal.

    Drawn by whoever calls `show`: no thread, no redirected streams and no hidden cursor, so that a job which is
    interrupted or killed leaves the terminal as it was. Closed at the interpreter's exit at the latest.
    """

    def __init__(self) -> None:
        self._progress: Any = None
        self._task: Any = None
        self._drawn_at = 0.0
        self._at_exit: weakref.finalize | None = None

    @property
    def is_open(self) -> bool:
        """Whether a line of the terminal is in use."""
        return self._progress is not None

    def show(self, done: int, total: int) -> None:
        """Draw `done` of `total` steps, at most ten times a second; opens the bar if need be."""
        if self._progress is None and not self._open(done, total):
            return
        now = time.monotonic()
        is_due = now - self._drawn_at >= _REDRAW_SECONDS
        self._progress.update(self._task, completed=done, total=total, refresh=is_due)
        if is_due:
            self._drawn_at = now

    def close(self) -> None:
        """Take the line away. `show` opens a new one."""
        if self._at_exit is not None:
            self._at_exit()  # at most once, also if this is the second call
        self._progress = self._at_exit = None

    def _open(self, done: int, total: int) -> bool:
        if not sys.stderr.isatty():
            return False
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(file=sys.stderr)
        self._progress = Progress(
            TextColumn("GRASS probes"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps without update,"),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task("", completed=done, total=total)
        self._progress.start()  # draws it
        self._drawn_at = time.monotonic()
        console.show_cursor(True)
        self._at_exit = weakref.finalize(self, self._progress.stop)
        return True
