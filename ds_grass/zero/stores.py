"""The state store of one rank's units: which states there are, and how large. `ds_grass plan` makes the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ds_grass.config import StatesConfig
from ds_grass.state_store import StateStore
from ds_grass.units import Unit
from ds_grass.zero.shards import ShardLayout

_MOMENT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_store(
    states: StatesConfig,
    units: Sequence[Unit],
    layouts: Mapping[int, ShardLayout],
    device: torch.device,
    weights: Callable[[int], Tensor],
) -> StateStore:
    """A store that knows every unit and holds none; `weights(key)` is this rank's shard of a unit's weights."""
    blocks = [layouts[unit.key].shard_numel for unit in units if unit.block is not None]
    store = StateStore(
        device=device,
        moment_dtype=_MOMENT_DTYPES[states.dtype],
        pin_memory=states.pin_memory,
        buffers=states.buffers,
        slot_numel=max(blocks),
        mode=states.mode or "stream",
    )
    for unit in units:
        low_precision = unit.dtype != torch.float32
        store.add(
            unit.key,
            layouts[unit.key].shard_numel,
            lambda key=unit.key: weights(key),
            master=low_precision and states.master_weights,
        )
    return store
