"""The seam to the Hugging Face Trainer: GRASS's numbers in its training log, and an honest count of parameters.

Contract: with a Trainer whose engine does not run GRASS, or has no engine at all, every call goes through untouched.
Only a log with a "loss" is added to: evaluations and the summary at the end are left as they are. The Trainer counts
what requires a gradient when it looks; of a GRASS model it is told what trains in the whole run.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import MutableMapping
from types import ModuleType
from typing import Any

MARK = "__grass_wrapped__"


def install(module: ModuleType) -> None:
    """Wrap `Trainer.log` and the module's parameter count, once. Called when transformers.trainer was imported."""
    log = module.Trainer.log
    if hasattr(log, MARK):
        return

    # transformers 4.46 added `start_time`; whatever else comes is passed on
    @functools.wraps(log)
    def telling_log(self: Any, logs: Any, *args: Any, **kwargs: Any) -> Any:
        core = _core_of(getattr(self, "deepspeed", None)) or _core_of(getattr(self, "model_wrapped", None))
        if core is not None and isinstance(logs, MutableMapping) and "loss" in logs:
            with core.journal.time:
                logs.update(_numbers(core))  # in place, as the Trainer itself adds the epoch
        return log(self, logs, *args, **kwargs)

    setattr(telling_log, MARK, True)
    module.Trainer.log = telling_log
    count = getattr(module, "get_model_param_count", None)
    if count is not None:
        module.get_model_param_count = _honest(count)


def _honest(count: Any) -> Any:
    @functools.wraps(count)
    def get_model_param_count(model: Any, trainable_only: bool = False, *args: Any, **kwargs: Any) -> Any:
        core = _core_of(model) if trainable_only else None
        if core is not None:
            return sum(unit.numel for unit in core.units.values())
        return count(model, trainable_only, *args, **kwargs)

    return get_model_param_count


def _core_of(engine: Any) -> Any:
    """The GRASS core of a DeepSpeed engine, None for anything else."""
    known = sys.modules.get("ds_grass.zero.core")  # absent: no engine of this process runs GRASS
    core = getattr(getattr(engine, "optimizer", None), "core", None)
    return core if known is not None and isinstance(core, known.GrassCore) else None


def _numbers(core: Any) -> dict[str, float]:
    from ds_grass.telemetry.scalars import trainer_logs

    return trainer_logs(core.journal.describe())
