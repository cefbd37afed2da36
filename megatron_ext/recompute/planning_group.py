"""The ranks that must hold one plan, and what they tell each other when a step begins.

Ranks that recompute together replay each other's collectives, so they must recompute the same. Those are the ranks of a
tensor-parallel group. Where experts or context are spread, a layer also talks to ranks of other tensor-parallel groups,
and then all ranks of the pipeline stage must hold one plan: the group is *wide*.

In a wide group ranks see different micro-batches at different moments, so no rank may plan in the middle of a step: the
others would not take part. What a rank has seen is told at the beginning of the next step, by one all-reduce.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..sequence_parallel.switch import group_of
from .sizes import Size

_SIZES = ("context_parallel_size", "expert_model_parallel_size")
_GLOBAL_LOSS = "global_aux_loss"


def is_spread(config: Any) -> bool:
    """Whether layers talk to ranks of other tensor-parallel groups; `config`: the model's TransformerConfig."""
    if any(getattr(config, key, 1) > 1 for key in _SIZES):
        return True
    experts = getattr(config, "expert_tensor_parallel_size", None) or 1
    if getattr(config, "num_moe_experts", None) and experts > getattr(
        config, "tensor_model_parallel_size", 1
    ):
        return True
    balancing = getattr(config, "moe_router_load_balancing_type", None)
    # This loss counts the tokens of all data-parallel ranks in every forward.
    return balancing == _GLOBAL_LOSS or (isinstance(balancing, list) and _GLOBAL_LOSS in balancing)


def planning_group(block: nn.Module) -> Any:
    """The group whose ranks must hold the same plan for this block."""
    if not is_spread(block.config):
        return group_of(block)
    group = getattr(getattr(block, "pg_collection", None), "tp_dp_cp", None)
    if group is not None:
        return group
    from megatron.core import parallel_state

    return parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)


def largest_of_all(own: Size | None, most: Callable[..., list[int]]) -> Size | None:
    """A size that covers those of all ranks, None where nobody has one; `most` gives the largest of each number."""
    return _covering(most(*_numbers(own)))


def are_equal(fact: Any, most: Callable[..., list[int]]) -> bool:
    """Whether all ranks have an equal `fact`, by one all-reduce: a board reads what each of thousands has posted, and
    does not wait as long as a first micro-batch may take to load."""
    digest = hashlib.sha256(json.dumps(fact, sort_keys=True).encode()).hexdigest()
    number = int(digest[:15], 16)  # fits an int64, negative too
    highest, lowest = most(number, -number)
    return highest == -lowest


@dataclass(frozen=True)
class News:
    """Since the last step, of one rank or of its group."""

    micro_batches: int
    """Of the step that begins."""
    waiting: Size | None = None
    """Of micro-batches larger than planned for."""
    trains_others: bool = False
    """Whether weights were frozen or freed."""
    static_bytes: int = 0
    over_bytes: int = 0
    """By which the step went over the limit."""

    def of_all(self, most: Callable[..., list[int]]) -> News:
        """The most of each, the same on all ranks."""
        micro_batches, trains_others, static, over, *size = most(
            self.micro_batches,
            int(self.trains_others),
            self.static_bytes,
            self.over_bytes,
            *_numbers(self.waiting),
        )
        return News(micro_batches, _covering(size), bool(trains_others), static, over)


def _numbers(size: Size | None) -> tuple[int, int, int]:
    return (0, 0, 0) if size is None else (size.tokens, size.pairs, size.batch)


def _covering(numbers: list[int]) -> Size | None:
    tokens, pairs, batch = numbers
    return Size.covering(tokens, pairs, batch) if tokens else None
