"""What ``megatron_ext doctor`` reports: whether a ``megatron_ext`` block would run here, and if not, why.

Purpose: a block that is silently ignored trains just as well, only not as it should, so everything that decides it is
put in one report: versions, the import hook as a training script would get it, the names of Megatron-core that are
relied on, and the ds_config that holds the block.

Contract: :func:`examine` returns findings and never raises for what is broken on the machine; a broken thing is a
finding with state "problem" and the cure beside it. The hook is looked at in a fresh interpreter, because this one
imported the package by hand. Not covered: other nodes of a job (run it there), and what it takes a model to see.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ds_grass.block import shown
from ds_grass.doctor import ask_fresh_interpreter, declared
from ds_grass.doctor.finding import Finding
from megatron_ext import compat
from megatron_ext.config import NAME, MegatronExtConfig, RecomputeConfig, RecomputePlanConfig, parse_block
from megatron_ext.locate import OPTIONS, VARIABLE, read
from megatron_ext.recompute.plan import KEY as PLAN_KEY
from megatron_ext.recompute.plan import MODULES, read_plan

NEEDED = ("ds-grass", "torch", "megatron-core", "pydantic", "rich")
OPTIONAL = ("deepspeed", "flash-attn", "scikit-learn", "matplotlib")
_KERNELS = {"Transformer Engine": "transformer_engine", "NVIDIA apex": "amp_C"}
"""Package -> a top-level module that only it has: `apex` on PyPI is another package."""

_PROBE = """
import importlib, json, sys
import torch
activate = sys.modules.get("ds_grass.activate")
hosts = [name for name in activate.HOOKS if name.startswith("megatron.")] if activate else []
found = {"finder": bool(activate) and activate.is_active(), "hosts": hosts, "live": [], "errors": {}}
for name in hosts:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        found["errors"][name] = str(error)
        continue
    if activate._hooked.get(name) is module and name not in activate.failures:
        found["live"].append(name)
failures = activate.failures if activate else {}
found["failures"] = {name: text for name, text in failures.items() if name in (*hosts, "autoload")}
sys.__stdout__.write("\\nprobe:" + json.dumps(found))
"""


def examine(config: str | None = None, timeout_s: float = 180.0) -> list[Finding]:
    """All findings, in the order of the report. `config`: path of a ds_config to look at, else the one that
    MEGATRON_EXT_CONFIG names. The interpreter that is started may take `timeout_s` seconds."""
    findings = [*_versions(), *_kernel_packages(), *declared("megatron_ext", "the model is built")]
    if _installed("torch") is not None:
        findings += _hook_in_a_fresh_interpreter(timeout_s)
    if _installed("megatron-core") is not None:
        findings += _symbols()
    return [*findings, *_config(config)]


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


def _kernel_packages() -> Iterator[Finding]:
    """Without either, Megatron-core falls back to a norm of its own that refuses sequence parallelism."""
    present = {name: importlib.util.find_spec(module) is not None for name, module in _KERNELS.items()}
    for name, there in present.items():
        yield Finding("versions", name, "installed" if there else "not installed (optional)")
    if not any(present.values()):
        cure = "pip install transformer-engine[pytorch]"
        value = "not there: Megatron-core's norm without Transformer Engine or apex refuses sequence_parallel"
        yield Finding("versions", "a norm for sequence parallelism", value, "note", cure)


def _hook_in_a_fresh_interpreter(timeout_s: float) -> Iterator[Finding]:
    name = "hook in a fresh interpreter"

    def problem(value: str, cure: str) -> Finding:
        return Finding("activation", name, value, "problem", cure)

    try:
        found = ask_fresh_interpreter(_PROBE, timeout_s)
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        yield problem(f"cannot be told: {error}", "try `import torch` by itself")
        return
    for host, text in found["failures"].items():
        last = text.strip().splitlines()[-1]
        yield Finding(
            "activation", f"installing on {host}", last, "problem", "repair what it says", detail=text
        )
    for host, error in found["errors"].items():
        yield problem(f"nothing to hook: {host}: {error}", "pip install megatron-core")
    missing = [host for host in found["hosts"] if host not in (*found["live"], *found["errors"])]
    if found["live"] and not missing:
        yield Finding("activation", name, f"live on {', '.join(found['live'])}")
    elif not found["finder"]:
        yield problem("not in place after `import torch`", "see the lines above")
    elif not found["errors"]:
        named = ", ".join(missing) or "any module of Megatron-core"
        yield problem(f"the finder is in place but does not hook {named}", "see the lines above")


def _symbols() -> Iterator[Finding]:
    """Every name of Megatron-core that is relied on, module by module; then the version."""
    try:
        needed, installed = compat.by_module(), compat.installed_version()
    except RuntimeError as error:
        yield Finding("symbols", "megatron-core", str(error), "problem", "repair that import")
        return
    for module, (count, absent) in needed.items():
        if absent:
            cure = f'install "megatron-core{compat.SUPPORTED}"'
            yield Finding("symbols", module, f"lacks {', '.join(absent)}", "problem", cure)
        else:
            names = "name is" if count == 1 else "names are"
            yield Finding("symbols", module, f"{count} {names} as expected")
    if compat.is_supported(installed):
        yield Finding("symbols", "megatron-core supported", f"yes ({compat.SUPPORTED})")
    else:
        cure = "it may well work where every name above is there"
        value = f"not tried; tried is {compat.SUPPORTED}"
        yield Finding("symbols", "megatron-core supported", value, "note", cure)


def _config(path: str | None) -> Iterator[Finding]:
    """The file that is given, else the one that the variable names."""
    source, name = ("--config", path) if path is not None else (VARIABLE, os.environ.get(VARIABLE))
    if not name:
        cure = f"set {VARIABLE}, pass {OPTIONS[0]} FILE to the script, or look at one with --config FILE"
        yield Finding("activation", "ds_config", "none is named here", "note", cure)
        return
    try:
        ds_config = read(Path(name), source)
    except ValueError as error:
        yield Finding("config", "file", str(error), "problem", "name the file that the job names")
        return
    yield Finding("config", "file", f"{name} ({source})")
    if NAME in ds_config:
        yield from _block(ds_config[NAME])
    else:
        value = "absent: Megatron-core runs as if ds-grass were not there"
        yield Finding("config", NAME, value, "problem", f'add "{NAME}": {{}}')


def _block(block: object) -> Iterator[Finding]:
    try:
        config = parse_block(block)
    except ValueError as error:
        yield Finding("config", NAME, str(error), "problem", "write what it says")
        return
    yield Finding("config", NAME, _told(config))
    if config.sequence_parallel.enabled:
        yield from _saved_measurements(config.sequence_parallel.cost_model.load)
    else:
        cure = 'remove "enabled": false to run it'
        value = "switched off by megatron_ext.sequence_parallel.enabled"
        yield Finding("config", f"{NAME}.sequence_parallel", value, "note", cure)
    if config.recompute is not None:
        yield from _recompute(config.recompute)


def _saved_measurements(saved: str | None) -> Iterator[Finding]:
    if saved is not None and not Path(saved).is_file():
        cure = 'write "load": null to measure at start'
        value = f"{saved} is no file here; it is looked for in the working directory of the job"
        yield Finding("config", "megatron_ext.sequence_parallel.cost_model.load", value, "note", cure)


def _recompute(config: RecomputeConfig) -> Iterator[Finding]:
    name = f"{NAME}.recompute"
    if not config.enabled:
        cure = 'remove "enabled": false to run it'
        value = "switched off by megatron_ext.recompute.enabled: the script's own setting stands"
        yield Finding("config", name, value, "note", cure)
        return
    yield Finding("config", name, _recompute_told(config))
    unknown = [module for module in config.modules or () if module not in MODULES]
    if unknown:
        value = f"names {', '.join(unknown)}; allowed: {', '.join(MODULES)}, or null"
        yield Finding("config", f"{name}.modules", value, "problem", "write null to let the package decide")
    yield from _plan_files(config.plan)


def _recompute_told(config: RecomputeConfig) -> str:
    """Which plan, of what, and where it goes."""
    if config.plan.load is not None:
        return (
            f"the plan of {config.plan.load}, verified but not measured; policy {config.policy} is not asked"
        )
    ratio = "" if config.ratio is None else f" with ratio {config.ratio:g}"
    if config.policy != "stage_aware":
        what = ", whole layers only, not measured" if config.policy != "none" else ", nothing is recomputed"
    elif config.modules is None:
        what = ", layers in full or every module that the model can recompute by itself"
    else:
        what = f", layers in full or {', '.join(config.modules)}"
    saved = "not saved" if config.plan.save is None else f"saved to {config.plan.save}"
    return f"policy {config.policy}{ratio}{what}; {saved}"


def _plan_files(config: RecomputePlanConfig) -> Iterator[Finding]:
    """Both are looked for from here, as from the working directory of the job."""
    if config.load is not None:
        try:
            plan = read_plan(config.load)
        except ValueError as error:
            cure = 'name a plan, or write "load": null to make one at start'
            yield Finding("config", PLAN_KEY, str(error), "problem", cure)
        else:
            layers = sum(len(chunk.layers) for chunk in plan.chunks.values())
            stages = len({rank for rank, _ in plan.chunks})
            value = f"{config.load}: policy {plan.policy}, {layers} layers on {stages} stages"
            yield Finding("config", PLAN_KEY, value)
    if config.save is not None and not Path(config.save).absolute().parent.is_dir():
        key = "megatron_ext.recompute.plan.save"
        value = f"{config.save} is to lie in a folder that is not here"
        yield Finding("config", key, value, "note", "make the folder, or name another file")


def _told(config: MegatronExtConfig) -> str:
    """The keys that were not left at their defaults."""
    given = config.model_dump(exclude_defaults=True)
    return ", ".join(f"{key} {shown(value)}" for key, value in given.items()) or "every key at its default"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
