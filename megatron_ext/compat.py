"""Every name of Megatron-core that this package relies on, and the versions it was run with.

Checked when a ``megatron_ext`` block is found, never before: a missing name or parameter is refused with its dotted
path and the installed version, a version outside the range is only warned about. To rely on another name, add a line
to :data:`NEEDED`.

Not covered: bodies. Those differ in nearly every release, so nothing here copies one.
"""

from __future__ import annotations

import dis
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from inspect import isfunction
from types import CodeType
from typing import Any, Literal

from packaging.specifiers import SpecifierSet

logger = logging.getLogger(__name__)

SUPPORTED = ">=0.12,<=0.16.1"
"""Megatron-core releases that were run: 0.12.0, 0.13.0, 0.14.0, 0.15.0 and 0.16.1."""

Kind = Literal["class", "function", "attribute", "member"]


@dataclass(frozen=True)
class Need:
    """One name. `path` is "module:name" below megatron.core.

    `kind`: "class" and "function" speak for themselves; "attribute" is one that instances get from their class's own
    methods, or a field of a dataclass; "member" is one of an enum. `parameters` are those passed or read by name.
    """

    path: str
    kind: Kind
    parameters: tuple[str, ...] = ()

    @property
    def dotted(self) -> str:
        """As a traceback would have it."""
        return f"megatron.core.{self.path.replace(':', '.')}"


def _attributes(owner: str, names: str) -> tuple[Need, ...]:
    return tuple(Need(f"{owner}.{name}", "attribute") for name in names.split())


def _functions(module: str, names: str) -> tuple[Need, ...]:
    return tuple(Need(f"{module}:{name}", "function") for name in names.split())


_BLOCK = "transformer.transformer_block:TransformerBlock"
_LAYER = "transformer.transformer_layer:TransformerLayer"
_SELF_ATTENTION = "transformer.attention:SelfAttention"
_MLP = "transformer.mlp:MLP"
_CORE = "transformer.dot_product_attention:DotProductAttention"
_COLUMN = "tensor_parallel.layers:ColumnParallelLinear"
_ROW = "tensor_parallel.layers:RowParallelLinear"
_CONFIG = "transformer.transformer_config:TransformerConfig"
_PACKED = "packed_seq_params:PackedSeqParams"
_GPT = "models.gpt.gpt_model:GPTModel"
_DDP = "distributed:DistributedDataParallel"
_SCHEDULES = "pipeline_parallel.schedules"
_RANDOM = "tensor_parallel.random:CudaRNGStatesTracker"

NEEDED: tuple[Need, ...] = (
    # where layers are found, and where a micro-batch's plan is taken
    Need(_BLOCK, "class"),
    Need(f"{_BLOCK}.__init__", "function", ("config",)),
    Need(f"{_BLOCK}.forward", "function", ("hidden_states", "attention_mask", "packed_seq_params")),
    *_attributes(_BLOCK, "layers pre_process input_tensor"),
    Need(_LAYER, "class"),
    *_attributes(_LAYER, "layer_number self_attention mlp"),
    Need(f"{_GPT}.__init__", "function"),
    *_attributes(_GPT, "decoder post_process vocab_size"),
    # the bodies that strategies stand in for
    Need(_SELF_ATTENTION, "class"),
    Need(
        f"{_SELF_ATTENTION}.forward",
        "function",
        ("hidden_states", "attention_mask", "rotary_pos_emb", "packed_seq_params", "attention_bias"),
    ),
    *_attributes(_SELF_ATTENTION, "linear_qkv linear_proj core_attention q_layernorm k_layernorm"),
    *_attributes(_SELF_ATTENTION, "config layer_number attn_mask_type hidden_size_per_attention_head"),
    Need(_MLP, "class"),
    Need(f"{_MLP}.forward", "function", ("hidden_states",)),
    *_attributes(_MLP, "config linear_fc1 linear_fc2"),
    Need(_CORE, "class"),
    Need(
        f"{_CORE}.forward",
        "function",
        ("query", "key", "value", "attention_mask", "attn_mask_type", "packed_seq_params"),
    ),
    # their weights and settings
    Need(_COLUMN, "class"),
    Need(f"{_COLUMN}.forward", "function", ("input_",)),
    *_attributes(_COLUMN, "weight bias"),
    Need(_ROW, "class"),
    Need(f"{_ROW}.forward", "function", ("input_",)),
    *_attributes(_ROW, "weight bias"),
    *_attributes(_CONFIG, "hidden_size ffn_hidden_size num_attention_heads num_query_groups"),
    *_attributes(_CONFIG, "gated_linear_unit activation_func bias_activation_fusion add_bias_linear"),
    *_attributes(_CONFIG, "normalization layernorm_epsilon layernorm_zero_centered_gamma"),
    *_attributes(_CONFIG, "hidden_dropout attention_dropout sequence_parallel context_parallel_size"),
    # what they call
    Need("models.common.embeddings.rope_utils:apply_rotary_pos_emb", "function", ("t", "freqs", "config")),
    Need(_PACKED, "class"),
    *_attributes(_PACKED, "qkv_format cu_seqlens_q cu_seqlens_q_padded"),
    Need("transformer.enums:AttnMaskType.causal", "member"),
    Need("transformer.enums:AttnMaskType.padding_causal", "member"),
    # what carries a plan through recomputation, and what makes weights whole before a forward
    Need("tensor_parallel:checkpoint", "function", ("function", "distribute_saved_activations", "args")),
    Need(_DDP, "class"),
    Need(f"{_DDP}._make_forward_pre_hook", "function"),
    # layers recomputed by a plan: where a block hands them over, and its settings that say so
    Need(
        f"{_BLOCK}._checkpointed_forward",
        "function",
        tuple(
            "hidden_states attention_mask context context_mask rotary_pos_emb attention_bias packed_seq_params".split()
        ),
    ),
    *_attributes(_BLOCK, "config"),
    Need(
        f"{_LAYER}._forward_attention",
        "function",
        (
            *"hidden_states attention_mask context context_mask rotary_pos_emb attention_bias".split(),
            *"inference_context packed_seq_params".split(),
        ),
    ),
    *_attributes(_CONFIG, "recompute_granularity recompute_method recompute_num_layers fp8 cpu_offloading"),
    *_attributes(_CONFIG, "microbatch_group_size_per_vp_stage window_size"),
    # switches of dense layers; those of others are looked for in each layer
    *_attributes(_LAYER, "recompute_input_layernorm recompute_pre_mlp_layernorm recompute_mlp"),
    *_attributes(_LAYER, "input_layernorm pre_mlp_layernorm"),
    *_attributes(_SELF_ATTENTION, "checkpoint_core_attention"),
    # a probe leaves random states as they were
    *_functions("tensor_parallel", "get_cuda_rng_tracker"),
    *(Need(f"{_RANDOM}.{name}", "function") for name in ("get_states", "set_states")),
    # when a step begins and ends, and what the emulator shares with it
    *(
        Need(f"{_SCHEDULES}:{name}", "function", ("num_microbatches", "forward_only"))
        for name in (
            "forward_backward_no_pipelining",
            "forward_backward_pipelining_without_interleaving",
            "forward_backward_pipelining_with_interleaving",
        )
    ),
    *_functions(_SCHEDULES, "forward_step deallocate_output_tensor custom_backward"),
    # which ranks there are
    *_functions("parallel_state", "model_parallel_is_initialized get_tensor_model_parallel_group"),
    *_functions("parallel_state", "get_tensor_model_parallel_rank get_tensor_model_parallel_world_size"),
    *_functions("parallel_state", "get_pipeline_model_parallel_rank get_pipeline_model_parallel_world_size"),
    *_functions("parallel_state", "get_virtual_pipeline_model_parallel_world_size"),
    *_functions("parallel_state", "get_data_parallel_world_size get_context_parallel_world_size"),
    Need("parallel_state:get_data_parallel_rank", "function", ("with_context_parallel",)),
    Need("parallel_state:get_tensor_and_data_parallel_group", "function", ("with_context_parallel",)),
    # a probe of experts leaves the table of their losses as it was; where that is differs by release
    Need("transformer.moe.moe_utils:MoEAuxLossAutoScaler", "class"),
)


def check(needed: Sequence[Need] = NEEDED) -> None:
    """Raise RuntimeError when something needed is missing; warn outside the versions that were run."""
    version = installed_version()
    absent = missing(needed)
    if absent:
        raise RuntimeError(
            f"megatron_ext needs {', '.join(absent)}, which megatron-core {version} does not have; "
            f'install "megatron-core{SUPPORTED}" or remove the megatron_ext block'
        )
    if not is_supported(version):
        logger.warning("megatron_ext was run with megatron-core%s, not with %s", SUPPORTED, version)


def missing(needed: Sequence[Need] = NEEDED) -> list[str]:
    """Dotted paths of what the installed Megatron-core does not have; `path(parameter)` for a parameter."""
    return [path for need in needed for path in _lacking(need)]


def by_module(needed: Sequence[Need] = NEEDED) -> dict[str, tuple[int, list[str]]]:
    """For each module how many of its names are needed, and what of those it lacks."""
    modules: dict[str, tuple[int, list[str]]] = {}
    for need in needed:
        module = f"megatron.core.{need.path.partition(':')[0]}"
        count, absent = modules.get(module, (0, []))
        modules[module] = count + 1, [*absent, *_lacking(need)]
    return modules


def installed_version() -> str:
    """Of Megatron-core. RuntimeError where it cannot be imported."""
    try:
        return str(importlib.import_module("megatron.core").__version__)
    except ImportError as error:
        raise RuntimeError(
            f"megatron_ext needs Megatron-core, which cannot be imported ({error}); pip install megatron-core"
        ) from error


def is_supported(version: str) -> bool:
    """Whether `version` lies in the range that was run."""
    return SpecifierSet(SUPPORTED).contains(version.split("+")[0], prereleases=True)


def _lacking(need: Need) -> list[str]:
    """What is missing of one name: itself, or some of its parameters."""
    module, _, path = need.path.partition(":")
    try:
        owner: Any = importlib.import_module(f"megatron.core.{module}")
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
    except (ImportError, AttributeError):
        return [need.dotted]
    if not _KINDS[need.kind](owner, name):
        return [need.dotted]
    accepted = _parameters(getattr(owner, name)) if need.parameters else ()
    return [f"{need.dotted}({parameter})" for parameter in need.parameters if parameter not in accepted]


def _is_class(owner: Any, name: str) -> bool:
    return inspect.isclass(getattr(owner, name, None))


def _is_function(owner: Any, name: str) -> bool:
    return callable(getattr(owner, name, None))


def _is_member(owner: Any, name: str) -> bool:
    return name in getattr(owner, "__members__", ())


def _is_attribute(owner: Any, name: str) -> bool:
    """Whether instances of the class `owner` have `name`."""
    return name in _attributes_of(owner)


_KINDS: dict[Kind, Callable[[Any, str], bool]] = {
    "class": _is_class,
    "function": _is_function,
    "attribute": _is_attribute,
    "member": _is_member,
}


@lru_cache(maxsize=64)
def _attributes_of(owner: type) -> frozenset[str]:
    """Fields of a dataclass, or what the methods of a class and of its parents assign to an object."""
    if is_dataclass(owner):
        return frozenset(each.name for each in fields(owner))
    functions = [value for parent in owner.__mro__ for value in vars(parent).values() if isfunction(value)]
    return frozenset(name for function in functions for name in _assigned(inspect.unwrap(function).__code__))


def _assigned(code: CodeType) -> Iterator[str]:
    """Names of attributes that a function assigns, or registers as a parameter of a module."""
    previous = None
    for step in dis.get_instructions(code):
        if step.opname == "STORE_ATTR":
            yield step.argval
        if step.opname == "LOAD_CONST" and previous == "register_parameter":
            yield step.argval
        previous = step.argval


def _parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)
