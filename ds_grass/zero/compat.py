"""Every private or unstable name of DeepSpeed that GRASS relies on, and the versions it was run with.

Checked when a `grass` block is found, never before: a missing name is refused with its dotted path and the
installed version, a version outside the range is only warned about.
"""

from __future__ import annotations

import importlib
import logging

import deepspeed
from packaging.specifiers import SpecifierSet

logger = logging.getLogger(__name__)

SUPPORTED = ">=0.18,<0.20"
"""DeepSpeed releases the tests were run with: 0.18.9 and 0.19.8."""

NEEDED = {
    "deepspeed.runtime.engine": (
        "DeepSpeedEngine._configure_zero_optimizer",
        "DeepSpeedEngine._do_optimizer_sanity_check",
        "DeepSpeedEngine._get_zero_ckpt_name",
        "DeepSpeedEngine._copy_recovery_script",
        "DeepSpeedEngine._get_all_ckpt_names",
        "DeepSpeedEngine.is_gradient_accumulation_boundary",
        "DeepSpeedEngine.no_sync",
        "DeepSpeedEngine.load_checkpoint",
        "DeepSpeedEngine.module_state_dict",
        "DeepSpeedEngine.save_checkpoint",
        "DeepSpeedZeroOptimizer",
        "get_fp32_state_dict_from_zero_checkpoint",
        "ZERO_OPTIMIZATION",
    ),
    "deepspeed.runtime.base_optimizer": (
        "ZeROOptimizer.backward_prologue",
        "ZeROOptimizer.reenter_backward_if_needed",
        "ZeROOptimizer.should_refresh_expected_hook_count",
        "ZeROOptimizer.update_hook_state_and_maybe_run_epilogue",
        "ZeROOptimizer._max_expected_hooks_seen",
    ),
    "deepspeed.runtime.fp16.loss_scaler": ("CreateLossScaler",),
    "deepspeed.runtime.utils": ("count_used_parameters_in_backward", "is_model_parallel_parameter"),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
    "deepspeed.utils.groups": ("_get_sequence_parallel_world_size",),
    "deepspeed.moe.utils": ("is_moe_param",),
}

NEEDED_BY_STAGE_3 = {
    "deepspeed.runtime.zero.stage3": (
        "DeepSpeedZeroOptimizer_Stage3._setup_for_real_optimizer",
        "DeepSpeedZeroOptimizer_Stage3.reduce_ready_partitions_and_remove_grads",
        "DeepSpeedZeroOptimizer_Stage3.independent_gradient_partition_epilogue",
        "DeepSpeedZeroOptimizer_Stage3._pre_step",
        "DeepSpeedZeroOptimizer_Stage3._post_step",
        "DeepSpeedZeroOptimizer_Stage3._partition_all_parameters",
        "DeepSpeedZeroOptimizer_Stage3._get_param_coordinator",
        "DeepSpeedZeroOptimizer_Stage3._get_fp32_opt_state_partition",
        "DeepSpeedZeroOptimizer_Stage3._get_fp32_grad_state_partition",
    ),
    "deepspeed.runtime.zero.partitioned_param_coordinator": (
        "PartitionedParameterCoordinator.is_invalid_trace",
        "PartitionedParameterCoordinator._invalidate_trace",
    ),
}


def missing(stage: int) -> list[str]:
    """Dotted paths of needed names that the installed DeepSpeed does not have."""
    return [path for _, absent in by_module(stage).values() for path in absent]


def by_module(stage: int) -> dict[str, tuple[int, list[str]]]:
    """For each module of DeepSpeed how many of its names are needed, and the dotted paths of those it lacks."""
    table = {**NEEDED, **(NEEDED_BY_STAGE_3 if stage == 3 else {})}
    return {
        module: (len(paths), [f"{module}.{path}" for path in paths if not _exists(module, path)])
        for module, paths in table.items()
    }


def check(stage: int) -> None:
    """Raise RuntimeError when a needed name is missing; warn outside the versions that were run."""
    absent = missing(stage)
    if absent:
        raise RuntimeError(
            f"grass needs {', '.join(absent)}, which deepspeed {deepspeed.__version__} does not have; "
            f"install deepspeed{SUPPORTED} or remove the grass block"
        )
    if not is_supported():
        logger.warning("grass was run with deepspeed%s, not with %s", SUPPORTED, deepspeed.__version__)


def is_supported() -> bool:
    """Whether the installed version lies in the range that was run."""
    return SpecifierSet(SUPPORTED).contains(deepspeed.__version__.split("+")[0], prereleases=True)


def _exists(module: str, path: str) -> bool:
    try:
        found: object = importlib.import_module(module)
    except ImportError:
        return False
    for name in path.split("."):
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True
