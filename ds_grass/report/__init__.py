"""`ds_grass report`: what a run did, as one page and one picture a figure, from its log.

Contract: `write_report` reads logs, writes into one folder, and changes nothing else. matplotlib is needed, and
imported, only when it is called. `log` reads, `figures` draws, `page` puts them into HTML.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ds_grass.report.log import ReportError, read_run
from ds_grass.report.page import remarks, render
from ds_grass.report.run import Run

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["ReportError", "Run", "read_run", "remarks", "write_report"]

PAGE_NAME = "report.html"


def write_report(runs: Sequence[Run], folder: str | Path) -> Path:
    """Write report.html, and a PNG of each figure beside it, for one run or two to compare; return the page's path.

    ReportError: matplotlib is missing, or the folder cannot be written.
    """
    assert 1 <= len(runs) <= 2, len(runs)
    folder = Path(folder)
    pictures = _figures().draw_all(runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            (folder / f"{picture.name}.png").write_bytes(picture.png)
        (folder / PAGE_NAME).write_bytes(render(runs, pictures).encode("utf-8", "replace"))
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ReportError(f"--output {folder} cannot be written: {error}") from error
    return folder / PAGE_NAME


def _figures() -> ModuleType:
    try:
        from ds_grass.report import figures
    except ImportError as error:
        raise ReportError(f"the report needs matplotlib ({error}): pip install ds_grass[report]") from error
    return figures
