"""A random script of draws, steps and mode changes, played on a StateStore and on a plain dictionary.

Contract: whatever the script does besides drawing and stepping (prefetch in any amount and order, skipped
steps, switching modes, saving and restoring, looking at states) must not change a single bit. The toy AdamW
uses elementary operations only, so that the bits do not depend on how a unit is sliced.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ds_grass.state_store import StateStore

UNITS = {0: 96, 1: 96, 2: 96, 3: 33, 4: 0, 5: 257, 6: 1, 7: 96}
"""Elements of each unit: equal ones, as blocks are; odd, empty and tiny ones; one larger than a slot."""

WITHOUT_MASTER = {1, 6}


def element_bytes(key: int, moment_dtype: torch.dtype) -> int:
    return 4 * (key not in WITHOUT_MASTER) + 2 * moment_dtype.itemsize


def first_weights(device: torch.device | str = "cpu") -> dict[int, Tensor]:
    """bf16 weights of each unit, float32 where the weights are their own master."""
    generator = torch.Generator().manual_seed(5)
    values = {key: torch.randn(numel, generator=generator) for key, numel in UNITS.items()}
    return {
        key: value.to(device, torch.float32 if key in WITHOUT_MASTER else torch.bfloat16)
        for key, value in values.items()
    }


def gradient(key: int, step: int) -> Tensor:
    return torch.randn(UNITS[key], generator=torch.Generator().manual_seed(1000 * step + key))


def adamw_(
    weights: Tensor, master: Tensor | None, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, step: int
) -> None:
    """One AdamW step in place, every intermediate rounded to float32, moments rounded to their own dtype."""
    value = weights if master is None else master
    first = exp_avg.float() * 0.9 + grad * 0.1
    second = exp_avg_sq.float() * 0.99 + grad * grad * 0.01
    exp_avg.copy_(first)
    exp_avg_sq.copy_(second)
    update = (first / (1 - 0.9**step)) / ((second / (1 - 0.99**step)).sqrt() + 1e-8)
    value.copy_(value * (1 - 0.01 * 0.1) - update * 0.01)
    if master is not None:
        weights.copy_(master)


Compute = Callable[[Callable[[], None]], None]
"""Enqueues work on the stream that computes."""


def at_once(work: Callable[[], None]) -> None:
    work()


def new_store(weights: dict[int, Tensor], **options) -> StateStore:
    """A store of all units over `weights`: stream mode, two slots of 64 elements, unless told otherwise."""
    defaults = dict(
        device=weights[0].device,
        moment_dtype=torch.float32,
        pin_memory=True,
        buffers=2,
        slot_numel=64,
        mode="stream",
    )
    store = StateStore(**defaults | options)
    for key, numel in UNITS.items():
        store.add(key, numel, lambda key=key: weights[key], master=key not in WITHOUT_MASTER)
    return store


def random_script(seed: int, length: int = 40) -> list[tuple]:
    """Events (name, arguments ...); every "step" follows an "activate"."""
    rng = random.Random(seed)
    active = rng.sample(list(UNITS), 3)
    script: list[tuple] = [("activate", active)]
    for index in range(length):
        name = rng.choices(
            ["step", "activate", "mode", "round_trip", "look", "skip"], weights=[10, 5, 1, 2, 1, 1]
        )[0]
        if name == "activate":
            active = rng.sample(list(UNITS), rng.randint(0, 5))
            script.append((name, active))
        elif name == "step":
            order = rng.sample(active, len(active))
            ahead = [rng.sample(active, rng.randint(0, len(active))) for _ in range(rng.randint(0, 3))]
            ahead = rng.choice([ahead, [order[: n + 1] for n in range(len(order))]])
            then = rng.choice([None, rng.sample(list(UNITS), rng.randint(0, 4))])
            script.append((name, order, ahead, index, then))
        elif name == "mode":
            script.append((name, rng.choice(["resident", "stream"])))
        elif name in ("round_trip", "look"):
            script.append((name, rng.choice(list(UNITS))))
        else:
            script.append((name, rng.sample(active, len(active))))
    return script


def play_plain(script: Sequence[tuple], moment_dtype: torch.dtype) -> tuple[dict, dict]:
    """The script over a dictionary: final weights, and {key: (master, exp_avg, exp_avg_sq, step)}."""
    weights, states = first_weights(), {}
    for event in script:
        if event[0] == "activate":
            for key in event[1]:
                master = None if key in WITHOUT_MASTER else weights[key].float()
                zeros = torch.zeros(UNITS[key], dtype=moment_dtype)
                states.setdefault(key, [master, zeros, zeros.clone(), 0])
        elif event[0] == "step":
            for key in event[1]:
                states[key][3] += 1
                adamw_(weights[key], *states[key][:3], gradient(key, event[3]), states[key][3])
    return weights, {key: tuple(state) for key, state in states.items()}


def step(
    store: StateStore,
    weights: dict[int, Tensor],
    order: Sequence[int],
    number: int,
    then: Sequence[int] | None = None,
    compute: Compute = at_once,
) -> None:
    """One toy step over the units in `order`; advances their step counts. `then`: guessed to be active next."""
    gradients = {key: gradient(key, number).to(weights[key].device) for key in order}
    for key in order:
        store.steps[key] += 1
    for piece in store.pieces(order, then):
        part = slice(piece.start, piece.stop)
        update = (weights[piece.key][part], *piece[3:], gradients[piece.key][part], store.steps[piece.key])
        compute(lambda update=update: adamw_(*update))


def play(
    script: Sequence[tuple],
    store: StateStore,
    weights: dict[int, Tensor],
    after_event: Callable[[], None] = lambda: None,
    compute: Compute = at_once,
) -> tuple[dict, dict]:
    """The script over a store; the same results as `play_plain`, on the host. `compute` enqueues an update."""
    for event in script:
        name = event[0]
        if name == "activate":
            store.activate(event[1])
        elif name == "step":
            for keys in event[2]:
                store.prefetch(keys)
            step(store, weights, event[1], event[3], event[4], compute)
        elif name == "skip":
            store.prefetch(event[1])
        elif name == "mode":
            store.set_mode(event[1])
        elif name == "round_trip":
            _round_trip(store, event[1])
        else:
            for part in ("master", "exp_avg", "exp_avg_sq"):
                store.view(event[1], part)
        after_event()
    states = {key: tuple(state) for key in UNITS if (state := store.home(key)) is not None}
    return {key: value.cpu() for key, value in weights.items()}, states


def assert_same(played: tuple[dict, dict], plain: tuple[dict, dict]) -> None:
    """Weights and states are equal in every bit, and the same units were drawn."""
    assert played[1].keys() == plain[1].keys()
    for key, expected in plain[0].items():
        assert torch.equal(played[0][key], expected), f"weights of unit {key}"
    for key, expected in plain[1].items():
        assert played[1][key][3] == expected[3]
        for name, got, want in zip(
            ("master", "exp_avg", "exp_avg_sq"), played[1][key], expected, strict=False
        ):
            assert got is want is None or torch.equal(got, want), f"{name} of unit {key}"


def random_sets(seed: int, count: int) -> Iterator[list[int]]:
    """Active sets, one after another."""
    rng = random.Random(seed)
    return (rng.sample(list(UNITS), rng.randint(0, 6)) for _ in range(count))


def _round_trip(store: StateStore, key: int) -> None:
    """Save a unit, damage nothing, load it again."""
    saved = store.home(key)
    if saved is not None:
        copies = [None if tensor is None else tensor.clone() for tensor in saved[:3]]
        store.restore(key, *copies, saved.step)
