"""What telemetry asks of an engine: the loss that goes into backward, the end of a step, its own end, its monitor.

Contract: the methods are replaced on one engine, pass arguments, results and exceptions through, and change nothing
that trains. A script that calls `loss.backward()` itself trains just as well; its loss is not in the log.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ds_grass.telemetry.scalars import events

if TYPE_CHECKING:
    from ds_grass.zero.journal import Journal


def watch(engine: Any) -> None:
    """Replace `backward`, `step` and `destroy` of an engine, which may not have been initialised yet."""
    for name, make in (("backward", _backward), ("step", _step), ("destroy", _destroy)):
        original = getattr(type(engine), name).__get__(engine)
        # `object.__setattr__`: the engine is a torch module that has not been initialised yet
        object.__setattr__(engine, name, functools.wraps(original)(make(engine, original)))


def sender(engine: Any) -> Callable[[Mapping[str, Any]], None] | None:
    """Gives the numbers of a log line to the engine's monitor, at the samples it has seen; None when none is on."""
    if not engine.monitor.enabled:
        return None
    return lambda line: engine.monitor.write_events(events(line, engine.global_samples))


def _journal(engine: Any) -> Journal | None:
    core = getattr(getattr(engine, "optimizer", None), "core", None)
    return None if core is None else core.journal


def _backward(engine: Any, original: Callable) -> Callable:
    def backward(*args: Any, **kwargs: Any) -> Any:
        # divided by the number of micro-batches, without the loss scale: DeepSpeed 0.18 and 0.19 return it alike
        loss = original(*args, **kwargs)
        journal = _journal(engine)
        if journal is not None:
            journal.saw_loss(loss)
        return loss

    return backward


def _step(engine: Any, original: Callable) -> Callable:
    def step(*args: Any, **kwargs: Any) -> Any:
        journal = _journal(engine)
        try:
            result = original(*args, **kwargs)
        except BaseException:
            if journal is not None:
                journal.bar.close()  # the traceback gets a line of its own
            raise
        if journal is not None:
            journal.end_step()
        return result

    return step


def _destroy(engine: Any, original: Callable) -> Callable:
    def destroy(*args: Any, **kwargs: Any) -> Any:
        journal = _journal(engine)
        if journal is not None:
            journal.close()
        return original(*args, **kwargs)

    return destroy
