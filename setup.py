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
import runpy
import subprocess
import sys
from glob import glob
from types import SimpleNamespace

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError

NAME = "ds_grass._C"
FOLDER = "csrc"
build = SimpleNamespace(**runpy.run_path("ds_grass/ops/building.py"))


def main() -> None:
    mode, cuda_mode = setting("GRASS_BUILD_NATIVE"), setting("GRASS_BUILD_CUDA")
    obstacle = "GRASS_BUILD_NATIVE is 0" if mode == "0" else build.find_obstacle()
    if obstacle is not None:
        for name, value in (("GRASS_BUILD_NATIVE", mode), ("GRASS_BUILD_CUDA", cuda_mode)):
            if value == "1":
                raise SystemExit(f"{name} is 1 but {NAME} cannot be built: {obstacle}")
        report(f"{NAME} is left out, the PyTorch kernels will run: {obstacle}")
        setup(cmdclass={"build_py": BuildWithSources})
        return
    obstacle = "GRASS_BUILD_CUDA is 0" if cuda_mode == "0" else build.find_cuda_obstacle()
    if cuda_mode == "1" and obstacle is not None:
        raise SystemExit(f"GRASS_BUILD_CUDA is 1 but the CUDA kernels cannot be built: {obstacle}")
    if obstacle is not None:
        report(f"{NAME} is built without CUDA kernels: {obstacle}")
    setup(**extension(cuda=obstacle is None, required="1" in (mode, cuda_mode)))


class BuildWithSources(build_py):
    """A wheel brings the C++ and CUDA sources, for installations without the extension to compile when first used."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = os.path.join(self.build_lib, "ds_grass", FOLDER)
            self.mkpath(target)
            for path in glob(f"{FOLDER}/*"):
                self.copy_file(path, target)


def setting(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "1", "0"):
        raise SystemExit(f"{name} is {value!r}; use auto, 1 or 0")
    return value


def extension(*, cuda: bool, required: bool) -> dict:
    """The arguments of `setup` that compile the extension."""
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

    os.environ.update(build.compilers())
    # -fopenmp only compiles: its functions come from the OpenMP library that PyTorch has already loaded. Linking would
    # bring a second one, with its own threads, deaf to torch.set_num_threads.
    cpu, gpu = ([f"{FOLDER}/{name}" for name in names] for names in (build.CPU_SOURCES, build.CUDA_SOURCES))
    shared = {"depends": glob(f"{FOLDER}/*.h"), "include_dirs": [FOLDER]}
    if cuda:
        build.choose_architectures()
        flags = {"cxx": build.CXX_FLAGS, "nvcc": build.NVCC_FLAGS}
        module = CUDAExtension(NAME, cpu + gpu, extra_compile_args=flags, **shared)
    else:
        module = CppExtension(NAME, cpu, extra_compile_args=build.CXX_FLAGS, **shared)
    return {"ext_modules": [module], "cmdclass": {"build_py": BuildWithSources, "build_ext": BuildNative}}


def report(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
