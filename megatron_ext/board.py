"""Ranks that would do different things are found by name, through the c10d store, before they meet in a collective.

Contract: no collective, an answer within `timeout_s` seconds. Every rank of a group posts a fact under a name and reads
the others'; all ranks that differ raise the same sentence, with global ranks. A rank that never posts is named with
what it posted last: it runs another micro-batch.

In a large group :meth:`Board.compare_with_first` reads less: the first rank reads all, the others read the first.

The store does not grow with a job: a rank deletes what it posted as soon as no peer can still read it. A peer that has
posted a fact is done with the facts before, whether it found them equal or not. So when all have posted one, the own
keys before it go; a comparison that failed deletes nothing, for peers may still come to read it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import Store

TIMEOUT_S = 120.0
"""Long enough for a rank that waits for its data, short enough to be read before the collectives' own time is up."""


class Board:
    """What the ranks of one group tell each other."""

    def __init__(
        self, store: Store, ranks: Sequence[int], rank: int, name: str, timeout_s: float = TIMEOUT_S
    ):
        """`ranks`: global ranks of the group, of which `rank` is this one; `name`: the group's, equal on its ranks."""
        self._store, self._ranks, self._rank = store, list(ranks), rank
        self._name, self._timeout_s = name, timeout_s
        self._times: Counter[str] = Counter()
        self._posted: list[str] = []
        """Own keys that a peer may still read."""

    def compare(self, what: str, fact: Any) -> None:
        """Return when all ranks have posted an equal `fact` for `what`; ValueError or RuntimeError names the others."""
        self._compare(what, fact, self._ranks)

    def compare_with_first(self, what: str, fact: Any) -> None:
        """As :meth:`compare`, but of ranks that differ only those with another fact than the first, and the first, are
        told. Each rank reads one answer, the first all."""
        self._compare(what, fact, self._ranks if self._rank == self._ranks[0] else self._ranks[:1])

    def _compare(self, what: str, fact: Any, whom: Sequence[int]) -> None:
        if len(self._ranks) == 1:
            return
        self._times[what] += 1
        if self._times[what] > 1:  # under the old key a peer's old answer may still be its only one
            what = f"{what} (time {self._times[what]})"
        text = json.dumps(fact, sort_keys=True)
        own = self._key(what, self._rank)
        self._store.set(own, text)
        self._store.set(self._key("latest", self._rank), what)
        before, self._posted = self._posted, [*self._posted, own]
        peers = [rank for rank in whom if rank != self._rank]
        self._wait(lambda: self._store.check([self._key(what, rank) for rank in peers]))
        for rank in peers:
            self._compare_with(rank, what, text)
        if len(peers) < len(self._ranks) - 1:  # of the others it is not known what they have read
            return
        self._delete(before)
        self._posted = [own]

    def _compare_with(self, rank: int, what: str, text: str) -> None:
        key = self._key(what, rank)
        if not self._store.check([key]):
            latest = self._key("latest", rank)
            last = self._store.get(latest).decode() if self._store.check([latest]) else "nothing"
            raise RuntimeError(
                f"rank {rank} did not answer rank {self._rank} about {what} within {self._timeout_s:g} s; what it told "
                f"last is {last}. All ranks of a tensor-parallel group must run the same micro-batches, and where "
                "experts or context are spread, all ranks of a stage the same steps"
            )
        other = self._store.get(key).decode()
        if other != text:
            raise ValueError(
                f"rank {rank} and rank {self._rank}, whose layers run together, differ about {what}: "
                f"{_difference(json.loads(other), json.loads(text))}; start all ranks with the same ds_config, model "
                "and packages"
            )

    def _delete(self, keys: Sequence[str]) -> None:
        """A store of another make may have no deletion; it then keeps a few hundred bytes for every plan."""
        with contextlib.suppress(RuntimeError):
            for key in keys:
                self._store.delete_key(key)

    def _key(self, what: str, rank: int) -> str:
        return f"{self._name}/{what}/{rank}"

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Ask instead of blocking: a blocked TCPStore client holds its lock against the process's other threads."""
        deadline, pause_s = time.monotonic() + self._timeout_s, 0.0005
        while not condition() and time.monotonic() < deadline:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.1)


def _difference(theirs: Any, mine: Any) -> str:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        keys = [key for key in {**theirs, **mine} if theirs.get(key) != mine.get(key)]
        return "; ".join(f"{key} {theirs.get(key)!r} against {mine.get(key)!r}" for key in keys[:4])
    return f"{theirs!r} against {mine!r}"
