"""GRASS for ZeRO stage 3: a subclass of DeepSpeed's optimizer, which keeps gathering and partitioning parameters.

One sub-group a unit. What the parent does with gradients, masters and states of the whole model is replaced: gradients
go through the reducer that stages 0-2 use (one reduce-scatter a unit, no bucket), states through the state store,
and `step` is the core's. The parent allocates no master, no moment and no gradient buffer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor
from torch.nn import Parameter

from ds_grass.units import Unit, make_units
from ds_grass.zero import checkpoint
from ds_grass.zero.assembly import assemble
from ds_grass.zero.core import Job
from ds_grass.zero.host import HostOptimizer
from ds_grass.zero.reducer import Averaging
from ds_grass.zero.shards import ParameterShards


class _UnitGroups:
    """Stands in for the optimizer while the parent is built: one parameter group a unit makes one sub-group a unit."""

    def __init__(self, units: Sequence[Unit]):
        self.param_groups = [{"params": list(unit.params)} for unit in units]
        self.state: dict = {}


class GrassZeroOptimizerStage3(HostOptimizer, DeepSpeedZeroOptimizer_Stage3):
    """Stage 3. Built where the engine looks up `DeepSpeedZeroOptimizer_Stage3`, from the same arguments."""

    def __init__(self, module, init_optimizer, param_names, *args, job: Job, **kwargs):
        self.units: Sequence[Unit] = make_units(job.layout, init_optimizer.param_groups, param_names)
        kwargs.update(sub_group_size=sys.maxsize, contiguous_gradients=False)
        super().__init__(module, _UnitGroups(self.units), param_names, *args, **kwargs)
        assert len(self.fp16_groups) == len(self.units), "one sub-group a unit"
        self.optimizer = init_optimizer
        averaging = Averaging.resolve(
            group=self.dp_process_group,
            postscale=self.postscale_gradients,
            predivide_factor=self.gradient_predivide_factor,
            average=True,
            wire_dtype=self.communication_data_type,
            sum_dtype=self.gradient_accumulation_dtype or self.dtype,
        )
        self.layouts = {
            unit.key: ParameterShards(unit.sizes, averaging.world_size, averaging.rank) for unit in self.units
        }
        self.shards = dict(enumerate(self.fp16_partitioned_groups_flat))
        self.core = assemble(
            job,
            self.units,
            self.layouts,
            averaging,
            partitioned=True,
            overlap=bool(kwargs.get("overlap_comm")),
            device=torch.device(get_accelerator().current_device_name()),
            mpu=kwargs.get("mpu"),
            weights=self.shards.__getitem__,
            publish=lambda key: None,
            clip_grad=self.clip_grad,
        )
        self._unit_of = {
            id(param): (unit.key, index) for unit in self.units for index, param in enumerate(unit.params)
        }
        self._init_loss_scale(self.loss_scaler)
        self._begin()

    # -- what the parent would hold for the whole model --------------------------------------------------------------

    def _setup_for_real_optimizer(self) -> None:
        """No masters, moments, gradient or bucket buffers: the state store and the reducer make what is needed."""
        self.fp32_partitioned_groups_flat = [torch.empty(0) for _ in self.fp16_groups]
        self.grad_partitions_flat_buffer = None

    # -- gradients --------------------------------------------------------------------------------------------------

    def reduce_ready_partitions_and_remove_grads(self, param: Parameter) -> None:
        """A full gradient has been accumulated; leaf modules call this for frozen parameters too."""
        self.core.reducer.arrived(param)

    def independent_gradient_partition_epilogue(self) -> None:
        """A micro-batch's backward has ended."""
        self.core.reducer.flush()
        self._epilogue_ran_this_backward = True

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        self.independent_gradient_partition_epilogue()

    def finalize_gradient_accumulation_boundary(self) -> None:
        """managed_gradient_accumulation false: everything was reduced backward by backward."""

    # -- step -------------------------------------------------------------------------------------------------------

    def _before_step(self) -> None:
        self._pre_step()
        self._partition_all_parameters()
        self._order_before = self.core.reducer.order

    def _after_step(self, applied: bool) -> None:
        self._post_step(set())
        coordinator = self._get_param_coordinator()
        if self.core.reducer.order != self._order_before and not coordinator.is_invalid_trace():
            # The order of gathers was recorded for another set; two steps without prefetch are the price.
            coordinator._invalidate_trace()

    def zero_grad(self, set_to_none: bool = True) -> None:
        DeepSpeedZeroOptimizer_Stage3.zero_grad(self, set_to_none)

    # -- deepspeed.utils.safe_get_* and safe_set_* ------------------------------------------------------------------

    def _get_fp32_opt_state_partition(self, param, release_swap_buffers=True, optim_state_key=None):
        key, index = self._unit_of[id(param)]
        held = self.core.store.view(key, optim_state_key or "master")
        if held is None and optim_state_key is None:
            held = self.shards[key] if self.shards[key].dtype == torch.float32 else self.shards[key].float()
        elif held is None:
            held = torch.zeros_like(self.shards[key], dtype=torch.float32)
        return self._part(held, key, index), key

    def _get_fp32_grad_state_partition(self, param, release_swap_buffers=True):
        key, index = self._unit_of[id(param)]
        shard = self.core.reducer.shards.get(key)
        if shard is None:
            raise ValueError(
                "gradients are available after backward and before engine.step(), for active blocks only"
            )
        return self._part(shard, key, index), key

    def _part(self, flat: Tensor, key: int, index: int) -> Tensor:
        layout = self.layouts[key]
        return flat.narrow(0, layout.columns[index], layout.parts[index])

    @contextmanager
    def _as_trainable(self, param: Parameter) -> Iterator[None]:
        """The parent answers None for frozen parameters; ours have a state while they rest."""
        before = param.requires_grad
        param.requires_grad_(True)
        try:
            yield
        finally:
            param.requires_grad_(before)

    def _has_gradient(self, param: Parameter) -> bool:
        unit = self._unit_of.get(id(param))
        return unit is not None and unit[0] in self.core.reducer.shards

    def get_fp32_grad_for_param(self, param) -> Tensor | None:
        return super().get_fp32_grad_for_param(param) if self._has_gradient(param) else None

    def get_local_fp32_grad_for_param(self, param) -> Tensor | None:
        return super().get_local_fp32_grad_for_param(param) if self._has_gradient(param) else None

    def get_full_hp_param(self, param, optim_state_key=None) -> Tensor | None:
        if id(param) not in self._unit_of:
            return None
        with self._as_trainable(param):
            return super().get_full_hp_param(param, optim_state_key)

    def get_local_fp32_param(self, param, optim_state_key=None) -> Tensor | None:
        if id(param) not in self._unit_of:
            return None
        with self._as_trainable(param):
            return super().get_local_fp32_param(param, optim_state_key)

    def set_full_hp_param(self, value, param, optim_state_key=None) -> None:
        if not self._make_state(param):
            return
        numel = param.ds_tensor.ds_numel
        start = min(numel * self.layouts[self._unit_of[id(param)][0]].rank, value.numel())
        part = value.flatten()[start : start + numel]  # the last rank's part may lack its padding
        self._write(param, part, optim_state_key)
        if optim_state_key is None and param.ds_status == ZeroParamStatus.AVAILABLE:
            param.data.copy_(value.view(param.ds_shape))  # a gathered (persistent) parameter is read as it is

    def set_local_hp_param(self, value, param, optim_state_key=None) -> None:
        if self._make_state(param):
            self._write(param, value.flatten(), optim_state_key)

    def _write(self, param: Parameter, part: Tensor, optim_state_key: str | None) -> None:
        """This rank's part of the weight and its master, or of a moment."""
        key, index = self._unit_of[id(param)]
        if optim_state_key is None:
            self._part(self.shards[key], key, index)[: part.numel()].copy_(part)
        held = self.core.store.view(key, optim_state_key or "master")
        if held is not None:
            self._part(held, key, index)[: part.numel()].copy_(part)

    def _make_state(self, param: Parameter) -> bool:
        """False, and nothing happens, for a parameter that is not managed; DeepSpeed ignores frozen ones as well."""
        if id(param) not in self._unit_of:
            return False
        self.core.store.ensure(self._unit_of[id(param)][0])
        return True

    def update_fp32_grad_for_param_vectorized(
        self, update_func: Callable, param_list: Sequence[Parameter]
    ) -> None:
        for param in param_list:
            if param.requires_grad:
                self.set_fp32_grad_for_param(update_func(self.get_fp32_grad_for_param(param), param), param)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """DeepSpeed's stage-3 layout, one sub-group a unit, plus the key "grass"; host tensors only."""
        states = [checkpoint.collect(unit, self.core.store, self.shards[unit.key]) for unit in self.units]
        return {
            "zero_stage": 3,
            "loss_scaler": self.loss_scaler,
            "dynamic_loss_scale": self.dynamic_loss_scale,
            "overflow": self.overflow,
            "partition_count": self.partition_count,
            "optimizer_state_dict": {
                "state": checkpoint.optimizer_state(states),
                "param_groups": checkpoint.param_groups(self.units, self.optimizer.param_groups),
            },
            "fp32_flat_groups": [state.master for state in states],
            checkpoint.KEY: self._grass_state(),
        }

    def _saved_tensor(self, state: Mapping, unit: Unit, what: str) -> Tensor:
        if what == "fp32":
            return state["fp32_flat_groups"][unit.key]
        return state["optimizer_state_dict"]["state"][unit.key][what]

    def _finish_loading(self) -> None:
        if self.persistent_parameters:
            self.persistent_parameters[0].partition(self.persistent_parameters)

    def checkpoint_event_prologue(self) -> None:
        DeepSpeedZeroOptimizer_Stage3.checkpoint_event_prologue(self)
        HostOptimizer.checkpoint_event_prologue(self)

    def checkpoint_event_epilogue(self) -> None:
        DeepSpeedZeroOptimizer_Stage3.checkpoint_event_epilogue(self)
        HostOptimizer.checkpoint_event_epilogue(self)

    def destroy(self) -> None:
        super().destroy()
        self.core.store.close()
