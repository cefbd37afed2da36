"""What was measured of each strategy, and the file that keeps it.

Contract: the file is JSON: a format's name and version, and for each shape of layer where it was measured, and rows.
That is all that a cost model is made from, so models are saved by saving their profiles and fitted anew when they are
loaded: no pickle. A file of another version, or one without the layer that is looked for, is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from megatron_ext.sequence_parallel.layer_shape import LayerShape
from megatron_ext.sequence_parallel.names import STRATEGIES
from megatron_ext.versioned_json import read_versioned, write_whole

FORMAT = "megatron_ext.sequence_parallel.profile"
VERSION = 2


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

    def merged(self, newer: Profile) -> Profile:
        """Both, of one shape; of what both have measured the newer measurement."""
        rows = {
            (row.strategy, row.batch, row.length): row for row in (*self.measurements, *newer.measurements)
        }
        return replace(newer, measurements=tuple(rows.values()))

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        return {
            "shape": self.shape.to_json(),
            "source": dict(self.source),
            "measurements": [asdict(row) for row in self.measurements],
        }

    @classmethod
    def from_json(cls, given: Any, where: str) -> Profile:
        """ValueError names `where`."""
        if not isinstance(given, dict):
            raise ValueError(f"{where} is {given!r}, no object; profile again")
        rows = given.get("measurements")
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{where} has no measurements; profile again")
        shape = LayerShape.from_json(given.get("shape"), f"{where}: shape")
        return cls(shape, tuple(_rows(rows, where)), given.get("source") or {})


def save_profiles(path: str | Path, profiles: Iterable[Profile]) -> None:
    """One of each shape, in one file. OSError."""
    layers = [profile.to_json() for profile in profiles]
    content = {"format": FORMAT, "version": VERSION, "layers": layers}
    write_whole(path, json.dumps(content, indent=1) + "\n")


def load_profiles(path: str | Path, key: str = "cost_model.load") -> list[Profile]:
    """All that a file has, at least one. ValueError names `key`."""
    content = read_versioned(path, key, FORMAT, VERSION, noun="profile", again="profile again")
    layers = content.get("layers")
    if not isinstance(layers, list) or not layers:
        raise ValueError(f"{key} is {str(path)!r}, which has no layers; profile again")
    return [
        Profile.from_json(layer, f"{key} is {str(path)!r}, whose layer {number}")
        for number, layer in enumerate(layers)
    ]


def load_profile(path: str | Path, shape: LayerShape, key: str = "cost_model.load") -> Profile:
    """The profile of a layer of this shape. ValueError names `key`, and what differs in the layer that is closest."""
    return profile_of(shape, load_profiles(path, key), path, key)


def profile_of(shape: LayerShape, profiles: Iterable[Profile], path: str | Path, key: str) -> Profile:
    """As :func:`load_profile`, of what the file at `path` was found to have."""
    found = {profile.shape: profile for profile in profiles}
    if shape in found:
        return found[shape]
    closest = min((_differences(other, shape) for other in found), key=len)
    which = "another layer" if len(found) == 1 else f"{len(found)} other layers; of the closest"
    raise ValueError(
        f"{key} is {str(path)!r}, measured of {which} ({', '.join(closest)}); profile this model, or name its own file"
    )


def _rows(rows: list[Any], where: str) -> Iterable[Measurement]:
    for number, row in enumerate(rows):
        try:
            yield Measurement(**row)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} has a measurement {number} that is wrong: {error}") from None


def _differences(found: LayerShape, wanted: LayerShape) -> list[str]:
    pairs = (
        (name.name, getattr(found, name.name), getattr(wanted, name.name)) for name in fields(LayerShape)
    )
    return [f"{name} {there!r} instead of {here!r}" for name, there, here in pairs if there != here]
