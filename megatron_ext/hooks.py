"""The seam to Megatron-core: what is called when the modules that build models have been imported.

`TransformerBlock.__init__` is wrapped because it is the one place that every model goes through, each virtual stage of
a pipeline too, after process groups are there and before DDP, an optimizer or DeepSpeed has seen the parameters.
Without a ``megatron_ext`` block in a config the wrapper calls the original and does nothing else.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

MARK = "__megatron_ext_wrapped__"
SCHEDULES = (
    "forward_backward_no_pipelining",
    "forward_backward_pipelining_without_interleaving",
    "forward_backward_pipelining_with_interleaving",
)
"""Functions of megatron.core.pipeline_parallel.schedules that run one step."""


def install_block(module: ModuleType) -> None:
    """Wrap ``TransformerBlock.__init__``, once. Called when megatron.core.transformer.transformer_block is imported."""
    _after_init(module.TransformerBlock, _adopt)


def install_gpt(module: ModuleType) -> None:
    """Wrap ``GPTModel.__init__``: it alone knows what is outside of its block, and how many logits it computes."""
    _after_init(module.GPTModel, _tell_of)


def install_schedules(module: ModuleType) -> None:
    """Wrap the schedules: they alone know how many micro-batches a step has, and when it begins and ends."""
    for name in SCHEDULES:
        _around(module, name, _step)
    _around(module, "forward_step", _forward)


def install_engine(module: ModuleType) -> None:
    """Wrap ``DeepSpeedEngine.__init__``. Called when deepspeed.runtime.engine is imported."""
    _after_init(module.DeepSpeedEngine, _join_engine)


def _after_init(owner: type, then: Any) -> None:
    original = owner.__init__
    if MARK in vars(original) and vars(original)[MARK] is then:
        return

    @functools.wraps(original)
    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        then(self, kwargs)

    setattr(build, MARK, then)
    owner.__init__ = build


def _around(module: ModuleType, name: str, run: Any) -> None:
    original = getattr(module, name)
    if vars(original).get(MARK) is run:
        return

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return run(original, args, kwargs)

    setattr(call, MARK, run)
    setattr(module, name, call)


def _step(original: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    from . import job

    found = job.running()
    if found is None or "num_microbatches" not in kwargs:
        return original(*args, **kwargs)
    if kwargs.get("forward_only"):
        with found.evaluation():
            return original(*args, **kwargs)
    with found.step(kwargs["num_microbatches"]):
        return original(*args, **kwargs)


def _forward(original: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    from . import job

    found = job.running()
    if found is None:
        return original(*args, **kwargs)
    found.forward_begins()
    result = original(*args, **kwargs)
    found.forward_ended()
    return result


def _adopt(block: Any, _kwargs: dict[str, Any]) -> None:
    from . import job

    found = job.current()
    if found is not None:
        found.adopt(block)


def _tell_of(model: Any, _kwargs: dict[str, Any]) -> None:
    from . import job

    found = job.current()
    if found is not None:
        job.tell_of(found, model)


def _join_engine(engine: Any, kwargs: dict[str, Any]) -> None:
    parsed = getattr(kwargs.get("config_class"), "_param_dict", None)
    if not isinstance(parsed, dict) or "megatron_ext" not in parsed:
        return
    from . import deepspeed_engine

    deepspeed_engine.join(engine, parsed)
