"""Builds the optional extension ds_grass._C; everything else about the package stands in pyproject.toml.

GRASS_BUILD_NATIVE=auto (the default) compiles where PyTorch and a C++ compiler are found and otherwise installs without
the extension, on the PyTorch kernels; 1 makes a missing extension an error; 0 never compiles. PyTorch is visible here
only with `pip install --no-build-isolation`: an isolated build would download a second one, of another version.

GRASS_BUILD_CUDA=auto (the default) adds the CUDA kernels where a CUDA toolkit and a PyTorch for CUDA are found, a GPU
or none; 1 makes it an error when one is missing; 0 leaves them out. TORCH_CUDA_ARCH_LIST says for which GPUs: by
default for those of this machine or, where none is seen, for DEFAULT_ARCHITECTURES. CXX, CUDA_HOME, MAX_JOBS and ninja
are obeyed as by every PyTorch extension; ccache is used when it is on the PATH and CXX is not set.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from glob import glob

from setuptools import setup
from setuptools.errors import BaseError

NAME = "ds_grass._C"
CPU_SOURCES = [
    "csrc/module.cpp",
    "csrc/adamw_call.cpp",
    "csrc/adamw_cpu.cpp",
    "csrc/squared_norm_cpu.cpp",
    "csrc/transfer_cpu.cpp",
]
CUDA_SOURCES = ["csrc/cuda_ops.cpp", "csrc/adamw_cuda.cu", "csrc/squared_norm_cuda.cu"]
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


def main() -> None:
    mode, cuda_mode = setting("GRASS_BUILD_NATIVE"), setting("GRASS_BUILD_CUDA")
    obstacle = "GRASS_BUILD_NATIVE is 0" if mode == "0" else find_obstacle()
    if obstacle is not None:
        for name, value in (("GRASS_BUILD_NATIVE", mode), ("GRASS_BUILD_CUDA", cuda_mode)):
            if value == "1":
                raise SystemExit(f"{name} is 1 but {NAME} cannot be built: {obstacle}")
        report(f"{NAME} is left out, the PyTorch kernels will run: {obstacle}")
        setup()
        return
    obstacle = "GRASS_BUILD_CUDA is 0" if cuda_mode == "0" else find_cuda_obstacle()
    if cuda_mode == "1" and obstacle is not None:
        raise SystemExit(f"GRASS_BUILD_CUDA is 1 but the CUDA kernels cannot be built: {obstacle}")
    if obstacle is not None:
        report(f"{NAME} is built without CUDA kernels: {obstacle}")
    setup(**extension(cuda=obstacle is None, required="1" in (mode, cuda_mode)))


def setting(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "1", "0"):
        raise SystemExit(f"{name} is {value!r}; use auto, 1 or 0")
    return value


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


def extension(*, cuda: bool, required: bool) -> dict:
    """The arguments of `setup` that compile the extension."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class BuildNative(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except (BaseError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
                if required:
                    raise
                report(f"{NAME} is left out, the PyTorch kernels will run: {error}")
                self.extensions = []  # nothing to copy or to list in the wheel

    if shutil.which("ccache") and "CXX" not in os.environ:
        os.environ["CXX"] = "ccache c++"
        os.environ.setdefault("PYTORCH_NVCC", "ccache nvcc")
    # -fopenmp only compiles: its functions come from the OpenMP library that PyTorch has already loaded. Linking would
    # bring a second one, with its own threads, deaf to torch.set_num_threads.
    shared = {"depends": glob("csrc/*.h"), "include_dirs": ["csrc"]}
    if cuda:
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
        flags = {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS}
        module = CUDAExtension(NAME, CPU_SOURCES + CUDA_SOURCES, extra_compile_args=flags, **shared)
    else:
        module = CppExtension(NAME, CPU_SOURCES, extra_compile_args=CXX_FLAGS, **shared)
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildNative}}


def report(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
