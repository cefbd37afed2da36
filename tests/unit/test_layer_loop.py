"""Contracts of the seam to a transformer block: what runs is what the plan says, and nothing of it stays behind.

On light stand-ins that have the classes' names; Megatron-core is not imported.
"""

from __future__ import annotations

import copy
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from megatron_ext.recompute import layer_loop
from megatron_ext.recompute.layer_loop import FLAGS, attach, detach, obstacle, set_modules
from megatron_ext.recompute.plan import FULL, MODULES, NONE, ChunkPlan, Share

HIDDEN = 4
ENGINE = "transformer_engine.pytorch.module.layernorm"
# PyTorch's checkpoint says so, Megatron-core's does not
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


@pytest.fixture(autouse=True)
def megatron(monkeypatch):
    """What a block looks up in Megatron-core, reentrant as its own is: no input with a gradient, no gradient at all."""
    core, parallel = ModuleType("megatron.core"), ModuleType("megatron.core.tensor_parallel")
    parallel.distributed = []

    def checkpoint(function, distribute, *args):
        parallel.distributed.append(distribute)
        return torch_checkpoint(function, *args, use_reentrant=True)

    parallel.checkpoint = checkpoint
    core.tensor_parallel = parallel
    for name, module in (
        ("megatron", ModuleType("megatron")),
        ("megatron.core", core),
        ("megatron.core.tensor_parallel", parallel),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    return parallel


def named(module: str, name: str, base: type = nn.Module, **members) -> type:
    """A class that says it is Megatron's."""
    return type(name, (base,), {"__module__": module, "__qualname__": name, **members})


def part(kind: str, **attributes) -> nn.Module:
    found = named("megatron.core.transformer", kind)()
    for name, value in attributes.items():
        setattr(found, name, value)
    return found


class TransformerLayer(nn.Module):
    """Flags as Megatron-core's dense layer has them; what they say in forward is noted."""

    def __init__(self, number: int = 1, bias: bool = False):
        super().__init__()
        self.layer_number = number
        self.weight = nn.Parameter(torch.eye(HIDDEN) * (1 + number / 10))
        self.recompute_input_layernorm = self.recompute_pre_mlp_layernorm = self.recompute_mlp = False
        core = part("DotProductAttention")
        self.self_attention = part("SelfAttention", checkpoint_core_attention=False, core_attention=core)
        linear = part("RowParallelLinear", bias=nn.Parameter(torch.ones(2)) if bias else None)
        self.mlp = part("MLP", linear_fc2=linear)
        self.input_layernorm = self.pre_mlp_layernorm = named(ENGINE, "LayerNorm")()
        self.noted: list[tuple[str, ...]] = []
        self.given: list[dict] = []

    def forward(self, hidden_states, **options):
        self.noted.append(modules_on(self))
        self.given.append(options)
        return torch.tanh(hidden_states @ self.weight), options["context"]


class Experts(TransformerLayer):
    """The same with a layer of experts."""

    def __init__(self, number: int = 1):
        super().__init__(number)
        self.mlp = part("MoELayer", moe_layer_recompute=False, shared_experts_recompute=False)
        self.mlp.experts = part("TEGroupedMLP", activation_recompute=False)
        self.mlp.shared_experts, self.mlp.shared_expert_overlap = part("SharedExpertMLP"), False


class TransformerBlock(nn.Module):
    """As Megatron-core 0.16 decides."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.config = SimpleNamespace(
            recompute_granularity=None, recompute_method=None, recompute_num_layers=None, other=[1]
        )
        self.layers = nn.ModuleList(layers or [TransformerLayer(number) for number in (1, 2, 3)])
        self.stock = 0

    def forward(self, hidden_states, attention_mask=None, context=None, **others):
        if self.config.recompute_granularity == "full" and self.training:
            return self._checkpointed_forward(
                hidden_states=hidden_states,
                attention_mask=attention_mask,
                context=context,
                context_mask=None,
                rotary_pos_emb=None,
                attention_bias=None,
                packed_seq_params=None,
                use_inner_quantization_context=False,
                **others,
            )
        for layer in self.layers:
            hidden_states, context = layer(hidden_states=hidden_states, context=context)
        return hidden_states

    def _checkpointed_forward(self, hidden_states, **_):
        self.stock += 1
        return hidden_states


def modules_on(layer: nn.Module) -> tuple[str, ...]:
    found = []
    for module, places in FLAGS.items():
        parts = [(layer_loop._part(layer, name), flag) for name, flag in places]
        if any(at is not None and at.__dict__.get(flag) for at, flag in parts):
            found.append(module)
    return tuple(found)


def planned(
    *choices: str, share: Share | None = None, layers: tuple = ()
) -> tuple[nn.Module, layer_loop.LayerLoop]:
    block = TransformerBlock(*layers)
    loop = attach(block)
    loop.plan = ChunkPlan(choices, share)
    return block, loop


def gradients(block: nn.Module, x: torch.Tensor, **others) -> list[torch.Tensor]:
    x = x.detach().requires_grad_(x.requires_grad)
    block(x, **others).square().sum().backward()
    found = [p.grad for p in [x, *block.parameters()] if p.requires_grad]
    block.zero_grad()
    return found


def x_of(seed: int = 0, *, needs: bool = True) -> torch.Tensor:
    return torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(seed)).requires_grad_(needs)


# -- attach and detach ------------------------------------------------------------------------------------------------


def state_of(block: nn.Module) -> dict:
    """Everything that instances hold, but for what they noted."""
    return {
        name: [(key, value if isinstance(value, bool) else id(value)) for key, value in vars(module).items()]
        for name, module in block.named_modules()
    }


def test_detached_block_is_what_it_was():
    block = TransformerBlock(TransformerLayer(1), Experts(2))
    block.layers[0].recompute_mlp = True  # the script's own setting
    before, config = state_of(block), copy.deepcopy(vars(block.config))
    attach(block).plan = ChunkPlan((FULL, "moe_act"))
    block.train()(x_of()).sum().backward()
    assert modules_on(block.layers[1]) == ("moe_act",)
    detach(block)
    assert state_of(block) == before
    assert vars(block.config) == config
    assert modules_on(block.layers[0]) == ("mlp",)
    detach(block)
    assert state_of(block) == before


def test_attached_block_has_a_config_of_its_own_and_layers_keep_theirs():
    block, other = TransformerBlock(), TransformerBlock()
    config = other.config = block.config
    for layer in block.layers:
        layer.config = config
    attach(block)
    assert vars(other.config) == vars(block.layers[0].config) == vars(config)
    assert config.recompute_granularity is None
    assert block.config.recompute_granularity == "full"
    assert block.config.other is config.other
    assert all(layer.config is config for layer in block.layers)


def test_attaching_twice_is_once():
    block = TransformerBlock()
    config, loop = block.config, attach(block)
    assert attach(block) is loop
    detach(block)
    assert block.config is config


def test_checkpointed_forward_that_somebody_else_put_in_comes_back():
    block = TransformerBlock()
    theirs = block._checkpointed_forward = lambda **given: given["hidden_states"] + 1
    attach(block)
    assert block._checkpointed_forward is not theirs
    detach(block)
    assert block._checkpointed_forward is theirs


def test_loop_is_no_part_of_the_model():
    block = TransformerBlock()
    names = list(block.state_dict()), [name for name, _ in block.named_modules()]
    attach(block)
    assert (list(block.state_dict()), [name for name, _ in block.named_modules()]) == names


def test_fresh_loop_recomputes_nothing():
    block = TransformerBlock()
    assert attach(block).plan == ChunkPlan((NONE,) * 3)


# -- what runs --------------------------------------------------------------------------------------------------------

PLANS = [
    (NONE, NONE, NONE),
    (FULL, FULL, FULL),
    (FULL, NONE, "mlp"),
    ("core_attn+mlp", FULL, NONE),
    (NONE, "layernorm", FULL),
]


@pytest.mark.parametrize("choices", PLANS)
@pytest.mark.parametrize("needs", [True, False])
def test_gradients_of_every_plan_are_those_of_the_stock_block(choices, needs):
    """Also where nothing before the first layer is trained: its checkpoint alone would lose the gradients."""
    x = x_of(needs=needs)
    expected = gradients(TransformerBlock(), x)
    block, loop = planned(*choices)
    found = gradients(block, x)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert loop.calls["recomputed", FULL] == choices.count(FULL)
    assert sum(count for (phase, _), count in loop.calls.items() if phase == "forward") == 3


def test_frozen_layers_before_the_first_that_trains_get_no_graph():
    block, _ = planned(FULL, FULL, FULL)
    block.layers[0].requires_grad_(False)
    y = block(x_of(needs=False))
    y.sum().backward()
    assert block.layers[0].weight.grad is None
    assert block.layers[1].weight.grad.abs().max() > 0


def test_without_gradients_nothing_is_recomputed_or_kept():
    block, _ = planned(FULL, NONE, FULL)
    with torch.no_grad():
        assert not block(x_of()).requires_grad


def test_layers_are_counted_by_choice_and_by_phase():
    block, loop = planned(FULL, "mlp", NONE)
    for seed in range(2):
        y = block(x_of(seed))
    assert loop.calls == {("forward", FULL): 2, ("forward", "mlp"): 2, ("forward", NONE): 2}
    y.sum().backward()
    assert loop.calls["recomputed", FULL] == 1
    assert ("recomputed", "mlp") not in loop.calls


def test_checkpoints_are_not_distributed(megatron):
    block, _ = planned(FULL, NONE, FULL)
    block(x_of())
    assert megatron.distributed == [False, False]


def test_evaluation_is_left_to_the_block():
    block, loop = planned(FULL, FULL, FULL)
    arrived = []
    loop.arrived = lambda *given: arrived.append(given)
    block.eval()(x_of())
    assert (loop.number, dict(loop.calls), arrived, block.stock) == (0, {}, [], 0)


@pytest.mark.parametrize("how", ["no_grad", "told"])
def test_evaluation_in_training_mode_is_no_micro_batch(how):
    block, loop = planned(FULL, FULL, "mlp")
    loop.evaluates = how == "told"
    arrived = []
    loop.arrived = lambda *given: arrived.append(given)
    expected = TransformerBlock()(x_of())
    with torch.set_grad_enabled(how == "told"):
        y = block(x_of())
    assert torch.equal(y, expected)
    assert (loop.number, dict(loop.calls), arrived) == (0, {}, [])
    assert block.layers[2].noted == [()]


def test_modules_are_switched_for_each_layer_and_again_when_the_plan_changes():
    block, loop = planned("mlp", "core_attn+layernorm", FULL)
    block.layers[
        2
    ].recompute_mlp = True  # the script's: a layer that runs again as a whole does nothing twice
    block(x_of()).sum().backward()
    assert [layer.noted for layer in block.layers] == [[("mlp",)], [("core_attn", "layernorm")], [(), ()]]
    loop.plan = ChunkPlan((NONE, "mlp", "core_attn"))
    block(x_of())
    assert [layer.noted[-1] for layer in block.layers] == [(), ("mlp",), ("core_attn",)]


def test_both_norms_of_a_layer_are_switched_together():
    layer = TransformerLayer()
    set_modules(layer, "layernorm")
    assert layer.recompute_input_layernorm
    assert layer.recompute_pre_mlp_layernorm
    set_modules(layer, NONE)
    assert modules_on(layer) == ()


def test_switches_that_a_layer_lacks_are_not_invented():
    layer = TransformerLayer()
    before = {name: list(vars(module)) for name, module in layer.named_modules()}
    set_modules(layer, "+".join(MODULES))
    assert {name: list(vars(module)) for name, module in layer.named_modules()} == before
    assert modules_on(layer) == ("core_attn", "layernorm", "mlp")
    experts = Experts()
    set_modules(experts, "moe+moe_act+shared_experts")
    assert modules_on(experts) == ("moe", "moe_act", "shared_experts")


def test_share_goes_by_the_number_of_the_training_pass():
    """Evaluation in between, and backwards that are late, count for nothing."""
    block, loop = planned(NONE, "mlp", NONE, share=Share(1, FULL, 2, 3))
    outs = []
    for number in range(6):
        outs.append(block(x_of(number)))
        block.eval()(x_of())
        block.train()
    assert [noted for noted in block.layers[1].noted[::2]] == [(), (), ("mlp",)] * 2
    assert loop.calls["forward", FULL] == 4
    assert loop.calls["forward", "mlp"] == 2
    for out in outs:
        out.sum().backward()
    assert loop.calls["recomputed", FULL] == 4
    assert loop.number == 6


def test_gradients_with_a_share_are_those_of_the_stock_block():
    plain, (block, _) = TransformerBlock(), planned(FULL, NONE, NONE, share=Share(1, FULL, 1, 2))
    for step in range(4):
        ours, theirs = gradients(block, x_of(step)), gradients(plain, x_of(step))
        assert all(map(torch.equal, ours, theirs))


def test_layers_get_what_the_block_got_and_contexts_follow_each_other():
    block, _ = planned(FULL, NONE, "mlp")
    context, mask = torch.ones(2), torch.zeros(1)
    block(x_of(), attention_mask=mask, context=context)
    for layer in block.layers:
        given = layer.given[0]
        assert given["attention_mask"] is mask
        assert torch.equal(given["context"], context)
        assert given["inference_context"] is None
        assert set(given) == {
            "attention_mask", "context", "context_mask", "rotary_pos_emb", "attention_bias", "packed_seq_params",
            "inference_context",
        }  # fmt: skip


def test_padding_mask_is_handed_on_where_there_is_one():
    """Earlier releases know no such argument."""
    block, _ = planned(FULL, NONE, NONE)
    mask = torch.zeros(1)
    block(x_of(), padding_mask=mask)
    assert all(layer.given[0]["padding_mask"] is mask for layer in block.layers)


def test_arrival_is_told_before_the_layers_run():
    block, loop = planned(NONE, NONE, NONE)
    told = []

    def arrived(*given):
        told.append((given, len(block.layers[0].noted), loop.number))

    loop.arrived = arrived
    x = x_of()
    block(x)
    (owner, hidden, options), ran, number = told[0]
    assert (owner, ran, number) == (block, 0, 0)
    assert hidden is x
    assert set(options) == {
        "attention_mask", "context", "context_mask", "rotary_pos_emb", "attention_bias", "packed_seq_params"
    }  # fmt: skip


def test_plan_can_be_made_on_arrival():
    block, loop = planned(NONE, NONE, NONE)
    loop.arrived = lambda *given: setattr(loop, "plan", ChunkPlan((FULL,) * 3))
    block(x_of())
    assert loop.calls == {("forward", FULL): 3}


# -- obstacles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("core_attn", None),
        ("layernorm", None),
        ("mlp", None),
        ("mla_up_proj", "TransformerLayer has no self_attention.recompute_up_proj"),
        ("moe", "TransformerLayer has no mlp.moe_layer_recompute"),
        ("moe_act", "TransformerLayer has no mlp.experts.activation_recompute"),
        ("shared_experts", "TransformerLayer has no mlp.shared_experts_recompute"),
    ],
)
def test_dense_layer_recomputes_its_own_modules_and_names_what_it_lacks(module, reason):
    assert obstacle(TransformerLayer(), module) == reason


def test_layer_of_experts_recomputes_its_own_modules():
    reasons = {module: obstacle(Experts(), module) for module in MODULES}
    assert [module for module, reason in reasons.items() if reason is None] == [
        "core_attn", "layernorm", "moe", "moe_act", "shared_experts"
    ]  # fmt: skip
    assert reasons["mlp"] == "the layer is one of experts; name moe"


def test_every_module_of_a_plan_has_its_flags():
    assert set(FLAGS) == set(MODULES)


def without_a_flag(layer):
    del layer.recompute_mlp


def without_attention(layer):
    layer.self_attention = part("IdentityOp")


def without_feed_forward(layer):
    layer.mlp = part("IdentityOp")


def with_fused_attention(layer):
    layer.self_attention.core_attention = part("TEDotProductAttention")


def with_a_bias(layer):
    layer.mlp.linear_fc2.bias = nn.Parameter(torch.ones(2))


def with_an_empty_bias(layer):
    layer.mlp.linear_fc2.bias = torch.empty(0)


def with_a_fused_norm(layer):
    layer.pre_mlp_layernorm = part("IdentityOp")


def with_a_local_norm(layer):
    layer.input_layernorm = named("megatron.core.transformer.torch_norm", "WrappedTorchNorm")()


@pytest.mark.parametrize(
    ("change", "module", "reason"),
    [
        (without_a_flag, "mlp", "TransformerLayer has no recompute_mlp"),
        (without_attention, "core_attn", "TransformerLayer has no self_attention.checkpoint_core_attention"),
        (without_feed_forward, "mlp", "its mlp is a IdentityOp"),
        (with_fused_attention, "core_attn", "core_attention is a TEDotProductAttention, which keeps no scores"),
        (with_a_bias, "mlp", "its linear_fc2 has a bias, with which Megatron-core's recomputation of mlp never ends"),
        (with_an_empty_bias, "mlp", None),
        (with_a_fused_norm, "layernorm", "pre_mlp_layernorm is a part of the linear after it"),
        (with_a_local_norm, "layernorm", "input_layernorm is a megatron.core.transformer.torch_norm.WrappedTorchNorm, "
         "not one of Transformer Engine's"),
    ],
)  # fmt: skip
def test_layer_that_cannot_recompute_a_module_says_why(change, module, reason):
    layer = TransformerLayer()
    change(layer)
    assert obstacle(layer, module) == reason


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("shared_experts", None, "the layer has no shared experts"),
        ("shared_expert_overlap", True, "its shared experts run beside the communication (moe_shared_expert_overlap), "
         "which recomputes none"),
    ],
)  # fmt: skip
def test_shared_experts_that_are_not_there_or_not_recomputed_are_told(key, value, reason):
    layer = Experts()
    setattr(layer.mlp, key, value)
    assert obstacle(layer, "shared_experts") == reason
