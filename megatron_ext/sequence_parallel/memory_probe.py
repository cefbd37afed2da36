"""Bytes that one run of a layer keeps from forward to backward, and the most it holds above these.

Kept bytes are those of the storages that autograd saves, each once, without what is there anyway: weights, tables that
all layers share, buffers of the host that outlive a run. On a GPU the most is the allocator's own count; on a CPU,
which counts nothing, storages are followed operator by operator, without what a kernel takes for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .. import device_peak
from ..saved_bytes import SavedBytes, place_of


def measure(run: Callable[[], Tensor], layer_input: Tensor, shared: Iterable[Tensor]) -> tuple[int, int]:
    """(kept, transient) bytes of `run`, a forward from `layer_input` whose output is run backward here.

    `shared`: tensors that are there anyway. The output is not counted: it is the next layer's input, and kept there.
    Runs twice: what the first run used and is alive after it belongs to nobody's backward.
    """
    there = {place_of(tensor) for tensor in shared}
    saved, followed = SavedBytes(there), _Followed(there)
    with followed:
        with saved:
            output = run()
        output.backward(torch.ones_like(output))
    del output
    there |= (saved.places_alive() | followed.places_alive()) - {place_of(layer_input)}

    saved = SavedBytes(there)
    counter = (
        _Allocator(layer_input.device) if layer_input.is_cuda else _Followed(there | {place_of(layer_input)})
    )
    with counter:
        with saved:
            output = run()
        kept, size = saved.now, output.untyped_storage().nbytes()
        output.backward(torch.ones_like(output))
    held = counter.peak_bytes + layer_input.untyped_storage().nbytes() - size
    return kept, max(0, held - kept)


class _Allocator:
    """The most that is allocated inside, by PyTorch's allocator for GPUs."""

    def __init__(self, device: torch.device):
        self._device = device
        self.peak_bytes = 0

    def __enter__(self) -> None:
        self._profiled = device_peak.profiled(self._device)
        self._profiled.__enter__()
        self._before = torch.cuda.memory_allocated(self._device)

    def __exit__(self, *exception: Any) -> None:
        self.peak_bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        self._profiled.__exit__(*exception)


class _Followed(TorchDispatchMode):
    """The most that lives inside of storages that operators take and return, but for those that were there."""

    def __init__(self, there: set[int]) -> None:
        super().__init__()
        self._there = there
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = 0

    def places_alive(self) -> set[int]:
        """Where storages lie that nobody has freed."""
        return {place for place, (reference, _) in self._alive.items() if not reference.expired()}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of((args, kwargs, result)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._there:
                self._alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {place: found for place, found in self._alive.items() if not found[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._alive.values()))
        return result


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """All in a tree of dicts, tuples and lists."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from tensors_of(list(tree.values()))
    elif isinstance(tree, tuple | list):
        for branch in tree:
            yield from tensors_of(branch)
