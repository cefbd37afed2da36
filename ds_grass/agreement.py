"""Agreement at start: all ranks run the same package on the same config and model, or all say why not.

Purpose: a rank without the package, with another version or with another config would hang the first
collective, or train something else without a word. So every rank posts a few facts to the c10d store before
anything is built. Rank 0 judges, all read its verdict: every rank raises the same error, which names the
ranks that differ, or nothing.

Contract: no collective, and an answer within ``timeout_s`` seconds whatever the others do. When rank 0 is the
one that is missing, the others judge. A rank that fails before it can agree posts that
(:func:`post_failure`), and the others stop at once instead of waiting for it. The store keeps about 1 kB for
every rank.

Not covered: anything after the start, and two launches that share one store and one name.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import Store

_counter = itertools.count()
_MAX_RANKS_NAMED = 8
_MAX_KEYS_NAMED = 6
_ERRORS = {"ValueError": ValueError, "RuntimeError": RuntimeError}


def next_name() -> str:
    """A name for the next engine's agreement: engines are built in the same order on every rank."""
    return f"grass/{next(_counter)}"


def default_store() -> Store:
    """The c10d store of the default process group, under a prefix of ours.

    Raises ``RuntimeError`` when torch.distributed is not initialised or keeps its store elsewhere.
    """
    from torch.distributed import distributed_c10d

    if not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialized, so ranks cannot agree on the `grass` block")
    find_store = getattr(distributed_c10d, "_get_default_store", None)
    if find_store is None:
        raise RuntimeError(
            "torch.distributed.distributed_c10d._get_default_store is missing in torch "
            f"{torch.__version__}; use a version of torch that `ds_grass doctor` calls supported"
        )
    return dist.PrefixStore("ds_grass", find_store())


def agree(
    store: Store,
    rank: int,
    world_size: int,
    facts: Mapping[str, Any],
    timeout_s: float = 60.0,
    name: str = "grass/0",
) -> None:
    """Return when all `world_size` ranks posted equal `facts` under `name`; otherwise raise the same on all.

    `facts` maps what is compared, such as ``"grass.seed"``, to a JSON value. Raises ``ValueError`` when ranks
    differ or one posted a failure of that kind, ``RuntimeError`` when ranks are missing after `timeout_s`
    seconds.
    """
    if world_size == 1:
        return
    board = _Board(store, rank, world_size, name)
    try:
        board.post(facts)
        verdict = board.verdict(timeout_s, until_all_posted=rank == 0)
        if verdict is None:
            board.decide(_judge(board, timeout_s))
            verdict = board.verdict(timeout_s)
        if verdict:
            board.linger(verdict["readers"])
    except dist.DistNetworkError as error:
        raise RuntimeError(
            f"rank {rank} ({_host()}) lost the store that ranks agree through: rank 0, which keeps it, "
            f"probably stopped with an error of its own; see its log ({_first_line(error)})"
        ) from error
    if verdict is None:
        raise RuntimeError(
            f"rank {rank} ({_host()}) heard no verdict within {2 * timeout_s:g} s; see rank 0's log"
        )
    if verdict:
        raise _ERRORS[verdict["kind"]](verdict["message"])


def post_failure(store: Store, rank: int, world_size: int, error: Exception, name: str = "grass/0") -> None:
    """Tell the other ranks that this one stops with `error`; the caller then raises it.

    They raise ``RuntimeError`` if `error` is one and ``ValueError`` otherwise, with its first line. Rank 0,
    which may keep the store, waits up to five seconds for them to read it. A store that is gone is no second
    error.
    """
    if world_size == 1:
        return
    kind = "RuntimeError" if isinstance(error, RuntimeError) else "ValueError"
    board = _Board(store, rank, world_size, name)
    try:
        message = f"rank {rank} (host {_host()}): {_first_line(error)}"
        board.decide({"kind": kind, "message": message, "readers": world_size})
        board.linger(world_size)
    except dist.DistNetworkError:
        return


def ranks_on_node() -> int | None:
    """Processes of this job on this host, as the launcher says: torchrun and DeepSpeed name it differently."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        if os.environ.get(name):
            return int(os.environ[name])
    return None


def facts_of(config: Any, layout: Any, **others: Any) -> dict[str, Any]:
    """What must be equal on all ranks: versions, the keys of the block but ``grass.log``, the layout.

    `config` is a ``GrassConfig``, `layout` a ``Layout``; `others` are added as they are, for example
    ``zero_stage=2``.
    """
    from importlib.metadata import PackageNotFoundError, version

    from . import __version__

    try:
        deepspeed_version = version("deepspeed")
    except PackageNotFoundError:
        deepspeed_version = "unknown"
    keys = _flatten("grass", config.model_dump(mode="json", exclude={"log"}))
    return {
        "ds_grass version": __version__,
        "deepspeed version": deepspeed_version,
        **dict(keys),
        "number of blocks": len(layout.blocks),
        "fingerprint of the model's layout": layout_fingerprint(layout),
        **{key.replace("_", " "): value for key, value in others.items()},
    }


def layout_fingerprint(layout: Any) -> str:
    """Twelve hex digits over the names and element counts of all blocks and outer parameters, in order."""
    import hashlib

    def describe(params: Iterable[tuple[str, Any]]) -> list[tuple[str, int]]:
        return [(name, getattr(p, "ds_numel", None) or p.numel()) for name, p in params]

    content = [[block.name, describe(block.params)] for block in layout.blocks]
    text = json.dumps([content, describe(layout.outer)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class _Board:
    """The keys of one agreement: a post of every rank, one verdict ({} = all agree), and who has read it."""

    store: Store
    rank: int
    world_size: int
    name: str

    def post(self, facts: Mapping[str, Any]) -> None:
        place = {"LOCAL_RANK": os.environ.get("LOCAL_RANK"), "LOCAL_WORLD_SIZE": ranks_on_node()}
        post = {"host": _host(), "place": place, "facts": dict(facts)}
        self.store.set(self._key(self.rank), json.dumps(post, default=str))

    def posts(self) -> dict[int, dict[str, Any]]:
        ranks = range(self.world_size)
        if not self.store.check([self._key(rank) for rank in ranks]):
            ranks = [rank for rank in ranks if self.store.check([self._key(rank)])]
        return {rank: json.loads(self.store.get(self._key(rank))) for rank in ranks}

    def decide(self, verdict: Mapping[str, Any]) -> None:
        """Write the verdict, unless another rank was first."""
        if self.store.add(f"{self.name}/judges", 1) == 1:
            self.store.set(f"{self.name}/verdict", json.dumps(verdict))

    def verdict(self, timeout_s: float, *, until_all_posted: bool = False) -> dict[str, Any] | None:
        """The verdict, or None when the time is up or, if so asked, as soon as all ranks have posted.

        Asks instead of blocking in ``Store.wait``: that holds the lock of a TCPStore's client, which other
        threads of the process use as well, and writes lines of its own to the log when its time is up.
        """
        verdict = [f"{self.name}/verdict"]
        keys = [self._key(rank) for rank in range(self.world_size)]
        _poll(lambda: self.store.check(verdict) or (until_all_posted and self.store.check(keys)), timeout_s)
        return json.loads(self.store.get(verdict[0])) if self.store.check(verdict) else None

    def linger(self, readers: int, timeout_s: float = 5.0) -> None:
        """Say that this rank knows the bad verdict; rank 0 may keep the store and waits for `readers`."""
        key = f"{self.name}/readers"
        self.store.add(key, 1)
        if self.rank == 0:
            _poll(lambda: self.store.add(key, 0) >= readers, timeout_s)

    def _key(self, rank: int) -> str:
        return f"{self.name}/rank{rank}"


def _judge(board: _Board, timeout_s: float) -> dict[str, Any]:
    """{} when all ranks posted the same, else the kind of the error, its text and how many will read it."""
    posts = board.posts()
    missing = [rank for rank in range(board.world_size) if rank not in posts]
    if missing:
        named = _names(missing, lambda rank: _host_of(rank, posts))
        message = (
            f"{named} did not answer within {timeout_s:g} s; check there that ds-grass is installed "
            "(`ds_grass doctor`), that TORCH_DEVICE_BACKEND_AUTOLOAD is not 0, that ds_config has the same "
            "`grass` block, and that the script reached deepspeed.initialize"
        )
        return {"kind": "RuntimeError", "message": message, "readers": len(posts)}
    differences = _differences({rank: post["facts"] for rank, post in posts.items()}, posts)
    if not differences:
        return {}
    more = f"; and {len(differences) - _MAX_KEYS_NAMED} more" if len(differences) > _MAX_KEYS_NAMED else ""
    message = "; ".join(differences[:_MAX_KEYS_NAMED]) + more
    message += "; start all ranks with the same ds_config, model and packages"
    return {"kind": "ValueError", "message": message, "readers": board.world_size}


def _differences(facts: Mapping[int, Mapping[str, Any]], posts: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """One sentence for every key and value that differs from rank 0's."""
    known = dict.fromkeys(key for rank in sorted(facts) for key in facts[rank])
    shared = [key for key in known if all(key in facts[rank] for rank in facts)]
    # A disabled block or another version has other keys; they add nothing to what the shared ones say.
    differs = any(facts[rank][key] != facts[0][key] for key in shared for rank in facts)
    sentences = []
    for key in shared if differs else known:
        ranks_by_value: dict[str, list[int]] = {}
        for rank in sorted(facts):
            value = json.dumps(facts[rank][key]) if key in facts[rank] else "nothing"
            ranks_by_value.setdefault(value, []).append(rank)
        (reference, _), *others = ranks_by_value.items()
        for value, ranks in others:
            named = _names(ranks, lambda rank: posts[rank]["host"])
            verb = "has" if len(ranks) == 1 else "have"
            zero = f"rank 0 (host {posts[0]['host']}) has {reference}"
            sentences.append(f"{named} {verb} {key} {value}, {zero}")
    return sentences


def _host_of(rank: int, posts: Mapping[int, Mapping[str, Any]]) -> str | None:
    """The host of a rank that did not post, from one that did on its node: launchers number nodes in turn."""
    for other, post in posts.items():
        local_world_size = int(post["place"]["LOCAL_WORLD_SIZE"] or 0)
        if local_world_size and rank // local_world_size == other // local_world_size:
            return post["host"]
    return None


def _names(ranks: list[int], host_of: Callable[[int], str | None]) -> str:
    """``rank 3 (host b)``, or ``ranks 2 and 3 (host b), 5 (host c)`` with neighbours of one host together."""
    groups: list[str] = []
    for host, members in itertools.groupby(ranks[:_MAX_RANKS_NAMED], host_of):
        numbers = " and ".join(str(rank) for rank in members)
        groups.append(f"{numbers} (host {host or 'unknown'})")
    more = f" and {len(ranks) - _MAX_RANKS_NAMED} more" if len(ranks) > _MAX_RANKS_NAMED else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(groups)}{more}"


def _flatten(prefix: str, tree: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(f"{prefix}.{key}", value)
        else:
            yield f"{prefix}.{key}", value


def _poll(condition: Callable[[], bool], timeout_s: float) -> None:
    """Return when `condition` holds or the time is up; asks ever more rarely, at least every 0.2 s."""
    deadline = time.monotonic() + timeout_s
    pause_s = 0.002
    while not condition() and time.monotonic() < deadline:
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.2)


def _host() -> str:
    return socket.gethostname()


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
