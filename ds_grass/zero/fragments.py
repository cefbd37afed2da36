"""DeepSpeed's per-parameter view of master weights and optimizer states, answered from the state store.

`deepspeed.utils.safe_get_full_fp32_param` and its siblings, and the universal checkpoint loader, ask a parameter's
`_hp_mapping`. DeepSpeed's own mapping holds tensor views that are made once; ours looks the state up when asked, since
a block's state may be on the device, on the host, or not made yet.
"""

from __future__ import annotations

from types import MethodType

import torch
from deepspeed import comm as dist
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor
from torch.nn import Parameter

from ds_grass.state_store import StateStore
from ds_grass.units import Unit
from ds_grass.zero.reducer import GradientReducer
from ds_grass.zero.shards import FlatShards

STATES = ("exp_avg", "exp_avg_sq")


class UnitFragment:
    """One parameter's part of this rank's shard; the interface of DeepSpeed's `tensor_fragment`."""

    def __init__(self, key: int, param_start: int, shard_start: int, numel: int, store: StateStore,
                 reducer: GradientReducer, weights: Tensor):  # fmt: skip
        self.key, self.store, self.reducer, self.weights = key, store, reducer, weights
        self.lp_fragment_address = fragment_address(start=param_start, numel=numel)
        self.hp_fragment_address = fragment_address(start=shard_start, numel=numel)

    def _narrow(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.hp_fragment_address.start, self.hp_fragment_address.numel)

    def get_hp_fragment_address(self) -> fragment_address:
        return self.hp_fragment_address

    def get_optim_state_keys(self) -> list[str]:
        return list(STATES)

    def get_hp_fragment(self, optim_state_key: str | None = None) -> Tensor:
        """fp32 values of the master weights or of a moment; zeros (or the weight) for a block never drawn."""
        held = self.store.view(self.key, optim_state_key or "master")
        if held is not None:
            return self._narrow(held)
        own = self._narrow(self.weights)
        return torch.zeros_like(own, dtype=torch.float32) if optim_state_key else own.float()

    def set_hp_fragment(self, value: Tensor, optim_state_key: str | None = None) -> None:
        """Write values of this rank's part; makes the block's state if it was never drawn."""
        if optim_state_key is None:
            self._narrow(self.weights).copy_(value)
            if not self.store.has_master(self.key):
                return
        self.store.ensure(self.key)
        self._narrow(self.store.view(self.key, optim_state_key or "master")).copy_(value)

    def get_lp_grad_fragment(self, index_in_param_group: int) -> Tensor:
        """This rank's part of the reduced gradient, between backward and step."""
        shard = self.reducer.shards.get(self.key)
        if shard is None:
            raise ValueError(
                "Gradients are only available after backward, before engine step, for active blocks"
            )
        return self._narrow(shard)

    def update_hp(self) -> None:
        self.set_hp_fragment(self._narrow(self.weights).float())

    def update_lp(self) -> None:
        self._narrow(self.weights).copy_(self.get_hp_fragment())


def link(
    unit: Unit, layout: FlatShards, store: StateStore, reducer: GradientReducer, weights: Tensor, group
) -> None:
    """Give every parameter of the unit the attributes and methods DeepSpeed's tools call. `weights`: the own shard."""
    first = layout.rank * layout.shard_numel
    for index, param in enumerate(unit.params):
        start, stop = layout.owned(index)
        param._index_in_param_group = index
        param._dp_group = group
        param._grass_gradients = (unit.key, reducer)
        param._hp_mapping = None
        if start < stop:
            in_param = start + first - layout.offsets[index]
            param._hp_mapping = UnitFragment(unit.key, in_param, start, stop - start, store, reducer, weights)
        param.get_full_hp_param = MethodType(_get_full, param)
        param.set_full_hp_param = MethodType(_set_full, param)
        param.get_full_hp_grad = MethodType(_get_full_grad, param)
        param.set_full_hp_grad = MethodType(_set_full_grad, param)


def _assemble(param: Parameter, fragment: Tensor | None) -> Tensor:
    """Sum the ranks' parts into the whole, fp32 on the parameter's device."""
    whole = torch.zeros(param.numel(), dtype=torch.float32, device=param.device)
    if fragment is not None:
        address = param._hp_mapping.lp_fragment_address
        whole.narrow(0, address.start, address.numel).copy_(fragment)
    dist.all_reduce(whole, group=param._dp_group)
    return whole.view(param.shape)


def _part(param: Parameter, value: Tensor) -> Tensor:
    address = param._hp_mapping.lp_fragment_address
    return value.flatten().narrow(0, address.start, address.numel)


def _get_full(param: Parameter, optim_state_key: str | None = None) -> Tensor:
    mapping = param._hp_mapping
    return _assemble(param, mapping.get_hp_fragment(optim_state_key) if mapping is not None else None)


def _set_full(param: Parameter, value: Tensor, optim_state_key: str | None = None) -> None:
    if optim_state_key is None:
        param.data.copy_(value.view(param.shape))  # every rank holds the whole weight and must see the same
    if param._hp_mapping is not None:
        param._hp_mapping.set_hp_fragment(_part(param, value), optim_state_key)


def _get_full_grad(param: Parameter) -> Tensor | None:
    """None, on all ranks alike, where there is no gradient: the block rests, or its probed gradient was freed."""
    key, reducer = param._grass_gradients
    if key not in reducer.shards:
        return None
    mapping = param._hp_mapping
    return _assemble(
        param, mapping.get_lp_grad_fragment(param._index_in_param_group) if mapping is not None else None
    )


def _set_full_grad(param: Parameter, value: Tensor) -> None:
    if param._hp_mapping is not None:
        param._hp_mapping.get_lp_grad_fragment(param._index_in_param_group).copy_(_part(param, value))
