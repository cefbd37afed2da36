"""What the engine and the user's scripts see of either ZeRO optimizer, beyond gradients and checkpoint layouts.

A mixin over the core: `step`, `overflow`, loss scale, the user's parameter groups, freezing around checkpoints.
`overflow` reads true while probing, so that DeepSpeed's, Accelerate's and the Trainer's schedules wait; the loss scaler
moves only on a real overflow.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from deepspeed import comm as dist
from torch import Tensor

from ds_grass.units import Unit
from ds_grass.zero import checkpoint
from ds_grass.zero.announce import announce
from ds_grass.zero.core import GrassCore


class HostOptimizer:
    """Expects `optimizer` (the user's), `units`, `layouts`, `shards` (own weight shards) and `core`."""

    core: GrassCore
    units: Sequence[Unit]
    shards: Mapping[int, Tensor]

    def _begin(self) -> None:
        """Take the controller's first active set."""
        self.overflow = self.core.probing
        self._global_grad_norm = 0.0
        self.core.switch()
        announce(self.core)

    # -- step -------------------------------------------------------------------------------------------------------

    def step(self, closure=None) -> None:
        """Update what trains, or measure while probing; `overflow` tells the engine whether the step counted."""
        if closure is not None:
            raise ValueError("grass: optimizer.step(closure) cannot be used with ZeRO; call engine.step()")
        self._before_step()
        result = self.core.step(self.loss_scale, scale_may_fall=self._scale_may_fall())
        self._finish_update()
        self.overflow = not result.applied
        self._global_grad_norm = result.grad_norm
        self.loss_scaler.update_scale(not result.finite)
        self._after_step(result.applied)

    def _scale_may_fall(self) -> bool:
        return self.loss_scaler.dynamic and self.loss_scaler.cur_scale > getattr(
            self.loss_scaler, "min_scale", 1.0
        )

    def _before_step(self) -> None:
        """Hook of stage 3."""

    def _finish_update(self) -> None:
        """Hook of stages 0-2: wait for gathered weights."""

    def _after_step(self, applied: bool) -> None:
        """Hook of stage 3."""

    def backward_prologue(self) -> None:
        """The engine calls this as a backward begins."""
        super().backward_prologue()
        self.core.reducer.start_round()

    def offload_states(self, *args: object, **kwargs: object) -> None:
        """States are on the host already, but for the active set, which a step needs."""
        raise RuntimeError(
            "engine.offload_states() is not for a grass engine: its states are on the host as it is"
        )

    def reload_states(self, *args: object, **kwargs: object) -> None:
        """Nothing was offloaded."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        for unit in self.units:
            for param in unit.params:
                param.grad = None

    # -- what schedulers and loggers use ----------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict]:
        """The user's own groups: a scheduler made before or after the engine writes where we read."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> dict:
        """Empty: the states live in the state store; see `deepspeed.utils.safe_get_full_optimizer_state`."""
        return self.optimizer.state

    def get_lr(self) -> float:
        return self.param_groups[0]["lr"]

    def set_lr(self, lr: float) -> None:
        for group in self.param_groups:
            group["lr"] = lr

    # -- loss scale -------------------------------------------------------------------------------------------------

    def _init_loss_scale(self, scaler) -> None:
        self.loss_scaler = scaler
        self.dynamic_loss_scale = scaler.dynamic
        self.custom_loss_scaler = False
        self.external_loss_scale = None
        self.torch_autocast_gradscaler = None

    @property
    def loss_scale(self) -> float:
        return self.external_loss_scale if self.custom_loss_scaler else self.loss_scaler.cur_scale

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        self.loss_scaler.cur_scale = value

    cur_scale = loss_scale

    def override_loss_scale(self, loss_scale: float) -> None:
        self.custom_loss_scaler = True
        self.external_loss_scale = loss_scale

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def checkpoint_event_prologue(self) -> None:
        """DeepSpeed writes frozen parameters apart; ours are all managed, whether they train now or not."""
        for unit in self.units:
            for param in unit.params:
                param.requires_grad_(True)

    def checkpoint_event_epilogue(self) -> None:
        self.freeze_again()

    def freeze_again(self) -> None:
        """After DeepSpeed has written or read: what does not train is frozen."""
        wanted = {id(param) for unit in self.core.active_units() for param in unit.params}
        for unit in self.units:
            for param in unit.params:
                param.requires_grad_(id(param) in wanted)

    def _grass_state(self) -> dict:
        core = self.core
        state = checkpoint.grass_state(
            self.units, self.param_groups, core.store, core.controller, core.reducer.counters
        )
        return {**state, "log": core.journal.identity()}

    def _restore_grass(
        self, state: Mapping, masters: Sequence[Tensor], moments: Mapping[int, Mapping]
    ) -> None:
        """States first, then the controller, then the active set that it says."""
        numels = {unit.key: self.shards[unit.key].numel() for unit in self.units}
        self.core.store.activate([])
        checkpoint.restore(state, self.units, self.core.store, masters, moments, numels)
        for group, saved in zip(self.param_groups, state["groups"], strict=True):
            group.update(saved)
        self.core.controller.load_state_dict(state["controller"])
        self.core.reducer.counters.update(state["counters"])
        self.core.switch()
        self.core.journal.resume(state.get("log"))  # absent in older files

    def check_checkpoint(self, path: str) -> None:
        """Raise ValueError for another job's file, of which only the small values are read; nothing has changed."""
        if os.path.isfile(path):  # DeepSpeed says what is missing
            state = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
            self._checked(state["optimizer_state_dict"], load_optimizer_states=True)

    def _checked(self, state: Mapping, *, load_optimizer_states: bool) -> Mapping:
        """The "grass" part of a checkpoint that this job can continue from; ValueError if it cannot."""
        ranks = dist.get_world_size(self.dp_process_group)
        grass = checkpoint.check(state, self.units, ranks, "the checkpoint")
        if load_optimizer_states:
            self.core.controller.check_state(grass["controller"])
        return grass

    def _restore_loss_scale(self, state: Mapping) -> None:
        self.loss_scaler = state.get("loss_scaler", self.loss_scaler)
        self.dynamic_loss_scale = state.get("dynamic_loss_scale", self.dynamic_loss_scale)
        self.overflow = state.get("overflow", self.overflow)

    @torch.no_grad()
    def refresh_fp32_params(self) -> None:
        """The weights were loaded without optimizer states: masters follow them, moments start again."""
        for unit in self.units:
            self.core.store.forget(unit.key)
        self.core.switch()

    _restore_from_bit16_weights = refresh_fp32_params
