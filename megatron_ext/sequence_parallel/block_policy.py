"""The policy of one transformer block: what is known when its first micro-batch comes, and the plan of each.

When the first micro-batch comes, all ranks of the tensor-parallel group are here with it: layers are profiled or a
saved profile is read, memory is measured, and the ranks compare what their plans will follow from. Then a plan is one
look into a dictionary; a size that was never seen is planned, compared with the other ranks once, and told. One that is
beyond what was profiled is profiled first.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import nn

from ds_grass.telemetry.human import human_bytes

from ..board import Board
from ..config import MegatronExtConfig
from ..rank_memory import RankMemory
from ..telemetry import Telemetry
from . import budget
from .known_costs import KnownCosts
from .layer_shape import LayerShape
from .memory_forms import logits_bytes
from .names import NATIVE, STRATEGIES
from .planner import LayerKind, Plan, Planner, runnable
from .recomputed import layers_together
from .saved_profiles import SavedProfiles
from .shape_of import shape_of
from .switch import BlockSwitch

logger = logging.getLogger("megatron_ext")

OFTEN, SELDOM = 32, 100
"""After each of the first steps the device is asked again what it holds, then after each hundredth."""

CHANGED = 1.01
"""Times the budget: with less of a change plans stay."""


@dataclass(frozen=True)
class Surroundings:
    """What a policy needs of the job."""

    config: MegatronExtConfig
    telemetry: Telemetry
    profiles: SavedProfiles
    board: Board
    memory: RankMemory
    recomputed: Callable[[nn.Module], tuple[int, ...] | None] = lambda _block: None
    """As :func:`.recomputed.layers_together`, of a block that is recomputed by plan; None of one that is not."""


class BlockPolicy:
    """Plans the micro-batches of one block."""

    def __init__(self, surroundings: Surroundings):
        self._surroundings = surroundings
        self._config = surroundings.config.sequence_parallel
        self._planner: Planner | None = None
        self._costs: KnownCosts | None = None
        self._switch: BlockSwitch | None = None
        self._shapes: list[LayerShape | None] = []
        self._together: tuple[int, ...] = ()
        """What plans were made for, as :func:`.recomputed.layers_together` has it."""
        self._seen: set[tuple[int, int, tuple[str, ...]]] = set()
        self._looked_at = -1
        """Steps that had ended when memory was measured last in one."""
        self._steps = 0
        """That it could have been measured in."""
        self.vocabulary = 0
        """Of the whole tensor-parallel group, 0 where the block's stage has none."""

    def attached(self, switch: BlockSwitch) -> None:
        """The block is known: check what can be checked before anything runs. Raises ValueError."""
        self._switch = switch
        size = switch.group.size()
        self._shapes = [None if layer.reasons else shape_of(layer.layer, size) for layer in switch.layers]
        if all(shape is None for shape in self._shapes):
            reasons = sorted({reason for layer in switch.layers for reason in layer.reasons})
            raise ValueError(
                "megatron_ext.sequence_parallel cannot switch any layer of this model: " + "; ".join(reasons)
                + '; write "enabled": false in megatron_ext.sequence_parallel'
            )  # fmt: skip
        for shape in dict.fromkeys(filter(None, self._shapes)):
            self._check_strategies(shape)

    def __call__(self, batch: int, length: int, documents: tuple[int, ...] | None) -> tuple[str, ...]:
        """The strategy of each layer. Raises ValueError, before any collective, where none can run these sizes."""
        if self._planner is None:
            self._prepare(batch, length)
        assert self._planner is not None
        assert self._costs is not None
        if self._surroundings.memory.steps_ended != self._looked_at and self._is_training:
            self._look_again()
        if batch * length > self._costs.reach:
            self._profile_also(batch, length)
        elif self._layers_together() != self._together:  # another plan of what is recomputed
            self._plan_with(self._planner.budget_bytes)
        lengths = (
            None
            if documents is None
            else tuple(b - a for a, b in zip(documents, documents[1:], strict=False))
        )
        plan = self._planner.plan(batch, length, lengths)
        key = (batch, length, plan.names)  # without documents: of those every micro-batch has others
        if key not in self._seen:
            self._first_time(key, plan, lengths)
        return plan.names

    @property
    def _is_training(self) -> bool:
        """An evaluation holds other bytes than a step."""
        assert self._switch is not None
        return self._switch.block.training and torch.is_grad_enabled()

    def predicted(self) -> Plan | None:
        """The last plan."""
        return self._planner.previous if self._planner else None

    def allowed(self, shape: LayerShape) -> dict[str, str | None]:
        """Strategy -> why a layer of this shape cannot run it, None where it can; only those that the config allows."""
        wanted = [self._config.strategy] if self._config.strategy else self._config.strategies
        return {name: shape.obstacle_of_heads(name) for name in STRATEGIES if name in wanted}

    def refused(self) -> dict[str, str]:
        """Strategies of the config that no layer can run, with the reason."""
        shapes = list(dict.fromkeys(filter(None, self._shapes)))
        found = {}
        for name in self.allowed(shapes[0]):
            reasons = [self.allowed(shape)[name] for shape in shapes]
            if all(reasons):
                found[name] = str(reasons[0])
        return found

    def _check_strategies(self, shape: LayerShape) -> None:
        allowed = self.allowed(shape)
        if not all(allowed.values()):
            return
        named = f'strategy is "{self._config.strategy}"' if self._config.strategy else (
            f"strategies is {self._config.strategies}"
        )  # fmt: skip
        raise ValueError(
            f"megatron_ext.sequence_parallel.{named}, which this model cannot run: "
            + "; ".join(str(reason) for reason in allowed.values())
            + f'; add "{NATIVE}" to strategies'
        )

    def _prepare(self, batch: int, length: int) -> None:
        assert self._switch is not None
        switch = self._switch
        shapes = list(dict.fromkeys(filter(None, self._shapes)))
        one_of_each = {shape: (self._shapes.index(shape), self._able(shape)) for shape in shapes}
        self._ready_to_profile("the first micro-batch", batch, length)
        self._costs = KnownCosts(
            self._config, self._surroundings.telemetry, self._surroundings.profiles, switch, one_of_each
        )
        with self._surroundings.memory.stays():
            self._costs.start(batch, length)
        if self._is_training:
            self._looked_at = self._surroundings.memory.steps_ended
        self._plan_with(self._tell_budget(*self._measured_budget()))

    def _look_again(self) -> None:
        """What a device holds is known better when the first step has made the optimizer's states, and may grow when
        steps that overflowed delayed them."""
        assert self._planner is not None
        memory = self._surroundings.memory
        self._looked_at, self._steps = memory.steps_ended, self._steps + 1
        if not memory.device_counts or (self._steps > OFTEN and self._steps % SELDOM):
            return
        before = self._planner.budget_bytes
        own, planned_bytes = self._measured_budget()
        if not before / CHANGED <= planned_bytes <= before * CHANGED:
            self._plan_with(self._tell_budget(own, planned_bytes))

    def _measured_budget(self) -> tuple[budget.Budget, int]:
        """This rank's, and the bytes for activations that all ranks of the group have."""
        assert self._switch is not None
        own = budget.measure(self._surroundings.memory, self._switch.block.config)
        return own, self._least_of_group(own.activation_bytes)

    def _least_of_group(self, number: int) -> int:
        """Ranks may measure a few bytes more or less; the least is everybody's."""
        assert self._switch is not None
        least = torch.tensor([number], device=self._surroundings.memory.device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self._switch.group)
        return int(least.item())

    def _tell_budget(self, own: budget.Budget, planned_bytes: int) -> int:
        self._surroundings.telemetry.log.write("budget", **asdict(own), planned_bytes=planned_bytes)
        return planned_bytes

    def _profile_also(self, batch: int, length: int) -> None:
        """What is planned from now on follows from this size, too."""
        assert self._planner is not None
        assert self._costs is not None
        self._ready_to_profile(f"a profile of {batch} x {length} tokens", batch, length)
        with self._surroundings.memory.stays():
            self._costs.extend(batch, length, self._least_of_group(self._surroundings.memory.room()))
        self._plan_with(self._planner.budget_bytes)

    def _ready_to_profile(self, what: str, batch: int, length: int) -> None:
        """A profile runs collectives of this size: on all ranks the same, and one that some strategy can run."""
        for shape in dict.fromkeys(filter(None, self._shapes)):
            runnable(shape, self._able(shape), batch, length)
        self._surroundings.board.compare(what, {"batch": batch, "length": length})

    def _plan_with(self, budget_bytes: int) -> None:
        """A planner from what is known now, after the ranks have compared that."""
        assert self._switch is not None
        assert self._costs is not None
        models = self._costs.models
        known = next(iter(models))
        places: dict[tuple[LayerShape | None, int], list[int]] = defaultdict(list)
        self._together = self._layers_together()
        for place, kind in enumerate(zip(self._shapes, self._together, strict=True)):
            places[kind].append(place)
        kinds = [
            LayerKind(
                models[shape or known],
                tuple(layers),
                (NATIVE,) if shape is None else self._able(shape),
                together,
            )
            for (shape, together), layers in places.items()
        ]
        previous = self.predicted()
        self._planner = Planner(
            kinds,
            budget_bytes,
            granularity=self._config.granularity,
            smoothing=self._config.smoothing,
            outside_bytes=lambda batch, length: logits_bytes(
                -(-batch * length // known.group_size), self.vocabulary, known.element_bytes
            ),
        )
        self._planner.previous = previous
        facts = {
            "the cost model": [kind.model.fingerprint() for kind in kinds],
            "the memory budget": self._planner.budget_bytes,
        }
        self._surroundings.board.compare("what plans follow from", facts)

    def _layers_together(self) -> tuple[int, ...]:
        assert self._switch is not None
        block = self._switch.block
        planned = self._surroundings.recomputed(block)
        return layers_together(block.config, len(self._shapes)) if planned is None else planned

    def _able(self, shape: LayerShape) -> tuple[str, ...]:
        """What is allowed and can run."""
        return tuple(name for name, reason in self.allowed(shape).items() if reason is None)

    def _first_time(
        self, key: tuple[int, int, tuple[str, ...]], plan: Plan, documents: tuple[int, ...] | None
    ) -> None:
        """A plan that was never run: compare it with the other ranks', tell it, and warn where it is too large."""
        batch, length, names = key
        assert self._planner is not None
        self._surroundings.board.compare(f"the plan for {batch} x {length} tokens", names)
        self._surroundings.telemetry.planned(
            batch,
            length,
            names,
            seconds=plan.seconds,
            peak_bytes=plan.peak_bytes,
            fits=plan.fits,
            documents=documents,
        )
        self._seen.add(key)
        if not plan.fits:
            logger.warning(
                "megatron_ext: %d x %d tokens do not fit: the leanest plan needs about %s of the %s that activations "
                "may take; it runs all the same",
                batch, length, human_bytes(plan.peak_bytes), human_bytes(self._planner.budget_bytes),
            )  # fmt: skip


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model, by their class."""
    from megatron.core.transformer.transformer_block import TransformerBlock

    return [module for module in model.modules() if isinstance(module, TransformerBlock)]
