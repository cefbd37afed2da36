"""Extensions for Megatron-core, switched on by a ``megatron_ext`` block in ds_config.json.

`apply` and `remove` switch on and off by hand; `counters` says what ran; `mpu` is the adapter for DeepSpeed's ``mpu=``.

Contract: importing this package imports neither torch nor megatron, and puts the same import hook in place as
``import ds_grass`` does, because one JSON file and one hook serve both packages.
"""

from __future__ import annotations

from typing import Any

from ds_grass import activate as _activate

__all__ = ["apply", "counters", "mpu", "recompute_counters", "remove"]


def apply(config: Any, model: Any = None) -> None:
    """Use this ds_config, a file name or a dict, for transformer blocks built from now on and for those of `model`.

    Only needed where nothing names the file: MEGATRON_EXT_CONFIG and --deepspeed_config in the script's arguments do,
    and ``deepspeed.initialize`` finds the block of its own config. Raises ValueError about what is wrong in the block.
    """
    from . import job

    job.apply(config, model)


def remove() -> None:
    """Take everything out again: Megatron-core is as it was, to the bit."""
    from . import job

    job.remove()


def counters() -> dict[str, dict[int, dict[str, int]]]:
    """{strategy: {length: {"forward": layers, "backward": layers, "recomputed": layers}}} that ran on this rank."""
    from . import job

    running = job.running()
    return {} if running is None else running.counters()


def recompute_counters() -> dict[str, dict[str, int]]:
    """{choice: {"forward": layers, "recomputed": layers}} that ran on this rank: "none", "full", or modules."""
    from . import job

    running = job.running()
    return {} if running is None or running.recomputation is None else running.recomputation.counters()


def __getattr__(name: str) -> object:
    if name == "mpu":
        from importlib import import_module

        return import_module(".mpu", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_activate.autoload()
