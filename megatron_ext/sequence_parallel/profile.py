"""What was measured of each strategy, and the file that keeps it.

Contract: a profile is JSON: a format's name and version, the shape of the layer, where it was measured, and rows. It is
all that a cost model is made from, so models are saved by saving their profile and fitted anew when it is loaded: no
pickle. A file of another version or another layer is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_ext.sequence_parallel.layer_shape import LayerShape
from megatron_ext.sequence_parallel.names import STRATEGIES
from megatron_ext.versioned_json import read_versioned, write_whole

FORMAT = "megatron_ext.sequence_parallel.profile"
VERSION = 1


@dataclass(frozen=True)
class Measurement:
    """One layer under one strategy, forward and backward, on the slowest rank."""

    strategy: str
    batch: int
    length: int
    """Tokens of a sequence before it is cut."""
    seconds: float
    kept_bytes: int
    """Held from forward to backward."""
    transient_bytes: int
    """The most on top of that."""

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(
                f"strategy is {self.strategy!r}; allowed: {', '.join(STRATEGIES)}; correct the name"
            )
        for name in ("batch", "length", "kept_bytes", "transient_bytes"):
            given, least = getattr(self, name), 1 if name in ("batch", "length") else 0
            if type(given) is not int or given < least:
                raise ValueError(f"{name} is {given!r}; allowed: an integer from {least}; measure again")
        if not isinstance(self.seconds, int | float) or not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds is {self.seconds!r}; allowed: a finite number above 0; measure again")

    @property
    def tokens(self) -> int:
        """Of the whole group."""
        return self.batch * self.length

    @property
    def pairs(self) -> int:
        """(query, key) pairs without a mask."""
        return self.batch * self.length**2


@dataclass(frozen=True)
class Profile:
    """Measurements of one layer on one machine."""

    shape: LayerShape
    measurements: tuple[Measurement, ...]
    source: Mapping[str, Any] = field(default_factory=dict)
    """Free: device, versions, date."""

    def save(self, path: str | Path) -> None:
        content = {
            "format": FORMAT,
            "version": VERSION,
            "shape": self.shape.to_json(),
            "source": dict(self.source),
            "measurements": [asdict(row) for row in self.measurements],
        }
        write_whole(path, json.dumps(content, indent=1) + "\n")


def load_profile(path: str | Path, shape: LayerShape | None = None, key: str = "cost_model.load") -> Profile:
    """The profile of a file; `shape`: of the layer that it must be of. ValueError names `key`."""
    content = read_versioned(path, key, FORMAT, VERSION, noun="profile", again="profile again")
    found = LayerShape.from_json(content.get("shape"), f"{key}: shape in {str(path)!r}")
    if shape is not None and found != shape:
        raise ValueError(
            f"{key} is {str(path)!r}, measured of another layer ({_differences(found, shape)}); "
            "profile this model, or name its own file"
        )
    rows = content.get("measurements")
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{key} is {str(path)!r}, which has no measurements; profile again")
    return Profile(found, tuple(_rows(rows, path, key)), content.get("source") or {})


def _rows(rows: list[Any], path: str | Path, key: str) -> Iterable[Measurement]:
    for number, row in enumerate(rows):
        try:
            yield Measurement(**row)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{key} is {str(path)!r}, whose measurement {number} is wrong: {error}"
            ) from None


def _differences(found: LayerShape, wanted: LayerShape) -> str:
    pairs = (
        (name.name, getattr(found, name.name), getattr(wanted, name.name)) for name in fields(LayerShape)
    )
    return ", ".join(f"{name} {there!r} instead of {here!r}" for name, there, here in pairs if there != here)
