"""What `ds_grass._C` is compiled from, how, and what stands in the way: for setup.py and for `just_in_time`.

Contract: setup.py runs this file by its path, before the package is installed, so it imports nothing of the package.
"""

from __future__ import annotations

import os
import shutil

CPU_SOURCES = [
    "module.cpp",
    "adamw_call.cpp",
    "adamw_cpu.cpp",
    "squared_norm_cpu.cpp",
    "transfer_cpu.cpp",
]
CUDA_SOURCES = ["cuda_ops.cpp", "adamw_cuda.cu", "squared_norm_cuda.cu"]
DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0+PTX"
# No contraction and no fast-math: the kernels equal their PyTorch specification bit for bit. Without errno and traps
# a root or a select can be vectorised; values do not depend on either.
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
]
NVCC_FLAGS = ["-O3", "--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=false"]


def find_obstacle() -> str | None:
    """Why the extension cannot be compiled here, or None."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler!r} is not on the PATH; set CXX)"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return f"{error}; install PyTorch first, then `pip install --no-build-isolation`"
    return None


def find_cuda_obstacle() -> str | None:
    """Why the CUDA kernels cannot be compiled here, or None. Whether there is a GPU makes no difference."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is not built for CUDA; install one that is"
    if CUDA_HOME is None or shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin")) is None:
        return "no nvcc; install a CUDA toolkit and set CUDA_HOME"
    return None


def compilers() -> dict[str, str]:
    """Variables that let PyTorch compile through ccache, where it is on the PATH and nobody named another compiler.

    Newer PyTorch does so by itself.
    """
    from torch.utils import cpp_extension

    if hasattr(cpp_extension, "_wrap_compiler") or "CXX" in os.environ or shutil.which("ccache") is None:
        return {}
    wrapped = {"CXX": "ccache c++", "PYTORCH_NVCC": "ccache nvcc"}
    return {name: command for name, command in wrapped.items() if name not in os.environ}


def choose_architectures() -> None:
    """PyTorch compiles for the GPUs it sees; where it sees none and nobody said which, for DEFAULT_ARCHITECTURES."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
