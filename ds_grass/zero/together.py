"""Ranks that meet and go on, or fail, together.

What one rank alone finds out (a full disk, a file that was damaged) must stop all of them: a rank that raises by
itself leaves the others in a collective until its timeout.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

_KINDS = {"ValueError": ValueError, "RuntimeError": RuntimeError}


def together(value: Any = None, error: Exception | None = None) -> list[Any]:
    """Return every rank's `value`, by rank; if any rank brings an `error`, raise the same one on all.

    Collective over all ranks; `value` is small and made of plain Python objects. What is raised is a `ValueError`
    when the first failing rank brought one, else a `RuntimeError`; other ranks' first lines follow.
    """
    if world_size() == 1:
        if error is not None:
            raise _of_kind(error)(_text(error)) from error
        return [value]
    kind = "ValueError" if isinstance(error, ValueError) else "RuntimeError"
    mine = (value, None if error is None else (kind, f"{_text(error)}", socket.gethostname()))
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, mine)
    failures = [(place, *failure) for place, (_, failure) in enumerate(everyone) if failure is not None]
    if failures:
        raise _KINDS[failures[0][1]](_summary(failures)) from error
    return [value for value, _ in everyone]


def attempt(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What `work` returns, or what it raises, for `together` to raise on all ranks.

    Whatever that is: a rank that ends by itself leaves the others waiting, and pickling runs the script's own code.
    """
    try:
        return work(), None
    except Exception as error:
        return None, error


def rank() -> int:
    """This process among all; 0 where nothing is distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _summary(failures: list[tuple[int, str, str, str]]) -> str:
    """One line: what the first rank said, and who said it; the same sentence of other ranks is not repeated."""
    ranks_by_text: dict[str, list[str]] = {}
    for place, _, text, host in failures:
        ranks_by_text.setdefault(text, []).append(f"rank {place} (host {host})")
    return "; ".join(f"{', '.join(ranks[:4])}: {text}" for text, ranks in list(ranks_by_text.items())[:3])


def _of_kind(error: Exception) -> type[Exception]:
    return ValueError if isinstance(error, ValueError) else RuntimeError


def _text(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
