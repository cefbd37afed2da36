"""Contracts of compiling at first use: once a machine, one process at a time, else the reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from ds_grass import ops
from ds_grass.ops import extension, just_in_time

REPOSITORY = Path(__file__).parents[2]
MISSING = ModuleNotFoundError("No module named 'ds_grass._C'")


@pytest.fixture
def not_installed(monkeypatch, tmp_path):
    """As if the package had been installed without the extension; results go to an empty folder."""
    monkeypatch.setattr(extension, "_import_error", MISSING)
    monkeypatch.setattr(extension, "_tried_to_compile", False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("GRASS_BUILD_NATIVE", raising=False)
    return tmp_path


def compiler_that(monkeypatch, *, works: bool) -> list[dict]:
    """`cpp_extension.load` that only notes its arguments and leaves an empty library."""
    calls = []

    def load(name, sources, **options):
        folder = Path(options["build_directory"])
        calls.append(
            dict(options, sources=sources, lock=(folder / "lock").exists(), cxx=os.environ.get("CXX"))
        )
        if not works:
            raise RuntimeError("Error building extension\nninja: build stopped")
        (folder / f"{name}.so").touch()

    monkeypatch.setattr(cpp_extension, "load", load)
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    return calls


def test_kernels_are_compiled_once_and_then_found(not_installed, monkeypatch, caplog):
    calls = compiler_that(monkeypatch, works=True)
    ops.ensure_native()
    assert ops.native()[0] == torch._C._dispatch_has_kernel_for_dispatch_key("grass::adamw_", "CPU")
    assert "compiling its kernels for this machine" in caplog.text
    assert all(Path(source).is_file() for source in calls[0]["sources"])
    monkeypatch.setattr(extension, "_import_error", MISSING)
    monkeypatch.setattr(extension, "_tried_to_compile", False)
    ops.ensure_native()
    assert len(calls) == 1


def test_lock_and_half_a_library_that_a_killed_process_left_do_no_harm(not_installed, monkeypatch):
    calls = compiler_that(monkeypatch, works=True)
    folder = just_in_time._folder(cuda=False)
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    (folder / "ds_grass_native.so").touch()
    ops.ensure_native()
    assert calls[0]["lock"] is False


def test_variables_are_as_they_were_afterwards(not_installed, monkeypatch):
    compiler_that(monkeypatch, works=False)
    before = dict(os.environ)
    ops.ensure_native()
    assert dict(os.environ) == before


def test_compiler_that_fails_leaves_the_pytorch_kernels_and_says_why_once(not_installed, monkeypatch, caplog):
    calls = compiler_that(monkeypatch, works=False)
    ops.ensure_native()
    ops.ensure_native()
    assert len(calls) == 1
    loaded, reason = ops.native()
    assert not loaded
    assert "No module named 'ds_grass._C', and it was not compiled now: Error building extension" in reason
    assert caplog.text.count("it was not compiled now") == 1


@pytest.mark.parametrize(
    ("obstacle", "message"),
    [
        (lambda patch: patch.setenv("GRASS_BUILD_NATIVE", "0"), "GRASS_BUILD_NATIVE is 0"),
        (
            lambda patch: patch.setattr(just_in_time, "_sources", lambda: None),
            "its sources were not installed",
        ),
        (lambda patch: patch.setenv("CXX", "no-such-compiler"), "no C++ compiler ('no-such-compiler'"),
        (
            lambda patch: patch.setattr(cpp_extension, "is_ninja_available", lambda: False),
            "pip install ninja",
        ),
    ],
)
def test_what_stands_in_the_way_is_said(not_installed, monkeypatch, obstacle, message):
    calls = compiler_that(monkeypatch, works=True)
    obstacle(monkeypatch)
    ops.ensure_native()
    assert not calls
    assert message in ops.native()[1]


@pytest.mark.parametrize("error", [None, ImportError("undefined symbol")])
def test_nothing_is_compiled_beside_an_installed_extension_broken_or_not(not_installed, monkeypatch, error):
    calls = compiler_that(monkeypatch, works=True)
    monkeypatch.setattr(extension, "_import_error", error)
    ops.ensure_native()
    assert not calls


def test_another_pytorch_or_other_gpus_make_another_library(not_installed, monkeypatch):
    folders = {just_in_time._folder(cuda=False)}
    monkeypatch.setattr(torch, "__version__", "99.0")
    folders.add(just_in_time._folder(cuda=False))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    folders.add(just_in_time._folder(cuda=True))
    assert len(folders) == 3


TWO_PROCESSES = """
import logging, sys
logging.basicConfig(level=logging.WARNING)
sys.modules["ds_grass._C"] = None
import torch
from ds_grass import ops
assert not ops.native()[0]
ops.ensure_native()
assert ops.native()[0], ops.native()[1]
x = torch.randn(9999)
assert torch.equal(ops.squared_norm(x), ops.squared_norm_specification(x))
"""


@pytest.mark.slow
def test_two_processes_compile_once_and_both_run_native_kernels(tmp_path):
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    environment.pop("GRASS_BUILD_NATIVE", None)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES], env=environment, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=500)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert sum("compiling its kernels" in output for output in outputs) == 1, outputs
