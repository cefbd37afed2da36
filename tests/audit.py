"""Bytes really held on the device, seen from below the package: everything that says "measured" in the tests uses this.

Contract: on CUDA these are PyTorch's own counters. On a machine without CUDA the CPU is the device, and a counting
allocator (`counting_allocator.cpp`, compiled once in a second or so) sees every tensor of every thread, whoever
made it: a whole-model allocation by anybody raises the peak. The package's host memory is mapped by `mmap`, does
not come from the allocator, and so counts as host here as it does on CUDA. `torch.profiler` memory events were the
alternative; they miss other threads and cannot be read while something runs.
Not covered: memory that is not a tensor's (libraries' scratch space, Python objects).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import hashlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("counting_allocator.cpp")


@dataclass(frozen=True)
class Peak:
    """Device bytes around a call: before it, the most at any time during it, after it."""

    bytes_before: int
    peak_bytes: int
    after: int

    @property
    def extra_bytes(self) -> int:
        """How far the peak rose above what was there before."""
        return self.peak_bytes - self.bytes_before


def start() -> None:
    """Begin to count. Tensors made earlier are not counted, so call this before the model is built."""
    if not torch.cuda.is_available():
        _library().counting_start()


def live_bytes() -> int:
    """Return the bytes of all tensors alive that were made since `start`."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _library().counting_live_bytes()


def peak_bytes() -> int:
    """Return the most bytes that were alive at once since `reset_peak`."""
    return (
        torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _library().counting_peak_bytes()
    )


def reset_peak() -> None:
    """Let the peak begin again at what is alive now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        _library().counting_reset_peak()


def measure_peak(run: Callable[[], Any]) -> Peak:
    """Call `run` and return the device bytes before, at the peak, and after; what `run` returns is dropped."""
    start()
    gc.collect()
    before = live_bytes()
    reset_peak()
    run()
    peak = peak_bytes()
    gc.collect()
    return Peak(before, peak, live_bytes())


COLLECTIVES = [
    name
    for name in (
        "allgather",
        "allgather_coalesced",
        "all_gather_single",
        "_allgather_base",  # its name before PyTorch 2.13
        "allreduce",
        "allreduce_coalesced",
        "broadcast",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_single",
        "_reduce_scatter_base",
    )
    if name in vars(torch.distributed.ProcessGroup)
]
LETS_GO_SECONDS = 1.0


@contextlib.contextmanager
def collectives_that_let_go() -> Iterator[None]:
    """Let collectives end, and give back what they used, before they return.

    A thread of gloo holds the buffers of a collective until a moment after it has ended. On a busy machine that moment
    overlaps with what is allocated next, and the peak rises, now and then, by a buffer that nobody needs any more.
    """
    group = torch.distributed.ProcessGroup
    stock = {name: vars(group)[name] for name in COLLECTIVES}  # what binds, which `getattr` unwraps
    for name in COLLECTIVES:
        setattr(group, name, _that_lets_go(getattr(group, name)))
    try:
        yield
    finally:
        for name, collective in stock.items():
            setattr(group, name, collective)


class _Ended:
    """In the place of a work that is over."""

    def wait(self) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _that_lets_go(collective: Callable[..., Any]) -> Callable[..., Any]:
    def run(group: Any, *arguments: Any, **options: Any) -> Any:
        held = live_bytes()
        collective(group, *arguments, **options).wait()  # the work goes at once, for it holds buffers too
        deadline = time.monotonic() + LETS_GO_SECONDS
        while live_bytes() > held and time.monotonic() < deadline:
            time.sleep(0)  # let the other thread run
        return _Ended()

    return run


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_compiled()))
    for name in ("counting_live_bytes", "counting_peak_bytes"):
        getattr(library, name).restype = ctypes.c_int64
    return library


def _compiled() -> Path:
    """Return the shared library for this source and this PyTorch, compiling it if no process has yet."""
    torch_folder = Path(torch.__file__).parent
    key = hashlib.sha256(
        SOURCE.read_bytes() + torch.__version__.encode() + str(torch_folder).encode()
    ).hexdigest()
    target = Path(tempfile.gettempdir()) / f"ds_grass_counting_allocator_{os.getuid()}_{key[:16]}.so"
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}")
        flags = [
            "-O1",
            "-std=c++20",
            "-shared",
            "-fPIC",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        ]
        places = [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
        compiler = os.environ.get("CXX", "c++")
        command = [compiler, *flags, *places, str(SOURCE), "-lc10", "-o", str(unfinished)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        unfinished.rename(target)  # whole or not at all, for the other ranks
    return target
