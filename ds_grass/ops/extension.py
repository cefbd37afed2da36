"""Whether the native kernels are loaded. Importing this module loads them, if they are there."""

from __future__ import annotations

import torch

_import_error: ImportError | None = None
try:
    import ds_grass._C  # noqa: F401  (loading it registers its kernels)
except ImportError as error:
    _import_error = error


def native(device: str = "cpu") -> tuple[bool, str]:
    """Whether native kernels run on a type of device, and if not, why: what is missing and what to do."""
    if _import_error is not None:
        if isinstance(_import_error, ModuleNotFoundError):
            cure = "to compile it, install with GRASS_BUILD_NATIVE=1 and `pip install --no-build-isolation`"
        else:
            cure = "if PyTorch has changed, compile it again: `pip install --no-build-isolation --force-reinstall`"
        return False, f"the PyTorch kernels run, since ds_grass._C does not load ({_import_error}); {cure}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("grass::adamw_", device.upper()):
        return False, (
            f"the PyTorch kernels run on {device}, since ds_grass._C was compiled without kernels for it; install with "
            "GRASS_BUILD_CUDA=1 and `pip install --no-build-isolation --force-reinstall` where nvcc is"
        )
    return True, f"ds_grass._C is loaded and has kernels for {device}"
