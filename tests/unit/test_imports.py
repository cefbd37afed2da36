"""Contracts of the layout: imports run one way, and importing the package is light.

The order below is the tour of the package for a reader: nothing refers to what comes after it. A new module must be
given its place here.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

ORDER = """
    ds_grass.activate

    ds_grass.block
    ds_grass.config
    ds_grass.conflicts
    ds_grass.layers
    ds_grass.units

    ds_grass.durable_files
    ds_grass.manifest

    ds_grass.importance
    ds_grass.sampler
    ds_grass.policies.grass
    ds_grass.policies.static
    ds_grass.policies.top_k
    ds_grass.policies.lisa
    ds_grass.policies.cyclic
    ds_grass.policies
    ds_grass.controller

    ds_grass.ops.library
    ds_grass.ops.building
    ds_grass.ops.just_in_time
    ds_grass.ops.extension
    ds_grass.ops.adamw
    ds_grass.ops.squared_norm
    ds_grass.ops.transfer
    ds_grass.ops
    ds_grass.numa
    ds_grass.host_memory
    ds_grass.copy_engine
    ds_grass.unit_state
    ds_grass.device_slots
    ds_grass.resident_states
    ds_grass.state_store

    ds_grass.adam
    ds_grass.agreement
    ds_grass.backward_cut

    ds_grass.telemetry
    ds_grass.telemetry.human
    ds_grass.telemetry.own_time
    ds_grass.telemetry.log_cut
    ds_grass.telemetry.log
    ds_grass.telemetry.start_line
    ds_grass.telemetry.loss_meter
    ds_grass.telemetry.probe_bar
    ds_grass.telemetry.scalars

    ds_grass.zero
    ds_grass.zero.compat
    ds_grass.zero.placement
    ds_grass.zero.shards
    ds_grass.zero.stores
    ds_grass.zero.reducer
    ds_grass.zero.journal
    ds_grass.zero.together
    ds_grass.zero.core
    ds_grass.zero.announce
    ds_grass.zero.checkpoint
    ds_grass.zero.saving
    ds_grass.zero.universal
    ds_grass.zero.loading
    ds_grass.zero.assembly
    ds_grass.zero.fragments
    ds_grass.zero.host
    ds_grass.zero.stages012
    ds_grass.zero.stage3

    ds_grass.step_hooks
    ds_grass.engine_hooks
    ds_grass.trainer_hooks
    ds_grass.doctor.finding
    ds_grass.doctor.machine
    ds_grass.doctor.config_file
    ds_grass.doctor
    ds_grass.report.run
    ds_grass.report.log
    ds_grass.report.page
    ds_grass.report.axes
    ds_grass.report.figures
    ds_grass.report

    ds_grass.plan.sizes
    ds_grass.plan.ledger
    ds_grass.plan.job
    ds_grass.plan.model
    ds_grass.plan.kernels
    ds_grass.plan.gathering
    ds_grass.plan.reduction
    ds_grass.plan.replay
    ds_grass.plan.budget
    ds_grass.plan.advice
    ds_grass.plan
    ds_grass.plan.table
    ds_grass.plan.picture
    ds_grass.cli

    megatron_ext.mpu
    megatron_ext.versioned_json
    megatron_ext.sequence_parallel
    megatron_ext.sequence_parallel.names
    megatron_ext.config
    megatron_ext.locate
    megatron_ext.compat
    megatron_ext.board
    megatron_ext.speakers
    megatron_ext.stage_facts
    megatron_ext.in_flight
    megatron_ext.device_peak
    megatron_ext.rank_memory
    megatron_ext.telemetry

    megatron_ext.sequence_parallel.layout
    megatron_ext.sequence_parallel.collectives
    megatron_ext.sequence_parallel.tile_kernels
    megatron_ext.sequence_parallel.key_values
    megatron_ext.sequence_parallel.attention
    megatron_ext.sequence_parallel.linears
    megatron_ext.sequence_parallel.strategies.layer
    megatron_ext.sequence_parallel.strategies.gathered
    megatron_ext.sequence_parallel.strategies.megatron_ts
    megatron_ext.sequence_parallel.strategies.ulysses
    megatron_ext.sequence_parallel.strategies.local_queries
    megatron_ext.sequence_parallel.strategies.context
    megatron_ext.sequence_parallel.strategies.ring
    megatron_ext.sequence_parallel.strategies.metp
    megatron_ext.sequence_parallel.strategies

    megatron_ext.sequence_parallel.layer_shape
    megatron_ext.sequence_parallel.closed_forms
    megatron_ext.sequence_parallel.memory_forms
    megatron_ext.sequence_parallel.cluster
    megatron_ext.sequence_parallel.profile
    megatron_ext.sequence_parallel.profile_sizes
    megatron_ext.sequence_parallel.least_squares
    megatron_ext.sequence_parallel.cost_model
    megatron_ext.sequence_parallel.forest
    megatron_ext.sequence_parallel.held_out
    megatron_ext.sequence_parallel.choice
    megatron_ext.sequence_parallel.recomputed
    megatron_ext.sequence_parallel.planner
    megatron_ext.sequence_parallel.truths
    megatron_ext.sequence_parallel.simulator

    megatron_ext.sequence_parallel.host
    megatron_ext.sequence_parallel.host.linears
    megatron_ext.sequence_parallel.host.rotary
    megatron_ext.sequence_parallel.host.attention
    megatron_ext.sequence_parallel.host.feed_forward
    megatron_ext.sequence_parallel.shape_of
    megatron_ext.sequence_parallel.micro_batch
    megatron_ext.sequence_parallel.switch
    megatron_ext.sequence_parallel.stopwatch
    megatron_ext.sequence_parallel.budget
    megatron_ext.saved_bytes
    megatron_ext.sequence_parallel.memory_probe
    megatron_ext.sequence_parallel.aliases
    megatron_ext.sequence_parallel.calibration
    megatron_ext.sequence_parallel.saved_profiles
    megatron_ext.sequence_parallel.known_costs
    megatron_ext.sequence_parallel.block_policy

    megatron_ext.recompute
    megatron_ext.recompute.schedule
    megatron_ext.recompute.running_pipeline
    megatron_ext.recompute.timeline
    megatron_ext.recompute.layout_advice
    megatron_ext.recompute.stage_memory
    megatron_ext.recompute.stage_bound
    megatron_ext.recompute.chunk_labels
    megatron_ext.recompute.first_plans
    megatron_ext.recompute.solver
    megatron_ext.recompute.policies
    megatron_ext.recompute.stage_peak
    megatron_ext.recompute.plan
    megatron_ext.recompute.layer_loop
    megatron_ext.recompute.layer_classes
    megatron_ext.recompute.expert_state
    megatron_ext.recompute.probe
    megatron_ext.recompute.sizes
    megatron_ext.recompute.planning_group
    megatron_ext.recompute.largest_size
    megatron_ext.recompute.stage
    megatron_ext.recompute.refusals
    megatron_ext.recompute.measurements
    megatron_ext.recompute.stage_plan
    megatron_ext.recompute.advice
    megatron_ext.recompute.storyteller
    megatron_ext.recompute.held
    megatron_ext.recompute.overshoot
    megatron_ext.recompute.recomputation
    megatron_ext.recompute.emulator
    megatron_ext.recompute.measured_stage

    megatron_ext.job
    megatron_ext.deepspeed_engine
    megatron_ext.hooks
    megatron_ext

    megatron_ext.described_model
    megatron_ext.described_job
    megatron_ext.plan
    megatron_ext.recompute_report
    megatron_ext.report
    megatron_ext.recompute_pictures
    megatron_ext.picture
    megatron_ext.tables
    megatron_ext.doctor
    megatron_ext.cli
""".split()

LAZY_ROOT = "ds_grass"
"""Imports `activate` at once and its public names when they are asked for."""

WITHOUT_DEEPSPEED = ORDER[: ORDER.index("ds_grass.zero")]
"""The method and its parts; what touches DeepSpeed stands in `ds_grass.zero` and `ds_grass.engine_hooks`."""


def modules() -> dict[str, Path]:
    found = {}
    for package in ("ds_grass", "megatron_ext"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(name: str, *, at_import_time: bool = False) -> set[str]:
    """Dotted names that a module imports: anywhere outside `if TYPE_CHECKING`, or only while it is imported."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    imported: set[str] = set()
    for node in statements(ast.parse(path.read_text()), into_functions=not at_import_time):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            submodules = {f"{source}.{alias.name}" for alias in node.names} & set(MODULES)
            names_besides = len(submodules) < len(node.names)
            imported |= submodules | ({source} if names_besides else set())
    return imported


def statements(tree: ast.AST, *, into_functions: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not into_functions:
            continue
        yield node
        yield from statements(node, into_functions=into_functions)


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_every_module_has_its_place_in_the_order():
    assert sorted(ORDER) == sorted(set(MODULES) - {LAZY_ROOT})


@pytest.mark.parametrize("name", [name for name in ORDER if name in MODULES])
def test_module_imports_only_what_comes_before_it(name):
    before = {LAZY_ROOT, *ORDER[: ORDER.index(name)]}
    ours = {imported for imported in imports_of(name) if imported in MODULES} - {name}
    assert ours <= before


def test_package_imports_nothing_but_its_activation_at_once():
    assert imports_of("ds_grass", at_import_time=True) & set(MODULES) == {"ds_grass.activate"}
    assert imports_of("megatron_ext", at_import_time=True) & set(MODULES) == {"ds_grass.activate"}


@pytest.mark.parametrize("name", ["ds_grass", "ds_grass.activate", "megatron_ext", "megatron_ext.mpu"])
def test_light_module_imports_only_the_standard_library_at_once(name):
    others = tops(imports_of(name, at_import_time=True)) - sys.stdlib_module_names
    assert others <= {"ds_grass"}


@pytest.mark.parametrize("name", [name for name in WITHOUT_DEEPSPEED if name in MODULES])
def test_method_knows_nothing_of_deepspeed(name):
    assert "deepspeed" not in tops(imports_of(name))


def test_importing_every_part_of_the_method_loads_no_deepspeed():
    """What the text of the files cannot show: an import behind an import."""
    present = [name for name in WITHOUT_DEEPSPEED if name in MODULES]
    source = f"import sys, {', '.join(present)}; print('deepspeed' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


def test_controller_is_the_function_even_after_its_module_was_imported():
    import ds_grass
    from ds_grass.controller import Controller

    assert callable(ds_grass.controller)
    assert Controller.__module__ == "ds_grass.controller"


def test_public_names_are_loaded_on_demand():
    import ds_grass
    from ds_grass.config import GrassConfig

    assert ds_grass.GrassConfig is GrassConfig
    assert set(ds_grass.__all__) <= set(dir(ds_grass))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ds_grass.nothing  # noqa: B018
    with pytest.raises(ValueError, match="grass"):
        ds_grass.controller(object())
