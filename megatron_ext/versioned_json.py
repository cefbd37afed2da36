"""Our own JSON files: an object that names its format and version, or a ValueError that names the key and the cure."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any


def write_whole(path: str | Path, text: str) -> None:
    """Whole or not at all: a job may be killed, and jobs that start together may write the same file."""
    path = Path(path)
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.new")  # nobody else's, on whatever node
    try:
        beside.write_text(text)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_versioned(
    path: str | Path, key: str, form: str, version: int, *, noun: str, again: str
) -> dict[str, Any]:
    """The object in the file that `key` names. `noun`: what it is; `again`: what to do about one of another version."""
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(
            f"{key} is {str(path)!r}, which cannot be read ({error.strerror}); name a {noun}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{key} is {str(path)!r}, which is not JSON ({error}); name a {noun}") from None
    if not isinstance(content, dict) or content.get("format") != form:
        raise ValueError(f"{key} is {str(path)!r}, which is no {noun} (format {form!r}); name a {noun}")
    if content.get("version") != version:
        raise ValueError(
            f"{key} is {str(path)!r} of version {content.get('version')!r}; allowed: {version}; {again}"
        )
    return content
