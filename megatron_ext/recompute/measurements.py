"""What is known of this rank's blocks: of each class of layers, under each choice, and of what lies outside the layers.

Contract: a class is measured once, at the size of the micro-batch that is waiting; all ranks that hold one plan measure
together, and where their micro-batches differ, what is known is of a size that covers them all. Outside of layers is
what a micro-batch keeps beside what its layers do (embedding, head, loss): counted when a chunk's first forward of a
step that recomputes everything has ended.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..sequence_parallel import micro_batch as running_batch
from ..sequence_parallel.layer_shape import LayerShape
from ..sequence_parallel.names import NATIVE
from ..sequence_parallel.shape_of import shape_of
from ..sequence_parallel.switch import group_of
from ..telemetry import Telemetry
from .layer_classes import allowed_modules, choices, signature, writes_scores
from .layer_loop import LayerLoop
from .plan import FULL, NONE
from .planning_group import planning_group
from .probe import Measured, measure_layer, most_of_group
from .sizes import Size
from .stage import Known, layer_class
from .stage_memory import LayerClass

Class = tuple[Hashable, str]
"""Of layers: their signature, and the sequence-parallel strategy that they ran."""


class Measurements:
    """Of the blocks of one rank, first chunk first."""

    def __init__(
        self, loops: dict[nn.Module, LayerLoop], modules: Sequence[str] | None, telemetry: Telemetry
    ):
        self._loops, self._modules, self._telemetry = loops, modules, telemetry
        self._known: dict[Class, Known] = {}
        self._strategies: dict[nn.Module, tuple[str, ...]] = {}
        self._outside: dict[nn.Module, int] = {}
        self._outside_seconds: dict[nn.Module, float] = {}
        self._began: tuple[float, tuple[int, ...]] = 0.0, ()
        self.size: Size | None = None
        """Of the micro-batch that was waiting on this rank."""

    def __bool__(self) -> bool:
        return bool(self._known)

    def layers(self, arrived: nn.Module) -> list[list[tuple[int, str]]]:
        """Of each layer of each block its class, counted from 0, and the strategy that it runs now or will run."""
        self._take_strategies(arrived)
        known = {key: number for number, key in enumerate(self._known)}
        return [
            [(known.setdefault(key, len(known)), key[1]) for key in self.classes_of(block)]
            for block in self._loops
        ]

    def _take_strategies(self, arrived: nn.Module) -> None:
        current = running_batch.current()
        names = (NATIVE,) * len(arrived.layers) if current is None else current.names
        for block in self._loops:
            self._strategies[block] = names if block is arrived else _stretched(names, len(block.layers))

    def measure(
        self,
        arrived: nn.Module,
        hidden: Tensor,
        options: dict[str, Any],
        size: Size,
        largest: Size,
        *,
        is_made_up: bool = False,
    ) -> None:
        """Every class of layers that this rank has, in the place of the micro-batch that has arrived at one block.

        `largest`: covers `size` and those of all other ranks that hold one plan; `is_made_up`: none of them has it, so
        each rank scales what it measures to it.
        """
        self.size = size
        self._take_strategies(arrived)
        current = running_batch.current()
        # What is measured is not what the micro-batch counts as run.
        aside = None if current is None else replace(current, calls=Counter())
        for block in self._loops:
            here = block is arrived
            for layer, key in zip(block.layers, self.classes_of(block), strict=True):
                if key in self._known:
                    continue
                with running_batch.running(aside if here else None):
                    rows = self._measured(layer, key[1], hidden, options)
                shape = _shape(layer, group_of(block).size())
                known = Known(tuple(rows), size, shape, key[1], writes_scores(layer))
                most = most_of_group(
                    known.at(largest) if is_made_up else rows, planning_group(block), hidden.device
                )
                self._known[key] = replace(known, measured=tuple(most), size=largest)
                self._tell(layer, self._known[key])
        for loop in self._loops.values():
            loop.chosen.clear()  # measuring has set flags

    def _measured(
        self, layer: nn.Module, strategy: str, hidden: Tensor, options: dict[str, Any]
    ) -> list[Measured]:
        modules = allowed_modules(layer, self._modules)
        if strategy != NATIVE:  # another body than Megatron-core's, which has no core attention to run again
            modules = tuple(module for module in modules if module != "core_attn")
        return measure_layer(layer, choices(modules), hidden, options)

    def _tell(self, layer: nn.Module, known: Known) -> None:
        self._telemetry.log.write(
            "recompute_measured",
            layer=layer.layer_number,
            strategy=known.strategy,
            **asdict(known.size),
            choices=[asdict(row) for row in known.measured],
        )

    def classes_of(self, block: nn.Module) -> list[Class]:
        """The class of each layer."""
        return [
            (signature(layer), strategy)
            for layer, strategy in zip(block.layers, self._strategies[block], strict=True)
        ]

    def typical_layer(self) -> nn.Module:
        """The first of the most frequent class."""
        pairs = [
            pair for block in self._loops for pair in zip(self.classes_of(block), block.layers, strict=True)
        ]
        ((kind, _),) = Counter(key for key, _ in pairs).most_common(1)
        return next(layer for key, layer in pairs if key == kind)

    def layer_classes(self, size: Size, *, saved_only: bool = False) -> dict[Class, LayerClass]:
        """Options of each class at another size; see :func:`.stage.layer_class`."""
        return {
            key: layer_class(f"class {number}", known.at(size), saved_only=saved_only)
            for number, (key, known) in enumerate(self._known.items())
        }

    def row(self, layer: Class, choice: str, size: Size) -> Measured:
        """What was measured of one class under one choice, at another size."""
        return next(row for row in self._known[layer].at(size) if row.choice == choice)

    # -- outside of layers ----------------------------------------------------------------------------------------

    def forward_begins(self, device: torch.device) -> None:
        """A chunk's forward, which will be timed if it is not the chunk's first, in which layers are measured."""
        self._began = _now(device), tuple(loop.number for loop in self._loops.values())

    def forward_ended(self, device: torch.device, saved_bytes: int) -> None:
        """It has ended, with so many bytes saved by all that run."""
        began, numbers = self._began
        for (block, loop), number in zip(self._loops.items(), numbers, strict=False):
            if loop.number == number + 1 >= 2:
                outside = max(0.0, _now(device) - began - self._seconds_in_layers(block))
                # The quickest of the step: whatever else the machine does only adds.
                self._outside_seconds[block] = min(outside, self._outside_seconds.get(block, outside))
        self._count_outside(saved_bytes)

    def forget(self) -> None:
        """Measure anew."""
        for known in (self._known, self._strategies, self._outside, self._outside_seconds):
            known.clear()

    def outside_seconds(self, block: nn.Module, size: Size) -> float:
        """Of one forward, outside of the layers: embedding, head, loss; 0 where a chunk ran but once."""
        growth = 1.0 if self.size is None else size.tokens / self.size.tokens
        return self._outside_seconds.get(block, 0.0) * growth

    def _count_outside(self, saved_bytes: int) -> None:
        """Of a chunk that has run once, this tells what lies outside its layers."""
        ran_first = [
            block for block, loop in self._loops.items() if loop.number == 1 and block not in self._outside
        ]
        if len(ran_first) != 1:
            return
        of_others = sum(
            self._loops[block].number * (outside + self._inputs_of(block))
            for block, outside in self._outside.items()
        )
        (block,) = ran_first
        self._outside[block] = max(0, saved_bytes - of_others - self._inputs_of(block))

    def outside_bytes(self, size: Size) -> list[int]:
        """Of each chunk's micro-batch at another size."""
        growth = 1.0 if self.size is None else size.tokens / self.size.tokens
        return [round(self._outside.get(block, 0) * growth) for block in self._loops]

    def _seconds_in_layers(self, block: nn.Module) -> float:
        """Of one forward. A chunk without layers may come before any is measured, also below."""
        if not len(block.layers):
            return 0.0
        assert self.size is not None
        return self.seconds(block, self.size)[0]

    def _inputs_of(self, block: nn.Module) -> int:
        """What a micro-batch keeps where all layers are recomputed."""
        if not len(block.layers):
            return 0
        assert self.size is not None
        return sum(self.row(layer, FULL, self.size).kept_bytes for layer in self.classes_of(block))

    def seconds(self, block: nn.Module, size: Size) -> tuple[float, float]:
        """Forward and backward of one micro-batch through the block's layers, nothing recomputed."""
        rows = [self.row(layer, NONE, size) for layer in self.classes_of(block)]
        return sum(row.forward_seconds for row in rows), sum(row.backward_seconds for row in rows)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _stretched(names: Sequence[str], count: int) -> tuple[str, ...]:
    """Another chunk's strategies are not known yet: taken to be those of this one, the last for what is left."""
    return tuple(names[min(place, len(names) - 1)] for place in range(count))


def _shape(layer: nn.Module, size: int) -> LayerShape | None:
    try:
        return shape_of(layer, size)
    except AttributeError:  # another attention (a latent one has no linear_qkv), or none
        return None
