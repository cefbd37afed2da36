"""What the engine and the user's scripts see of either ZeRO optimizer, beyond gradients and checkpoint layouts.

A mixin over the core: `step`, `overflow`, loss scale, the user's parameter groups, freezing around checkpoints.
`overflow` reads true while probing, so that DeepSpeed's, Accelerate's and the Trainer's schedules wait; the loss scaler
moves only on a real overflow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from deepspeed import comm as dist
from torch import Tensor

from ds_grass.units import Unit
from ds_grass.zero import checkpoint
from ds_grass.zero.announce import announce
from ds_grass.zero.core import GrassCore
from ds_grass.zero.shards import ShardLayout
from ds_grass.zero.universal import UniversalFolder


class HostOptimizer:
    """Expects `optimizer` (the user's), `units`, `layouts`, `shards` (own weight shards) and `core`, and of each stage
    `_saved_tensor`."""

    core: GrassCore
    units: Sequence[Unit]
    layouts: Mapping[int, ShardLayout]
    shards: Mapping[int, Tensor]
    _saved_tensor: Callable[[Mapping, Unit, str], Tensor]
    """(a rank's checkpoint, unit, "fp32" or a moment's name) -> the tensor, from DeepSpeed's layout of the stage."""

    def _begin(self) -> None:
        """Take the controller's first active set."""
        self.overflow = self.core.probing
        self._global_grad_norm = 0.0
        self._steps_to_load: Mapping[int, int] = {}
        self._reserved: list[int] = []
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
        self.thaw()

    def checkpoint_event_epilogue(self) -> None:
        self.freeze_again()

    def thaw(self) -> list[bool]:
        """Let every managed parameter require a gradient, and return what did before, for `restore_flags`."""
        params = [param for unit in self.units for param in unit.params]
        flags = [param.requires_grad for param in params]
        for param in params:
            param.requires_grad_(True)
        return flags

    def restore_flags(self, flags: Sequence[bool]) -> None:
        params = (param for unit in self.units for param in unit.params)
        for param, flag in zip(params, flags, strict=True):
            param.requires_grad_(flag)

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

    def load_state_dict(self, state_dict_list, load_optimizer_states=True, load_from_fp32_weights=False,
                        checkpoint_folder=None, load_serial=None, param_shapes=None) -> None:  # fmt: skip
        """Continue from a checkpoint of as many ranks, or from the universal one in `checkpoint_folder`.

        Raises ValueError before anything changes. The masters of the checkpoint are the weights, bit for bit.
        """
        if checkpoint_folder is not None:
            self._load_universal(UniversalFolder(checkpoint_folder), load_optimizer_states)
            return
        state = state_dict_list[dist.get_rank(self.dp_process_group)]
        grass = self._checked(state, load_optimizer_states)
        self._restore_loss_scale(state)
        steps = checkpoint.steps_of(grass) if load_optimizer_states else {}
        self._load_units(partial(self._saved_tensor, state), steps)
        if load_optimizer_states:
            self._restore_sampling(grass)
        self.core.switch()

    def _load_units(self, shards: checkpoint.Shards, steps: Mapping[int, int]) -> None:
        """Weights of all units, states of those with `steps`; the others were never drawn. `switch` comes after."""
        self.core.store.activate([])
        for unit in self.units:
            key, own = unit.key, self.shards[unit.key]
            master = shards(unit, "fp32")
            own[: master.numel()].copy_(master)
            if key not in steps:
                self.core.store.forget(key)
                continue
            self.core.store.restore(
                key,
                checkpoint.padded(master, own.numel()) if self.core.store.has_master(key) else None,
                checkpoint.padded(shards(unit, "exp_avg"), own.numel()),
                checkpoint.padded(shards(unit, "exp_avg_sq"), own.numel()),
                steps[key],
            )
        self._reserved = []
        self._finish_loading()

    def reserve(self) -> None:
        """Make host memory for what the checked checkpoint holds; RuntimeError, and nothing changed, without it."""
        self._reserved = self.core.store.reserve(self._steps_to_load)

    def release_reserved(self) -> None:
        """Give back what was reserved for a load that did not come about."""
        self.core.store.release(self._reserved)
        self._reserved = []

    def _finish_loading(self) -> None:
        """Hook: own weight shards were written; everybody who holds the whole weight must see it."""

    def _restore_sampling(self, grass: Mapping) -> None:
        for group, saved in zip(self.param_groups, grass["groups"], strict=True):
            checkpoint.update_group(group, saved)
        self.core.controller.load_state_dict(grass["controller"])
        self.core.reducer.counters.update(grass["counters"])
        self.core.journal.resume(grass.get("log"))  # absent in older files

    def check_checkpoint(self, path: str) -> None:
        """Raise ValueError for another job's file, of which only the small values are read; nothing has changed."""
        state = checkpoint.load_mapped(path)
        grass = self._checked(state["optimizer_state_dict"], load_optimizer_states=True)
        self._steps_to_load = checkpoint.steps_of(grass)

    def _checked(self, state: Mapping, load_optimizer_states: bool) -> Mapping:
        """The "grass" part of a checkpoint that this job can continue from; ValueError if it cannot."""
        grass = checkpoint.check(state, self.units, self.param_groups, "the checkpoint")
        checkpoint.check_ranks(state, dist.get_world_size(self.dp_process_group), "the checkpoint")
        if load_optimizer_states:
            self.core.controller.check_state(grass["controller"])
        return grass

    # -- universal checkpoints --------------------------------------------------------------------------------------

    def check_universal(self, folder: str, load_optimizer_states: bool) -> None:
        """Raise ValueError for a universal checkpoint that is damaged or another job's; nothing has changed."""
        found, where = UniversalFolder(folder), f"checkpoint {folder}"
        found.check_sizes(self.units)
        if not load_optimizer_states:
            return
        grass = found.shared.get(checkpoint.KEY)
        self._steps_to_load = found.steps(self.units) if grass is None else checkpoint.steps_of(grass)
        if grass is None:
            checkpoint.check_groups(found.shared["param_groups"], self.param_groups, where)
        else:
            checkpoint.check(found.shared, self.units, self.param_groups, where)
            self.core.controller.check_state(grass["controller"])

    loads_states = True
    """False while weights alone are loaded of a universal checkpoint, which DeepSpeed cannot ask for at stage 3."""

    def _load_universal(self, found: UniversalFolder, load_optimizer_states: bool) -> None:
        """From any number of ranks and any stage; one of plain AdamW brings states for every block and no sampling."""
        load_optimizer_states = load_optimizer_states and self.loads_states
        grass = found.shared.get(checkpoint.KEY)
        self._restore_loss_scale(found.shared)
        steps = found.steps(self.units) if grass is None else checkpoint.steps_of(grass)
        self._load_units(partial(self._universal_tensor, found), steps if load_optimizer_states else {})
        if load_optimizer_states and grass is not None:
            self._restore_sampling(grass)
        elif load_optimizer_states:
            for group, saved in zip(self.param_groups, found.shared["param_groups"], strict=True):
                plain = checkpoint.hyper_parameters(saved)
                checkpoint.update_group(group, {key: value for key, value in plain.items() if key in group})
        self.core.switch()

    def _universal_tensor(self, found: UniversalFolder, unit: Unit, what: str) -> Tensor:
        return found.shard(unit, self.layouts[unit.key], what)

    def update_lp_params(self) -> None:
        """After a universal load DeepSpeed asks for weights from masters; `_load_units` has written them."""

    def _restore_loss_scale(self, state: Mapping) -> None:
        saved = state.get("loss_scaler", self.loss_scaler)
        if type(saved) is not type(self.loss_scaler):
            return  # of a job in another precision; ours stays as ds_config says
        self.loss_scaler = saved
        self.dynamic_loss_scale = state.get("dynamic_loss_scale", self.dynamic_loss_scale)
        self.overflow = state.get("overflow", self.overflow)

    @torch.no_grad()
    def refresh_fp32_params(self) -> None:
        """The weights were loaded without optimizer states: masters follow them, moments start again."""
        for unit in self.units:
            self.core.store.forget(unit.key)
        self.core.switch()

    _restore_from_bit16_weights = refresh_fp32_params
