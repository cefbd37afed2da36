"""GRASS for ZeRO stages 0 to 2: an own `ZeROOptimizer` with one flat shard a unit.

The engine asks of it what it asks of DeepSpeed's stage-1/2 optimizer (hooks, epilogues, `step`, loss scaling,
checkpoint dictionaries); the work is done by the reducer, the core and the state store. Stage 0 arrives here promoted
to stage 1. One rank is not a special case.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import version as deepspeed_version
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
from deepspeed.runtime.utils import count_used_parameters_in_backward
from torch import Tensor
from torch.nn import Parameter

from ds_grass.units import Unit, make_units
from ds_grass.zero import checkpoint
from ds_grass.zero.assembly import assemble
from ds_grass.zero.core import Job
from ds_grass.zero.fragments import link
from ds_grass.zero.host import HostOptimizer
from ds_grass.zero.reducer import Averaging
from ds_grass.zero.shards import FlatShards, flatten


class GrassZeroOptimizer(HostOptimizer, ZeROOptimizer):
    """Stages 0-2. Built where the engine looks up `DeepSpeedZeroOptimizer`, from the same keyword arguments."""

    def __init__(
        self,
        init_optimizer,
        param_names,
        timers=None,
        *,
        job: Job,
        dp_process_group=None,
        mpu=None,
        clip_grad=0.0,
        partition_grads=True,
        overlap_comm=False,
        static_loss_scale=1.0,
        dynamic_loss_scale=False,
        dynamic_loss_args=None,
        postscale_gradients=True,
        gradient_predivide_factor=1.0,
        gradient_average=True,
        gradient_accumulation_dtype=None,
        communication_data_type=None,
        **_: object,
    ):
        super().__init__()
        self.optimizer = init_optimizer
        self.param_names = param_names
        self.mpu = mpu
        self.clip_grad = clip_grad
        self.dp_process_group = dp_process_group
        self.partition_gradients = partition_grads
        self.device = torch.device(get_accelerator().current_device_name())
        self.units: Sequence[Unit] = make_units(job.layout, init_optimizer.param_groups, param_names)
        self.dtype = self.units[0].dtype
        averaging = Averaging.resolve(
            group=dp_process_group,
            postscale=postscale_gradients,
            predivide_factor=gradient_predivide_factor,
            average=gradient_average,
            wire_dtype=communication_data_type or self.dtype,
            sum_dtype=gradient_accumulation_dtype or self.dtype,
        )
        self.layouts = {
            unit.key: FlatShards(
                unit.sizes, averaging.world_size, averaging.rank, unit.params[0].element_size()
            )
            for unit in self.units
        }
        self.flat = {unit.key: self._flatten(unit) for unit in self.units}
        self.shards = {key: self._own(key) for key in self.flat}
        self.core = assemble(
            job,
            self.units,
            self.layouts,
            averaging,
            partitioned=partition_grads,
            overlap=overlap_comm,
            device=self.device,
            mpu=mpu,
            weights=self.shards.__getitem__,
            publish=self._publish,
            clip_grad=clip_grad,
        )
        for unit in self.units:
            link(unit, self.layouts[unit.key], self.core.store, self.core.reducer, self.shards[unit.key],
                 dp_process_group)  # fmt: skip
        self.bit16_groups = self.round_robin_bit16_groups = [list(unit.params) for unit in self.units]
        self._init_loss_scale(
            CreateLossScaler(
                dtype=self.dtype,
                static_loss_scale=static_loss_scale,
                dynamic_scaling=dynamic_loss_scale,
                dynamic_loss_args=dynamic_loss_args,
            )
        )
        self._managed = [param for unit in self.units for param in unit.params]
        self._grad_acc_hooks = [
            p.register_post_accumulate_grad_hook(self._on_gradient) for p in self._managed
        ]
        self._gathers: list[object] = []
        self._begin()

    # -- weights ----------------------------------------------------------------------------------------------------

    def _flatten(self, unit: Unit) -> Tensor:
        """Move the unit's weights into one buffer, one unit at a time: the peak is one unit, not the model."""
        return flatten(self.layouts[unit.key], unit.params, unit.dtype, self.device)

    def _own(self, key: int) -> Tensor:
        layout = self.layouts[key]
        return self.flat[key].narrow(0, layout.rank * layout.shard_numel, layout.shard_numel)

    def _publish(self, key: int) -> None:
        """The unit's own shard has been updated: every rank gets the whole unit."""
        if dist.get_world_size(self.dp_process_group) > 1:
            gather = dist.all_gather_into_tensor(self.flat[key], self.shards[key], group=self.dp_process_group,
                                                 async_op=True)  # fmt: skip
            self._gathers.append(gather)

    def _finish_update(self) -> None:
        for gather in self._gathers:
            if gather is not None:
                gather.wait()  # guarantees that the next forward reads gathered weights
        self._gathers.clear()

    # -- gradients --------------------------------------------------------------------------------------------------

    def _on_gradient(self, param: Parameter) -> None:
        # asked before re-entering, which hides a phase's beginning
        refresh = self.should_refresh_expected_hook_count()
        self.reenter_backward_if_needed()
        self.core.reducer.arrived(param)
        expected = (
            count_used_parameters_in_backward(self._managed) if refresh else self._max_expected_hooks_seen
        )
        self.update_hook_state_and_maybe_run_epilogue(expected)

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """Stage 2: a micro-batch's backward has ended."""
        self.core.reducer.flush()

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Stages 0 and 1: the backward of the last micro-batch has ended."""
        self.core.reducer.flush()

    def finalize_gradient_accumulation_boundary(self) -> None:
        """Stage 2 with managed_gradient_accumulation false: everything was reduced backward by backward."""

    def independent_gradient_partition_epilogue(self) -> None:
        self.core.reducer.flush()

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """DeepSpeed's stage-1/2 layout, one group a unit, plus the key "grass"; host tensors only."""
        states = [checkpoint.collect(unit, self.core.store, self.shards[unit.key]) for unit in self.units]
        paddings = [self.layouts[unit.key].padding for unit in self.units]
        return {
            "loss_scaler": self.loss_scaler,
            "dynamic_loss_scale": self.dynamic_loss_scale,
            "overflow": self.overflow,
            "clip_grad": self.clip_grad,
            "base_optimizer_state": {
                "state": checkpoint.optimizer_state(states),
                "param_groups": checkpoint.param_groups(self.units, self.optimizer.param_groups),
            },
            "single_partition_of_fp32_groups": [
                state.master[: state.master.numel() - padding]
                for state, padding in zip(states, paddings, strict=True)
            ],
            "zero_stage": 2 if self.partition_gradients else 1,
            "group_paddings": paddings,
            "partition_count": [dist.get_world_size(self.dp_process_group)] * len(self.units),
            "ds_version": deepspeed_version,
            "param_slice_mappings": [self._slices(unit) for unit in self.units],
            checkpoint.KEY: self._grass_state(),
        }

    def _slices(self, unit: Unit) -> OrderedDict:
        return OrderedDict(
            (name, param._hp_mapping.get_hp_fragment_address())
            for name, param in zip(unit.names, unit.params, strict=True)
            if param._hp_mapping is not None
        )

    def _saved_tensor(self, state: Mapping, unit: Unit, what: str) -> Tensor:
        if what == "fp32":
            return state["single_partition_of_fp32_groups"][unit.key]  # saved without its padding
        return state["base_optimizer_state"]["state"][unit.key][what]

    def _finish_loading(self) -> None:
        for unit in self.units:
            self._publish(unit.key)
        self._finish_update()

    def destroy(self) -> None:
        for hook in self._grad_acc_hooks:
            hook.remove()
        self.core.store.close()
