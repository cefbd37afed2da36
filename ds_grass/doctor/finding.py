"""One line of what ``ds_grass doctor`` reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Section = Literal["versions", "activation", "symbols", "kernels", "memory", "config"]
State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """`cure` says what to do about a note or a problem, `detail` is a traceback."""

    section: Section
    name: str
    value: str
    state: State = "ok"
    cure: str = ""
    detail: str = ""
