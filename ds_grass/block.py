"""What every block of ds_config.json has in common: strict types, and the one line said when a value is wrong.

Contract: :func:`parse` turns a block into its frozen model or raises ``ValueError`` with a single line: which key, what
was given, what is allowed, what to do. Types are strict: ``true`` is no integer, ``2.0`` is no integer, NaN is no
number. No value is ever ``"auto"``, the word that the Trainer and Accelerate claim for the whole file.
Not covered: what the keys of a block are and how they go together (:mod:`ds_grass.config`,
:mod:`megatron_ext.config`).
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

LARGEST = 2**31 - 1

_printer = reprlib.Repr()
_printer.maxstring = _printer.maxother = 60


class Block(BaseModel):
    """A JSON object: the block itself, or one inside it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


_AnyBlock = TypeVar("_AnyBlock", bound=Block)
_Path = tuple[str, ...]
_Objects = dict[_Path, type[Block]]


def key(default: Any, allowed: str, *, write: str | None = None, **bounds: Any) -> Any:
    """A field with what its error message says: the `allowed` values, and what to `write` (the default)."""
    write = write or json.dumps(default)
    return Field(default, json_schema_extra={"allowed": allowed, "write": write}, **bounds)


def whole(smallest: int, largest: int = LARGEST) -> str:
    """How messages name an integer between two bounds."""
    return f"an integer from {smallest} to {largest}"


def distinct(names: list[str]) -> list[str]:
    """The names, if none is there twice."""
    if len(set(names)) != len(names):
        raise ValueError("one is named twice")
    return names


def _file_name(path: str) -> str:
    if path == "auto" or not path.strip() or b"\0" in os.fsencode(path):
        raise ValueError("not a file name")
    return path


FileName = Annotated[str, AfterValidator(_file_name)]


def shown(value: object) -> str:
    """`value` as error messages quote it: its repr, shortened, on one line."""
    try:
        return " ".join(_printer.repr(value).splitlines())
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        return f"<{type(value).__name__} too long to print>"


def parse(block: object, model: type[_AnyBlock], name: str, example: str) -> _AnyBlock:
    """`block`, which ds_config calls `name`, as a `model`; `example` is shown to who writes no object.

    Raises ``ValueError`` with one line about the first key that is wrong.
    """
    if not isinstance(block, dict):
        raise ValueError(
            f'{name} is {shown(block)}; allowed: an object such as {example}; write "{name}": {{}} '
            "to take every default, or remove the key"
        )
    objects = dict(_objects(model))
    for parent, unknown in _unknown_keys(block, objects):
        raise ValueError(
            _describe_unknown(name, objects, parent, unknown, shown(_at(block, parent)[unknown]))
        )
    try:
        return model.model_validate(block)
    except ValidationError as wrong:
        raise ValueError(_describe_values(name, objects, wrong, block)) from None


def fingerprint(config: Block) -> str:
    """SHA-256 (hex) of all that must agree between ranks: every key but those of the log."""
    agreed = config.model_dump(exclude={"log"})
    return hashlib.sha256(json.dumps(agreed, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _objects(model: type[Block], path: _Path = ()) -> Iterator[tuple[_Path, type[Block]]]:
    """`model` and the objects inside it, by their place."""
    yield path, model
    for leaf, field in model.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Block):
                yield from _objects(kind, (*path, leaf))


def _at(block: Any, path: _Path) -> Any:
    for leaf in path:
        block = block.get(leaf) if isinstance(block, dict) else None
    return block


def _dotted(name: str, parent: _Path, leaf: object) -> str:
    readable = isinstance(leaf, str) and leaf.isidentifier() and len(leaf) < 60
    return ".".join((name, *parent, leaf if readable else shown(leaf)))


def _unknown_keys(block: dict[Any, Any], objects: _Objects) -> Iterator[tuple[_Path, object]]:
    for parent, model in objects.items():
        given = _at(block, parent)
        for leaf in given if isinstance(given, dict) else ():
            if not (isinstance(leaf, str) and leaf in model.model_fields):
                yield parent, leaf


def _describe_unknown(name: str, objects: _Objects, parent: _Path, unknown: object, given: str) -> str:
    here = objects[parent].model_fields
    names = {
        leaf: _dotted(name, path, leaf) for path, model in objects.items() for leaf in model.model_fields
    }
    names |= {leaf: _dotted(name, parent, leaf) for leaf in here}
    typed = str(unknown)[:60].lower() if isinstance(unknown, str) else ""
    near = get_close_matches(typed, here, 1) or get_close_matches(typed, names, 1)
    advice = f"did you mean {names[near[0]]}?" if near else "remove it"
    dotted, allowed = _dotted(name, parent, unknown), ", ".join(here)
    return f"{dotted} is {given}, but there is no such key; allowed: {allowed}; {advice}"


def _describe_values(name: str, objects: _Objects, wrong: ValidationError, block: dict[Any, Any]) -> str:
    """What is wrong with the first key, and the names of the others."""
    errors = wrong.errors(include_url=False, include_input=False)
    if errors[0]["loc"] in objects and "error" in errors[0].get("ctx", {}):  # from a rule about keys together
        return str(errors[0]["ctx"]["error"])
    paths = [_key_of(error["loc"], objects) for error in errors]
    *parent, leaf = path = paths[0]
    given = shown(_at(block, path))
    allowed = objects[tuple(parent)].model_fields[leaf].json_schema_extra
    auto = ", a word that is for the Trainer and Accelerate only" if given == "'auto'" else ""
    dotted = _dotted(name, tuple(parent), leaf)
    others = sorted({_dotted(name, p[:-1], p[-1]) for p in paths} - {dotted})
    also = f" (also wrong: {', '.join(others)})" if others else ""
    return (
        f'{dotted} is {given}{auto}; allowed: {allowed["allowed"]}; write "{leaf}": {allowed["write"]}{also}'
    )


def _key_of(location: tuple[Any, ...], objects: _Objects) -> _Path:
    """A location goes on into union branches and list indices; the key is what comes before those."""
    length = 1
    while length < len(location) and location[:length] in objects:
        length += 1
    return location[:length]
