"""Which ds_config holds the ``megatron_ext`` block, for scripts that were not written to name one.

Contract: :func:`locate` takes what :func:`megatron_ext.apply` was given, else the file that ``MEGATRON_EXT_CONFIG``
names, else the one that ``--deepspeed_config`` names in the script's arguments; None where there is no block. Two
sources that name different files are an error, as is whatever cannot be read: one line of ``ValueError``. The variable
only ever names a file. A file is read as DeepSpeed reads it: JSON, HJSON where that package is there, and in the
argument also base64; a key that is there twice is refused.
Nothing but the standard library is imported. Not covered: what the block says (:mod:`megatron_ext.config`).
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

VARIABLE = "MEGATRON_EXT_CONFIG"
OPTIONS = ("--deepspeed_config", "--deepspeed-config")
_APPLY = "megatron_ext.apply"
_BLOCK = "megatron_ext"


@dataclass(frozen=True)
class Located:
    """A ds_config that has a block, and how it was found."""

    source: str
    """MEGATRON_EXT_CONFIG, --deepspeed_config or megatron_ext.apply."""

    path: Path | None
    """Absolute; None where no file was named."""

    ds_config: Mapping[str, Any]

    @property
    def block(self) -> Any:
        """As it was written, not checked."""
        return self.ds_config[_BLOCK]

    def __str__(self) -> str:
        return f"{self.source}: {self.path or 'no file'}"


def locate(
    given: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    arguments: Sequence[str] | None = None,
) -> Located | None:
    """The ds_config with the block, or None. `environment`, `arguments`: default os.environ and sys.argv[1:]."""
    if isinstance(given, Mapping):
        return _located(_APPLY, None, given)
    environment = os.environ if environment is None else environment
    arguments = sys.argv[1:] if arguments is None else arguments
    named = list(_named(given, environment, arguments))
    if not named:
        return None
    _refuse_different_files(named)
    source, text = named[0]
    inline = _decoded(text) if source in OPTIONS and not Path(text).exists() else None
    if inline is not None:
        return _located(source, None, inline)
    path = Path(text).absolute()  # the script may change its directory later
    return _located(source, path, read(path, source))


def read(path: Path, source: str) -> dict[str, Any]:
    """The object that a file holds. ValueError says in one line what is wrong, and that `source` names it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a null byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"{source} names {path}, which cannot be read ({reason}); name the ds_config.json that holds the "
            f"{_BLOCK} block"
        ) from None
    try:
        found = _parsed(text)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{source} names {path}, which is not JSON ({reason}); repair that file") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{source} names {path}, which holds a JSON {type(found).__name__}; allowed: an object with the "
            f'key "{_BLOCK}"; repair that file'
        )
    return found


def _located(source: str, path: Path | None, ds_config: Mapping[str, Any]) -> Located | None:
    if _BLOCK in ds_config:
        return Located(source, path, ds_config)
    if source not in OPTIONS:  # whoever names a file for us, and for nobody else, expects something to happen
        where = str(path) if path else "the dictionary"
        logger.warning(
            "%s: %s has no %s block, so Megatron-core runs as it is; add one", source, where, _BLOCK
        )
    return None


def _named(
    given: str | os.PathLike[str] | None, environment: Mapping[str, str], arguments: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """(source, what it names), the strongest first."""
    if given is not None:
        yield _APPLY, os.fspath(given)
    if environment.get(VARIABLE):
        yield VARIABLE, environment[VARIABLE]
    option = _last_option(arguments)
    if option is not None:
        yield option


def _last_option(arguments: Sequence[str]) -> tuple[str, str] | None:
    """(option, value) as argparse would have it: the last one given. One without a value is the script's to refuse."""
    found = None
    for argument, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        option, equals, value = argument.partition("=")
        if option not in OPTIONS:
            continue
        if equals and value:
            found = option, value
        elif not equals and following and not following.startswith("--"):
            found = option, following
    return found


def _refuse_different_files(named: list[tuple[str, str]]) -> None:
    (first, path), *others = named
    for source, other in others:
        if os.path.realpath(path) != os.path.realpath(other):
            raise ValueError(
                f"{first} names {path} but {source} names {other}; allowed: one ds_config for the whole job; "
                f"name the same file in both, or leave {source} away"
            )


def _decoded(text: str) -> dict[str, Any] | None:
    """The object that DeepSpeed would find in an argument that is no file but base64; None where there is none."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+={0,2}", text):
        return None
    try:
        found = _parsed(base64.urlsafe_b64decode(text).decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        try:
            import hjson
        except ImportError:  # it comes with DeepSpeed
            raise error from None
    try:
        return hjson.loads(text, object_pairs_hook=_without_duplicates)
    except hjson.HjsonDecodeError:
        return json.loads(text)  # raises, and its message is the one that people know


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [name for name, _ in pairs]
        twice = sorted({name for name in keys if keys.count(name) > 1})
        raise ValueError(f"{', '.join(twice)}: there twice in one object")
    return found
