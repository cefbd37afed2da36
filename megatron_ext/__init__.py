"""Extensions for Megatron-core: so far :mod:`megatron_ext.mpu`, the adapter for DeepSpeed's ``mpu=``.

Contract: importing this package imports neither torch nor megatron, and puts the same import hook in place as
``import ds_grass`` does, because one JSON file and one hook serve both packages.
"""

from __future__ import annotations

from ds_grass import activate as _activate

__all__ = ["mpu"]


def __getattr__(name: str) -> object:
    if name == "mpu":
        from importlib import import_module

        return import_module(".mpu", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_activate.autoload()
