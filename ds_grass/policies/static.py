"""`static`: as `grass`, but the importance found by probing is never refreshed (the paper's "GRASS*")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ds_grass.policies.grass import GrassPolicy


@dataclass(frozen=True)
class StaticPolicy(GrassPolicy):
    """The draw of `grass` from probabilities that stay those of the probe."""

    name: ClassVar[str] = "static"
    refreshes: ClassVar[bool] = False
