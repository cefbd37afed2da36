"""The list of distributed cases: a decorator, products of factors, and which cells of a product the quick run takes.

Contract: a case is a function `case(ctx, **cell)` that runs on every rank of a group and raises when its promise is
broken; what it returns (JSON-able) is kept per rank. Modules named `cases_*.py` in this folder hold them and import
DeepSpeed only inside functions, so that collecting costs nothing. Not covered: running them (harness.py).
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEFAULT_TIMEOUT_SECONDS = 90


@dataclass(frozen=True)
class Case:
    """One cell: the function `target` ("module:name") with `kwargs` on `world_size` ranks.

    `alone` gives the case a process group of its own, for cases that leave a group unusable or set the environment.
    """

    id: str
    target: str
    world_size: int
    kwargs: Mapping[str, Any]
    slow: bool = False
    alone: bool = False
    timeout_seconds: int = DEFAULT_TIMEOUT_SECONDS
    environment: Sequence[Mapping[str, str]] = field(default=())


CASES: list[Case] = []


def covering(factors: Mapping[str, Sequence[Any]], strength: int = 2) -> list[dict[str, Any]]:
    """Return few cells of the product in which every `strength` values of different factors meet.

    2 = all pairs, 1 = every value once. Greedy, and always the same.
    """
    names = list(factors)
    cells = [dict(zip(names, values, strict=True)) for values in itertools.product(*factors.values())]
    strength = min(strength, len(names))
    wanted = {group for cell in cells for group in _groups(cell, strength)}
    chosen = []
    while wanted:
        best = max(cells, key=lambda cell: len(wanted & _groups(cell, strength)))
        chosen.append(best)
        wanted -= _groups(best, strength)
    return chosen


def _groups(cell: Mapping[str, Any], strength: int) -> set[tuple]:
    return set(itertools.combinations([(name, repr(value)) for name, value in cell.items()], strength))


def case(
    *,
    ranks: Iterable[int] = (2,),
    strength: int = 2,
    most_quick: int | None = None,
    thorough: int | None = None,
    slow: bool = False,
    alone: bool = False,
    timeout_seconds: int = DEFAULT_TIMEOUT_SECONDS,
    environment: Sequence[Mapping[str, str]] = (),
    **factors: Sequence[Any],
) -> Callable[[Callable], Callable]:
    """Register every cell of `ranks` x `factors`; the quick run takes a `covering` subset, the slow run all of them.

    `most_quick`: the quick run takes no more cells than these, the first ones, which differ most.
    `thorough`: the slow run takes a `covering` subset too, of this strength, where the whole product takes too long.
    """

    def register(function: Callable) -> Callable:
        product = {"ranks": list(ranks), **{name: list(values) for name, values in factors.items()}}
        names = list(product)
        covers = covering(product, strength)
        quick = covers[:most_quick]
        chosen = None if thorough is None else covering(product, thorough) + covers
        for values in itertools.product(*product.values()):
            cell = dict(zip(names, values, strict=True))
            if chosen is not None and cell not in chosen:
                continue
            label = "-".join(f"{name}={_label(value)}" for name, value in cell.items())
            kwargs = {name: value for name, value in cell.items() if name != "ranks"}
            CASES.append(
                Case(
                    id=f"{function.__name__}[{label}]",
                    target=f"{function.__module__}:{function.__name__}",
                    world_size=cell["ranks"],
                    kwargs=kwargs,
                    slow=slow or cell not in quick,
                    alone=alone,
                    timeout_seconds=timeout_seconds,
                    environment=tuple(environment),
                )
            )
        return function

    return register


def _label(value: Any) -> str:
    """Return a short name for a value; a long list is told by its length."""
    if isinstance(value, str) or len(str(value)) <= 20:
        return str(value).replace(" ", "_")
    return f"{len(value)}_of_them"


def load_cases() -> list[Case]:
    """Import every `cases_*.py` of this folder and return all registered cases."""
    for path in sorted(Path(__file__).parent.glob("cases_*.py")):
        importlib.import_module(f"tests.distributed.{path.stem}")
    return CASES
