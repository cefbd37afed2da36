"""Whether the native kernels are loaded. Importing this module loads them, if they are installed."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger("ds_grass")

_import_error: ImportError | None = None
_tried_to_compile = False
try:
    import ds_grass._C  # noqa: F401  (loading it registers its kernels)
except ImportError as error:
    _import_error = error


def ensure_native() -> None:
    """Compile and load the native kernels where the package was installed without them; a job that trains calls it.

    Where that fails the PyTorch kernels stay, and a warning says why, once.
    """
    global _import_error, _tried_to_compile
    if not isinstance(_import_error, ModuleNotFoundError) or _tried_to_compile:
        return
    from ds_grass.ops import just_in_time

    _tried_to_compile = True
    try:
        torch.ops.load_library(just_in_time.compiled())
        _import_error = None
    except (RuntimeError, OSError, ImportError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        _import_error = ModuleNotFoundError(f"{_import_error}, and it was not compiled now: {reason}")
        logger.warning("grass: %s", native()[1])


def native(device: str = "cpu") -> tuple[bool, str]:
    """Whether native kernels run on a type of device, and if not, why: what is missing and what to do."""
    if _import_error is not None:
        if isinstance(_import_error, ModuleNotFoundError):
            cure = "to compile it, install with GRASS_BUILD_NATIVE=1 and `pip install --no-build-isolation`"
            if not _tried_to_compile:
                cure = f"the first job that trains compiles it, where it can; {cure}"
        else:
            cure = "if PyTorch has changed, compile it again: `pip install --no-build-isolation --force-reinstall`"
        return False, f"the PyTorch kernels run, since ds_grass._C does not load ({_import_error}); {cure}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("grass::adamw_", device.upper()):
        return False, (
            f"the PyTorch kernels run on {device}, since ds_grass._C was compiled without kernels for it; install with "
            "GRASS_BUILD_CUDA=1 and `pip install --no-build-isolation --force-reinstall` where nvcc is"
        )
    return True, f"ds_grass._C is loaded and has kernels for {device}"
