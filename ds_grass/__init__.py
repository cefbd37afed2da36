"""GRASS for DeepSpeed: fine-tune every layer of a model with the optimizer memory of a few.

Purpose: the public names of the package, loaded when they are first used. Importing the package also puts the
import hook in place (see :mod:`ds_grass.activate`), for people who switched PyTorch's own plugin loading off.

Contract: importing this module imports neither torch nor deepspeed nor pydantic, and never raises.
Not covered: anything that trains; that begins in :mod:`ds_grass.engine_hooks`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import activate as _activate

if TYPE_CHECKING:
    from .config import GrassConfig
    from .controller import Controller

__version__ = "0.1.0"
__all__ = ["GrassConfig", "controller"]


def controller(engine: Any) -> Controller:
    """The GRASS controller of a DeepSpeed engine: what is active, why, and since when.

    Raises ``ValueError`` when `engine` was built without a ``grass`` block.
    """
    from .engine_hooks import controller as find_controller

    return find_controller(engine)


def __getattr__(name: str) -> Any:
    if name == "GrassConfig":
        from .config import GrassConfig

        return GrassConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `ds_grass.controller` the public function.

    Importing the submodule of the same name would bind that module over it, as the import system does for
    every submodule. The submodule stays reachable in the usual way, ``from ds_grass.controller import
    Controller``.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "controller" and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
_activate.autoload()
