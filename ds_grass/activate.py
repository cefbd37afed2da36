"""Activation: how the package comes into a training job whose script was not edited.

Purpose: PyTorch (2.5 and newer) calls :func:`autoload` at the end of ``import torch``, through the entry
point group ``torch.backends``. It puts one finder on ``sys.meta_path``; when a module named in :data:`HOOKS`
is imported later, before or after torch, its installer is called with the module as soon as the module has
been executed.

Contract: imports neither host, touches no device, can be called any number of times and never raises, because
an exception here would break ``import torch`` for every program on the machine. What went wrong is kept in
:data:`failures`. A failed installer leaves a guard behind that refuses a ``grass`` block with that traceback:
a block that is silently ignored would train everything, and the loss would still go down. A hook that only tells
(:data:`OPTIONAL`) leaves a warning.

Not covered: what the installers do (:mod:`ds_grass.engine_hooks`, :mod:`ds_grass.trainer_hooks`), and reading any
config.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HOOKS: dict[str, str] = {
    "deepspeed.runtime.engine": "ds_grass.engine_hooks:install, megatron_ext.hooks:install_engine",
    "transformers.trainer": "ds_grass.trainer_hooks:install",
    "megatron.core.transformer.transformer_block": "megatron_ext.hooks:install_block",
    "megatron.core.models.gpt.gpt_model": "megatron_ext.hooks:install_gpt",
    "megatron.core.pipeline_parallel.schedules": "megatron_ext.hooks:install_schedules",
}
"""Module of a host -> each "module:function" of ours that is called with it. One table for both packages."""

OPTIONAL: dict[str, str] = {
    "transformers.trainer": "so the Trainer's log lacks the numbers of GRASS",
    "megatron.core.transformer.transformer_block": "so a `megatron_ext` block has no effect on its models",
    "megatron.core.models.gpt.gpt_model": "so plans of `megatron_ext` do not count the memory of logits",
    "megatron.core.pipeline_parallel.schedules": "so `megatron_ext.recompute` plans for one micro-batch at a time",
}
"""Hooks without which a `grass` block still runs -> what is missing then."""

failures: dict[str, str] = {}
"""Module of a host, or "autoload" -> traceback of what failed there. Shown by ``ds_grass doctor``."""

_hooked: dict[str, ModuleType] = {}


def autoload() -> None:
    """Put the finder in place and hook what is already imported. The entry point that PyTorch calls."""
    try:
        if not is_active():
            sys.meta_path.insert(0, _Finder())
        for name in HOOKS:
            module = sys.modules.get(name)
            if module is not None and _hooked.get(name) is not module:
                _install_when_executed(name, module)
    except Exception as error:  # an exception would break `import torch`
        _keep("autoload", error, "so a `grass` block in ds_config would be ignored")


def is_active() -> bool:
    """Whether the finder is on ``sys.meta_path``."""
    return any(getattr(finder, "is_ds_grass", False) for finder in sys.meta_path)


class _Finder:
    """Asks the finders after it for the modules in :data:`HOOKS`, and wraps the loader they answer with."""

    is_ds_grass = True

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in HOOKS:
            return None
        spec = self._find_spec_of_others(fullname, path, target)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)
        return spec

    def _find_spec_of_others(self, fullname: str, path: Any, target: Any) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None


class _Loader:
    """Delegates everything to the real loader, and leaves the module to that one for good."""

    def __init__(self, loader: Any):
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # a copy that is not initialised yet; going on would recurse
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        create = getattr(self._loader, "create_module", None)
        return None if create is None else create(spec)

    def exec_module(self, module: ModuleType) -> None:
        # First, so that the module and everything that asks for its source see an ordinary loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _install(module.__name__, module)


class _WatchedSpec(ModuleSpec):
    """The spec of a module that is being executed: the import system clears `_initializing` after."""

    @property
    def _initializing(self) -> bool:
        return self.__dict__.get("_initializing", False)

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        self.__dict__["_initializing"] = value
        if not value:
            self.__class__ = ModuleSpec
            module = sys.modules.get(self.name)
            if module is not None:  # None: its execution raised
                _install(self.name, module)


def _install_when_executed(name: str, module: ModuleType) -> None:
    spec = getattr(module, "__spec__", None)
    if not getattr(spec, "_initializing", False):
        _install(name, module)
    elif type(spec) is ModuleSpec:
        spec.__class__ = _WatchedSpec
        if not spec._initializing:  # another thread finished it between the two lines above
            spec._initializing = False


def _install(name: str, module: ModuleType) -> None:
    try:
        _hooked[name] = module
        from importlib import import_module

        for installer in HOOKS[name].split(", "):
            module_path, _, function = installer.partition(":")
            getattr(import_module(module_path), function)(module)
        failures.pop(name, None)
    except Exception as error:  # an exception would break `import deepspeed`
        _keep(name, error, OPTIONAL.get(name, "so a `grass` block in ds_config will be refused"))
        if name not in OPTIONAL:
            _refuse_blocks(module)


def _keep(name: str, error: Exception, consequence: str) -> None:
    import logging
    import traceback

    known = name in failures
    failures[name] = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    if not known:
        logging.getLogger(__name__).warning(
            "ds_grass failed at %s (%s: %s), %s; `ds_grass doctor` shows the traceback",
            name,
            type(error).__name__,
            error,
            consequence,
        )


def _refuse_blocks(module: ModuleType) -> None:
    """Make ``DeepSpeedEngine`` refuse a ``grass`` block, with the traceback of the installer that failed."""
    from functools import wraps

    engine_class = getattr(module, "DeepSpeedEngine", None)
    if engine_class is None or getattr(engine_class.__init__, "__grass_refuses__", False):
        return
    original = engine_class.__init__

    @wraps(original)
    def refusing_init(self: Any, *args: Any, **kwargs: Any) -> None:
        block = getattr(kwargs.get("config_class"), "_param_dict", {}).get("grass")
        enabled = block.get("enabled", True) if isinstance(block, dict) else block is not None
        if enabled and module.__name__ in failures:
            raise RuntimeError(
                "ds_config has a `grass` block but ds_grass could not hook DeepSpeed; repair what the "
                f'traceback says, or write "enabled": false\n\n{failures[module.__name__]}'
            )
        original(self, *args, **kwargs)

    refusing_init.__grass_refuses__ = True
    engine_class.__init__ = refusing_init
