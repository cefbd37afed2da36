"""Builds the optional extension ds_grass._C; everything else about the package stands in pyproject.toml.

GRASS_BUILD_NATIVE=auto (the default) compiles where PyTorch and a C++ compiler are found and otherwise installs without
the extension, on the PyTorch kernels; 1 makes a missing extension an error; 0 never compiles. PyTorch is visible here
only with `pip install --no-build-isolation`: an isolated build would download a second one, of another version.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from setuptools import setup
from setuptools.errors import BaseError

NAME = "ds_grass._C"
SOURCES = ["csrc/module.cpp", "csrc/adamw_cpu.cpp"]
HEADERS = ["csrc/adamw.h"]
# No contraction and no fast-math: the kernels equal their PyTorch specification bit for bit. Without errno and traps
# a root or a select can be vectorised; values do not depend on either.
FLAGS = [
    "-O3",
    "-g0",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
]


def main() -> None:
    mode = os.environ.get("GRASS_BUILD_NATIVE", "auto")
    if mode not in ("auto", "1", "0"):
        raise SystemExit(f"GRASS_BUILD_NATIVE is {mode!r}; use auto, 1 or 0")
    obstacle = "GRASS_BUILD_NATIVE is 0" if mode == "0" else find_obstacle()
    if obstacle is None:
        setup(**extension(required=mode == "1"))
        return
    if mode == "1":
        raise SystemExit(f"GRASS_BUILD_NATIVE is 1 but {NAME} cannot be built: {obstacle}")
    report(obstacle)
    setup()


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


def extension(*, required: bool) -> dict:
    """The arguments of `setup` that compile the extension."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildNative(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except (BaseError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
                if required:
                    raise
                report(error)
                self.extensions = []  # nothing to copy or to list in the wheel

    # -fopenmp only compiles: its functions come from the OpenMP library that PyTorch has already loaded. Linking would
    # bring a second one, with its own threads, deaf to torch.set_num_threads.
    module = CppExtension(NAME, SOURCES, depends=HEADERS, include_dirs=["csrc"], extra_compile_args=FLAGS)
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildNative}}


def report(obstacle: object) -> None:
    print(f"{NAME} is left out, the PyTorch kernels will run: {obstacle}", file=sys.stderr)


main()
