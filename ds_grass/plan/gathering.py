"""Stage 3 as DeepSpeed's `PartitionedParameterCoordinator` runs it: which weights are gathered when, for a replay.

Contract: the order and the rules are those of DeepSpeed 0.19: a module's own parameters are gathered before its forward
and its backward and released after, unless they are persistent, needed again within `max_reuse_distance`, or
wanted by another module that runs; in a step whose order was recorded before, what comes next is prefetched.
Several parameters gathered at once lie in one buffer and are then copied out of it. With one rank gathering is a view.

Not covered: parameters that a module uses but does not own (external ones), leaf modules, hpZ and quantised weights.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ds_grass.plan.job import Gathering
from ds_grass.plan.ledger import GATHERED, Ledger


class Coordinator:
    """Hooks on one model. `held` keeps the memory of each gathered parameter; the replay's own weights do not count."""

    def __init__(self, model: nn.Module, rules: Gathering, ranks: int, ledger: Ledger):
        self._model, self._rules, self._ranks, self._ledger = model, rules, ranks, ledger
        self._number = {param: number for number, param in enumerate(model.parameters())}
        self._numel = {param: param.numel() for param in self._number}
        self._persistent = {p for p, numel in self._numel.items() if numel <= rules.persistence_threshold}
        self._held: dict[Parameter, Tensor] = {}
        self._in_flight: dict[Parameter, _Gather] = {}
        self._users: dict[Parameter, set[nn.Module]] = defaultdict(set)
        self._recomputed: dict[nn.Module, set[Parameter]] = defaultdict(set)
        self._in_backward: dict[nn.Module, None] = {}
        self._trace: list[nn.Module] | None = None
        self._recorded: list[nn.Module] = []
        self._queue: deque[tuple[Parameter, int]] = deque()
        self._fetched_for: dict[Parameter, int] = {}
        self._position = 0
        self._handles = [hook for module in model.modules() for hook in self._hook(module)]

    # -- the replay says where it is --------------------------------------------------------------------------------

    def start_micro_batch(self) -> None:
        """A forward of the whole model begins."""
        for param in self._in_flight:  # prefetched for nobody
            if not self._users[param]:
                self._held.pop(param, None)
        self._in_flight.clear()
        if self._recorded and self._trace is None:
            self._trace = self._recorded
        self._recorded = []
        self._fetched_for = defaultdict(lambda: -1)
        self._position = 0
        if self._trace is not None:
            self._queue = deque(
                (param, step) for step, module in enumerate(self._trace) for param in self._sorted(module)
            )

    def end_backward(self) -> None:
        """Modules whose input needed no gradient are released now."""
        for module in reversed(list(self._in_backward)):
            self._release_of(module, {*_own(module), *self._recomputed.pop(module, ())} - self._persistent)
        self._in_backward.clear()

    def end_step(self) -> None:
        """The optimizer partitions everything, and gathers the persistent parameters again after its update."""
        self._users.clear()
        self._in_flight.clear()
        self._held.clear()

    def gather_persistent(self) -> None:
        for param in self._persistent:
            self._hold(param)

    def forget_trace(self) -> None:
        """Another set of blocks trains: the order of modules has changed."""
        self._trace, self._recorded = None, []

    # -- fetch and release ------------------------------------------------------------------------------------------

    def _fetch(self, module: nn.Module, *, forward: bool) -> None:
        if self._trace is None:
            self._recorded.append(module)
        if not forward:
            self._in_backward[module] = None
        own = _own(module)
        self._gather(own)
        recomputing = forward and torch._C._current_graph_task_id() != -1
        for param in own:
            self._users[param].add(module)
            if recomputing and self._in_backward and not param.requires_grad:
                owner = next(reversed(self._in_backward))
                self._recomputed[owner].add(param)
                self._users[param].add(owner)
            self._wait(param)
        if self._trace is not None:
            self._prefetch(own)
        self._position += 1

    def _prefetch(self, own: Sequence[Parameter]) -> None:
        new = {param for param in own if self._fetched_for[param] < self._position}
        while self._queue and new:
            param, step = self._queue.popleft()
            self._fetched_for[param] = step
            new.discard(param)
        room = min(
            self._rules.max_live_parameters
            - sum(self._numel[param] for param in {*self._held, *self._in_flight}),
            self._rules.prefetch_bucket_size,
        )
        coming: dict[Parameter, int] = {}
        while self._queue and sum(coming.values()) < room:
            param, step = self._queue.popleft()
            self._fetched_for[param] = max(self._fetched_for[param], step)
            if param not in self._held and param not in self._in_flight:
                coming[param] = self._numel[param]
        self._gather(coming)

    def _release(self, module: nn.Module, *, forward: bool) -> None:
        own = set(_own(module))
        wanted = own if self._trace is None else self._not_needed_soon(own - self._persistent)
        if not forward:
            recomputed = self._recomputed.pop(module, set())
            wanted = wanted | (recomputed - self._persistent)
            own |= recomputed
            self._in_backward.pop(module, None)
        for param in own - wanted:
            self._users[param].discard(module)
        self._release_of(module, wanted)

    def _release_of(self, module: nn.Module, params: Iterable[Parameter]) -> None:
        for param in params:
            self._users[param].discard(module)
            if not self._users[param]:
                self._held.pop(param, None)

    def _not_needed_soon(self, params: set[Parameter]) -> set[Parameter]:
        leaving = {param for param in params if self._fetched_for[param] <= self._position}
        passed = 0
        for module in self._trace[self._position :]:
            if passed >= self._rules.max_reuse_distance or not leaving:
                break
            own = _own(module)
            leaving -= set(own)
            passed += sum(self._numel[param] for param in own)
        return leaving

    # -- memory -----------------------------------------------------------------------------------------------------

    def _gather(self, params: Iterable[Parameter]) -> None:
        missing = [param for param in params if param not in self._held and param not in self._in_flight]
        if not missing:
            return
        if self._ranks == 1:
            self._held.update((param, param) for param in missing)
            return
        gather = _Gather(missing)
        with self._ledger.holding(GATHERED), torch.no_grad():
            gather.buffer = missing[0].new_empty(sum(map(self._aligned, missing)))
        self._in_flight.update(dict.fromkeys(missing, gather))

    def _wait(self, param: Parameter) -> None:
        gather = self._in_flight.pop(param, None)
        if gather is None or gather.waited:
            return
        gather.waited = True
        for each in gather.params:
            if len(gather.params) == 1:
                self._held[each] = gather.buffer
            else:
                self._hold(each)

    def _hold(self, param: Parameter) -> None:
        if param not in self._held and self._ranks > 1:
            with self._ledger.holding(GATHERED), torch.no_grad():
                self._held[param] = param.new_empty(self._numel[param])

    def _aligned(self, param: Parameter) -> int:
        return math.ceil(self._numel[param] / self._ranks) * self._ranks

    def _sorted(self, module: nn.Module) -> list[Parameter]:
        return sorted(set(_own(module)), key=self._number.__getitem__)

    # -- hooks ------------------------------------------------------------------------------------------------------

    def _hook(self, module: nn.Module) -> list[Any]:
        def before_backward(module: nn.Module, inputs: Any, output: Any) -> Any:
            return _on_tensors(lambda t: _Marker.apply(t, lambda: self._fetch(module, forward=False)), output)

        def after_backward(module: nn.Module, inputs: Any) -> Any:
            waiting = [0]

            def passed() -> None:
                waiting[0] -= 1
                if waiting[0] == 0:
                    self._release(module, forward=False)

            def mark(tensor: Tensor) -> Tensor:
                waiting[0] += 1
                return _Marker.apply(tensor, passed)

            return _on_tensors(mark, inputs)

        return [
            module.register_forward_pre_hook(lambda module, _: self._fetch(module, forward=True)),
            module.register_forward_hook(lambda module, *_: self._release(module, forward=True)),
            module.register_forward_hook(before_backward),
            module.register_forward_pre_hook(after_backward),
        ]


class _Gather:
    """One collective under way; its buffer stays until every parameter of it was waited for."""

    def __init__(self, params: Sequence[Parameter]):
        self.params = params
        self.buffer: Tensor | None = None
        self.waited = False


class _Marker(torch.autograd.Function):
    """Passes a tensor on, and says when backward comes by."""

    passes_tensors_on = True

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, passed: Callable[[], None]) -> Tensor:
        ctx.passed = passed
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.passed()
        return gradient, None


def _own(module: nn.Module) -> list[Parameter]:
    return [param for param in module._parameters.values() if param is not None]


def _on_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `function` to every tensor in `value` that requires a gradient."""
    if isinstance(value, Tensor):
        return function(value) if value.requires_grad else value
    if isinstance(value, tuple | list):
        return type(value)(_on_tensors(function, item) for item in value)
    if isinstance(value, dict):
        for key, item in value.items():
            value[key] = _on_tensors(function, item)
    return value
