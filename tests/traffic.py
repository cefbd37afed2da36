"""What really goes over a process group: every collective and message of this rank, seen below torch.distributed.

A dispatch mode sees the c10d operators themselves, whoever calls them: the package, or Megatron-core.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_KINDS = {
    "_allgather_base_": ("all_gather", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "send": ("send", 0),
    "allreduce_": ("all_reduce", 0),
}
"""Operator -> what closed forms call it, and the argument that is this rank's input."""
_NOT_COUNTED = {"recv_", "barrier", "monitored_barrier_"}


class Traffic(TorchDispatchMode):
    """Inside, `events` counts (kind, elements, bytes) of this rank's inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.events: Counter[tuple[str, int, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d" and name not in _NOT_COUNTED:
            kind, place = _KINDS[name]
            tensor = args[place]
            tensor = tensor if isinstance(tensor, Tensor) else tensor[0]
            if kind == "all_to_all" and any(args[4]):  # split sizes: two chunks go to their owners
                kind = "exchange"
            self.events[kind, tensor.numel(), tensor.numel() * tensor.element_size()] += 1
        return func(*args, **(kwargs or {}))
