"""Bytes that autograd holds from forward to backward, counted while a step runs.

Storages are followed by weak references, each once however many tensors lie in it; what is there anyway (parameters) is
left out. One counts with the size that it has at the moment: Megatron-core empties outputs of what it recomputes while
autograd still holds them. It costs Python for every saved tensor, so it is entered for single steps and left again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


def place_of(tensor: Tensor) -> int:
    """Where a tensor's storage lies."""
    return tensor.untyped_storage().data_ptr()


class SavedBytes:
    """Inside, what is saved for backward and not freed yet."""

    def __init__(self, there: Iterable[int] = ()):
        """`there`: where storages lie that count for nothing (`place_of`)."""
        self._there = set(there)
        self._storages: dict[int, StorageWeakRef] = {}
        """By their C++ object, whose address nobody else gets while there is a weak reference."""
        self._hooks: Any = None
        self.peak = 0
        """The most so far, looked at whenever something is saved."""

    def __enter__(self) -> SavedBytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)

    @property
    def now(self) -> int:
        """Bytes that are held at this moment."""
        return sum(storage.nbytes() for storage in self._alive())

    def places_alive(self) -> set[int]:
        """Where storages lie that nobody has freed."""
        return {storage.data_ptr() for storage in self._alive()}

    def _alive(self) -> Iterator[torch.UntypedStorage]:
        for place, found in list(self._storages.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(found.cdata)
            if storage is None:
                del self._storages[place]
            else:
                yield storage

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._there and storage._cdata not in self._storages:
            self._storages[storage._cdata] = StorageWeakRef(storage)
            self.peak = max(self.peak, self.now)
        return tensor.detach()  # an operator's own result would hold the graph that holds it
