"""The policy of one transformer block: what is known when its first micro-batch comes, and the plan of each.

When the first micro-batch comes, all ranks of the tensor-parallel group are here with it: layers are profiled or a
saved profile is read, memory is measured, and the ranks compare what their plans will follow from. Then a plan is one
look into a dictionary; a size that was never seen is planned, compared with the other ranks once, and told.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ds_grass.telemetry.human import human_bytes

from ..board import Board
from ..config import MegatronExtConfig
from ..telemetry import Telemetry
from . import budget, calibration
from .cluster import Cluster, find_cluster
from .cost_model import AnalyticalModel, CostModel
from .forest import ForestModel
from .held_out import HeldOutError, held_out_error
from .layer_shape import LayerShape
from .memory_forms import logits_bytes
from .names import NATIVE, STRATEGIES
from .planner import LayerKind, Plan, Planner
from .profile import Measurement, Profile, load_profile
from .recomputed import layers_together
from .shape_of import shape_of
from .switch import BlockSwitch

logger = logging.getLogger("megatron_ext")

PRIOR_CLUSTER = "8xH100-80G"
"""Whose rates the closed forms are divided by before a profile replaces them."""


@dataclass(frozen=True)
class Surroundings:
    """What a policy needs of the job."""

    config: MegatronExtConfig
    telemetry: Telemetry
    board: Board
    ranks_on_node: int


class BlockPolicy:
    """Plans the micro-batches of one block."""

    def __init__(self, surroundings: Surroundings):
        self._surroundings = surroundings
        self._config = surroundings.config.sequence_parallel
        self._planner: Planner | None = None
        self._switch: BlockSwitch | None = None
        self._shapes: list[LayerShape | None] = []
        self._seen: set[tuple[int, int, tuple[str, ...]]] = set()
        self.vocabulary = 0
        """Of this rank's logits, 0 where the block's stage has none."""

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
        # A profile runs collectives of this size.
        self._surroundings.board.compare("the first micro-batch", {"batch": batch, "length": length})
        places: dict[tuple[LayerShape | None, int], list[int]] = defaultdict(list)
        recomputed = layers_together(switch.block.config, len(self._shapes))
        for place, kind in enumerate(zip(self._shapes, recomputed, strict=True)):
            places[kind].append(place)
        shapes = list(dict.fromkeys(filter(None, self._shapes)))
        known = shapes[0]
        models = {shape: self._cost_model(shape, batch, length) for shape in shapes}
        kinds = [
            LayerKind(
                models[shape or known],
                tuple(layers),
                (NATIVE,)
                if shape is None
                else tuple(n for n, why in self.allowed(shape).items() if why is None),
                together,
            )
            for (shape, together), layers in places.items()
        ]
        measured = budget.measure(
            switch.block, self._surroundings.config.memory, self._surroundings.ranks_on_node
        )
        # Ranks may measure a few bytes more or less; the least is everybody's.
        least = torch.tensor([measured.activation_bytes], device=next(switch.block.parameters()).device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=switch.group)
        self._planner = Planner(
            kinds,
            int(least.item()),
            granularity=self._config.granularity,
            smoothing=self._config.smoothing,
            outside_bytes=lambda batch, length: logits_bytes(
                batch * length, self.vocabulary, known.element_bytes
            ),
        )
        facts = {
            "the cost model": [kind.model.fingerprint() for kind in kinds],
            "the memory budget": self._planner.budget_bytes,
        }
        self._surroundings.board.compare("what plans follow from", facts)
        self._surroundings.telemetry.log.write(
            "budget", **asdict(measured), planned_bytes=self._planner.budget_bytes
        )

    def _cost_model(self, shape: LayerShape, batch: int, length: int) -> CostModel:
        assert self._switch is not None
        settings = self._config.cost_model
        if settings.load:
            profile = load_profile(settings.load, shape, "megatron_ext.sequence_parallel.cost_model.load")
        elif self._config.strategy:
            return AnalyticalModel(shape, _prior(shape))  # nothing is chosen, so nothing need be measured
        else:
            place = self._shapes.index(shape)
            names = [name for name, why in self.allowed(shape).items() if why is None]
            rows = calibration.profile_layer(self._switch, place, shape, batch, length, names)
            profile = Profile(shape, tuple(rows), {"torch": torch.__version__})
        if settings.save and dist.get_rank() == 0:
            profile.save(Path(settings.save))

        def model_of(rows: Sequence[Measurement]) -> CostModel:
            if settings.kind == "forest":
                return ForestModel(shape, rows)
            return AnalyticalModel(shape, _prior(shape)).calibrated(rows)

        if dist.get_rank() == 0:
            self._tell_errors(held_out_error(model_of, profile.measurements))
        return model_of(profile.measurements)

    def _tell_errors(self, errors: Mapping[str, HeldOutError]) -> None:
        """How well the model knows lengths that it was not made from."""
        for error in errors.values():
            self._surroundings.telemetry.log.write("held_out_error", **asdict(error))
        warnings = [error.warning for error in errors.values() if error.warning]
        if warnings:
            logger.warning("megatron_ext: the cost model's held-out error: %s", "; ".join(warnings))

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


def _prior(shape: LayerShape) -> Cluster:
    return find_cluster(PRIOR_CLUSTER)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model, by their class."""
    from megatron.core.transformer.transformer_block import TransformerBlock

    return [module for module in model.modules() if isinstance(module, TransformerBlock)]
