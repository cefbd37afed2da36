"""Host memory for optimizer state: exact page-aligned ranges, and a check at start that the final size fits.

Contract: a `HostArena` is one contiguous range of zeros, exactly as long as asked. Pages that are not written
cost no physical memory. For CUDA the range is registered in place (`cudaHostRegister`), on the NUMA node next to
the device where the system tells which; PyTorch's own pinned allocator is never used, because it rounds every
request up to a power of two. Where registering fails the range stays pageable, with one warning for the whole
process. `host_storages` and `is_host` name the live arenas, so that an audit of bytes can tell them from tensors
of a CPU that plays the device. (Arenas come from `mmap`: the c10 CPU allocator, and so the profiler's memory
events, never see them.)

Not covered: memory limits other than the machine's and the cgroup's. A forked child does not inherit arenas;
touching one there is a fault.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch

from ds_grass import numa

logger = logging.getLogger(__name__)

ALIGNMENT = 64
"""Bytes; every part of an arena starts on a multiple: one cache line, and more than any vector load needs."""

_REGISTER_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device of the process
_live: dict[int, int] = {}  # data_ptr of the storage of each arena alive -> its bytes
_warned_pageable = False


class HostArena:
    """`nbytes` of zeroed host memory in one page-aligned range, pinned for CUDA when `pin_device` is given.

    `memory` is the range as a 1-D uint8 tensor; typed views of it share its storage. The pages go back when
    the last view is gone; the registration ends earlier, at `free` or when the arena is collected.
    """

    def __init__(self, nbytes: int, *, pin_device: torch.device | None = None) -> None:
        self.nbytes = nbytes
        self._pages = _map_pages(nbytes)
        self.memory = self.slice(0, nbytes)
        address = self.memory.data_ptr()
        if pin_device is not None and (node := numa.node_of(pin_device)) is not None:
            numa.prefer(address, nbytes, node)
        self.pinned = pin_device is not None and nbytes > 0 and _register(address, nbytes, pin_device)
        if nbytes > 0:
            _live[address] = nbytes
        unpin_device = pin_device if self.pinned else None
        self._release = weakref.finalize(self, _release, address, unpin_device, os.getpid())
        self._release.atexit = False  # the end of the process unpins faster than we could

    def slice(self, start: int, nbytes: int) -> torch.Tensor:
        """Bytes of the arena as uint8 (nbytes,) in a storage of just that length: what `torch.save` would write."""
        return _tensor(self._pages, start, nbytes)

    def free(self) -> None:
        """Unregister now and drop the memory. No copy to or from the arena may be under way. Idempotent."""
        self._release()
        self._pages = None
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.pinned = False


def host_zeros(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros (numel,) in pages of their own, outside PyTorch's allocator; those never written cost no memory."""
    nbytes = numel * dtype.itemsize
    return _tensor(_map_pages(nbytes), 0, nbytes).view(dtype)


def host_storages() -> set[int]:
    """Storage addresses (`tensor.untyped_storage().data_ptr()`) of all arenas alive in this process."""
    return set(_live)


def is_host(tensor: torch.Tensor) -> bool:
    """Whether `tensor` lies in a live host arena."""
    address = tensor.data_ptr()
    return tensor.device.type == "cpu" and any(start <= address < start + n for start, n in _live.items())


def check_host_capacity(
    final_bytes_per_rank: int,
    ranks_on_node: int,
    *,
    proc: Path = Path("/proc"),
    cgroup: Path = Path("/sys/fs/cgroup"),
) -> None:
    """Raise RuntimeError when the states of all blocks would not fit into this rank's share of memory.

    The share is the smaller of the machine's available memory and what the cgroup limits (v1 or v2, at every
    level) leave, over `ranks_on_node`. Page cache counts as available. What can't be read is not checked.
    """
    known = _bounds(proc, cgroup)
    if not known:
        return
    name, smallest = min(known.items(), key=lambda item: item[1])
    share = smallest // ranks_on_node
    if final_bytes_per_rank > share:
        raise RuntimeError(
            f"grass keeps {_gib(final_bytes_per_rank)} of optimizer state per rank on the host once every "
            f"block has been drawn, but the {name} of this node leaves {_gib(smallest)}, which is "
            f"{_gib(share)} for each of its {ranks_on_node} ranks; set grass.states.dtype to "
            '"bf16" or grass.states.master_weights to false, spread the job over more nodes, '
            "or give it more memory"
        )


def available_bytes() -> int | None:
    """Memory this node can still give: the smaller of what is available and what the cgroup leaves; None if unknown."""
    return min(bounds().values(), default=None)


def bounds() -> dict[str, int]:
    """Bytes left by each thing that bounds the host's memory, as far as they are known, by name."""
    return _bounds(Path("/proc"), Path("/sys/fs/cgroup"))


def _bounds(proc: Path, cgroup: Path) -> dict[str, int]:
    bounds = {"available memory": _available_bytes(proc), "cgroup limit": _cgroup_headroom(proc, cgroup)}
    return {name: nbytes for name, nbytes in bounds.items() if nbytes is not None}


def _map_pages(nbytes: int) -> mmap.mmap | None:
    """Private anonymous pages: zeros, without physical memory until written. None for no bytes."""
    if nbytes == 0:
        return None
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise RuntimeError(
            f"cannot allocate {_gib(nbytes)} of host memory for optimizer states ({error}); give the job more memory, "
            'set grass.states.dtype to "bf16", or grass.states.master_weights to false'
        ) from error
    # Without DONTFORK a fork (every DataLoader worker) makes our pages copy-on-write: our next write moves
    # them to new frames, away from those that CUDA has pinned, and the memory of the job doubles. HUGEPAGE
    # makes the first touch of 512 MiB take 0.06 s instead of 0.26 s (kernel 6.18, one core).
    for advice in ("MADV_DONTFORK", "MADV_HUGEPAGE"):
        with contextlib.suppress(AttributeError, OSError):  # this Python or this kernel does not have it
            pages.madvise(getattr(mmap, advice))
    return pages


def _tensor(pages: mmap.mmap | None, start: int, nbytes: int) -> torch.Tensor:
    """A range of the pages as uint8 (nbytes,); it keeps them alive."""
    if pages is None or nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(pages, dtype=torch.uint8, offset=start, count=nbytes)


def _register(address: int, nbytes: int, device: torch.device) -> bool:
    """Pin the range in place; False, and one warning for the process, when the driver refuses."""
    with torch.cuda.device(device):
        error = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, _REGISTER_PORTABLE))
        if error == 0:
            return True
        # The failure stays in the runtime's last-error slot, which PyTorch has no call to read (pytorch
        # #165990), and the next kernel would be blamed for it. Launch one whose launch check takes it away.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=device)
    global _warned_pageable
    if not _warned_pageable:
        _warned_pageable = True
        logger.warning(
            "could not pin %s of host memory for optimizer states (cudaHostRegister: error %d); using "
            "pageable memory: copies to and from the device run at about half the speed and do not overlap "
            "with computing. Give the job more memory, or set grass.states.pin_memory to false",
            _gib(nbytes),
            error,
        )
    return False


def _release(address: int, device: torch.device | None, owner_pid: int) -> None:
    """End an arena's registrations: ours, and CUDA's when `device` is given."""
    _live.pop(address, None)
    is_fork = os.getpid() != owner_pid  # a forked child has neither the pages nor the registration
    if device is None or is_fork:
        return
    with torch.cuda.device(device):
        error = int(torch.cuda.cudart().cudaHostUnregister(address))
    if error != 0:
        logger.warning("cudaHostUnregister failed with error %d; the pages stay pinned", error)


def _available_bytes(proc: Path) -> int | None:
    """Memory to be had without swapping: the kernel's estimate, or psutil's where there is no procfs."""
    fields = _read_fields(proc / "meminfo")
    if "MemAvailable:" in fields:
        return fields["MemAvailable:"] * 1024
    try:
        import psutil
    except ImportError:
        return None
    return psutil.virtual_memory().available


def _cgroup_headroom(proc: Path, cgroup: Path) -> int | None:
    """Smallest of what is left under the memory limit of this process's cgroup and of each group above it."""
    rooms = [_headroom(folder) for folder in _cgroup_folders(proc, cgroup)]
    return min((room for room in rooms if room is not None), default=None)


def _cgroup_folders(proc: Path, cgroup: Path) -> Iterator[Path]:
    """This process's memory cgroup and its ancestors, v1 and v2. In a container some may not exist."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            base = cgroup
        elif "memory" in controllers.split(","):
            base = cgroup / "memory"
        else:
            continue
        folder = base.joinpath(*(part for part in path.split("/") if part not in ("", "..")))
        while True:
            yield folder
            if folder == base:
                break
            folder = folder.parent


def _headroom(folder: Path) -> int | None:
    """Limit less usage of one cgroup in bytes, page cache counted as free; None where no limit is set."""
    for limit_file, usage_file in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit = _read_int(folder / limit_file)
        if limit is None:
            continue
        stat = _read_fields(folder / "memory.stat")
        # v1 keeps a group's own pages and, as total_*, those of its subtree, which is what its usage counts.
        cache = sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in ("active_file", "inactive_file"))
        return max(0, limit - (_read_int(folder / usage_file) or 0) + cache)
    return None


def _read_int(path: Path) -> int | None:
    """The number in a one-line file; None when it is missing or says "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _read_fields(path: Path) -> dict[str, int]:
    """Lines "name number ..." as a dictionary; empty when the file is missing."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    words = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in words if len(pair) >= 2 and pair[1].isdigit()}


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
