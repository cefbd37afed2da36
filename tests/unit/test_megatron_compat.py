"""Needed names of Megatron-core: all there in the installed version; a missing one is refused by its dotted path."""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import logging
import sys
import types

import pytest

from megatron_ext import compat, hooks
from megatron_ext.compat import NEEDED, Need
from megatron_ext.recompute import layer_loop
from megatron_ext.recompute.layer_loop import FLAGS


@dataclasses.dataclass
class Packed:
    cu_seqlens: object = None


class Mask(enum.Enum):
    causal = 1


class Base:
    def register_parameter(self, name, value):
        setattr(self, name, value)


class Layer(Base):
    def __init__(self):
        self.assigned = 1
        self.annotated: int = 2
        self.register_parameter("registered", None)

    def build(self):
        self.built_later = 3

    def forward(self, hidden_states, *args, **kwargs):
        return self.only_read


@pytest.fixture
def fake(monkeypatch):
    """A Megatron-core with one module, `layers`."""
    modules = {name: types.ModuleType(name) for name in ("megatron", "megatron.core", "megatron.core.layers")}
    modules["megatron.core"].__version__ = "0.16.1"
    vars(modules["megatron.core.layers"]).update(
        Packed=Packed, Mask=Mask, Layer=Layer, function=lambda a, *args: a
    )
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules["megatron.core"]


@pytest.mark.parametrize("need", NEEDED, ids=lambda need: need.path)
def test_installed_megatron_core_has_what_is_needed(need):
    pytest.importorskip("megatron.core")
    assert compat.missing([need]) == []


def test_installed_megatron_core_is_one_that_was_run(caplog):
    pytest.importorskip("megatron.core")
    with caplog.at_level(logging.WARNING):
        compat.check()
    assert not caplog.records


def test_switches_of_every_kind_of_layer_are_in_the_installed_megatron_core():
    """Those that only some models have; a layer without one is refused by name when it is adopted."""
    pytest.importorskip("megatron.core")
    owners = {
        ("", "layernorm"): "transformer.transformer_layer:TransformerLayer",
        ("", "mlp"): "transformer.transformer_layer:TransformerLayer",
        ("self_attention", "core_attn"): "transformer.attention:Attention",
        ("self_attention", "mla_up_proj"): "transformer.multi_latent_attention:MultiLatentAttention",
        ("mlp", "moe"): "transformer.moe.moe_layer:MoELayer",
        ("mlp", "shared_experts"): "transformer.moe.moe_layer:MoELayer",
        ("mlp.experts", "moe_act"): "transformer.moe.experts:TEGroupedMLP",
    }
    for module, places in FLAGS.items():
        for part, flag in places:
            assert compat.missing([Need(f"{owners[part, module]}.{flag}", "attribute")]) == []


def test_what_megatron_core_hands_to_its_checkpointed_forward_is_handed_on():
    """Another argument would be dropped without a word."""
    block = pytest.importorskip("megatron.core.transformer.transformer_block")
    given = set(inspect.signature(block.TransformerBlock._checkpointed_forward).parameters)
    known = set(inspect.signature(layer_loop._run_layers).parameters)
    assert given - known == {"use_inner_quantization_context"}  # only under fp8 and fp4, which are refused


def test_every_schedule_that_is_hooked_is_needed():
    paths = {need.path: need.parameters for need in NEEDED}
    for name in hooks.SCHEDULES:
        assert {"num_microbatches", "forward_only"} <= set(paths[f"pipeline_parallel.schedules:{name}"])
    assert "pipeline_parallel.schedules:forward_step" in paths


def test_installed_schedules_take_what_is_read_by_name_only():
    """So that it is among the keywords, wherever a script calls them."""
    schedules = pytest.importorskip("megatron.core.pipeline_parallel.schedules")
    for name in hooks.SCHEDULES:
        parameters = inspect.signature(getattr(schedules, name)).parameters
        for key in ("num_microbatches", "forward_only"):
            assert parameters[key].kind is inspect.Parameter.KEYWORD_ONLY


def test_every_need_is_named_once():
    assert len({need.path for need in NEEDED}) == len(NEEDED)


@pytest.mark.parametrize(
    "need",
    [
        Need("layers:Layer", "class"),
        Need("layers:Layer.forward", "function", ("hidden_states", "args")),
        Need("layers:function", "function", ("a", "args")),
        *(
            Need(f"layers:Layer.{name}", "attribute")
            for name in ("assigned", "annotated", "built_later", "registered")
        ),
        Need("layers:Packed.cu_seqlens", "attribute"),
        Need("layers:Mask.causal", "member"),
    ],
    ids=lambda need: need.path,
)
def test_name_that_is_there_is_found(fake, need):
    compat.check([need])


@pytest.mark.parametrize(
    ("need", "path"),
    [
        (Need("gone:anything", "class"), "megatron.core.gone.anything"),
        (Need("layers:Gone", "class"), "megatron.core.layers.Gone"),
        (Need("layers:Gone.forward", "function"), "megatron.core.layers.Gone.forward"),
        (Need("layers:function", "class"), "megatron.core.layers.function"),
        (Need("layers:Layer.gone", "function"), "megatron.core.layers.Layer.gone"),
        (Need("layers:Layer.only_read", "attribute"), "megatron.core.layers.Layer.only_read"),
        (Need("layers:Packed.max_seqlen", "attribute"), "megatron.core.layers.Packed.max_seqlen"),
        (Need("layers:Mask.padding", "member"), "megatron.core.layers.Mask.padding"),
        (Need("layers:Layer.forward", "function", ("x",)), "megatron.core.layers.Layer.forward(x)"),
    ],
    ids=lambda value: getattr(value, "path", ""),
)
def test_missing_name_is_refused_with_its_path_and_the_version(fake, need, path):
    with pytest.raises(RuntimeError) as caught:
        compat.check([need])
    assert str(caught.value) == (
        f"megatron_ext needs {path}, which megatron-core 0.16.1 does not have; "
        'install "megatron-core>=0.12,<=0.16.1" or remove the megatron_ext block'
    )


def test_name_that_is_hooked_is_still_found(fake, monkeypatch):
    """The hook wraps methods; what it wraps must go on counting."""
    original = Layer.__init__

    @functools.wraps(original)
    def wrapper(self, *args, **kwargs):
        original(self, *args, **kwargs)

    compat._attributes_of.cache_clear()
    monkeypatch.setattr(Layer, "__init__", wrapper)
    assert compat.missing([Need("layers:Layer.assigned", "attribute")]) == []


def test_all_that_is_missing_is_named(fake):
    needed = [
        Need("layers:A", "class"),
        Need("layers:Layer", "class"),
        Need("layers:function", "function", ("x", "y")),
    ]
    assert compat.missing(needed) == [
        "megatron.core.layers.A",
        "megatron.core.layers.function(x)",
        "megatron.core.layers.function(y)",
    ]
    assert compat.by_module(needed) == {"megatron.core.layers": (3, compat.missing(needed))}


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.11.0", False),
        ("0.12.0", True),
        ("0.14.1", True),
        ("0.16.1", True),
        ("0.16.1+abc", True),
        ("0.17.0rc0", False),
    ],
)
def test_versions_outside_the_range_are_warned_about_only(fake, caplog, version, supported):
    fake.__version__ = version
    with caplog.at_level(logging.WARNING):
        compat.check([])
    assert compat.is_supported(version) is supported
    assert bool(caplog.records) is not supported
    assert supported or f"not with {version}" in caplog.text


def test_megatron_core_that_cannot_be_imported_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    with pytest.raises(RuntimeError, match="megatron_ext needs Megatron-core, which cannot be imported"):
        compat.check([])
