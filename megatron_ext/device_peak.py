"""The most that PyTorch's allocator has held on a device since somebody began to watch.

PyTorch counts one peak a device, which starts anew for all when anyone resets it. A layer may be profiled in the middle
of a step that is being watched; so whoever resets goes through here, and what was reached before is not forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_before_profiles: dict[torch.device, int] = {}
"""Peaks since the watch began that a profile has reset."""


def watch(device: torch.device) -> None:
    """Count from here."""
    _before_profiles.pop(device, None)
    torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Since the last `watch`, or since the process began."""
    return max(torch.cuda.max_memory_allocated(device), _before_profiles.get(device, 0))


@contextmanager
def profiled(device: torch.device) -> Iterator[None]:
    """Inside, PyTorch's own count is of what runs inside alone."""
    reached = peak_bytes(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        yield
    finally:
        _before_profiles[device] = max(reached, torch.cuda.max_memory_allocated(device))
