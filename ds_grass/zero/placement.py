"""`states.mode: null`: do the states of the active set fit on the device beside what training needs at its peak?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_grass.host_memory import available_bytes
from ds_grass.state_store import StateStore

SHARE = 0.9
"""Of the memory left at the peak; the rest is for fragmentation and longer batches."""


def spare_bytes(headroom: float, resident: int) -> float:
    """What is left of the room beside the peak once `resident` bytes of states stay there; they do if it is above 0."""
    return SHARE * headroom - resident


def resident_fits(store: StateStore, active: Sequence[int], device: torch.device, ranks_on_node: int) -> bool:
    """Whether every rank has room; one collective. The next set may be the largest, so it is sized by the largest."""
    from deepspeed import comm as dist

    spare = spare_bytes(_headroom(device, ranks_on_node), store.device_bytes_resident(active))
    room = torch.tensor([spare], dtype=torch.float64)
    room = room.to(torch.float32).to(device)
    dist.all_reduce(room, op=dist.ReduceOp.MIN)
    return bool(room.item() > 0)


def _headroom(device: torch.device, ranks_on_node: int) -> float:
    """Bytes of the device that even the peak so far left free."""
    if device.type != "cuda":
        return (available_bytes() or 0) / ranks_on_node
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
