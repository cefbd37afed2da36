"""What the ZeRO optimizers of all stages share: measuring, deciding, updating, switching.

One optimizer step reads as: reduce the squared norms (one collective, one host read), decide whether the step counts,
update the active units piece by piece as their state comes by, let the controller decide, switch the active set.

The host optimizer (stages 0-2 or 3) gives the weights' shards and is told to publish a unit after its update; the
state store moves the state; the controller decides. None of them knows the others.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from deepspeed import comm as dist
from torch import Tensor
from torch.optim import Optimizer

from ds_grass import ops
from ds_grass.adam import read_group
from ds_grass.config import GrassConfig
from ds_grass.controller import Controller, Transition
from ds_grass.layers import Layout
from ds_grass.state_store import StateStore
from ds_grass.telemetry.log import GrassLog
from ds_grass.telemetry.own_time import OwnTime
from ds_grass.units import Unit, largest_blocks, reduction_order
from ds_grass.zero.journal import Journal
from ds_grass.zero.placement import resident_fits
from ds_grass.zero.reducer import GradientReducer
from ds_grass.zero.together import together

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Everything resolved before an optimizer is built; the same on every rank."""

    config: GrassConfig
    layout: Layout
    optimizer: Optimizer
    """The user's; only its groups are read."""
    controller: Controller
    log: GrassLog
    send: Callable[[Mapping], None] | None
    """Gives the numbers of a log line to DeepSpeed's monitor; None when none is on."""
    at_boundary: Callable[[], bool]
    """True while the micro-batch that completes an optimizer step is running."""
    ranks_on_node: int
    """Processes that share this host's memory."""
    stage: int
    """ZeRO stage that ds_config asks for; 0 runs as 1."""
    num_steps: int | None
    """Optimizer steps of the whole run, where the config tells."""
    on_switch: Callable[[Sequence[int]], None]
    """Told the blocks that train, or are probed, from now on."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step came to."""

    applied: bool
    finite: bool
    grad_norm: float
    """Global L2 norm of what trains, unscaled, before clipping; inf when not finite."""


class GrassCore:
    """The work of one optimizer step over the active units."""

    def __init__(
        self,
        job: Job,
        units: Sequence[Unit],
        reducer: GradientReducer,
        store: StateStore,
        *,
        weights: Callable[[int], Tensor],
        publish: Callable[[int], None],
        norm_groups: Sequence[object],
        norm_ranges: Mapping[int, Sequence[tuple[int, int]]],
        shard_start: Mapping[int, int],
        clip_grad: float,
    ):
        """`weights(key)` is this rank's flat weight shard; `publish(key)` follows its update. `norm_ranges` are the
        parts of each gradient shard that this rank counts (tensor parallelism counts replicated ones once);
        `norm_groups` the process groups over which squares add up; `shard_start` the shard's place in the unit."""
        self.job, self.reducer, self.store = job, reducer, store
        self.units = {unit.key: unit for unit in units}
        self.weights, self.publish = weights, publish
        self.norm_groups, self.norm_ranges, self.shard_start = norm_groups, norm_ranges, shard_start
        self.clip_grad = clip_grad
        self.measuring_time = OwnTime()
        self.switch_time = OwnTime()
        self.journal = Journal(
            job.log,
            job.controller,
            tells=dist.get_rank() == 0,
            costs=self._costs,
            block_names=[block.name for block in job.layout.blocks],
            send=job.send,
        )
        self._squares: dict[int, Tensor] = {}
        self._measured_twice = False
        self._mode_is_open = job.config.states.mode is None
        self._ordered = reduction_order(units)
        reducer.on_reduced = self._on_reduced

    # -- the active set ---------------------------------------------------------------------------------------------

    @property
    def controller(self) -> Controller:
        return self.job.controller

    @property
    def probing(self) -> bool:
        return self.controller.phase == "probe"

    @property
    def _frees_now(self) -> bool:
        """Whether a gradient goes as soon as it is reduced and measured."""
        return self.probing and not self.controller.probes_in_turns

    @property
    def is_within_step(self) -> bool:
        """Whether gradients of a step that has not been made are held."""
        return bool(self.reducer.holds_gradients or self._squares)

    def active_units(self) -> list[Unit]:
        """Units whose gradients are wanted now, in the fixed order. While probing, outer parameters rest."""
        active = set(self.controller.active)
        return [u for u in self._ordered if u.block in active or (u.block is None and not self.probing)]

    def largest_active(self) -> list[int]:
        """Keys of the largest active set that can be drawn, outer included."""
        largest = largest_blocks(self._ordered, self.job.config.active_layers)
        return [unit.key for unit in self._ordered if unit.block is None or unit.block in largest]

    def device_bytes(self, keys: Sequence[int]) -> int:
        """Bytes on this rank's device for states and gradient shards of these units, and what is in flight."""
        layouts, sums = self.reducer.layouts, self.reducer.averaging.sum_dtype.itemsize
        gradients = sum(layouts[key].shard_numel * sums for key in keys)
        # Head and blocks are in flight one after the other; a tied embedding has gradients from the first to the last.
        one_by_one = [layouts[key].numel for key in keys if not self._is_last(key)]
        last = sum(layouts[key].numel for key in keys if self._is_last(key))
        in_flight = (max(one_by_one) + last) * self.reducer.averaging.wire_dtype.itemsize
        return self.store.device_bytes_planned(keys) + gradients + in_flight

    def _is_last(self, key: int) -> bool:
        return self.units[key].block is None and not self.units[key].head

    def switch(self) -> None:
        """Bring everything in line with the controller: gradients, hooks, states."""
        with self.switch_time:
            self._switch()

    def _switch(self) -> None:
        active = self.active_units()
        wanted = {id(param) for unit in active for param in unit.params}
        for unit in self.units.values():
            for param in unit.params:
                param.requires_grad_(id(param) in wanted)
                param.grad = None
        self.reducer.activate(active, measured_at_once=self._frees_now)
        self._squares.clear()
        self._activate_states([] if self.probing else [unit.key for unit in active])
        self.job.on_switch(self.controller.active)

    def _activate_states(self, keys: Sequence[int]) -> None:
        """Where blocks are drawn for the first time, ranks tell each other whether there was memory for them."""
        first_draw, failure = any(not self.store.has_state(key) for key in keys), None
        try:
            self.store.activate(keys)
        except RuntimeError as error:
            if not first_draw:
                raise
            failure = error
        if first_draw:
            together(None, failure)

    # -- one step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, loss_scale: float, *, scale_may_fall: bool = False) -> StepResult:
        """One optimizer step over reduced gradients that are `loss_scale` times too large.

        `scale_may_fall`: a dynamic scaler is still above its floor, so that any number of skips is ordinary.
        """
        self.journal.begin_step()
        if not (self.reducer.shards or self._squares):
            raise RuntimeError(
                "grass: engine.step() without gradients: there was no backward pass since the last step, or since a "
                "checkpoint was loaded"
            )
        with self.measuring_time:
            squares = self._global_squares()
        if squares is None:
            return self._repeat_probe_step()
        keys = self.reducer.order
        total = math.fsum(squares.values())
        if not math.isfinite(total):
            return self._skip(squares, scale_may_fall)
        norm = math.sqrt(total) / loss_scale
        probing = self.probing
        # Decided before the update, so that states of blocks that will rest go home under it.
        with self.measuring_time:
            transition = self._decide({key: value / loss_scale**2 for key, value in squares.items()})
        if not probing:
            self._update(keys, norm, loss_scale)
        self.reducer.shards.clear()
        self._squares.clear()
        if self._mode_is_open and not probing:
            self._choose_mode()
        self._follow(transition)
        return StepResult(applied=not probing, finite=True, grad_norm=norm)

    def _update(self, keys: Sequence[int], norm: float, loss_scale: float) -> None:
        """AdamW over every unit of `keys`, its state passing piece by piece."""
        clip = max(1.0, (norm + 1e-6) / self.clip_grad) if self.clip_grad > 0 else 1.0
        device = self.reducer.device
        inv_scale = torch.full((), 1.0 / (clip * loss_scale), dtype=torch.float32, device=device)
        groups = [read_group(self.job.optimizer, group) for group in self.job.optimizer.param_groups]
        then = {unit.key for unit in self.active_units()}
        for piece in self.store.pieces(keys, then):
            key, unit = piece.key, self.units[piece.key]
            hyper = groups[unit.group]
            weights = self.weights(key)
            ops.adamw_(
                weights[piece.start : piece.stop],
                piece.master,
                piece.exp_avg,
                piece.exp_avg_sq,
                self.reducer.shards[key][piece.start : piece.stop],
                inv_scale,
                lr=hyper.lr,
                beta1=hyper.beta1,
                beta2=hyper.beta2,
                eps=hyper.eps,
                weight_decay=hyper.weight_decay,
                step=self.store.steps[key] + 1,
                decoupled=hyper.decoupled,
                maximize=hyper.maximize,
                seed=self.job.config.seed * 2654435761 + key,
                offset=self.shard_start[key] + piece.start,
            )
            if piece.stop == weights.numel():
                self.store.steps[key] += 1
                del self.reducer.shards[key]
                self.publish(key)

    def _choose_mode(self) -> None:
        """states.mode null: after the first update the peak is known, and all ranks choose alike."""
        self._mode_is_open = False
        if resident_fits(self.store, self.largest_active(), self.reducer.device, self.job.ranks_on_node):
            self.store.set_mode("resident")

    def _decide(self, squares: Mapping[int, float]) -> Transition:
        by_block: dict[int, float] = {}
        for key, value in squares.items():
            block = self.units[key].block
            if block is not None:
                by_block[block] = by_block.get(block, 0.0) + value
        transition = self.controller.advance(by_block)
        if transition.drew:
            self._verify_draw()
        return transition

    def _follow(self, transition: Transition) -> None:
        if transition.active_changed or transition.phase_before != self.controller.phase:
            self.switch()
        if transition.drew or transition.refreshed:
            self.journal.drew("refresh" if not transition.drew else "draw")

    def _repeat_probe_step(self) -> StepResult:
        """Parts of a norm are no norm: measure again, keeping gradients until the boundary, so a few blocks a step."""
        self._measured_twice = False
        self.controller.probe_in_turns()
        self.switch()
        self.journal.measures_in_turns()
        return StepResult(applied=False, finite=True, grad_norm=0.0)

    def _skip(self, squares: Mapping[int, float], scale_may_fall: bool) -> StepResult:
        """A non-finite norm: no rank steps, nothing is recorded, nothing switches."""
        names = sorted({self.units[key].name for key, value in squares.items() if not math.isfinite(value)})
        counters = self.controller.counters
        if dist.get_rank() == 0:
            where, so_far = ", ".join(names) or "their sum", counters["skipped_steps"] + 1
            logger.warning("grass: non-finite gradient in %s; step skipped (%d so far)", where, so_far)
        self.journal.skipped(names)
        self.reducer.clear()
        self._squares.clear()
        self.controller.advance(None, may_end=not scale_may_fall)
        return StepResult(applied=False, finite=False, grad_norm=math.inf)

    # -- norms ------------------------------------------------------------------------------------------------------

    def _on_reduced(self, key: int) -> None:
        """A unit's gradients of one micro-batch have been reduced."""
        if not self.probing:
            self.store.prefetch(self.reducer.order)
        elif self._frees_now and self.job.at_boundary():
            with self.measuring_time:
                self._measured_twice |= key in self._squares  # a second backward of one step: parts of a sum
                self._squares[key] = self._square(key)
                del self.reducer.shards[key]

    def _square(self, key: int) -> Tensor:
        """Squared norm of what this rank counts of the unit's shard, a 0-d fp32 tensor on the device."""
        shard = self.reducer.shards[key]
        parts = [ops.squared_norm(shard[start:stop]) for start, stop in self.norm_ranges[key] if start < stop]
        return torch.stack(parts).sum() if parts else torch.zeros((), device=shard.device)

    def _global_squares(self) -> dict[int, float] | None:
        """Squared norm of every active unit over all ranks, still loss-scaled: one collective, one host read.

        None, on all ranks alike, when a gradient came after a probed unit had been measured and freed.
        """
        if self._measured_twice:
            return None
        keys = self.reducer.order
        while True:
            late = set(self.reducer.late_units)
            values = [self._squares[key] if key in self._squares else self._square(key) for key in keys]
            flags = torch.tensor([float(key in late) for key in keys], device=values[0].device)
            sums = torch.cat([torch.stack(values), flags])
            for group in self.norm_groups:
                dist.all_reduce(sums, group=group)
            host = sums.tolist()
            late_anywhere = [key for key, flag in zip(keys, host[len(keys) :], strict=True) if flag > 0]
            if not late_anywhere:
                return dict(zip(keys, host[: len(keys)], strict=True))
            if self._frees_now:
                return None
            self.reducer.reduce_late(late_anywhere)

    # -- agreement and costs ----------------------------------------------------------------------------------------

    def _verify_draw(self) -> None:
        """Every rank must hold the set that rank 0 drew; a rank that differs is named."""
        mine = [float(block) for block in self.controller.active] + list(self.controller.importance or ())
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        device = self.reducer.device
        values = torch.tensor(mine, dtype=torch.float64, device=device)
        reference = values.clone()
        dist.broadcast(reference, src=0)
        differs = torch.tensor([float(not torch.equal(values, reference))], device=device)
        flags = [torch.zeros_like(differs) for _ in range(dist.get_world_size())]
        dist.all_gather(flags, differs)
        ranks = [rank for rank, flag in enumerate(flags) if flag.item()]
        if ranks:
            raise RuntimeError(
                f"grass: rank(s) {ranks} drew other blocks than rank 0 (this rank: {list(self.controller.active)}); "
                "all ranks must hold the same importance: check that every rank runs the same step and the same config"
            )

    def _costs(self) -> dict:
        """Bytes and seconds so far, for a line of the log."""
        return {
            "states": {"mode": self.store.mode, **self.store.counters},
            "reduced": dict(self.reducer.counters),
            "measuring_seconds": round(self.measuring_time.seconds, 6),
            "switching_seconds": round(self.switch_time.seconds, 6),
        }
