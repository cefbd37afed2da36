"""What ``ds_grass doctor`` reports: whether GRASS would run here, and if not, why.

Purpose: in this field a feature that silently does not run still shows a falling loss, so everything that
decides it is put in one report: versions, the import hook as a training script would get it, the native
kernels, host memory.

Contract: :func:`examine` returns findings and never raises for what is broken on the machine; a broken thing
is a finding with state "problem" and the cure beside it. The hook is looked at in a fresh interpreter, because
this one imported ds_grass by hand. Not covered: other nodes of a job (run it there), any ds_config.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Literal

PACKAGES = ("ds-grass", "torch", "deepspeed", "transformers", "accelerate", "megatron-core")
HOST_MODULE = "deepspeed.runtime.engine"
_SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"

_PROBE = f"""
import json, sys
import torch
found = {{"finder": any(getattr(finder, "is_ds_grass", False) for finder in sys.meta_path)}}
try:
    import {HOST_MODULE} as engine
    found["error"] = None
    found["classes"] = [
        name for name, value in vars(engine).items()
        if isinstance(value, type) and hasattr(value.__init__, "__grass_wrapped__")
    ]
except ImportError as error:
    found["error"] = str(error)
    found["classes"] = []
activate = sys.modules.get("ds_grass.activate")
found["failures"] = dict(activate.failures) if activate else {{}}
sys.__stdout__.write("\\nprobe:" + json.dumps(found))
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report; `cure` says what to do about a note or a problem, `detail` is a traceback."""

    section: Literal["versions", "activation", "kernels", "memory"]
    name: str
    value: str
    state: Literal["ok", "note", "problem"] = "ok"
    cure: str = ""
    detail: str = ""


def examine(timeout_s: float = 120.0) -> list[Finding]:
    """All findings, in the order of the report. The interpreter it starts may take `timeout_s` seconds."""
    return [*_versions(), *_activation(timeout_s), *_kernels(), *_memory()]


def is_healthy(findings: list[Finding]) -> bool:
    """Whether a ``grass`` block would run: no finding is a problem."""
    return all(finding.state != "problem" for finding in findings)


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "python", f"{platform.python_version()} ({sys.executable})")
    for package in PACKAGES:
        installed = _installed(package)
        if installed is not None:
            yield Finding("versions", package, installed)
        elif package == "ds-grass":
            cure = "pip install it, so that PyTorch finds its entry point"
            yield Finding("versions", package, "not installed, imported from a folder", "note", cure)
        elif package in ("torch", "deepspeed"):
            yield Finding("versions", package, "not installed", "problem", f"pip install {package}")
        else:
            yield Finding("versions", package, "not installed (optional)")
    if _installed("deepspeed") is not None:
        yield _supported_deepspeed()


def _supported_deepspeed() -> Finding:
    name = "deepspeed supported"
    try:
        compat = importlib.import_module("ds_grass.zero.compat")
        missing = [*dict.fromkeys(compat.missing(2) + compat.missing(3))]
        supported = compat.is_supported()
    except ImportError as error:
        return Finding("versions", name, f"cannot be told: {error}", "problem", "repair that import")
    if missing:
        cure = f"install deepspeed{compat.SUPPORTED}"
        return Finding("versions", name, f"no: it lacks {', '.join(missing)}", "problem", cure)
    if not supported:
        cure = "it may well work: every name that is needed is there"
        return Finding("versions", name, f"not tried; tried is {compat.SUPPORTED}", "note", cure)
    return Finding("versions", name, f"yes ({compat.SUPPORTED})")


def _activation(timeout_s: float) -> Iterator[Finding]:
    declared = [entry.value for entry in entry_points(group="torch.backends") if entry.name == "ds_grass"]
    if declared:
        yield Finding("activation", "entry point", f"torch.backends: {declared[0]}")
    else:
        cure = "pip install ds-grass into this environment, or import ds_grass in the script"
        yield Finding("activation", "entry point", "not found", "problem", cure)
    switch = os.environ.get(_SWITCH)
    if switch in (None, "1"):
        yield Finding("activation", _SWITCH, "not set" if switch is None else switch)
    else:
        cure = "unset it, or import ds_grass in the script before deepspeed.initialize"
        yield Finding("activation", _SWITCH, f"{switch}: switched off", "problem", cure)
    if _installed("torch") is not None:
        yield from _hook_in_a_fresh_interpreter(timeout_s)


def _hook_in_a_fresh_interpreter(timeout_s: float) -> Iterator[Finding]:
    name = "hook in a fresh interpreter"

    def problem(value: str, cure: str) -> Finding:
        return Finding("activation", name, value, "problem", cure)

    try:
        found = _probe(timeout_s)
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        yield problem(f"cannot be told: {error}", "try `import torch` by itself")
        return
    for module, text in found["failures"].items():
        name_of_step, last = f"installing on {module}", text.strip().splitlines()[-1]
        yield Finding("activation", name_of_step, last, "problem", "repair what it says", detail=text)
    if found["error"] is not None:
        yield problem(f"nothing to hook: {found['error']}", "pip install deepspeed")
    elif found["classes"]:
        yield Finding("activation", name, f"live on {HOST_MODULE}: {', '.join(found['classes'])}")
    elif found["finder"]:
        yield problem("the finder is in place but no class is hooked", "see the lines above")
    else:
        yield problem("not in place after `import torch`", "see the lines above")


def _probe(timeout_s: float) -> dict:
    """What a script sees that imports torch and DeepSpeed and knows nothing of this package."""
    command = [sys.executable, "-c", _PROBE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    _, found, answer = done.stdout.rpartition("probe:")
    if not found:
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        raise ValueError(f"the interpreter ended with status {done.returncode}: {last}")
    return json.loads(answer)


def _kernels() -> Iterator[Finding]:
    if _installed("torch") is None:
        return
    ops = importlib.import_module("ds_grass.ops")
    loaded, reason = ops.native()
    yield Finding("kernels", "native", reason, "ok" if loaded else "note")
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        devices = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
        yield Finding("kernels", "device", f"CUDA {torch.version.cuda}, {devices}")
    else:
        yield Finding("kernels", "device", "CPU: no CUDA device is visible")


def _memory() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        yield Finding("memory", "pinned memory (ulimit -l)", "unlimited")
    else:
        cure = "raise it if pinning fails, or set grass.states.pin_memory to false"
        yield Finding("memory", "pinned memory (ulimit -l)", _size(soft), "note", cure)
    if _installed("torch") is None:
        return
    available = importlib.import_module("ds_grass.host_memory").available_bytes()
    if available is not None:
        need = "by default GRASS keeps 12 bytes a parameter there"
        yield Finding("memory", "host memory available", f"{_size(available)}; {need}")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _size(count_bytes: int) -> str:
    if count_bytes < 2**30:
        return f"{count_bytes / 2**20:.0f} MiB"
    return f"{count_bytes / 2**30:.1f} GiB"
