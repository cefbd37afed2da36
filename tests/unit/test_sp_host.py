"""Contracts of the host's side: Megatron's modules are read right, what is not understood is refused by name.

On light stand-ins that have the classes' names; Megatron-core is not imported.
"""

from __future__ import annotations

import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megatron_ext.sequence_parallel import switch
from megatron_ext.sequence_parallel.host import attention as host_attention
from megatron_ext.sequence_parallel.host import feed_forward as host_feed_forward
from megatron_ext.sequence_parallel.host import linears, rotary
from megatron_ext.sequence_parallel.layout import Span, contiguous, whole, zigzag
from megatron_ext.sequence_parallel.micro_batch import MicroBatch

LOCAL = "megatron.core.tensor_parallel.layers"
ENGINE = "megatron.core.extensions.transformer_engine"
HIDDEN = 8
CONFIG = {
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "attention_dropout": 0.1,
    "gated_linear_unit": False,
    "activation_func": F.gelu,
    "bias_activation_fusion": False,
    "layernorm_zero_centered_gamma": False,
    "layernorm_epsilon": 1e-5,
    "normalization": "LayerNorm",
    "no_rope_freq": None,
    "softmax_scale": None,
    "masked_softmax_fusion": False,
}


@pytest.fixture(autouse=True)
def megatron(monkeypatch):
    """What `attach` looks up in Megatron-core: the function that recomputation goes through."""
    core, parallel = ModuleType("megatron.core"), ModuleType("megatron.core.tensor_parallel")
    parallel.checkpoint = lambda function, distribute, *args: function(*args)
    core.tensor_parallel = parallel
    for name, module in (
        ("megatron", ModuleType("megatron")),
        ("megatron.core", core),
        ("megatron.core.tensor_parallel", parallel),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(switch, "_attached", 0)
    monkeypatch.setattr(switch, "_capturing", None)
    return parallel


def named(module: str, name: str, base: type = nn.Module) -> type:
    """A class that says it is Megatron's."""
    return type(name, (base,), {"__module__": module, "__qualname__": name})


def config(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{**CONFIG, **changes})


def linear(module: str, name: str, *, rows: int = 16, bias: bool = True) -> nn.Module:
    found = named(module, name)()
    found.weight = nn.Parameter(torch.randn(rows, HIDDEN))
    found.bias = nn.Parameter(torch.randn(rows)) if bias else None
    return found


def attention(core: str = "local", kind: str = "causal", **changes) -> nn.Module:
    found = named("megatron.core.transformer.attention", "SelfAttention")()
    found.config = config(**changes)
    found.linear_qkv = linear(LOCAL, "ColumnParallelLinear")
    found.linear_proj = linear(LOCAL, "RowParallelLinear")
    where = {
        "local": ("megatron.core.transformer.dot_product_attention", "DotProductAttention"),
        "engine": (ENGINE, "TEDotProductAttention"),
    }
    found.core_attention = named(*where[core])()
    found.attn_mask_type = SimpleNamespace(name=kind)
    found.hidden_size_per_attention_head = 16
    found.layer_number = 2
    found.q_layernorm = found.k_layernorm = None
    return found


def feed_forward(**changes) -> nn.Module:
    found = named("megatron.core.transformer.mlp", "MLP")()
    found.config = config(**changes)
    found.linear_fc1 = linear(LOCAL, "ColumnParallelLinear")
    found.linear_fc2 = linear(LOCAL, "RowParallelLinear")
    return found


def layer(number: int = 1, **changes) -> nn.Module:
    found = named("megatron.core.transformer.transformer_layer", "TransformerLayer")()
    found.config = config(**changes)
    found.layer_number = number
    found.self_attention, found.mlp = attention(), feed_forward()
    return found


# What is refused


def test_layer_as_megatron_builds_it_has_no_obstacle():
    assert switch._obstacles(layer()) == []
    assert host_attention.obstacles(attention("engine")) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fp8", "hybrid"),
        ("fp4", "e2m1"),
        ("tp_comm_overlap", True),
        ("delay_wgrad_compute", True),
        ("cpu_offloading", True),
        ("fine_grained_activation_offloading", True),
        ("enable_cuda_graph", True),
        ("external_cuda_graph", True),
        ("cuda_graph_impl", "local"),
    ],
)
def test_setting_that_only_megatron_can_run_is_refused_by_name(key, value):
    assert switch._obstacles(layer(**{key: value})) == [f"config.{key} is {value!r}"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_output_gate", True),
        ("window_size", (128, 0)),
        ("softmax_type", "learnable"),
        ("qk_clip", True),
        ("multi_latent_attention", True),
        ("flash_decode", True),
        ("test_mode", True),
    ],
)
def test_setting_of_attention_that_strategies_lack_is_refused_by_name(key, value):
    assert host_attention.obstacles(attention(**{key: value})) == [f"config.{key} is {value!r}"]


@pytest.mark.parametrize("key", ["activation_func_fp8_input_store", "use_te_activation_func"])
def test_setting_of_feed_forward_that_strategies_lack_is_refused_by_name(key):
    assert host_feed_forward.obstacles(feed_forward(**{key: True})) == [f"config.{key} is true"]


@pytest.mark.parametrize("part", ["self_attention", "mlp"])
def test_layer_without_attention_or_feed_forward_is_refused_not_a_crash(part):
    """Heterogeneous models leave a part out; what stands there has no config to look into."""
    found = layer()
    setattr(found, part, named("megatron.core.transformer.identity_op", "IdentityOp")())
    (reason,) = switch._obstacles(found)
    assert reason.startswith(f"{part} is a megatron.core.transformer.identity_op.IdentityOp, not ")


def test_classes_that_are_not_megatrons_are_refused_by_name():
    assert "not TransformerLayer" in switch._obstacles(named("mine", "Layer")())[0]
    derived = attention()
    derived.core_attention = named("mine", "Sparse")()
    derived.linear_qkv = linear("peft.tuners.lora", "LoraParallelLinear")
    assert host_attention.obstacles(derived) == [
        "linear_qkv is a peft.tuners.lora.LoraParallelLinear, not one of Megatron-core's own linears",
        "core_attention is a mine.Sparse",
    ]
    assert "not SelfAttention" in host_attention.obstacles(named("mine", "SelfAttention")())[0]


@pytest.mark.parametrize("how", ["absent", "zero_3"])
def test_linear_that_does_not_hold_its_weight_is_refused(how):
    found = attention()
    if how == "absent":
        found.linear_proj.weight = None
    else:
        found.linear_proj.weight.ds_id = 7
    assert host_attention.obstacles(found) == [
        "linear_proj does not hold its weight (DeepSpeed's ZeRO stage 3 or a shared weight)"
    ]


# Linears


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("TEColumnParallelLinear", linears.COLUMN),
        ("TELayerNormColumnParallelLinear", linears.COLUMN),
        ("TERowParallelLinear", linears.ROW),
    ],
)
def test_linears_of_transformer_engine_are_known(name, known):
    assert linears.obstacle("linear", linear(ENGINE, name), known) is None
    assert linears.obstacle("linear", linear("mine", name), known) is not None


def test_empty_bias_of_transformer_engine_is_none():
    module = linear(ENGINE, "TERowParallelLinear", bias=False)
    del module.bias
    module.bias = torch.empty(0)
    assert linears.opened(module) == (module.weight, None)
    del module.bias
    module.bias = nn.Parameter(torch.ones(3))
    assert linears.opened(module)[1] is module.bias


class DistributedDataParallel:
    """The part of Megatron's that fetches a module's parameters before its forward."""

    def __init__(self):
        self.fetched = []

    def _make_forward_pre_hook(self):
        def hook(module, *unused):
            self.fetched.append(module)

        return hook


def test_parameters_are_fetched_by_the_hook_of_megatrons_ddp_and_another_hook_is_told():
    ddp, others = DistributedDataParallel(), []
    module = linear(LOCAL, "ColumnParallelLinear")
    module.register_forward_pre_hook(ddp._make_forward_pre_hook())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linears.opened(module)
    ddp.fetched.clear()
    module.register_forward_pre_hook(lambda module, args: others.append(module))
    with pytest.warns(
        UserWarning, match="<lambda> of a ColumnParallelLinear does not run where megatron_ext"
    ):
        linears.opened(module)
    assert ddp.fetched == [module]
    assert others == []


@pytest.mark.parametrize("part", ["attention", "feed_forward"])
def test_norm_inside_a_linear_is_read_after_its_weight_has_been_fetched(monkeypatch, part):
    """With overlap_param_gather the norm's weight is being received until the hook has run."""
    block, calls = a_block(), []
    attached = switch.attach(block, lambda *sizes: ("ring", "ring"))
    read = {"attention": "linear_qkv", "feed_forward": "linear_fc1"}[part]
    monkeypatch.setattr(linears, "opened", lambda module: calls.append(module) or (module.weight, None))
    monkeypatch.setattr(linears, "normalised", lambda x, module, config: calls.append("norm") or x)
    monkeypatch.setattr(rotary, "rotation_of", lambda attention: None)
    body = SimpleNamespace(attention=lambda *a: torch.zeros(1), feed_forward=lambda *a: torch.zeros(1))
    monkeypatch.setitem(switch.BODIES, "ring", body)
    micro_batch = MicroBatch(attached, ("ring", "ring"), 1, 8)
    module = block.layers[0].self_attention if part == "attention" else block.layers[0].mlp
    with switch.running_batch.running(micro_batch):
        module.forward(torch.zeros(4, 1, HIDDEN), *([None] if part == "attention" else []))
    assert calls.index(getattr(module, read)) < calls.index("norm")


def fused_norm(dtype: torch.dtype, *, bias: bool) -> nn.Module:
    module = linear(ENGINE, "TELayerNormColumnParallelLinear")
    generator = torch.Generator().manual_seed(0)
    module.layer_norm_weight = nn.Parameter(
        (0.02 * torch.randn(HIDDEN, generator=generator, dtype=torch.float64)).to(dtype)
    )
    if bias:
        module.layer_norm_bias = nn.Parameter(
            torch.randn(HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
        )
    return module


def by_definition(x, module, settings):
    weight = module.layer_norm_weight.double() + settings.layernorm_zero_centered_gamma
    x = x.double()
    if settings.normalization == "RMSNorm":
        return x / (x.square().mean(-1, keepdim=True) + settings.layernorm_epsilon).sqrt() * weight
    centred = x - x.mean(-1, keepdim=True)
    spread = (centred.square().mean(-1, keepdim=True) + settings.layernorm_epsilon).sqrt()
    return centred / spread * weight + module.layer_norm_bias.double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_norm_inside_a_linear_is_applied_with_its_gradients(normalization, zero_centered, dtype):
    """In bf16 to its rounding: a weight stored less one must not be rounded as a number near one."""
    settings = config(normalization=normalization, layernorm_zero_centered_gamma=zero_centered)
    module = fused_norm(dtype, bias=normalization == "LayerNorm")
    x = torch.randn(5, 2, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    x.requires_grad_()
    leaves = [x, *(p for name, p in module.named_parameters() if name.startswith("layer_norm"))]
    out, expected = linears.normalised(x, module, settings), by_definition(x, module, settings)
    assert out.dtype == dtype
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    epsilon = 1e-13 if dtype == torch.float64 else 2**-8
    torch.testing.assert_close(out.double(), expected, rtol=epsilon, atol=1e-13)
    found = torch.autograd.grad(out, leaves, grad.to(dtype))
    for ours, theirs in zip(found, torch.autograd.grad(expected, leaves, grad.double()), strict=True):
        assert (ours - theirs).abs().max() <= 4 * epsilon * theirs.abs().max()


def test_norm_inside_a_linear_keeps_its_input_and_no_wider_copy():
    module = fused_norm(torch.bfloat16, bias=False)
    settings = config(normalization="RMSNorm", layernorm_zero_centered_gamma=True)
    x, saved = torch.randn(5, 2, HIDDEN).bfloat16().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linears.normalised(x, module, settings)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), module.layer_norm_weight.data_ptr()}


def test_linear_without_a_norm_leaves_its_input():
    x = torch.randn(3, 2, HIDDEN)
    assert linears.normalised(x, linear(ENGINE, "TEColumnParallelLinear"), config()) is x


def test_frozen_norm_inside_a_linear_passes_the_gradient_on():
    module = fused_norm(torch.float64, bias=True).requires_grad_(False)
    x = torch.randn(3, 2, HIDDEN, dtype=torch.float64, requires_grad=True)
    for zero_centered in (False, True):
        settings = config(layernorm_zero_centered_gamma=zero_centered)
        (grad,) = torch.autograd.grad(linears.normalised(x, module, settings).square().sum(), x)
        assert grad.abs().max() > 0
    assert module.layer_norm_weight.grad is None


# Masks


def causal_mask(length: int) -> torch.Tensor:
    return torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)


def pattern(attention, mask=None, *, length=6, documents=None):
    micro_batch = MicroBatch(None, (), 1, length, documents)
    return host_attention.pattern_of(attention, mask, length, documents, micro_batch.is_causal)


@pytest.mark.parametrize(
    ("core", "kind", "given", "causal", "obeyed"),
    [
        ("local", "causal", None, True, False),
        ("local", "causal", "causal", True, False),
        ("local", "causal", "other", False, True),
        ("local", "no_mask", None, False, False),
        ("local", "no_mask", "other", False, True),
        ("local", "padding", "other", False, True),
        ("local", "padding", "causal", True, False),
        ("local", "padding_causal", "other", False, True),
        ("engine", "causal", None, True, False),
        ("engine", "causal", "other", True, False),
        ("engine", "no_mask", None, False, False),
        ("engine", "no_mask", "other", False, False),
        ("engine", "padding", "other", False, True),
        ("engine", "padding_causal", None, True, False),
        ("engine", "padding_causal", "nothing", True, False),
        ("engine", "padding_causal", "other", False, True),
    ],
)
def test_mask_is_obeyed_as_the_core_attention_obeys_it(core, kind, given, causal, obeyed):
    other = causal_mask(6)
    other[..., 0] = True
    masks = {
        "causal": causal_mask(6),
        "other": other,
        "nothing": torch.zeros(1, 1, 6, 6, dtype=torch.bool),
        None: None,
    }
    found = pattern(attention(core, kind), masks[given])
    assert (found.causal, found.mask is not None) == (causal, obeyed)


def test_mask_of_padded_keys_is_spread_over_all_queries():
    """As Megatron broadcasts it; one that hides all keys but the first looks like the first row of a causal one."""
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    mask[..., 0] = False
    found = pattern(attention("local", "padding"), mask)
    assert not found.causal
    assert torch.equal(found.mask, mask.expand(2, 1, 6, 6))


def test_padding_under_a_causal_kind_of_transformer_engine_hides_both():
    mask = torch.zeros(2, 1, 1, 6, dtype=torch.bool)
    mask[1, ..., :2] = True
    found = pattern(attention("engine", "padding_causal"), mask)
    assert torch.equal(found.mask, mask | causal_mask(6))


def test_mask_that_a_fused_causal_softmax_might_ignore_is_an_error():
    module = attention("local", "causal")
    module.config.masked_softmax_fusion = True
    assert pattern(module, causal_mask(6)).causal
    with pytest.raises(ValueError, match="set masked_softmax_fusion to False"):
        pattern(module, torch.zeros(1, 1, 6, 6, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(1, 4, 6, 6), (1, 1, 5, 6), (1, 1, 6, 3), (2, 1, 1, 1, 6)])
def test_mask_of_another_shape_is_an_error_that_names_it(shape):
    with pytest.raises(
        ValueError, match=r"attention_mask is \[.*\] with 6 tokens; allowed: \[batch or 1, 1, 6"
    ):
        pattern(attention("local", "padding"), torch.zeros(shape, dtype=torch.bool))


def test_packed_documents_take_the_place_of_a_mask():
    for core in ("local", "engine"):
        found = pattern(attention(core), causal_mask(6), documents=(0, 2, 6))
        assert (found.causal, found.mask, found.documents) == (True, None, (0, 2, 6))
    assert pattern(attention("local", "padding_causal"), documents=(0, 6)).causal


def test_dropout_is_of_training_only_and_scale_is_of_the_head():
    module = attention()
    assert pattern(module).dropout == 0.1
    assert pattern(module.eval()).dropout == 0.0
    assert pattern(module).scale == 0.25
    assert pattern(attention(softmax_scale=0.5)).scale == 0.5


# Packed sequences


def packed(*lengths: int, padded: tuple[int, ...] | None = None, form: str = "thd") -> SimpleNamespace:
    """`padded`: the places that the documents take, with their padding."""

    def borders(sizes):
        return None if sizes is None else torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)

    return SimpleNamespace(
        qkv_format=form, cu_seqlens_q=borders(lengths), cu_seqlens_q_padded=borders(padded)
    )


def test_borders_of_documents_are_read_with_their_padding():
    assert switch._documents(None, 12, True) is None
    assert switch._documents(packed(5, 7), 12, True) == (0, 5, 12)
    assert switch._documents(packed(3, 7, padded=(5, 7)), 12, True) == (0, 5, 12)
    assert switch._documents(packed(5, 7, 0), 12, False) == (0, 5, 12, 12)


def test_padding_between_documents_is_refused_where_tokens_would_see_it():
    assert switch._documents(packed(5, 7, padded=(5, 7)), 12, False) == (0, 5, 12)
    with pytest.raises(ValueError, match="padding between documents, .* attention is not causal; pack"):
        switch._documents(packed(3, 7, padded=(5, 7)), 12, False)


def test_documents_that_end_before_the_tokens_are_an_error():
    """The last rank alone would miss angles, and the others wait for it in a collective."""
    with pytest.raises(
        ValueError, match="ends at token 12 but the micro-batch has 16 tokens; let cu_seqlens_q"
    ):
        switch._documents(packed(5, 7), 16, True)


def test_packed_form_that_is_not_thd_is_an_error():
    with pytest.raises(ValueError, match="qkv_format is 'bshd'; megatron_ext knows thd"):
        switch._documents(packed(12, form="bshd"), 12, True)


# Rotary embedding


def test_angles_are_of_the_layers_that_use_them():
    table = torch.zeros(6, 1, 1, 4)
    assert host_attention.angles_of(attention(), None) is None
    assert host_attention.angles_of(attention(), table) == (table, table)
    assert host_attention.angles_of(attention(), (table, None)) == (table, None)
    assert host_attention.angles_of(attention(no_rope_freq=[0, 1, 0]), table) is None
    assert host_attention.angles_of(attention(no_rope_freq=[1, 0, 1]), table) == (table, table)


def rows(spans, table_length, documents=None, length=16):
    table = torch.arange(table_length).reshape(-1, 1, 1, 1)
    return MicroBatch(None, (), 1, length, documents).rows_of(table, spans).flatten().tolist()


def test_rows_of_a_table_are_those_of_the_tokens_in_memory():
    assert rows(whole(16), 16) == [*range(16)]
    assert rows(zigzag(1, 2, 16), 16) == [*range(4, 12)]
    assert rows(zigzag(0, 2, 16), 16) == [*range(4), *range(12, 16)]
    assert rows(contiguous(1, 4, 16), 64) == [*range(4, 8)], "a longer table is cut"
    assert rows((Span(8, 12, 4), Span(0, 4, 0)), 16) == [*range(4), *range(8, 12)]


def test_positions_begin_anew_at_documents_where_the_table_is_of_one():
    assert rows(whole(16), 9, (0, 7, 16)) == [*range(7), *range(9)]
    assert rows(contiguous(1, 4, 16), 9, (0, 7, 16)) == [4, 5, 6, 0]
    assert rows(whole(16), 16, (0, 7, 16)) == [*range(16)], (
        "a table of all tokens has each one's own position"
    )


@pytest.mark.parametrize("documents", [None, (0, 3, 16)])
def test_table_that_is_too_short_is_an_error_on_every_rank(documents):
    """On the first rank too, which would find its own rows."""
    for rank in range(4):
        with pytest.raises(
            ValueError, match=r"rotary_pos_emb has 10 positions but .* has 1[36] tokens; make"
        ):
            rows(contiguous(rank, 4, 16), 10, documents)


def rotation(interleaved: bool, scale: float = 1.0):
    """Rotary embedding from its definition: pairs of features turned; features beyond the table pass."""

    def rotate(x, angles):
        x, passed = x[..., : angles.shape[-1]], x[..., angles.shape[-1] :]
        if interleaved:
            half = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        else:
            half = torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1)
        return torch.cat((scale * (x * angles.cos() + half * angles.sin()), passed), -1)

    return rotate


@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize("rotated", [8, 4])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_turned_back_in_backward(interleaved, rotated, scale):
    pairs = torch.randn(5, 1, 1, rotated // 2, dtype=torch.float64)
    angles = pairs.repeat_interleave(2, -1) if interleaved else torch.cat((pairs, pairs), -1)
    x, rotate = torch.randn(5, 2, 3, 8, dtype=torch.float64, requires_grad=True), rotation(interleaved, scale)
    grad = torch.randn_like(x)
    found, expected = rotary.Rotated.apply(x, angles, rotate), rotate(x, angles)
    assert torch.equal(found, expected)
    (ours,), (theirs,) = (torch.autograd.grad(y, x, grad) for y in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def test_rotation_keeps_nothing_for_backward():
    saved = []
    x, angles = torch.randn(5, 2, 3, 8, requires_grad=True), torch.randn(5, 1, 1, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rotary.Rotated.apply(x, angles, rotation(False))
    assert saved == []


# Feed-forward


def test_activation_is_the_one_that_megatron_computes():
    x = torch.randn(3, 2, 16, dtype=torch.float64)

    def activated(**settings):
        return host_feed_forward.read_layer(feed_forward(**settings), None).activation(x)

    gate, other = x.chunk(2, -1)
    fused = {"bias_activation_fusion": True}
    silu = {"activation_func": F.silu, "gated_linear_unit": True}
    torch.testing.assert_close(activated(), F.gelu(x))
    torch.testing.assert_close(activated(**fused), F.gelu(x, approximate="tanh"))
    torch.testing.assert_close(activated(**silu), F.silu(gate) * other)
    torch.testing.assert_close(activated(**silu, **fused), F.silu(gate) * other)
    torch.testing.assert_close(
        activated(**fused, gated_linear_unit=True), F.gelu(gate, approximate="tanh") * other
    )
    clamped = activated(**silu, activation_func_clamp_value=0.5, glu_linear_offset=1.0)
    torch.testing.assert_close(clamped, F.silu(gate.clamp(max=0.5)) * (other.clamp(-0.5, 0.5) + 1))


def test_gated_activation_keeps_its_input_only_and_has_its_gradient():
    layer = host_feed_forward.read_layer(feed_forward(activation_func=F.silu, gated_linear_unit=True), None)
    x, saved = torch.randn(3, 16, dtype=torch.float64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer.activation(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]
    assert torch.autograd.gradcheck(layer.activation, x)


# Taking a block over, and giving it back


def a_block(*layers: nn.Module) -> nn.Module:
    found = named("megatron.core.transformer.transformer_block", "TransformerBlock")()
    found.layers = nn.ModuleList(layers or (layer(1), layer(2)))
    found.tp_group = SimpleNamespace(size=lambda: 2)
    return found


def everything(block: nn.Module) -> list[tuple[int, dict]]:
    return [(id(module), dict(module.__dict__)) for module in block.modules()]


def test_detach_is_the_inverse_of_attach(megatron):
    block, stock = a_block(), megatron.checkpoint
    before = everything(block)
    first = switch.attach(block, lambda *sizes: ())
    assert switch.attach(block, lambda *sizes: ()) is first
    assert everything(block) != before
    assert megatron.checkpoint is not stock
    for _ in range(2):
        switch.detach(block)
        assert everything(block) == before
        assert megatron.checkpoint is stock


def test_last_block_to_go_takes_out_the_hook_on_checkpoints(megatron):
    blocks, stock = [a_block(), a_block()], megatron.checkpoint
    for block in blocks:
        switch.attach(block, lambda *sizes: ())
    hooked = megatron.checkpoint
    switch.detach(blocks[0])
    assert megatron.checkpoint is hooked
    switch.detach(blocks[1])
    assert megatron.checkpoint is stock


def test_hook_on_checkpoints_that_another_tool_has_wrapped_is_left_to_it(megatron):
    block = a_block()
    switch.attach(block, lambda *sizes: ())
    ours = megatron.checkpoint
    megatron.checkpoint = theirs = lambda *args: ours(*args)
    switch.detach(block)
    assert megatron.checkpoint is theirs
    assert theirs(lambda x: x + 1, False, 1) == 2


def test_refused_layer_keeps_a_forward_that_another_tool_gave_it():
    """Also through detach, and where a layer has no such parts at all."""
    other = layer(2, fp8="hybrid")
    other.mlp.forward = theirs = lambda *args: None
    block = a_block(layer(1), other, named("mine", "Mamba")())
    block.layers[2].layer_number = 3
    attached = switch.attach(block, lambda *sizes: ())
    assert attached.refusals() == {
        2: ("config.fp8 is 'hybrid'",),
        3: ("the layer is a mine.Mamba, not TransformerLayer",),
    }
    switch.detach(block)
    assert other.mlp.forward is theirs


def test_block_that_cannot_be_taken_over_whole_is_left_as_it_was(megatron):
    block, stock = a_block(), megatron.checkpoint
    block.layers[1].mlp.forward = lambda *args: None
    before = everything(block)
    with pytest.raises(RuntimeError, match="MLP.forward has been replaced on this instance by another tool"):
        switch.attach(block, lambda *sizes: ())
    assert everything(block) == before
    assert megatron.checkpoint is stock


def planned(block, names):
    return switch.attach(block, lambda *sizes: names)


def test_plan_of_another_length_or_name_is_an_error_and_refused_layers_stay_native():
    block = a_block(layer(1), layer(2, fp8="hybrid"))
    assert planned(block, ("ring", "ring")).plan(1, 8, None).names == ("ring", "megatron_ts")
    with pytest.raises(ValueError, match="the plan has 1 layers but the block has 2"):
        planned(block, ("ring",)).plan(1, 8, None)
    with pytest.raises(ValueError, match=r"the plan names \['rink'\]; strategies are megatron_ts"):
        planned(block, ("rink", "ring")).plan(1, 8, None)


def test_layers_outside_of_their_own_block_run_natively():
    block = a_block()
    attached = planned(block, ("ring", "ring"))
    stranger = MicroBatch(object(), ("metp", "metp"), 1, 8)
    own = attached.plan(1, 8, None)
    first = attached.layers[0]
    assert first.strategy() == ("megatron_ts", None)
    with switch.running_batch.running(stranger):
        assert first.strategy() == ("megatron_ts", None)
    with switch.running_batch.running(own):
        assert first.strategy() == ("ring", own)


def test_attention_bias_is_an_error_that_says_what_to_write():
    block = a_block()
    attached = planned(block, ("ring", "ring"))
    with (
        switch.running_batch.running(attached.plan(1, 8, None)),
        pytest.raises(ValueError, match="attention_bias"),
    ):
        block.layers[0].self_attention.forward(torch.zeros(4, 1, HIDDEN), None, attention_bias=torch.zeros(1))


def test_scale_of_each_token_is_an_error_that_says_what_to_write():
    block = a_block()
    attached = planned(block, ("ring", "ring"))
    x = torch.zeros(4, 1, HIDDEN)
    with (
        switch.running_batch.running(attached.plan(1, 8, None)),
        pytest.raises(ValueError, match='layer 1 was given per_token_scale; write "strategies"'),
    ):
        block.layers[0].mlp.forward(x, per_token_scale=x)


def test_planned_call_leaves_nothing_behind_when_it_fails():
    """Neither the plan nor the call's tensors."""

    def fail(self, *args, **kwargs):
        raise OSError("stock")

    block = a_block()
    type(block).forward, block.pre_process = fail, True
    attached = planned(block, ("ring", "ring"))
    with pytest.raises(OSError, match="stock"):
        block.forward(hidden_states=torch.zeros(4, 1, HIDDEN))
    assert switch.running_batch.current() is None
    attached.policy = lambda *sizes: ()
    with pytest.raises(ValueError, match="the plan has 0 layers"):
        block.forward(hidden_states=torch.zeros(4, 1, HIDDEN), attention_mask=torch.zeros(1))
    assert attached.call == {}


def test_inference_is_not_planned():
    block = a_block()
    type(block).forward = lambda self, *args, **kwargs: "stock"

    def refuse(*sizes):
        raise AssertionError("planned")

    switch.attach(block, refuse)
    assert block.forward(torch.zeros(1), inference_context=object()) == "stock"
    assert block.forward(torch.zeros(1), inference_params=object()) == "stock"
