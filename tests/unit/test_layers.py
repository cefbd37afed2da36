"""Blocks are found by structure in many model families; each trainable parameter is sorted exactly once."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from ds_grass.layers import find_layout, num_elements, outer_share, outer_warning

# the three vocabularies of Hugging Face configs
LLAMA = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
    head_dim=8, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
BERT = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=64,
    max_position_embeddings=32,
)  # fmt: skip
GPT2 = dict(n_embd=16, n_layer=3, n_head=2, vocab_size=64, n_positions=32, bos_token_id=1, eos_token_id=2)
BART = dict(
    d_model=16, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=64,
    max_position_embeddings=32, encoder_attention_heads=2, decoder_attention_heads=2, pad_token_id=0,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
OPT = dict(
    hidden_size=16, ffn_dim=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=64,
    word_embed_proj_dim=16, max_position_embeddings=32,
)  # fmt: skip
T5 = dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=2, vocab_size=64)
VISION = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16,
    patch_size=8,
)  # fmt: skip
EXPERTS = dict(
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
)
DEEPSEEK = dict(
    first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
    v_head_dim=4, n_group=1, topk_group=1,
)  # fmt: skip
JAMBA = dict(
    num_hidden_layers=4, attn_layer_period=4, attn_layer_offset=3, expert_layer_period=2,
    expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4,
)  # fmt: skip
ZAMBA = dict(
    num_hidden_layers=6, layers_block_type=["mamba", "hybrid", "mamba", "hybrid", "mamba", "hybrid"],
    num_mem_blocks=1, mamba_d_state=4, n_mamba_heads=2, mamba_headdim=16, adapter_rank=2,
)  # fmt: skip
QWEN3_NEXT = dict(
    num_hidden_layers=4, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
    linear_value_head_dim=8,
)  # fmt: skip
GEMMA3N = dict(
    vocab_size_per_layer_input=64, hidden_size_per_layer_input=4, num_kv_shared_layers=0, laurel_rank=4,
    altup_num_inputs=2, intermediate_size=[32] * 3, layer_types=["full_attention"] * 3,
    activation_sparsity_pattern=[0.0] * 3,
)  # fmt: skip
SWIN = dict(embed_dim=16, depths=[2, 2, 2], num_heads=[2, 2, 2], image_size=32, patch_size=4, window_size=2)
MROPE = {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]}
QWEN2_VL = dict(
    text_config={**LLAMA, "rope_parameters": MROPE},
    vision_config=dict(depth=2, embed_dim=16, hidden_size=16, num_heads=2, patch_size=4),
)
CLIP = dict(
    text_config={**BERT, "projection_dim": 8}, vision_config={**VISION, "projection_dim": 8}, projection_dim=8
)
LLAVA = dict(
    text_config={**LLAMA, "model_type": "llama"},
    vision_config={**VISION, "model_type": "clip_vision_model"},
    image_token_index=3,
)
GEMMA3 = dict(
    text_config={**LLAMA, "model_type": "gemma3_text"},
    vision_config={**VISION, "model_type": "siglip_vision_model"},
    mm_tokens_per_image=4,
)
BLIP2 = dict(
    text_config={**OPT, "model_type": "opt"}, vision_config=VISION, num_query_tokens=4,
    qformer_config={**BERT, "encoder_hidden_size": 16},
)  # fmt: skip
MLLAMA = dict(
    text_config={**LLAMA, "num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
    vision_config=dict(
        hidden_size=16, attention_heads=2, num_hidden_layers=2, num_global_layers=2, intermediate_size=32,
        vision_output_dim=48, image_size=16, patch_size=8, intermediate_layers_indices=[0, 1],
    ),
)  # fmt: skip

# (family, config, paths of the lists in the model without head, number of blocks)
FAMILIES = [
    ("llama", LLAMA, "layers", 3),
    ("mistral", LLAMA, "layers", 3),
    ("qwen2", LLAMA, "layers", 3),
    ("qwen3", LLAMA, "layers", 3),
    ("qwen3_moe", LLAMA | EXPERTS, "layers", 3),
    ("qwen3_next", LLAMA | EXPERTS | QWEN3_NEXT, "layers", 4),
    ("mixtral", LLAMA | EXPERTS, "layers", 3),
    ("gpt_oss", LLAMA | EXPERTS, "layers", 3),
    ("deepseek_v3", LLAMA | EXPERTS | DEEPSEEK, "layers", 3),
    ("gemma2", LLAMA, "layers", 3),
    ("gemma3_text", LLAMA, "layers", 3),
    ("gemma3n_text", LLAMA | GEMMA3N, "layers", 3),
    ("phi3", LLAMA, "layers", 3),
    ("gpt2", GPT2, "h", 3),
    ("gptj", GPT2 | {"rotary_dim": 4}, "h", 3),
    ("gpt_neox", BERT, "layers", 3),
    ("opt", OPT, "decoder.layers", 3),
    ("bloom", dict(hidden_size=16, n_layer=3, n_head=2, vocab_size=64), "h", 3),
    ("falcon", dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, vocab_size=64), "h", 3),
    ("mamba", dict(hidden_size=16, num_hidden_layers=3, vocab_size=64, state_size=4), "layers", 3),
    ("jamba", LLAMA | EXPERTS | JAMBA, "layers", 4),
    ("zamba2", LLAMA | ZAMBA, "layers", 6),
    ("bert", BERT, "encoder.layer", 3),
    ("roberta", BERT, "encoder.layer", 3),
    ("deberta", BERT, "encoder.layer", 3),
    ("deberta-v2", BERT, "encoder.layer", 3),
    ("electra", BERT | {"embedding_size": 16}, "encoder.layer", 3),
    ("mobilebert", BERT | {"embedding_size": 16, "true_hidden_size": 16}, "encoder.layer", 3),
    ("distilbert", dict(dim=16, hidden_dim=32, n_layers=3, n_heads=2, vocab_size=64), "transformer.layer", 3),
    ("vit", BERT | {"image_size": 16, "patch_size": 8}, "layers", 3),
    ("swin", SWIN, "encoder.layers.0.blocks encoder.layers.1.blocks encoder.layers.2.blocks", 6),
    ("resnet", dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"),
     "encoder.stages.0.layers encoder.stages.1.layers", 3),
    ("clip", CLIP, "text_model.encoder.layers vision_model.encoder.layers", 5),
    ("t5", T5, "encoder.block decoder.block", 5),
    ("bart", BART, "encoder.layers decoder.layers", 5),
    ("pegasus", BART, "encoder.layers decoder.layers", 5),
    ("whisper", BART | {"num_mel_bins": 8, "decoder_start_token_id": 1}, "encoder.layers decoder.layers", 5),
    ("llava", LLAVA, "vision_tower.encoder.layers language_model.layers", 5),
    ("qwen2_vl", QWEN2_VL, "visual.blocks language_model.layers", 5),
    ("gemma3", GEMMA3, "vision_tower.encoder.layers language_model.layers", 5),
    ("idefics3", dict(text_config={**LLAMA, "model_type": "llama"}, vision_config=VISION),
     "vision_model.encoder.layers text_model.layers", 5),
    ("mllama", MLLAMA, "vision_model.transformer.layers vision_model.global_transformer.layers "
     "language_model.layers", 8),
    ("blip-2", BLIP2, "vision_model.encoder.layers qformer.encoder.layer "
     "language_model.model.decoder.layers", 8),
]  # fmt: skip


def build(family: str, config: dict, auto: str = "AutoModel") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(family, **config)
    return getattr(transformers, auto).from_config(config)


class Block(nn.Module):
    """Attention-like and MLP-like halves behind a norm."""

    def __init__(self, width: int = 8, **lists: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, width)
        self.mlp = nn.Linear(width, width)
        for name, module in lists.items():
            setattr(self, name, module)


class Other(nn.Module):
    """Shares no class and no parameter name with Block."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.mixer = nn.Linear(width, 2 * width)
        self.gate = nn.Linear(2 * width, width)


class Parts(nn.Module):
    """A module with the given children."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, module in children.items():
            setattr(self, name, module)


def blocks(count: int, width: int = 8) -> nn.ModuleList:
    return nn.ModuleList([Block(width) for _ in range(count)])


def language_model(num_blocks: int = 4) -> nn.Module:
    return Parts(
        model=Parts(embed=nn.Embedding(20, 8), layers=blocks(num_blocks), norm=nn.LayerNorm(8)),
        head=nn.Linear(8, 20, bias=False),
    )


def names(pairs) -> list[str]:
    return [name for name, _ in pairs]


def block_names(layout) -> list[str]:
    return [block.name for block in layout.blocks]


def assert_sorted_once(model: nn.Module, layout) -> None:
    sorted_params = [pair for block in layout.blocks for pair in block.params]
    sorted_params += [*layout.outer, *layout.frozen_outer]
    trainable = {name: id(param) for name, param in model.named_parameters() if param.requires_grad}
    assert len(sorted_params) == len(trainable)
    assert {name: id(param) for name, param in sorted_params} == trainable
    assert [block.index for block in layout.blocks] == list(range(len(layout.blocks)))


@pytest.mark.parametrize(("family", "config", "lists", "count"), FAMILIES, ids=[row[0] for row in FAMILIES])
def test_find_layout_hugging_face_family(family, config, lists, count):
    model = build(family, config)
    layout = find_layout(model)
    assert layout.lists == tuple(lists.split())
    assert len(layout.blocks) == count
    assert_sorted_once(model, layout)
    assert all(model.get_submodule(block.name) is block.module for block in layout.blocks)


def test_find_layout_one_reused_layer_is_refused():
    model = build("albert", BERT | {"embedding_size": 16})
    with pytest.raises(ValueError, match=r"^grass\.layers is null but .*albert_layer_groups"):
        find_layout(model)
    two_groups = build("albert", BERT | {"embedding_size": 16, "num_hidden_groups": 2})
    assert find_layout(two_groups).lists == ("encoder.albert_layer_groups",)


def test_find_layout_tied_embedding_counts_once_as_outer():
    model = build("gpt2", GPT2, "AutoModelForCausalLM")
    layout = find_layout(model)
    assert layout.lists == ("transformer.h",)
    outer_names = names(layout.outer)
    assert [name for name in outer_names if "wte" in name or "head" in name] == ["transformer.wte.weight"]
    only_head = find_layout(model, outer=["lm_head"])
    assert names(only_head.outer) == ["transformer.wte.weight"]


def test_find_layout_module_shared_between_blocks_is_outer():
    layout = find_layout(build("zamba2", LLAMA | ZAMBA))
    shared = [name for name in names(layout.outer) if name.startswith("layers.")]
    assert shared
    assert all("shared_transformer" in name for name in shared)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_find_layout_lora_adapters_are_the_trainable_part(family):
    peft = pytest.importorskip("peft")
    model = build("llama", LLAMA, "AutoModelForCausalLM") if family == "llama" else build("t5", T5)
    target = ["q_proj", "v_proj"] if family == "llama" else ["q", "v"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=target))
    layout = find_layout(model)
    assert_sorted_once(model, layout)
    assert all("lora_" in name for block in layout.blocks for name, _ in block.params)
    assert layout.outer == ()
    if family == "llama":
        assert layout.lists == ("base_model.model.model.layers",)
        assert find_layout(model, layers="model.layers").lists == layout.lists
        with pytest.raises(ValueError, match="names 'lm_head', which holds no trainable"):
            find_layout(model, outer=["lm_head"])


def test_find_layout_compiled_and_engine_wrapped_names_are_understood():
    wrapped = Parts(module=Parts(_orig_mod=language_model()))
    layout = find_layout(wrapped, layers="model.layers", outer=["model.norm"])
    assert layout.lists == ("module._orig_mod.model.layers",)
    assert names(layout.outer) == [f"module._orig_mod.model.norm.{kind}" for kind in ("weight", "bias")]
    plain = find_layout(language_model(), layers="module._orig_mod.base_model.model.model.layers")
    assert plain.lists == ("model.layers",)


def test_find_layout_plain_torch_transformer():
    layout = find_layout(Parts(t=nn.Transformer(8, 2, 2, 3, 16), heads=nn.ModuleList([nn.Linear(8, 8)] * 3)))
    assert layout.lists == ("t.encoder.layers", "t.decoder.layers")
    assert layout.other_lists == ()


def test_find_layout_sequential_keeps_ends_out():
    model = nn.Sequential(nn.Embedding(20, 8), Block(), Block(), Block(), nn.LayerNorm(8), nn.Linear(8, 20))
    layout = find_layout(model)
    assert block_names(layout) == ["1", "2", "3"]
    assert layout.lists == ("",)
    assert names(layout.outer) == ["0.weight", "4.weight", "4.bias", "5.weight", "5.bias"]


def test_find_layout_hybrid_without_common_names():
    model = Parts(layers=nn.ModuleList([Other(), Block(), Block(), Other(), Block()]))
    assert len(find_layout(model).blocks) == 5
    odd_one = Parts(layers=nn.ModuleList([Block(), Other(), Block(), Block()]))
    assert len(find_layout(odd_one).blocks) == 4


def test_find_layout_numbered_children_of_a_plain_module():
    numbered = nn.Module()
    for i in range(2, 5):  # a stage of a pipeline keeps the numbers of the whole
        numbered.add_module(str(i), Block())
    assert block_names(find_layout(Parts(decoder=numbered))) == ["decoder.2", "decoder.3", "decoder.4"]
    prefixed = nn.Sequential()
    for i in range(3):
        prefixed.add_module(f"encoder_layer_{i}", Block())
    assert block_names(find_layout(Parts(layers=prefixed)))[-1] == "layers.encoder_layer_2"


def test_find_layout_single_weights_count_only_alone():
    mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    assert block_names(find_layout(mlp)) == ["0", "2", "4"]
    tables = nn.ModuleList([nn.Embedding(100, 8) for _ in range(4)])
    layout = find_layout(Parts(tables=tables, layers=blocks(2)))
    assert layout.lists == ("layers",)
    assert layout.other_lists == ()
    with pytest.raises(ValueError, match=r"^grass\.layers is null .* only lists of single weights"):
        find_layout(Parts(tables=tables, heads=nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])))


def mixture(width: int, num_experts: int) -> Block:
    return Block(width, experts=nn.ModuleList([Other(width) for _ in range(num_experts)]))


@pytest.mark.parametrize(
    "layers",
    [
        [mixture(8, 4), mixture(8, 4)],
        [Block(), mixture(8, 4), mixture(8, 4)],
        [mixture(8, 2), mixture(8, 6), Block()],
        [Block(convs=nn.Sequential(nn.Conv1d(8, 8, 3), nn.Conv1d(8, 8, 3))) for _ in range(2)],
        [Block(8), Block(12), Block(16)],
        [Block(width, convs=nn.Sequential(*[nn.Conv1d(width, width, 9)] * 2)) for width in (8, 16)],
        [nn.ModuleList([Block(), Other()]), nn.ModuleList([Block(), Other()])],
        [Block(first=blocks(3)), Block(first=blocks(3))],
    ],
    ids=["experts", "first dense", "expert counts", "convs", "widths", "wide convs", "halves", "one width"],
)
def test_find_layout_lists_inside_blocks_do_not_win(layers):
    layout = find_layout(Parts(layers=nn.ModuleList(layers)))
    assert block_names(layout) == [f"layers.{i}" for i in range(len(layers))]
    assert layout.other_lists == ()


@pytest.mark.parametrize("family", ["t5", "moe"])
def test_find_layout_single_block_is_not_searched_for_lists(family):
    model = build("t5", T5 | {"num_layers": 1, "num_decoder_layers": 1}) if family == "t5" else None
    model = model or Parts(layers=nn.ModuleList([mixture(8, 4)]))
    with pytest.raises(ValueError, match="no repeated list"):
        find_layout(model)


def test_find_layout_list_of_lists_gives_inner_entries():
    layout = find_layout(Parts(stages=nn.ModuleList([blocks(2), blocks(3)])))
    assert layout.lists == ("stages.0", "stages.1")
    assert len(layout.blocks) == 5


def test_find_layout_unet_gives_blocks_of_all_stages():
    def stage(width: int, num_blocks: int, num_attentions: int) -> nn.Module:
        attentions = nn.ModuleList([Other(width) for _ in range(num_attentions)])
        sample = nn.Conv2d(width, width, 1)
        return Parts(resnets=blocks(num_blocks, width), attentions=attentions, sample=sample)

    model = Parts(
        conv_in=nn.Conv2d(3, 8, 3),
        down_blocks=nn.ModuleList([stage(8, 2, 0), stage(16, 2, 2), stage(24, 1, 1)]),
        mid_block=stage(8, 2, 1),
        up_blocks=nn.ModuleList([stage(24, 3, 3), stage(16, 3, 0)]),
    )
    layout = find_layout(model)
    assert layout.lists[:3] == ("down_blocks.0.resnets", "down_blocks.1.resnets", "down_blocks.1.attentions")
    assert layout.lists[-3:] == ("up_blocks.0.resnets", "up_blocks.0.attentions", "up_blocks.1.resnets")
    assert len(layout.blocks) == (2 + 0) + (2 + 2) + (1 + 1) + (3 + 3) + (3 + 0)
    assert layout.other_lists == ("mid_block.resnets",)
    assert_sorted_once(model, layout)


def test_find_layout_small_list_is_named_but_not_drawn():
    model = Parts(vision=Parts(blocks=blocks(2, 4)), text=Parts(layers=blocks(4, 16)), other=blocks(6, 16))
    layout = find_layout(model)
    assert layout.lists == ("text.layers", "other")
    assert layout.other_lists == ("vision.blocks",)
    assert {name.split(".")[0] for name in names(layout.outer)} == {"vision"}
    assert_sorted_once(model, layout)


def test_find_layout_vocabulary_outweighs_the_blocks():
    model = Parts(embed=nn.Embedding(5000, 8), encoder=blocks(2), decoder=blocks(2), tiny=blocks(2, 1))
    layout = find_layout(model)
    assert (layout.lists, layout.other_lists) == (("encoder", "decoder"), ("tiny",))


def test_find_layout_explicit_paths_are_taken_at_their_word():
    model = build("swin", SWIN)
    layout = find_layout(model, layers="encoder.layers")
    assert block_names(layout) == ["encoder.layers.0", "encoder.layers.1", "encoder.layers.2"]
    assert layout.other_lists == ()
    experts = Parts(layers=nn.ModuleList([mixture(8, 4), mixture(8, 4)]))
    layout = find_layout(experts, layers=["layers.1.experts", "layers.0.experts"])
    assert layout.lists == ("layers.0.experts", "layers.1.experts")
    assert "layers.0.norm.weight" in names(layout.outer)
    two_lists = Parts(encoder=blocks(2), decoder=blocks(2))
    assert find_layout(two_lists, layers="decoder").other_lists == ("encoder",)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("model.layer", "the model has no 'model.layer'"),
        ("model.layers[0]", "the model has no"),
        ("__class__", "the model has no"),
        ("model", "'model' is a Parts, not a list"),
        ("model.layers.0", "'model.layers.0' is a Block, not a list"),
        (["model.layers", "model.layers"], "it names 'model.layers.0' twice"),
        (["model.layers", "nowhere"], "the model has no 'nowhere'"),
        ([], "it holds 0 block"),
    ],
)
def test_find_layout_wrong_path_lists_candidates(layers, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        find_layout(language_model(), layers=layers)
    text = str(error.value)
    assert text.startswith("grass.layers is ")
    assert "model.layers (4 entries, 66% of what can train)" in text
    assert "\n" not in text


def test_find_layout_path_that_fits_twice_is_refused():
    model = Parts(module=Parts(layers=blocks(2)), base_model=Parts(model=Parts(layers=blocks(2))))
    with pytest.raises(ValueError, match="may be .*layers or .*layers"):
        find_layout(model, layers="layers")


def test_find_layout_nested_paths_are_refused():
    model = Parts(layers=nn.ModuleList([mixture(8, 4), mixture(8, 4)]))
    with pytest.raises(ValueError, match=r"names 'layers\.1\.experts\.0' twice or inside another block"):
        find_layout(model, layers=["layers", "layers.1.experts"])


def test_find_layout_frozen_blocks_are_left_out():
    model = language_model(4)
    model.model.layers[0].requires_grad_(False)
    model.model.layers[2].norm.requires_grad_(False)
    layout = find_layout(model)
    assert block_names(layout) == ["model.layers.1", "model.layers.2", "model.layers.3"]
    assert names(layout.blocks[1].params)[0] == "model.layers.2.attention.weight"
    assert_sorted_once(model, layout)


def test_find_layout_frozen_tower_is_an_other_list():
    model = Parts(vision=blocks(3, 16), text=blocks(3))
    model.vision.requires_grad_(False)
    layout = find_layout(model)
    assert (layout.lists, layout.other_lists, layout.outer) == (("text",), ("vision",), ())


@pytest.mark.parametrize("layers", [None, "model.layers"])
def test_find_layout_nothing_to_draw_is_refused(layers):
    model = language_model()
    model.model.layers.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^grass\.layers is .* are frozen.*model\.layers \(4 entries, 0%"):
        find_layout(model, layers=layers)


def test_find_layout_only_the_optimizers_parameters_count():
    model = language_model()
    given = {name: id(param) for name, param in model.named_parameters() if "norm" not in name}
    given = {id_ for name, id_ in given.items() if ".0." not in name}
    layout = find_layout(model, trainable=given)
    assert block_names(layout) == ["model.layers.1", "model.layers.2", "model.layers.3"]
    assert names(layout.outer) == ["model.embed.weight", "head.weight"]


def test_find_layout_weight_shared_with_a_block_is_outer():
    model = language_model()
    model.model.layers[1].mlp.weight = model.model.layers[2].mlp.weight
    model.probe = Parts(inner=model.model.layers[3].attention)
    layout = find_layout(model)
    shared = ["model.layers.1.mlp.weight", "model.layers.3.attention.weight", "model.layers.3.attention.bias"]
    assert [name for name in names(layout.outer) if ".layers." in name] == shared
    assert_sorted_once(model, layout)


def test_find_layout_second_name_of_a_list_is_no_second_owner():
    model = language_model()
    model.alias = model.model.layers
    model.again = nn.ModuleList(list(model.model.layers))
    layout = find_layout(model)
    assert (layout.lists, layout.other_lists, len(layout.blocks)) == (("model.layers",), (), 4)
    assert not [name for name in names(layout.outer) if "layers" in name]
    assert find_layout(model, layers="alias").lists == ("model.layers",)
    assert find_layout(model, layers="again").other_lists == ()


def test_find_layout_outer_never_and_list_hold_the_rest_still():
    model = language_model()
    never = find_layout(model, outer="never")
    assert (never.outer, len(never.frozen_outer)) == ((), 4)
    some = find_layout(model, outer=["model.norm", "head.weight"])
    assert names(some.outer) == ["model.norm.weight", "model.norm.bias", "head.weight"]
    assert names(some.frozen_outer) == ["model.embed.weight"]
    around = find_layout(model, outer=["model"])
    assert names(around.frozen_outer) == ["head.weight"]
    for layout in (never, some, around):
        assert_sorted_once(model, layout)


@pytest.mark.parametrize(
    ("outer", "message"),
    [
        (["model.embd"], "'model.embd', which is not in the model; did you mean model.embed"),
        (["qqqq"], "'qqqq', which is not in the model; outside the blocks: model.embed, model.norm, head"),
        (["head", "model.layers.0.mlp"], "'model.layers.0.mlp', which lies inside a drawn block"),
        (["model.layers.3"], "which lies inside a drawn block"),
        (["model.layers.3.mlp.weight"], "which lies inside a drawn block"),
        (["model.layers"], "which holds no trainable parameter outside"),
        ("sometimes", 'use "always", "never" or a list'),
    ],
)
def test_find_layout_wrong_outer_is_refused(outer, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        find_layout(language_model(), outer=outer)
    assert str(error.value).startswith("grass.outer ")
    assert "\n" not in str(error.value)


def test_find_layout_zero3_partitioned_parameters_count_in_full():
    stages = nn.ModuleList([blocks(2, 8), blocks(2, 16)])
    model = Parts(embed=nn.Embedding(50, 8), stages=stages, tiny=blocks(2, 1))
    whole = find_layout(model)
    for param in model.parameters():
        param.ds_numel, param.ds_shape = param.numel(), param.shape
        param.data = torch.empty(0)
    sharded = find_layout(model)
    assert num_elements(model.embed.weight) == 400
    assert (sharded.lists, sharded.other_lists) == (("stages.0", "stages.1"), ("tiny",))
    assert (whole.lists, whole.other_lists) == (sharded.lists, sharded.other_lists)
    assert sharded.blocks[0].params[0][1].numel() == 0
    assert [block.numel for block in sharded.blocks] == [160, 160, 576, 576]


def test_outer_share_and_warning_follow_what_trains():
    model = language_model()
    layout = find_layout(model)
    outer, block = 160 + 16 + 160, 160
    assert outer_share(layout, 2) == pytest.approx(outer / (outer + 2 * block))
    assert outer_share(layout, 40) == pytest.approx(outer / (outer + 4 * block))
    assert outer_warning(layout, 4) is None
    text = outer_warning(layout, 2)
    assert text is not None
    assert text.startswith("51% of what trains at once is outside the blocks: 336 parameters (model.embed")
    assert "4.03e-06 GB of optimizer state at 12 bytes" in text
    assert "5.38e-06 GB with fp32 gradients at 16" in text
    assert "grass.outer" in text
    assert outer_share(find_layout(model, outer="never"), 2) == 0
    assert outer_warning(find_layout(model, outer="never"), 2) is None
