"""Compiles the kernels when a job first needs them, where the package was installed without the extension.

DeepSpeed's users know this of its own ops. The result is kept beside those (TORCH_EXTENSIONS_DIR), under a name made of
the sources, the versions and the GPUs, so it is compiled once a machine. A lock of the kernel's, which ends with its
process, lets one process of a machine compile while the others wait.

GRASS_BUILD_NATIVE=0 leaves it out. Not covered: which kernels a call runs (`extension`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from ds_grass.ops import building

logger = logging.getLogger("ds_grass")

_NAME = "ds_grass_native"


def compiled() -> Path:
    """The library of native kernels for this machine, compiled now if need be.

    RuntimeError, with the reason, where that cannot be done.
    """
    obstacle = _obstacle()
    if obstacle is not None:
        raise RuntimeError(obstacle)
    cuda = building.find_cuda_obstacle() is None and torch.cuda.is_available()
    folder = _folder(cuda)
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{_NAME}.so"
    complete = folder / "complete"  # a library alone may be half of one, where its linker was killed
    with _locked(folder / ".compiling"):
        if not complete.exists():
            _compile(folder, cuda)
            complete.touch()
    return library


def _obstacle() -> str | None:
    if os.environ.get("GRASS_BUILD_NATIVE") == "0":
        return "GRASS_BUILD_NATIVE is 0"
    if _sources() is None:
        return "its sources were not installed"
    if building.find_obstacle() is not None:
        return building.find_obstacle()
    from torch.utils.cpp_extension import is_ninja_available

    return None if is_ninja_available() else "ninja is not there; pip install ninja"


def _sources() -> Path | None:
    """The folder of the C++ sources: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    folders = (package / "csrc", package.parent / "csrc")
    return next((folder for folder in folders if (folder / building.CPU_SOURCES[0]).is_file()), None)


def _folder(cuda: bool) -> Path:
    """Another one for whatever would make another library."""
    digest = hashlib.sha256()
    for path in sorted(_sources().iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    devices = sorted(
        {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count() if cuda else 0)}
    )
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    facts = (torch.__version__, sys.version_info[:2], platform.machine(), cuda, devices, architectures)
    facts += (building.CXX_FLAGS, building.NVCC_FLAGS)
    digest.update(repr(facts).encode())
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(_cache(), "torch_extensions")
    return Path(root) / f"{_NAME}-{digest.hexdigest()[:16]}"


def _cache() -> str:
    return os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(folder: Path, cuda: bool) -> None:
    from torch.utils import cpp_extension

    logger.warning(
        "grass: compiling its kernels for this machine%s, once; the other processes wait. Install with "
        "GRASS_BUILD_NATIVE=1 to have them from the start, or set it to 0 to go on without",
        ", CUDA included" if cuda else "",
    )
    started = time.perf_counter()
    sources = building.CPU_SOURCES + (building.CUDA_SOURCES if cuda else [])
    # PyTorch's own lock is a file that a killed process leaves behind; ours says that nobody else is in here.
    (folder / "lock").unlink(missing_ok=True)
    with _compilers():
        cpp_extension.load(
            _NAME,
            [str(_sources() / name) for name in sources if name != "module.cpp"],
            extra_cflags=building.CXX_FLAGS,
            extra_cuda_cflags=building.NVCC_FLAGS,
            extra_include_paths=[str(_sources())],
            build_directory=str(folder),
            with_cuda=cuda,
            is_python_module=False,
        )
    logger.warning("grass: compiled in %.0f s", time.perf_counter() - started)


@contextlib.contextmanager
def _compilers() -> Iterator[None]:
    """The variables that name compilers, for as long as PyTorch reads them."""
    chosen = building.compilers()
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name in chosen:
            del os.environ[name]
