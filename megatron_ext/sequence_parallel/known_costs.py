"""What the layers of one block cost, from a profile that grows with the sequences that come.

A micro-batch beyond what was profiled (:mod:`.profile_sizes`) is profiled when it comes, on all ranks of its
tensor-parallel group, which are there with it. A profile that was loaded, or a strategy that was fixed, stays as it is.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial

import torch

from ..config import SequenceParallelConfig
from ..telemetry import Telemetry
from . import calibration
from .cluster import PRIOR_CLUSTER, find_cluster
from .cost_model import AnalyticalModel, CostModel
from .forest import ForestModel
from .held_out import HeldOutError, held_out_error
from .layer_shape import LayerShape
from .profile import Measurement, Profile, load_profiles, profile_of
from .profile_sizes import REACH, first_lengths, more_lengths
from .saved_profiles import SavedProfiles
from .switch import BlockSwitch

logger = logging.getLogger("megatron_ext")


class KnownCosts:
    """Cost models by the shape of a layer, the same on all ranks of a tensor-parallel group."""

    def __init__(
        self,
        config: SequenceParallelConfig,
        telemetry: Telemetry,
        saved: SavedProfiles,
        switch: BlockSwitch,
        layers: Mapping[LayerShape, tuple[int, Sequence[str]]],
    ):
        """`saved`: of the job. `layers`: of each shape the place of one layer in the block, and the strategies that it
        can run."""
        self._config, self._telemetry, self._saved = config, telemetry, saved
        self._switch, self._layers = switch, layers
        self._profiles: dict[LayerShape, Profile] = {}
        self._warned: dict[str, HeldOutError] = {}
        """By strategy, the error that was warned of last."""
        self.models: dict[LayerShape, CostModel] = {}
        self.reach: float = math.inf
        """Tokens of the largest micro-batch that the models are good for."""

    def start(self, batch: int, length: int) -> None:
        """Load the profile, or measure one up to `length`. ValueError where the file is not this model's."""
        settings, key = self._config.cost_model, "megatron_ext.sequence_parallel.cost_model.load"
        loaded = load_profiles(settings.load, key) if settings.load else []
        if loaded:  # the same file may be saved to: other stages' layers stay in it
            self._saved.add(loaded)
        for shape in self._layers:
            if settings.load:
                self._profiles[shape] = profile_of(shape, loaded, settings.load, key)
            elif self._config.strategy:  # nothing is chosen, so nothing need be measured
                self.models[shape] = _closed_forms(shape)
            else:
                lengths = first_lengths(length, self._switch.group.size())
                self._measure(shape, batch, lengths, self._layers[shape][1])
                self.reach = REACH * batch * length
        self._make_models()

    def extend(self, batch: int, length: int, room_bytes: int) -> None:
        """Measure `length` too, under the strategies of which one layer fits into `room_bytes`; what the others cost is
        known from shorter sequences."""
        lengths = more_lengths(length, self._switch.group.size(), self.reach / batch)
        for shape, (_, names) in self._layers.items():
            costs = {
                name: self.models[shape].predict(name, batch, length)
                for name in names
                if shape.obstacle(name, batch, lengths[0]) is None
            }
            fitting = [
                name for name, cost in costs.items() if cost.kept_bytes + cost.transient_bytes <= room_bytes
            ]
            self._measure(shape, batch, lengths, fitting)
        self.reach = REACH * batch * length
        self._make_models()

    def _measure(self, shape: LayerShape, batch: int, lengths: Sequence[int], names: Sequence[str]) -> None:
        place, start = self._layers[shape][0], time.perf_counter()
        rows = calibration.profile_layer(self._switch, place, shape, batch, lengths, names)
        seconds = time.perf_counter() - start
        self._telemetry.log.write("profile", batch=batch, lengths=lengths, strategies=names, seconds=seconds)
        known = self._profiles.get(shape, Profile(shape, (), {"torch": torch.__version__}))
        self._profiles[shape] = replace(known, measurements=(*known.measurements, *rows))

    def _make_models(self) -> None:
        """From all that was measured; it is saved, and the rank that writes says how well unseen lengths are known."""
        if self._profiles:
            self._saved.add(self._profiles.values())
        for shape, profile in self._profiles.items():
            if self._telemetry.is_writer:
                model_of = partial(self._model, shape)
                self._tell_errors(held_out_error(model_of, profile.measurements))
            self.models[shape] = self._model(shape, profile.measurements)

    def _model(self, shape: LayerShape, rows: Sequence[Measurement]) -> CostModel:
        if self._config.cost_model.kind == "forest":
            return ForestModel(shape, rows)
        return _closed_forms(shape).calibrated(rows)

    def _tell_errors(self, errors: Mapping[str, HeldOutError]) -> None:
        """How well the model knows lengths that it was not made from; a warning is repeated where it gets worse."""
        for error in errors.values():
            self._telemetry.log.write("held_out_error", **asdict(error))
        news = {
            name: error
            for name, error in errors.items()
            if error.warning and error.is_worse_than(self._warned.get(name))
        }
        if news:
            self._warned |= news
            warnings = "; ".join(str(error.warning) for error in news.values())
            logger.warning("megatron_ext: the cost model's held-out error: %s", warnings)


def _closed_forms(shape: LayerShape) -> AnalyticalModel:
    return AnalyticalModel(shape, find_cluster(PRIOR_CLUSTER))
