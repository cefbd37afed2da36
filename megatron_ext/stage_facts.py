"""What the stages of a pipeline tell each other through the c10d store: their layers, plans, measurements.

Contract: no collective. Of all ranks of a stage the first tells for them (data- and tensor-parallel rank 0). A fact may
be told again and replaces the one before; :meth:`StageFacts.all_there` and :meth:`StageFacts.by_now` never wait,
:meth:`StageFacts.wait` does, and names the stages that did not tell.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from .board import TIMEOUT_S
from .speakers import is_first_of_stage

if TYPE_CHECKING:
    from torch.distributed import Store


def stage_facts(name: str) -> StageFacts:
    """Of the pipeline that Megatron-core runs. `name`: what the facts belong to, equal on all ranks."""
    from megatron.core import parallel_state

    from ds_grass.agreement import default_store

    stages = parallel_state.get_pipeline_model_parallel_world_size()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return StageFacts(default_store(), name, stages, stage, is_first_of_stage())


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

    def by_now(self, what: str) -> list[Any]:
        """What those stages told last that have told, the first one's first."""
        keys = [self._key(what, stage) for stage in range(self._stages)]
        return [json.loads(self._store.get(key)) for key in keys if self._store.check([key])]

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
