"""What ``ds_grass doctor`` finds out about the machine: kernels, devices, memory that can be had and pinned.

Contract: generators of findings; torch must be installed. A thing that cannot be found out is left out.
"""

from __future__ import annotations

import importlib
import resource
from collections.abc import Iterator
from pathlib import Path

from ds_grass.doctor.finding import Finding

_UNLIMITED = 2**60  # version 1 of cgroups has no word for it, but a number of about 2**63
_DRIVER = Path("/proc/driver/nvidia/version")


def kernels() -> Iterator[Finding]:
    """The native ops, or why there are none; the devices that PyTorch sees."""
    torch = importlib.import_module("torch")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        loaded, reason = importlib.import_module("ds_grass.ops").native(device)
        yield Finding("kernels", f"native, {device}", reason, "ok" if loaded else "note")
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        yield Finding("kernels", "device", f"CPU: no CUDA device is visible, torch is {built}")
        return
    name = torch.cuda.get_device_name(0)
    yield Finding("kernels", "device", f"{torch.cuda.device_count()} x {name}")
    yield Finding("kernels", "CUDA of torch", str(torch.version.cuda or torch.version.hip))
    if torch.backends.cudnn.is_available():
        yield Finding("kernels", "cuDNN", str(torch.backends.cudnn.version()))
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        yield Finding("kernels", "NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    driver = _driver()
    if driver:
        yield Finding("kernels", "driver", driver)


def memory() -> Iterator[Finding]:
    """Limits of pinned memory, and what the host and its cgroup leave."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        yield Finding("memory", "pinned memory (ulimit -l)", "unlimited")
    else:
        cure = "raise it if pinning fails, or set grass.states.pin_memory to false"
        yield Finding("memory", "pinned memory (ulimit -l)", size(soft), "note", cure)
    bounds = importlib.import_module("ds_grass.host_memory").bounds()
    names = {"available memory": "host memory available", "cgroup limit": "host memory, left by the cgroup"}
    for bound, nbytes in bounds.items():
        yield Finding("memory", names[bound], size(nbytes) if nbytes < _UNLIMITED else "no limit")
    if bounds:
        least = min(bounds.values())
        held = "at 12 bytes a parameter, over all ranks of this node"
        yield Finding("memory", "room for states", f"{least / 12e9:.1f} billion parameters, {held}")


def size(count_bytes: int) -> str:
    """For people; powers of 1024."""
    if count_bytes < 2**30:
        return f"{count_bytes / 2**20:.0f} MiB"
    return f"{count_bytes / 2**30:.1f} GiB"


def _driver() -> str:
    """The first line that the kernel module tells of itself; empty where there is none."""
    try:
        return _DRIVER.read_text().splitlines()[0].removeprefix("NVRM version: ").strip()
    except (OSError, IndexError):
        return ""
