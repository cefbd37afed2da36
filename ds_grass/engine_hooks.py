"""The seam to DeepSpeed's engine: one wrap around `DeepSpeedEngine.__init__`.

Without a `grass` block, or with `"enabled": false`, the engine is built as if this package were not installed. With
one, everything that can be wrong is checked on every rank before the engine is built, the ranks agree through the
c10d store, and the engine's own lookup of its ZeRO optimizer finds ours. Methods are replaced on the instance, for one
engine; several engines in a process know nothing of each other.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_grass.config import GrassConfig
    from ds_grass.controller import Controller
    from ds_grass.layers import Layout

logger = logging.getLogger(__name__)

MARK = "__grass_wrapped__"


def install(module: ModuleType) -> None:
    """Wrap `module.DeepSpeedEngine.__init__`, once. Called as soon as deepspeed.runtime.engine has been imported."""
    engine_class = module.DeepSpeedEngine
    original = engine_class.__init__
    if hasattr(original, MARK):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def build(self, *args: Any, **kwargs: Any) -> None:
        config_class = kwargs.get("config_class")
        if not _asks_for_grass(config_class):
            original(self, *args, **kwargs)
            return
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        plan = _plan(bound.arguments)
        if plan is None:
            original(self, *args, **kwargs)
            return
        _prepare(self, plan, bound.arguments["config_class"], module)
        bound.arguments["model_parameters"] = plan.model_parameters
        original(*bound.args, **bound.kwargs)

    setattr(build, MARK, True)
    engine_class.__init__ = build


def controller(engine: Any) -> Controller:
    """The controller of an engine that runs GRASS: phase, active blocks, importance, counters.

    Raises ValueError for an engine without an enabled `grass` block.
    """
    core = getattr(getattr(engine, "optimizer", None), "core", None)
    if core is None:
        raise ValueError(
            "this engine does not run grass: its ds_config has no enabled grass block, or no optimizer"
        )
    return core.controller


@dataclass(frozen=True)
class _Plan:
    """What was read and checked before the engine is built."""

    config: GrassConfig
    layout: Layout
    model: Any
    model_parameters: Any
    """As given, but a generator has become a list: it was read to learn what trains."""
    stage: int
    """ZeRO stage in ds_config."""


def _asks_for_grass(config_class: Any) -> bool:
    """Whether the config that the engine parsed has a `grass` key; the quick way out for everybody else."""
    parsed = getattr(config_class, "_param_dict", None)
    return isinstance(parsed, Mapping) and "grass" in parsed


def _plan(arguments: Mapping[str, Any]) -> _Plan | None:
    """Check everything that can be checked now; None when GRASS stands aside. All ranks raise or none does."""
    from ds_grass import agreement
    from ds_grass.config import parse_block

    config_class = arguments["config_class"]
    has_optimizer = bool(arguments["optimizer"]) or config_class.optimizer_name is not None
    rank, world_size = _rank_and_world()
    if not has_optimizer:
        if rank == 0:
            logger.info("grass stands aside: this engine has no optimizer")
        return None
    name = agreement.next_name()
    store = agreement.default_store() if world_size > 1 else None
    try:
        config = parse_block(config_class._param_dict["grass"])
        plan = _check(config, arguments) if config.enabled else None
        facts = (
            agreement.facts_of(config, plan.layout, zero_stage=plan.stage)
            if plan
            else {"grass.enabled": False}
        )
    except (ValueError, RuntimeError) as error:
        if store is not None:
            agreement.post_failure(store, rank, world_size, error, name=name)
        raise
    if store is not None:
        agreement.agree(store, rank, world_size, facts, name=name)
    return plan


def _check(config: GrassConfig, arguments: Mapping[str, Any]) -> _Plan:
    from ds_grass import conflicts
    from ds_grass.adam import check_optimizer
    from ds_grass.layers import find_layout
    from ds_grass.zero import compat

    config_class, model, optimizer = arguments["config_class"], arguments["model"], arguments["optimizer"]
    stage = int(config_class.zero_optimization_stage)
    compat.check(stage)
    conflicts.check(config_class._param_dict, config)
    _refuse_pipeline_and_experts(model)
    parameters = arguments["model_parameters"]
    if parameters is not None and not isinstance(parameters, list):
        parameters = list(parameters)
    if hasattr(optimizer, "param_groups"):
        check_optimizer(optimizer)
        trainable = {id(p) for group in optimizer.param_groups for p in group["params"]}
    else:
        trainable = _ids(parameters)
    layout = find_layout(model, layers=config.layers, outer=config.outer, trainable=trainable)
    config.check_layers(len(layout.blocks))
    config.probe_steps_for(len(layout.blocks), _accumulation(config_class))
    return _Plan(config, layout, model, parameters, stage)


def _ids(parameters: list | None) -> set[int] | None:
    if parameters is None:
        return None
    flat = [p for entry in parameters for p in (entry["params"] if isinstance(entry, dict) else [entry])]
    return {id(entry[1] if isinstance(entry, tuple) else entry) for entry in flat}


def _refuse_pipeline_and_experts(model: Any) -> None:
    from deepspeed.moe.layer import MoE
    from deepspeed.runtime.pipe.module import PipelineModule

    if isinstance(model, PipelineModule):
        raise ValueError(
            "grass cannot train a PipelineModule yet; use ZeRO data parallelism, or remove the grass block"
        )
    if any(isinstance(module, MoE) for module in model.modules()):
        raise ValueError("grass cannot train DeepSpeed MoE layers yet; remove them, or the grass block")


def _prepare(engine: Any, plan: _Plan, config_class: Any, module: ModuleType) -> None:
    """Make this one engine choose our optimizer when it looks for a ZeRO optimizer."""
    from ds_grass import ops, step_hooks
    from ds_grass.zero.loading import guard_loading
    from ds_grass.zero.saving import guard_saving

    ops.ensure_native()  # after the ranks have agreed, which they must within a minute
    if plan.stage == 0:
        config_class.zero_config.stage = 1
        config_class.zero_optimization_stage = 1
        config_class.zero_enabled = True
    config_class.zero_allow_untested_optimizer = True  # the class was checked by name
    for _, param in plan.layout.frozen_outer:  # DeepSpeed then treats them as any frozen parameter
        param.requires_grad_(False)
    original = module.DeepSpeedEngine._configure_zero_optimizer

    def configure(optimizer: Any) -> Any:
        if optimizer is None:
            return original(engine, optimizer)
        with _our_optimizers(module, _make_job(engine, plan, optimizer)):
            return original(engine, optimizer)

    # `object.__setattr__`: the engine is a torch module that has not been initialised yet
    object.__setattr__(engine, "_configure_zero_optimizer", configure)
    guard_loading(engine, module)
    guard_saving(engine, module.DeepSpeedEngine)
    _keep_resting_weights(engine, module.DeepSpeedEngine)
    step_hooks.watch(engine)
    # DeepSpeed sends bf16 weights with fp32 accumulation at stage 1 to another optimizer; ours does both
    object.__setattr__(engine, "_do_optimizer_sanity_check", lambda optimizer: module.ZERO_OPTIMIZATION)


def _keep_resting_weights(engine: Any, engine_class: type) -> None:
    """`exclude_frozen_parameters` leaves out what the user froze; blocks that rest are not meant."""
    stock = engine_class.module_state_dict

    def module_state_dict(*args: Any, **kwargs: Any) -> Any:
        if not hasattr(engine.optimizer, "core"):
            return stock(engine, *args, **kwargs)
        flags = engine.optimizer.thaw()
        try:
            return stock(engine, *args, **kwargs)
        finally:
            engine.optimizer.restore_flags(flags)

    object.__setattr__(engine, "module_state_dict", module_state_dict)


@contextmanager
def _our_optimizers(module: ModuleType, job: Any) -> Iterator[None]:
    """While the engine builds its optimizer, the names it looks up are ours."""
    # The engine imports this subclass of the name we replace; it must derive from DeepSpeed's own class.
    import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: F401
    from deepspeed.runtime.zero import stage3

    from ds_grass.zero.stage3 import GrassZeroOptimizerStage3
    from ds_grass.zero.stages012 import GrassZeroOptimizer

    theirs = module.DeepSpeedZeroOptimizer, stage3.DeepSpeedZeroOptimizer_Stage3
    module.DeepSpeedZeroOptimizer = functools.partial(GrassZeroOptimizer, job=job)
    stage3.DeepSpeedZeroOptimizer_Stage3 = functools.partial(GrassZeroOptimizerStage3, job=job)
    try:
        yield
    finally:
        module.DeepSpeedZeroOptimizer, stage3.DeepSpeedZeroOptimizer_Stage3 = theirs


def _make_job(engine: Any, plan: _Plan, optimizer: Any) -> Any:
    """Everything resolved, and one line that says it."""
    from ds_grass import agreement, step_hooks
    from ds_grass.adam import check_optimizer
    from ds_grass.backward_cut import BackwardCut
    from ds_grass.controller import Controller
    from ds_grass.layers import outer_warning
    from ds_grass.telemetry.log import GrassLog
    from ds_grass.zero.core import Job

    check_optimizer(optimizer)
    config, layout = plan.config, plan.layout
    rank, _ = _rank_and_world()
    accumulation = _accumulation(engine._config)
    warning = outer_warning(layout, config.active_layers)
    if rank == 0 and warning:
        logger.warning("grass: %s", warning)
    cut = BackwardCut(engine.module, layout)
    return Job(
        config=config,
        layout=layout,
        optimizer=optimizer,
        controller=Controller(config, _block_sizes(engine, layout), accumulation_steps=accumulation),
        log=GrassLog(config.log.path, config.log.enabled, is_writer=rank == 0),
        send=step_hooks.sender(engine),
        at_boundary=lambda: (
            bool(engine.is_gradient_accumulation_boundary()) and not engine.inside_no_sync_ctxt
        ),
        ranks_on_node=agreement.ranks_on_node() or 1,
        stage=plan.stage,
        num_steps=_num_steps(engine._config._param_dict),
        on_switch=cut.on_switch,
    )


def _block_sizes(engine: Any, layout: Layout) -> list[int]:
    """Unsharded elements of each block: a tensor-parallel shard stands for as many as its group has ranks."""
    from deepspeed.runtime.utils import is_model_parallel_parameter

    from ds_grass.layers import num_elements

    mpu = engine.mpu
    shares = mpu.get_model_parallel_world_size() if hasattr(mpu, "get_model_parallel_world_size") else 1
    return [
        sum(num_elements(p) * (shares if is_model_parallel_parameter(p) else 1) for _, p in block.params)
        for block in layout.blocks
    ]


def _accumulation(config_class: Any) -> int:
    """Micro-batches of an optimizer step; 2 where the script owns the boundary and nobody knows how many there are."""
    managed = config_class._param_dict.get("managed_gradient_accumulation", True)
    return int(config_class.gradient_accumulation_steps) if managed else 2


def _num_steps(ds_config: Mapping) -> int | None:
    """Optimizer steps of the run, where DeepSpeed's scheduler was told."""
    params = (ds_config.get("scheduler") or {}).get("params") or {}
    total = params.get("total_num_steps")
    return total if isinstance(total, int) else None


def _rank_and_world() -> tuple[int, int]:
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
