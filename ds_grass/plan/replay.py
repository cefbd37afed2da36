"""One rank of a planned job, run on the meta device with the job's own parts; what it holds is read off a ledger.

The model is transformers', blocks and units are found, gradients reduced, states sized and backward cut by the
objects that run in the job. What DeepSpeed itself does is imitated: stage 3's gathering in `gathering`, the
collectives by nothing. So nothing here adds up maxima: activations, gradients and states rise and fall together, and
the peak is where it is.

Attention is the kernel without a matrix of scores, as on the device; see `device_kernels`.
Not covered: batches with padding, for which transformers makes a mask of rows x length^2 bytes.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_grass import ops
from ds_grass.backward_cut import BackwardCut
from ds_grass.config import StatesConfig
from ds_grass.layers import Layout, find_layout
from ds_grass.plan import model as models
from ds_grass.plan.gathering import Coordinator
from ds_grass.plan.job import DTYPES, PlannedJob
from ds_grass.plan.kernels import device_kernels
from ds_grass.plan.ledger import STATES, WEIGHTS, Ledger, Moment, name_places
from ds_grass.plan.reduction import ReplayedReducer
from ds_grass.state_store import StateStore
from ds_grass.unit_state import StateLayout
from ds_grass.units import Unit, make_units, reduction_order
from ds_grass.zero.reducer import Averaging
from ds_grass.zero.shards import FlatShards, ParameterShards, ShardLayout, flatten
from ds_grass.zero.stores import make_store


class Rank:
    """The model of one rank as it stands after `deepspeed.initialize`; `init` is the peak until then."""

    def __init__(self, job: PlannedJob, config: Any):
        self.job = job
        self.ledger = Ledger()
        self._device = torch.device("meta")
        self._chunk_numel = ops.chunk_numel(torch.device(job.device))
        with self._running("init"):
            with self.ledger.holding(WEIGHTS):
                self.model = models.build(config, DTYPES[job.dtype], checkpointing=job.checkpointing)
            self.ledger.start_peak()  # a tied weight is made twice while the script builds its model
            self.layout: Layout = find_layout(self.model, layers=job.grass.layers, outer=job.grass.outer)
            job.grass.check_layers(len(self.layout.blocks))
            for _, param in self.layout.frozen_outer:
                param.requires_grad_(False)
            names = {param: name for name, param in self.model.named_parameters()}
            trainable = [param for param in names if param.requires_grad]
            self.units: Sequence[Unit] = make_units(self.layout, [{"params": trainable}], names)
            self.layouts = {unit.key: self._shard_layout(unit) for unit in self.units}
            self._batch = models.batch(config, job.micro_batch, job.seq_length)
            self._weights = self._lay_out_weights()
        self.init = self.ledger.peak
        self.store = self.store_of(job.grass.states)
        self.reducer = self._make_reducer()
        for unit in self.units:
            for param in unit.params:
                param.register_post_accumulate_grad_hook(self.reducer.arrived)
        self._cut = BackwardCut(self.model, self.layout)
        self._coordinator = None
        if job.stage == 3:
            self._coordinator = Coordinator(self.model, job.gathering, job.ranks, self.ledger)
        self._boundary = True
        name_places(self.model, self.ledger)

    @property
    def can_recompute(self) -> bool:
        """Whether the model knows gradient checkpointing."""
        return bool(getattr(self.model, "supports_gradient_checkpointing", False))

    # -- what is measured -------------------------------------------------------------------------------------------

    def probe(self, blocks: Sequence[int]) -> Moment:
        """Peak of a probe step: all blocks at once, or, with accumulation, these blocks in their turn."""
        in_turns = self.job.accumulation > 1
        wanted = [unit for unit in self.units if unit.block in (blocks if in_turns else _all(self.layout))]
        self.reducer.on_reduced = (lambda key: None) if in_turns else self.reducer.shards.__delitem__
        return self._step(wanted, probing=True)

    def train(self, blocks: Sequence[int], states: StatesConfig, *, history: bool = False) -> Moment:
        """Peak of a training step in which these blocks are active. `history`: keep every change in the ledger."""
        wanted = [unit for unit in self.units if unit.block is None or unit.block in blocks]
        self.reducer.on_reduced = lambda key: None
        self.store = self.store_of(states)
        nbytes = self.store.device_bytes_planned([unit.key for unit in wanted])
        with self._running("draw"), self.ledger.holding(STATES):
            held = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        self.drawn = self.ledger.now
        self.ledger.history = [] if history else None
        peak = self._step(wanted, probing=False)
        del held
        return peak

    def store_of(self, states: StatesConfig) -> StateStore:
        """This rank's state store, all sizes known and nothing held."""
        return make_store(states, self.units, self.layouts, self._device, self._no_weights)

    # -- one step ---------------------------------------------------------------------------------------------------

    def _step(self, units: Sequence[Unit], *, probing: bool) -> Moment:
        active = reduction_order(units)
        chosen = {id(param) for unit in active for param in unit.params}
        for unit in self.units:
            for param in unit.params:
                param.requires_grad_(id(param) in chosen)
                param.grad = None
        in_turns = self.job.accumulation > 1
        self.reducer.activate(active, measured_at_once=probing and not in_turns)
        self._cut.on_switch([unit.block for unit in active if unit.block is not None])
        if self._coordinator:
            self._coordinator.forget_trace()
        with self._running("forward"):
            self.ledger.start_peak()
            # Stage 3 gathers otherwise once it has seen a step with the same blocks, which turns never give it.
            for _ in range(2 if self.job.stage == 3 and not (probing and in_turns) else 1):
                self._run_step(active, probing=probing)
        self.reducer.clear()
        return self.ledger.peak

    def _run_step(self, active: Sequence[Unit], *, probing: bool) -> None:
        if self._coordinator:
            self._coordinator.gather_persistent()
        if self.job.accumulation > 1 and self._coordinator:  # which learns from the first micro-batch
            self._boundary = False
            self._forward_and_backward()
        elif self.job.accumulation > 1:
            self.reducer.hold_sums()
        self._boundary = True
        self._forward_and_backward()
        self.ledger.phase, self.ledger.place = "update", ""
        if self._coordinator:
            self._coordinator.end_step()
        self._update(active, probing=probing)

    def _forward_and_backward(self) -> None:
        self.ledger.phase = "forward"
        if self._coordinator:
            self._coordinator.start_micro_batch()
        outputs = self.model(**self._batch)
        loss = outputs.loss
        del outputs  # as in the Trainer: the logits go, but for what the loss has saved
        self.reducer.start_round()
        self.ledger.phase, self.ledger.place = "backward", "loss"
        (loss / self.job.accumulation).backward()
        if self._coordinator:
            self._coordinator.end_backward()
        if self.reducer.partitioned or self._boundary:
            self.reducer.flush()

    @torch.no_grad()
    def _update(self, active: Sequence[Unit], *, probing: bool) -> None:
        """Norms, then AdamW over every unit; each goes on as soon as it is updated."""
        for unit in active:
            if unit.key in self.reducer.shards:
                self._norm(self.reducer.shards[unit.key])
        for unit in active:
            self.ledger.place = unit.name
            if not probing:
                self._adamw(unit)
            self.reducer.shards.pop(unit.key, None)

    def _norm(self, shard: Tensor) -> None:
        """The temporaries of one chunk; a native kernel has none worth counting."""
        if not ops.native(self.job.device)[0]:
            ops.squared_norm_specification(shard[: self._chunk_numel])

    def _adamw(self, unit: Unit) -> None:
        """The temporaries of one chunk; a native kernel has none."""
        if ops.native(self.job.device)[0]:
            return
        numel = min(self.layouts[unit.key].shard_numel, self._chunk_numel)
        state = StateLayout(numel, self.store.has_master(unit.key), self.store.moment_dtype)
        place = functools.partial(torch.empty, device=self._device)
        with self.ledger.resting():
            memory = place(max(state.nbytes, 1), dtype=torch.uint8)
            param, grad = place(numel, dtype=unit.dtype), place(numel, dtype=DTYPES[self.job.sum_dtype])
            inv_scale = place((), dtype=torch.float32)
        ops.adamw_specification(
            param, *state.parts(memory), grad, inv_scale, 1e-4, 0.9, 0.999, 1e-8, 0.01, 1, True, False, 0, 0
        )  # fmt: skip

    # -- parts ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _running(self, phase: str) -> Iterator[None]:
        self.ledger.phase, self.ledger.place = phase, ""
        kernels = device_kernels(self.job.device, partitioned=self.job.stage == 3)
        with torch.device("meta"), kernels, models.no_values_asked(), self.ledger:
            yield

    def _shard_layout(self, unit: Unit) -> ShardLayout:
        if self.job.stage == 3:
            return ParameterShards(unit.sizes, self.job.ranks, 0)
        return FlatShards(unit.sizes, self.job.ranks, 0, unit.params[0].element_size())

    @torch.no_grad()
    def _lay_out_weights(self) -> list[Tensor]:
        """Weights as they rest on the device, unit by unit (stage 3: parameter by parameter)."""
        flat = []
        with self.ledger.holding(WEIGHTS):
            if self.job.stage == 3:
                return self._partition_weights()
            for unit in self.units:
                self.ledger.place = unit.name
                flat.append(flatten(self.layouts[unit.key], unit.params, unit.dtype, self._device))
        return flat

    def _partition_weights(self) -> list[Tensor]:
        """DeepSpeed cuts one parameter after the other, then moves all parts, through the host, into one buffer."""
        parts = []
        for name, param in self.model.named_parameters():
            self.ledger.place = name
            parts.append(param.new_empty(math.ceil(param.numel() / self.job.ranks)))
            with self.ledger.resting():
                param.data = torch.empty_like(param)  # computed with, but gathered memory is what counts
            self.ledger.leave_out(param)
        numel = sum(part.numel() for part in parts)
        if self.job.device != "cpu":
            parts.clear()
        return [torch.empty(numel, dtype=DTYPES[self.job.dtype], device=self._device)]

    def _make_reducer(self) -> ReplayedReducer:
        ranks, job = self.job.ranks, self.job
        averaging = Averaging(
            None,
            ranks,
            0,
            float(ranks),
            1.0,
            wire_dtype=DTYPES[job.wire_dtype],
            sum_dtype=DTYPES[job.sum_dtype],
        )
        return ReplayedReducer(
            self.ledger,
            self.layouts,
            averaging,
            partitioned=job.stage >= 2,
            at_boundary=lambda: self._boundary,
            device=self._device,
        )

    def _no_weights(self, key: int) -> Tensor:
        raise AssertionError("a planned store holds no states")


def _all(layout: Layout) -> range:
    return range(len(layout.blocks))
