"""Contracts of setup.py: what is compiled where, what is an error, and that the CUDA sources compile."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils import cpp_extension

from ds_grass.ops import building

REPOSITORY = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ARCHITECTURES = ("80", "90")


@pytest.fixture
def build(monkeypatch) -> ModuleType:
    """setup.py as a module, with `setup` noting its arguments in `build.given`."""
    for name in ("GRASS_BUILD_NATIVE", "GRASS_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST", "PYTORCH_NVCC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.chdir(REPOSITORY)
    return load_setup(monkeypatch)


def load_setup(monkeypatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("grass_setup", REPOSITORY / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.given = None
    monkeypatch.setattr(module, "setup", lambda **arguments: setattr(module, "given", arguments))
    return module


def a_cuda_machine(monkeypatch, tmp_path, *, torch_cuda="13.0", nvcc=True) -> None:
    (tmp_path / "bin").mkdir()
    if nvcc:
        compiler = tmp_path / "bin" / "nvcc"
        compiler.write_text("#!/bin/sh\n")
        compiler.chmod(0o755)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "CUDAExtension", cpp_extension.CppExtension)


def sources(build) -> list[str]:
    (extension,) = build.given["ext_modules"]
    return sorted(Path(source).name for source in extension.sources)


CPU, CUDA = building.CPU_SOURCES, building.CUDA_SOURCES


def test_cpu_kernels_alone_where_torch_is_built_without_cuda(build, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", None)
    build.main()
    assert sources(build) == sorted(CPU)
    assert "without CUDA kernels: PyTorch" in capsys.readouterr().err


@pytest.mark.parametrize("sees_a_gpu", [True, False])
def test_cuda_kernels_where_toolkit_and_torch_are_there_whether_or_not_a_gpu_is(
    build, monkeypatch, tmp_path, sees_a_gpu
):
    a_cuda_machine(monkeypatch, tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sees_a_gpu)
    build.main()
    assert sources(build) == sorted(CPU + CUDA)
    assert os.environ.get("TORCH_CUDA_ARCH_LIST") == (None if sees_a_gpu else building.DEFAULT_ARCHITECTURES)


def test_list_of_architectures_that_is_given_stays(build, monkeypatch, tmp_path):
    a_cuda_machine(monkeypatch, tmp_path)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    build.main()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "9.0a"


def test_no_cuda_kernels_when_told(build, monkeypatch, tmp_path, capsys):
    a_cuda_machine(monkeypatch, tmp_path)
    monkeypatch.setenv("GRASS_BUILD_CUDA", "0")
    build.main()
    assert sources(build) == sorted(CPU)
    assert "GRASS_BUILD_CUDA is 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (dict(torch_cuda=None), "is not built for CUDA; install one that is"),
        (dict(nvcc=False), "no nvcc; install a CUDA toolkit and set CUDA_HOME"),
    ],
)
def test_cuda_kernels_that_are_asked_for_and_cannot_be_built_are_an_error(
    build, monkeypatch, tmp_path, machine, message
):
    a_cuda_machine(monkeypatch, tmp_path, **machine)
    monkeypatch.setenv("GRASS_BUILD_CUDA", "1")
    with pytest.raises(
        SystemExit, match="GRASS_BUILD_CUDA is 1 but the CUDA kernels cannot be built: .*" + message
    ):
        build.main()
    assert build.given is None


@pytest.mark.parametrize("name", ["GRASS_BUILD_NATIVE", "GRASS_BUILD_CUDA"])
def test_another_word_is_an_error(build, monkeypatch, name):
    monkeypatch.setenv(name, "yes")
    with pytest.raises(SystemExit, match=f"{name} is 'yes'; use auto, 1 or 0"):
        build.main()


@pytest.mark.parametrize("name", ["GRASS_BUILD_NATIVE", "GRASS_BUILD_CUDA"])
def test_without_a_compiler_the_package_installs_unless_kernels_were_asked_for(
    build, monkeypatch, capsys, name
):
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    build.main()
    assert "ext_modules" not in build.given
    assert "no C++ compiler ('no-such-compiler' is not on the PATH; set CXX)" in capsys.readouterr().err
    monkeypatch.setenv(name, "1")
    with pytest.raises(SystemExit, match=f"{name} is 1 but ds_grass._C cannot be built: no C\\+\\+ compiler"):
        build.main()


def test_ccache_is_used_where_it_is_and_neither_the_user_nor_pytorch_names_a_compiler(build, monkeypatch):
    which = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name, **options: name if name == "ccache" else which(name, **options)
    )
    monkeypatch.setattr(cpp_extension, "_wrap_compiler", None, raising=False)
    monkeypatch.delenv("CXX")
    build.main()
    assert "CXX" not in os.environ
    monkeypatch.delattr(cpp_extension, "_wrap_compiler")
    monkeypatch.setenv("CXX", "c++")
    build.main()
    assert os.environ["CXX"] == "c++"
    monkeypatch.delenv("CXX")
    build.main()
    assert os.environ["CXX"] == "ccache c++"


def test_every_source_is_compiled_somewhere():
    assert sorted(CPU + CUDA) == sorted(path.name for path in (REPOSITORY / "csrc").glob("*.c*"))


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_cuda_sources_compile_for_ampere_and_hopper(tmp_path):
    """Against whatever PyTorch is here: its headers for CUDA come with every build."""
    include = Path(torch.__file__).parent / "include"
    shared = [
        "-std=c++20",
        "-DC10_USING_CUSTOM_GENERATED_MACROS",
        "-I",
        str(REPOSITORY / "csrc"),
        "-I",
        str(include),
    ]
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    kernels = [name for name in CUDA if name.endswith(".cu")]
    commands = [
        [NVCC, *shared, *building.NVCC_FLAGS, *targets, "-c", name, "-o", f"{tmp_path}/{Path(name).stem}.o"]
        for name in kernels
    ]
    # what is left is the host compiler's, which nvcc calls with its own headers; without linking, types are checked
    commands += [
        [NVCC, *shared, "-c", name, "-o", f"{tmp_path}/{Path(name).stem}.o"]
        for name in CUDA
        if name not in kernels
    ]
    running = [
        subprocess.Popen(
            command, cwd=REPOSITORY / "csrc", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command in commands
    ]
    outputs = [process.communicate(timeout=300)[0] for process in running]
    for process, command, output in zip(running, commands, outputs, strict=True):
        assert process.returncode == 0, f"{' '.join(command)}\n{output[-3000:]}"
    dump = shutil.which("cuobjdump", path=str(Path(NVCC).parent))
    for name in kernels if dump else []:
        listed = subprocess.run(
            [dump, "-lelf", f"{tmp_path}/{Path(name).stem}.o"], capture_output=True, text=True
        )
        assert all(f"sm_{arch}" in listed.stdout for arch in ARCHITECTURES), listed.stdout


def test_setup_py_answers_without_compiling():
    done = subprocess.run([sys.executable, "setup.py", "--name"], cwd=REPOSITORY, capture_output=True, text=True,
                          env={**os.environ, "GRASS_BUILD_NATIVE": "0"})  # fmt: skip
    assert done.stdout.split()[-1] == "ds-grass", done.stderr
