"""Contracts of layer classes: layers that keep alike are one class, and each may do what it can.

On light stand-ins that have the classes' names; Megatron-core is not imported.
"""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_ext.recompute.layer_classes import (
    MOST_TOGETHER,
    allowed_modules,
    choices,
    signature,
    writes_scores,
)
from megatron_ext.recompute.plan import FULL, MODULES, NONE, parse_choice

CONFIG = {"no_rope_freq": None, "window_size": None, "window_attn_skip_freq": None}


def part(kind: str, **attributes) -> nn.Module:
    found = type(kind, (nn.Module,), {})()
    for name, value in attributes.items():
        setattr(found, name, value)
    return found


def layer(number: int = 1, *, width: int = 4, experts: bool = False, **config) -> nn.Module:
    attention = part(
        "SelfAttention",
        config=SimpleNamespace(**{**CONFIG, **config}),
        attn_mask_type=SimpleNamespace(name="causal"),
        checkpoint_core_attention=False,
        core_attention=part("DotProductAttention"),
        linear_qkv=nn.Linear(width, 3 * width),
    )
    if experts:
        mlp = part("MoELayer", moe_layer_recompute=False, shared_experts_recompute=False, shared_experts=None)
        mlp.experts = part("TEGroupedMLP", activation_recompute=False)
    else:
        mlp = part("MLP", linear_fc2=nn.Linear(width, width, bias=False))
    return part(
        "TransformerLayer", layer_number=number, recompute_mlp=False, self_attention=attention,
        recompute_input_layernorm=False, recompute_pre_mlp_layernorm=False, mlp=mlp,
        input_layernorm=nn.LayerNorm(width), pre_mlp_layernorm=nn.LayerNorm(width),
    )  # fmt: skip


# -- signatures -------------------------------------------------------------------------------------------------------


def test_layers_that_differ_in_number_and_values_alone_are_alike():
    first, second = layer(1), layer(7)
    nn.init.zeros_(second.mlp.linear_fc2.weight)
    assert signature(first) == signature(second)
    assert hash(signature(first)) == hash(signature(second))
    first.train()
    second.eval()
    assert signature(first) == signature(second)


def frozen(found):
    found.mlp.requires_grad_(False)


def in_bf16(found):
    found.mlp.to(torch.bfloat16)


def with_another_core(found):
    found.self_attention.core_attention = part("TEDotProductAttention")


def with_another_norm(found):
    found.input_layernorm = part("IdentityOp")


def with_an_adapter(found):
    found.mlp.linear_fc2.adapter = nn.Linear(4, 1)


def with_another_mask(found):
    found.self_attention.attn_mask_type = SimpleNamespace(name="no_mask")


def without_attention(found):
    found.self_attention = part("IdentityOp")


CHANGES = [
    frozen,
    in_bf16,
    with_another_core,
    with_another_norm,
    with_an_adapter,
    with_another_mask,
    without_attention,
]


@pytest.mark.parametrize("change", CHANGES)
def test_layer_that_keeps_something_else_is_of_another_class(change):
    found = layer()
    change(found)
    assert signature(found) != signature(layer())


def test_width_and_experts_make_other_classes():
    assert len({signature(layer()), signature(layer(width=8)), signature(layer(experts=True))}) == 3


def kinds(**config) -> list[int]:
    """Of six layers, the class of each."""
    found: dict = {}
    return [found.setdefault(signature(layer(number, **config)), len(found)) for number in range(1, 7)]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [0] * 6),
        ({"no_rope_freq": [0, 0, 1, 0, 0, 1]}, [0, 0, 1, 0, 0, 1]),
        ({"window_size": (8, 0)}, [0] * 6),
        ({"window_size": (8, 0), "window_attn_skip_freq": 3}, [0, 0, 1, 0, 0, 1]),
        ({"window_size": (8, 0), "window_attn_skip_freq": [1, 0, 1, 0, 1, 0]}, [0, 1] * 3),
        ({"window_attn_skip_freq": 3}, [0] * 6),
    ],
)
def test_layers_of_one_config_that_attend_by_turns_are_told_apart(config, expected):
    """As Megatron-core's is_layer_window_attention and its no_rope_freq have it."""
    assert kinds(**config) == expected


def test_window_is_no_other_class_where_no_layer_has_one():
    assert signature(layer(window_attn_skip_freq=2)) == signature(layer())
    assert signature(layer(window_size=(8, 0))) != signature(layer(window_size=(16, 0)))


# -- modules ----------------------------------------------------------------------------------------------------------


def test_null_stands_for_all_that_a_layer_can():
    assert allowed_modules(layer(), None) == ("core_attn", "mlp")
    assert allowed_modules(layer(experts=True), None) == ("core_attn", "moe", "moe_act")


def test_wanted_modules_come_in_the_order_of_the_plan_and_once():
    assert allowed_modules(layer(), ["mlp", "core_attn", "mlp"]) == ("core_attn", "mlp")
    assert allowed_modules(layer(), ["mlp"]) == ("mlp",)
    assert allowed_modules(layer(), []) == ()


def test_modules_of_the_other_kind_of_layer_are_passed_over():
    wanted = ["mlp", "moe", "moe_act"]
    assert allowed_modules(layer(), wanted) == ("mlp",)
    assert allowed_modules(layer(experts=True), wanted) == ("moe", "moe_act")


def test_unknown_module_is_refused_with_all_names():
    with pytest.raises(ValueError, match="names 'half'") as caught:
        allowed_modules(layer(), ["mlp", "half"])
    assert str(caught.value) == (
        "megatron_ext.recompute.modules names 'half'; allowed: core_attn, layernorm, mlp, mla_up_proj, moe, moe_act, "
        "shared_experts, or null"
    )


def test_module_that_a_layer_cannot_recompute_is_refused_with_the_reason_and_what_it_can():
    with pytest.raises(ValueError, match="names 'layernorm'") as caught:
        allowed_modules(layer(), ["mlp", "layernorm"])
    assert str(caught.value) == (
        "megatron_ext.recompute.modules names 'layernorm', which this model cannot recompute by itself: "
        "input_layernorm is a torch.nn.modules.normalization.LayerNorm, not one of Transformer Engine's; allowed here: "
        '"core_attn", "mlp"; leave it out, or write null'
    )


@pytest.mark.parametrize("experts", [False, True])
def test_module_that_every_kind_of_layer_has_is_refused_in_every_kind(experts):
    """Attention that keeps no scores: a layer of experts must not pass it over as somebody else's."""
    found = layer(experts=experts)
    with_another_core(found)
    with pytest.raises(ValueError, match="names 'core_attn'.*core_attention is a TEDotProductAttention"):
        allowed_modules(found, ["core_attn"])
    with pytest.raises(ValueError, match="names 'mla_up_proj'.*no self_attention.recompute_up_proj"):
        allowed_modules(found, ["mla_up_proj"])


def test_layer_of_experts_without_shared_ones_is_refused_by_name():
    with pytest.raises(ValueError, match="names 'shared_experts'.*has no shared experts; allowed here"):
        allowed_modules(layer(experts=True), ["shared_experts"])


def test_layer_that_can_recompute_nothing_alone_says_so():
    found = part("TransformerLayer")
    assert allowed_modules(found, None) == ()
    with pytest.raises(ValueError, match="allowed here: none; leave it out"):
        allowed_modules(found, ["core_attn"])


# -- choices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(len(MODULES) + 1))
def test_choices_begin_with_nothing_end_with_everything_and_name_each_set_once(count):
    modules = MODULES[:count]
    found = choices(modules)
    assert (found[0], found[-1]) == (NONE, FULL)
    sets = [parse_choice(choice) for choice in found[1:-1]]
    assert len(set(found)) == len(found)
    if count <= MOST_TOGETHER:
        assert sets == [some for size in range(1, count + 1) for some in combinations(modules, size)]
    else:
        assert sets == [*((module,) for module in modules), modules]


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "kind", "backend", "writes"),
    [
        ("megatron.core.extensions.transformer_engine", "TEDotProductAttention", "auto", False),
        ("megatron.core.extensions.transformer_engine", "TEDotProductAttention", "unfused", True),
        ("megatron.core.transformer.dot_product_attention", "DotProductAttention", "auto", True),
        ("somebodys.own", "Attention", "flash", True),
    ],
)
def test_scores_are_feared_of_all_but_the_engines_attention(module, kind, backend, writes):
    found = layer()
    found.self_attention.core_attention = part(kind)
    type(found.self_attention.core_attention).__module__ = module
    found.config = SimpleNamespace(attention_backend=SimpleNamespace(name=backend))
    assert writes_scores(found) == writes


def test_layer_without_attention_writes_no_scores():
    found = layer()
    found.self_attention = part("IdentityOp")
    assert not writes_scores(found)
