"""What the stages of a pipeline tell each other through the c10d store: their layers, and what they plan.

Contract: no collective. Of all ranks of a stage the first tells for them (data- and tensor-parallel rank 0). A fact may
be told again and replaces the one before; :meth:`StageFacts.all_there` never waits, :meth:`StageFacts.wait` does, and
names the stages that did not tell.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..board import TIMEOUT_S

if TYPE_CHECKING:
    from torch.distributed import Store


@dataclass(frozen=True)
class StagePlan:
    """One stage's plan and what it was made from, as it is told, logged, saved and drawn."""

    stage: int
    policy: str
    chunks: tuple[dict[str, Any], ...]
    """{"layers": [choice of each layer], "share": null or its fields} of each chunk."""
    open: tuple[int, ...]
    """Most micro-batches of each chunk whose activations are held."""
    pipeline: dict[str, Any]
    """Fields of :class:`.schedule.Pipeline`."""
    limit_bytes: int
    static_bytes: int | None = None
    """Weights, gradients, optimizer states. This and what follows: None where the policy does not measure."""
    predicted_bytes: int | None = None
    """At the peak."""
    measured_bytes: int | None = None
    """At the peak of the step that verified the plan; None before."""
    error: float | None = None
    """Of that measurement: measured over predicted, less one. On a CPU, where nothing else is counted, both are of what
    autograd holds beside the static bytes."""
    nothing_recomputed_bytes: int | None = None
    """What the peak would be with every activation kept."""
    all_recomputed_bytes: int | None = None
    """What the peak would be with every layer recomputed in full."""
    forward_seconds: tuple[float, ...] | None = None
    """Of one micro-batch through each chunk's layers."""
    backward_seconds: tuple[float, ...] | None = None
    """The same, without what is recomputed."""
    recompute_seconds: tuple[float, ...] | None = None
    outside_seconds: tuple[float, ...] | None = None
    """Of one forward of each chunk, outside of its layers: embedding, head, loss."""
    layer_options: tuple[dict[str, Any], ...] | None = None
    """Fields of each :class:`.stage_memory.Option` of the stage's most frequent layer."""
    layer_static_bytes: int | None = None
    """Weights, gradients and optimizer states of one such layer."""
    outside_bytes: tuple[int, ...] | None = None
    """Kept by a micro-batch of each chunk, outside of its layers."""
    frozen: bool = False


class StageFacts:
    """A place in the store for each stage."""

    def __init__(
        self, store: Store, name: str, stages: int, stage: int, is_first: bool, timeout_s: float = TIMEOUT_S
    ):
        """`name`: of the job, equal on all ranks. `is_first`: this rank tells for its stage."""
        self._store, self._name, self._stages, self._stage = store, name, stages, stage
        self._is_first, self._timeout_s = is_first, timeout_s

    def tell(self, what: str, fact: Any) -> None:
        """Put it where the others look."""
        if self._is_first:
            self._store.set(self._key(what, self._stage), json.dumps(fact))

    def all_there(self, what: str) -> list[Any] | None:
        """What every stage told last, the first stage's first; None while one is missing."""
        keys = [self._key(what, stage) for stage in range(self._stages)]
        if not self._store.check(keys):
            return None
        return [json.loads(self._store.get(key)) for key in keys]

    def wait(self, what: str) -> list[Any]:
        """As :meth:`all_there`, later if it must be. RuntimeError names stages that stay silent."""
        deadline, pause_s = time.monotonic() + self._timeout_s, 0.0005
        while (found := self.all_there(what)) is None:
            late = time.monotonic() > deadline
            if late and (silent := self._silent(what)):
                raise RuntimeError(
                    f"pipeline stages {silent} did not tell stage {self._stage} about {what} within "
                    f"{self._timeout_s:g} s; all ranks must run the same ds_config"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.1)
        return found

    def _silent(self, what: str) -> list[int]:
        return [stage for stage in range(self._stages) if not self._store.check([self._key(what, stage)])]

    def _key(self, what: str, stage: int) -> str:
        return f"{self._name}/{what}/{stage}"
