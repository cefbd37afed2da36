"""The namespace `grass` of PyTorch's ops, and what the kernels written in PyTorch share.

An op is a schema, a fake (which does all the checks) and a PyTorch kernel, defined here in one call; native kernels
override it for a device when `ds_grass._C` is loaded, before or after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOATS_TEXT = "float32, bfloat16 or float16"

# Elements that a temporary of the PyTorch kernels holds. Powers of two, so that none straddles a page of 2^32.
CHUNK_CPU = 1 << 16  # few enough to stay in cache
CHUNK_DEVICE = 1 << 22  # enough to hide the launches

_library = torch.library.Library("grass", "DEF")


def define(schema: str, *, kernel: Callable, fake: Callable) -> Callable[..., Any]:
    """Define an op with its PyTorch kernel for every device; returns what calls it."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"grass::{name}", fake, lib=_library)
    return getattr(torch.ops.grass, name)


def chunk_numel(device: torch.device) -> int:
    """Elements that the PyTorch kernels take at a time on `device`."""
    return CHUNK_CPU if device.type == "cpu" else CHUNK_DEVICE


def chunks(numel: int, offset: int, device: torch.device) -> Iterator[slice]:
    """Cuts [0, numel) where `offset` plus the index is a multiple of the chunk."""
    chunk = chunk_numel(device)
    start = 0
    while start < numel:
        stop = min(numel, start + chunk - (offset + start) % chunk)
        yield slice(start, stop)
        start = stop
