"""Bytes alive on the planned device, tensor by tensor, while a replay runs on the meta device.

Contract: inside `with ledger:` every storage that any operation makes, forward, backward or in a hook, counts from then
until it is freed, under the kind that was set when it was made. `peak` says how much was alive at the most, of what
kind, in which phase and module. Meta tensors have shapes and storages, and no data: no memory is used.

Not covered: what an allocator adds (rounding, fragmentation), and scratch space inside one kernel.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WEIGHTS, GATHERED, STATES, GRADIENTS, IN_FLIGHT, ACTIVATIONS = (
    "weights",
    "gathered weights",
    "optimizer states",
    "gradients",
    "gradients in flight",
    "activations",
)
KINDS = (WEIGHTS, GATHERED, STATES, GRADIENTS, IN_FLIGHT, ACTIVATIONS)
"""From the bottom of the picture to its top; what is not said to be another kind is an activation or a temporary."""


@dataclass(frozen=True)
class Moment:
    """What was alive at one time, in bytes by kind, and what was running."""

    held: tuple[int, ...]
    """In the order of KINDS."""
    phase: str
    place: str

    @property
    def total_bytes(self) -> int:
        return sum(self.held)

    def of(self, kind: str) -> int:
        """Bytes of one kind."""
        return self.held[KINDS.index(kind)]


@dataclass
class _Storage:
    reference: weakref.ref
    nbytes: int
    kind: int


class Ledger(TorchDispatchMode):
    """Counts storages; `phase` and `place` are written by whoever drives the replay."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = self.place = ""
        self.peak = Moment((0,) * len(KINDS), "", "")
        self.history: list[Moment] | None = None
        """Every change, while it is a list."""
        self._held = [0] * len(KINDS)
        self._kind = KINDS.index(ACTIVATIONS)
        self._known: dict[int, _Storage] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return result

    @contextlib.contextmanager
    def holding(self, kind: str) -> Iterator[None]:
        """What is made inside is of this kind."""
        before, self._kind = self._kind, KINDS.index(kind)
        try:
            yield
        finally:
            self._kind = before

    def assign(self, tensor: torch.Tensor, kind: str) -> None:
        """From now on the tensor's memory counts as `kind`."""
        known = self._known[tensor.untyped_storage()._cdata]
        self._held[known.kind] -= known.nbytes
        known.kind = KINDS.index(kind)
        self._held[known.kind] += known.nbytes

    def leave_out(self, tensor: torch.Tensor) -> None:
        """The tensor's memory does not count, now or later."""
        self._count(tensor)
        known = self._known[tensor.untyped_storage()._cdata]
        self._held[known.kind] -= known.nbytes
        known.nbytes = 0

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """What is made inside does not count, unless it meets an operation later."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    @property
    def now(self) -> Moment:
        return Moment(tuple(self._held), self.phase, self.place)

    def start_peak(self) -> None:
        """Let the peak begin again at what is alive now."""
        self.peak = self.now

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._known:
            return
        known = _Storage(weakref.ref(storage, lambda _: self._forget(address)), storage.nbytes(), self._kind)
        self._known[address] = known
        self._held[known.kind] += known.nbytes
        self._note()

    def _forget(self, address: int) -> None:
        known = self._known.pop(address)
        self._held[known.kind] -= known.nbytes
        self._note()

    def _note(self) -> None:
        if self.history is not None:
            self.history.append(self.now)
        if sum(self._held) > self.peak.total_bytes:
            self.peak = self.now


def name_places(model: nn.Module, ledger: Ledger) -> None:
    """Let the ledger know which module runs, or is being differentiated."""

    def at(place: str) -> None:
        ledger.place = place

    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        module.register_forward_pre_hook(lambda *_, name=name: at(name or "model"))

        def after(
            module: nn.Module, inputs: Any, output: Any, name: str = name, parent: str = parent
        ) -> None:
            at(parent or "loss")
            first = output[0] if isinstance(output, tuple | list) and output else output
            if name and isinstance(first, Tensor) and first.requires_grad:
                first.register_hook(lambda gradient: at(name))

        module.register_forward_hook(after)
