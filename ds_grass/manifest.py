"""The manifest of a checkpoint: which files belong to it, and what is in each of them.

DeepSpeed writes its files one by one and unpickles whatever it finds; `torch.load` takes a flipped bit without
complaint. The manifest is written last, when all files are on the disk, so that a folder without one was not finished,
and it is read first, so that nothing is unpickled that is not what was saved. It carries a checksum of itself.

Contract: JSON, one file a checkpoint folder. Every problem is a `ValueError` of one line that names the file, what was
found, what was expected, and what to do. Not covered: who writes and who verifies which file (`zero/saving.py`,
`zero/loading.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_grass.durable_files import FileRecord, read_record

NAME = "grass_manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What one complete checkpoint consists of."""

    tag: str
    """Name it was saved under; a folder may be renamed later."""
    world_size: int
    """Ranks that saved, model-parallel ones included."""
    zero_stage: int
    versions: Mapping[str, str]
    """Of ds_grass, deepspeed and torch, for whoever reads the file."""
    files: Mapping[str, FileRecord]
    """By name relative to the folder of the checkpoint."""

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(record.nbytes for record in self.files.values())

    def to_json(self) -> str:
        """The text of the manifest file."""
        body = {
            "format": FORMAT,
            "tag": self.tag,
            "world_size": self.world_size,
            "zero_stage": self.zero_stage,
            "versions": dict(self.versions),
            "files": {
                name: {"bytes": record.nbytes, "sha256": record.sha256}
                for name, record in sorted(self.files.items())
            },
        }
        return json.dumps({**body, "sha256": _digest(body)}, indent=1) + "\n"


def read(folder: Path) -> Manifest | None:
    """The manifest of a checkpoint folder; None when it has none. ValueError when it is not what was written."""
    path = folder / NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        body = {key: value for key, value in document.items() if key != "sha256"}
        written = document["sha256"]
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"checkpoint {folder}: {NAME} is damaged ({error}); use another checkpoint"
        ) from error
    if written != _digest(body):
        raise ValueError(
            f"checkpoint {folder}: {NAME} was changed after it was saved; use another checkpoint"
        )
    if body["format"] > FORMAT:
        raise ValueError(
            f"checkpoint {folder}: {NAME} has format {body['format']}, and this ds_grass reads up to {FORMAT}; "
            f"upgrade ds_grass (it was saved by {body['versions'].get('ds_grass', 'a newer one')})"
        )
    return _from_body(body)


def _from_body(body: Mapping[str, Any]) -> Manifest:
    files = {name: FileRecord(entry["bytes"], entry["sha256"]) for name, entry in body["files"].items()}
    return Manifest(body["tag"], body["world_size"], body["zero_stage"], body["versions"], files)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def verify_file(folder: Path, name: str, expected: FileRecord) -> None:
    """Raise ValueError unless the file holds exactly what the manifest says. Reads all of it."""
    path = folder / name
    try:
        nbytes = path.stat().st_size
        if nbytes != expected.nbytes:
            what = "truncated" if nbytes < expected.nbytes else "appended to"
            raise ValueError(
                f"checkpoint {folder}: {name} has {nbytes} bytes but was saved with {expected.nbytes}, so it was "
                f"{what}; use another checkpoint"
            )
        found = read_record(path)
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint {folder}: {name} is missing; use another checkpoint") from error
    except OSError as error:
        raise ValueError(f"checkpoint {folder}: {name} cannot be read ({error})") from error
    if found != expected:
        raise ValueError(
            f"checkpoint {folder}: {name} is not what was saved (its checksum differs); use another checkpoint"
        )


def complete_ones(folder: Path) -> list[str]:
    """Names of the folders in `folder` that have a manifest, the newest first: what a message can offer instead."""
    found = [path.parent for path in folder.glob(f"*/{NAME}") if not path.parent.name.startswith(".")]
    return [path.name for path in sorted(found, key=lambda path: -(path / NAME).stat().st_mtime)]
