"""What ``ds_grass doctor`` reports: whether GRASS would run here, and if not, why.

Purpose: in this field a feature that silently does not run still shows a falling loss, so everything that
decides it is put in one report: versions, the import hook as a training script would get it, the private names
of DeepSpeed that are relied on, the native kernels, host memory, and a ds_config if one is given.

Contract: :func:`examine` returns findings and never raises for what is broken on the machine; a broken thing
is a finding with state "problem" and the cure beside it. The hook is looked at in a fresh interpreter, because
this one imported ds_grass by hand. Not covered: other nodes of a job (run it there).
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version

from ds_grass.doctor import machine
from ds_grass.doctor.config_file import config_file
from ds_grass.doctor.finding import Finding

NEEDED = ("ds-grass", "torch", "deepspeed", "pydantic", "rich")
OPTIONAL = ("transformers", "accelerate", "matplotlib", "tensorboard", "wandb", "comet-ml", "megatron-core")
HOST_MODULE = "deepspeed.runtime.engine"
TRAINER_MODULE = "transformers.trainer"
_SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"

_PROBE = f"""
import importlib, json, sys
import torch
found = {{"hooked": {{}}, "errors": {{}}}}
found["finder"] = any(getattr(finder, "is_ds_grass", False) for finder in sys.meta_path)
for name, method in (("{HOST_MODULE}", "__init__"), ("{TRAINER_MODULE}", "log")):
    try:
        module = importlib.import_module(name)
        found["hooked"][name] = [
            name for name, value in vars(module).items()
            if isinstance(value, type) and hasattr(getattr(value, method, None), "__grass_wrapped__")
        ]
    except ImportError as error:
        found["errors"][name] = str(error)
activate = sys.modules.get("ds_grass.activate")
found["failures"] = dict(activate.failures) if activate else {{}}
sys.__stdout__.write("\\nprobe:" + json.dumps(found))
"""


def examine(config: str | None = None, timeout_s: float = 120.0) -> list[Finding]:
    """All findings, in the order of the report. `config`: path of a ds_config to look at, too. The interpreter that
    is started may take `timeout_s` seconds."""
    findings = [*_versions(), *_activation(timeout_s)]
    if _installed("deepspeed") is not None:
        findings += _symbols()
    if _installed("torch") is not None:
        findings += [*machine.kernels(), *machine.memory()]
    return findings if config is None else [*findings, *config_file(config)]


def is_healthy(findings: list[Finding]) -> bool:
    """Whether a ``grass`` block would run: no finding is a problem."""
    return all(finding.state != "problem" for finding in findings)


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "python", f"{platform.python_version()} ({sys.executable})")
    for package in NEEDED:
        installed = _installed(package)
        if installed is not None:
            yield Finding("versions", package, installed)
        elif package == "ds-grass":
            cure = "pip install it, so that PyTorch finds its entry point"
            yield Finding("versions", package, "not installed, imported from a folder", "note", cure)
        else:
            yield Finding("versions", package, "not installed", "problem", f"pip install {package}")
    for package in OPTIONAL:
        yield Finding("versions", package, _installed(package) or "not installed (optional)")


def _symbols() -> Iterator[Finding]:
    """Every private or unstable name of DeepSpeed that is relied on, module by module; then the version."""
    try:
        compat = importlib.import_module("ds_grass.zero.compat")
        needed, supported = (
            compat.by_module(3),
            compat.is_supported(),
        )  # stage 3 needs all that the others need
    except ImportError as error:
        yield Finding("symbols", "deepspeed", f"cannot be told: {error}", "problem", "repair that import")
        return
    for module, (count, absent) in needed.items():
        if absent:
            cure = f"install deepspeed{compat.SUPPORTED}"
            yield Finding("symbols", module, f"lacks {', '.join(absent)}", "problem", cure)
        else:
            names = "name is" if count == 1 else "names are"
            yield Finding("symbols", module, f"{count} {names} as expected")
    if supported:
        yield Finding("symbols", "deepspeed supported", f"yes ({compat.SUPPORTED})")
    else:
        cure = "it may well work where every name above is there"
        yield Finding(
            "symbols", "deepspeed supported", f"not tried; tried is {compat.SUPPORTED}", "note", cure
        )


def _activation(timeout_s: float) -> Iterator[Finding]:
    yield from declared("ds_grass", "deepspeed.initialize")
    if _installed("torch") is not None:
        yield from _hook_in_a_fresh_interpreter(timeout_s)


def declared(package: str, before: str) -> Iterator[Finding]:
    """Whether PyTorch will call the entry point; else `package` is to be imported `before` something."""
    found = [entry.value for entry in entry_points(group="torch.backends") if entry.name == "ds_grass"]
    if found:
        yield Finding("activation", "entry point", f"torch.backends: {found[0]}")
    else:
        cure = f"pip install ds-grass into this environment, or import {package} in the script"
        yield Finding("activation", "entry point", "not found", "problem", cure)
    switch = os.environ.get(_SWITCH)
    if switch in (None, "1"):
        yield Finding("activation", _SWITCH, "not set" if switch is None else switch)
    else:
        cure = f"unset it, or import {package} in the script before {before}"
        yield Finding("activation", _SWITCH, f"{switch}: switched off", "problem", cure)


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
        state = "note" if module == TRAINER_MODULE else "problem"
        yield Finding("activation", name_of_step, last, state, "repair what it says", detail=text)
    error, classes = found["errors"].get(HOST_MODULE), found["hooked"].get(HOST_MODULE)
    if error is not None:
        yield problem(f"nothing to hook: {error}", "pip install deepspeed")
    elif classes:
        yield Finding("activation", name, f"live on {HOST_MODULE}: {', '.join(classes)}")
    elif found["finder"]:
        yield problem("the finder is in place but no class is hooked", "see the lines above")
    else:
        yield problem("not in place after `import torch`", "see the lines above")
    yield from _trainer_hook(found)


def _trainer_hook(found: dict) -> Iterator[Finding]:
    """Not needed to train: without it the Trainer's log lacks GRASS's numbers."""
    name, classes = "hook on the Trainer", found["hooked"].get(TRAINER_MODULE)
    if classes:
        yield Finding("activation", name, f"live on {TRAINER_MODULE}: {', '.join(classes)}")
    elif classes is not None:
        cure = "see the lines above; a job runs without it"
        yield Finding(
            "activation", name, "not in place: its log will lack the numbers of GRASS", "note", cure
        )
    elif _installed("transformers") is not None:
        reason = found["errors"].get(TRAINER_MODULE, "unknown")
        yield Finding(
            "activation", name, f"nothing to hook: {reason}", "note", "repair it to use the Trainer"
        )


def _probe(timeout_s: float) -> dict:
    """What a script sees that imports torch and DeepSpeed and knows nothing of this package."""
    return ask_fresh_interpreter(_PROBE, timeout_s)


def ask_fresh_interpreter(source: str, timeout_s: float) -> dict:
    """What `source` writes as JSON after the word "probe:". ValueError where it writes none."""
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    _, found, answer = done.stdout.rpartition("probe:")
    if not found:
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        raise ValueError(f"the interpreter ended with status {done.returncode}: {last}")
    return json.loads(answer)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
