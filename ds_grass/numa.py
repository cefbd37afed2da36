"""Host memory near a GPU: which NUMA node the device hangs on, and pages that are wanted there.

Contract: best effort. Where the system does not tell, or refuses, nothing happens and the kernel's first-touch rule
holds. A page is placed when it is first written, so `prefer` comes before that.

Not covered: pinning threads to nodes; launchers do that (`deepspeed --bind_cores_to_rank`).
"""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import torch

_MBIND = {"x86_64": 237, "aarch64": 235}.get(platform.machine())  # number of the system call
_PREFERRED = 1  # MPOL_PREFERRED: other nodes serve when this one is full
_MASK_BITS = 1024  # nodes that a mask can name, the kernel's largest number


def node_of(device: torch.device, sysfs: Path = Path("/sys")) -> int | None:
    """The NUMA node next to a CUDA device; None when there is one node only, or the system does not tell."""
    if len(list(sysfs.glob("devices/system/node/node[0-9]*"))) < 2:
        return None
    properties = torch.cuda.get_device_properties(device)
    try:
        address = (
            f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        )
        node = int((sysfs / "bus/pci/devices" / address / "numa_node").read_text())
    except (AttributeError, OSError, ValueError):
        return None
    return node if node >= 0 else None


def prefer(address: int, nbytes: int, node: int) -> bool:
    """Ask for the pages of a range, not written yet, on `node`; whether the kernel took the wish."""
    if _MBIND is None or nbytes == 0 or not 0 <= node < _MASK_BITS:
        return False
    mask = (ctypes.c_uint64 * (_MASK_BITS // 64))()
    mask[node // 64] = 1 << (node % 64)
    call = ctypes.CDLL(None, use_errno=True).syscall
    return call(
        ctypes.c_long(_MBIND), ctypes.c_void_p(address), ctypes.c_ulong(nbytes), ctypes.c_int(_PREFERRED), mask,
        ctypes.c_ulong(_MASK_BITS + 1), ctypes.c_uint(0),
    ) == 0  # fmt: skip
