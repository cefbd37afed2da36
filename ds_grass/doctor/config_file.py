"""What ``ds_grass doctor --config FILE`` finds out about a ds_config: its block, and what cannot stand beside it.

Contract: the file is read as DeepSpeed reads it (HJSON, which JSON is a part of), checked by the functions that check
a job at its start, and not changed. Every conflict is a finding, not only the first.
Not covered: what it takes a model or an optimizer object to see.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds_grass.config import GrassConfig, parse_block, shown
from ds_grass.conflicts import conflicts_of
from ds_grass.doctor.finding import Finding


def config_file(path: str | Path) -> Iterator[Finding]:
    """Findings about the ds_config at `path`."""
    try:
        ds_config = _read(Path(path))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        cure = "give the file that the job gives to DeepSpeed"
        yield Finding("config", "file", f"{path} cannot be read: {reason}", "problem", cure)
        return
    yield Finding("config", "file", str(path))
    yield from _block(ds_config)


def _block(ds_config: dict[str, Any]) -> Iterator[Finding]:
    if "grass" not in ds_config:
        cure = 'add "grass": {"active_layers": 2}'
        yield Finding(
            "config", "grass", "absent: DeepSpeed runs as if ds_grass were not there", "problem", cure
        )
        return
    try:
        config = parse_block(ds_config["grass"])
    except ValueError as error:
        yield Finding("config", "grass", str(error), "problem", "write what it says")
        return
    if not config.enabled:
        cure = 'remove "enabled": false to run it'
        yield Finding("config", "grass", "switched off by grass.enabled", "note", cure)
        return
    yield Finding("config", "grass", _told(config))
    found = list(conflicts_of(ds_config, config))
    for key, value, why, do in found:
        yield Finding("config", key, f"{shown(value)}, but {why}", "problem", do)
    if not found:
        yield Finding("config", "other keys", "none is in conflict with the block")


def _told(config: GrassConfig) -> str:
    """The keys that were not left at their defaults, or that matter most."""
    given = {"policy": config.policy, "active_layers": config.active_layers}
    given |= {
        key: value for key, value in config.model_dump(exclude_defaults=True).items() if key not in given
    }
    return ", ".join(f"{key} {shown(value)}" for key, value in given.items())


def _read(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    try:
        from hjson import loads
    except ImportError:  # it comes with DeepSpeed
        loads = json.loads
    found = loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"it holds {shown(found)}, not an object")
    return _plain(found)


def _plain(value: Any) -> Any:
    """HJSON makes ordered dictionaries; messages show plain ones."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
