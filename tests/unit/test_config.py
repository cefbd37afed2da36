"""The grass block: every wrong value is one line that names the key; every default is what the docs say."""

from __future__ import annotations

import ast
import inspect
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from pydantic import ValidationError

from ds_grass import config as config_module
from ds_grass.config import GrassConfig, LogConfig, StatesConfig, fingerprint, parse_block, shown

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = [path for path in sorted(CONFIGS.glob("*.json")) if not path.name.startswith("megatron_")]

WRONG_BLOCKS = {
    "null": (None, "None"),
    "boolean": (True, "True"),
    "string": ("auto", "'auto'"),
    "list": ([], "[]"),
}

WRONG_VALUES = {
    "enabled": [1, "true", None],
    "policy": ["gras", "GRASS", "auto", None, ["grass"]],
    "active_layers": [0, -1, 2.0, True, "two", "2", "auto", None, 10**30, 10**5000],
    "layers": ["", "model..layers", " model.layers", "auto", [], ["a", ""], ["a", "a"], [1], ("a", "b"), 3],
    "outer": ["lm_head", "auto", [], ["auto"], ["lm_head", "lm_head"], None, True],
    "probe_steps": [-1, 1.5, "auto"],
    "sampling_period": [0, False, float("inf")],
    "refresh_period": [0, "50"],
    "temperature": [0, -0.5, float("nan"), float("inf"), True, 10**400],
    "ema": [0.0, 1.01, None],
    "exploration": [-0.1, 2],
    "seed": [-1, 2**63, None],
    "states": [None, "stream", []],
    "states.mode": ["offload", "auto", True],
    "states.dtype": ["fp16", None],
    "states.master_weights": [0],
    "states.pin_memory": ["no"],
    "states.buffers": [1, 2.0],
    "log": [False],
    "log.enabled": ["yes"],
    "log.path": ["", "  ", "a\0b", "\ud800", "auto", ["grass.jsonl"]],
}
WRONG = [(key, value) for key, values in WRONG_VALUES.items() for value in values]

# the block, the key that is named, what it is said to be, the advice
UNKNOWN_KEYS = [
    ({"actve_layers": 3}, "grass.actve_layers", "3", "did you mean grass.active_layers?"),
    ({"Policy": "lisa"}, "grass.Policy", "'lisa'", "did you mean grass.policy?"),
    ({"buffers": 3}, "grass.buffers", "3", "did you mean grass.states.buffers?"),
    ({"states": {"modee": "stream"}}, "grass.states.modee", "'stream'", "did you mean grass.states.mode?"),
    ({"states": {"layers": "h"}}, "grass.states.layers", "'h'", "did you mean grass.layers?"),
    ({"log": {"enable": True}}, "grass.log.enable", "True", "did you mean grass.log.enabled?"),
    ({"zzz": 1}, "grass.zzz", "1", "remove it"),
    ({"x" * 10_000: 1}, "grass.'xxx", "1", "remove it"),
    ({"two\nlines": 1}, "grass.'two\\nlines'", "1", "remove it"),
    ({7: 1}, "grass.7", "1", "remove it"),
    ({("states",): 1}, "grass.('states',)", "1", "remove it"),
]

# keys that do not go together, the key that is named, what the message must hold
WRONG_TOGETHER = [
    ({"refresh_period": 75}, "grass.refresh_period is 75", ["50", "100"]),
    ({"sampling_period": 30, "refresh_period": 50}, "grass.refresh_period is 50", ["30", "60"]),
    ({"sampling_period": 100, "refresh_period": 50}, "grass.refresh_period is 50", ["100"]),
    ({"sampling_period": None, "refresh_period": 50}, "grass.refresh_period is 50", ["null"]),
    ({"policy": "lisa", "probe_steps": 5}, "grass.probe_steps is 5", ['"lisa"', "null"]),
    ({"policy": "cyclic", "probe_steps": 1}, "grass.probe_steps is 1", ['"cyclic"', "null"]),
    ({"policy": "static", "probe_steps": 0}, "grass.probe_steps is 0", ['"static"', "null"]),
    ({"probe_steps": 0, "refresh_period": None}, "grass.probe_steps is 0", ['"grass"', "null"]),
]


def block_with(dotted: str, value: object) -> dict:
    """A block with one key set: {"states": {"mode": value}} for "states.mode"."""
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value


def refusal(block: object) -> str:
    with pytest.raises(ValueError, match="^grass") as caught:
        parse_block(block)
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    return message


@pytest.mark.parametrize("name", WRONG_BLOCKS)
def test_block_that_is_not_an_object_is_refused(name):
    block, given = WRONG_BLOCKS[name]
    assert refusal(block).startswith(f"grass is {given}; allowed: an object")


@pytest.mark.parametrize(("key", "value"), WRONG, ids=[f"{key}={shown(value)}" for key, value in WRONG])
def test_wrong_value_is_refused_by_name(key, value):
    message = refusal(block_with(key, value))
    assert message.startswith(f"grass.{key} is {shown(value)}")
    assert "; allowed: " in message
    assert f'; write "{key.split(".")[-1]}": ' in message


@pytest.mark.parametrize(("block", "key", "given", "advice"), UNKNOWN_KEYS)
def test_unknown_key_is_refused_with_the_nearest_one(block, key, given, advice):
    message = refusal(block)
    assert message.startswith(key)
    assert f" is {given}, but there is no such key; allowed: " in message
    assert message.endswith(advice)


@pytest.mark.parametrize(("block", "start", "parts"), WRONG_TOGETHER)
def test_keys_that_do_not_go_together_are_refused(block, start, parts):
    message = refusal(block)
    assert message.startswith(start)
    assert "; allowed: " in message
    assert all(part in message for part in parts)


def test_other_wrong_keys_are_named_after_the_first():
    message = refusal({"ema": 3, "states": {"mode": 7}, "temperature": "hot"})
    assert message.startswith("grass.temperature is 'hot'")
    assert message.endswith("(also wrong: grass.ema, grass.states.mode)")


def test_advice_repairs_the_value():
    for key, value in WRONG:
        advice = refusal(block_with(key, value)).split(f'"{key.split(".")[-1]}": ')[-1]
        parse_block(block_with(key, json.loads(advice.split(" or ")[0])))


class _Unprintable:
    def __repr__(self):
        raise RuntimeError("no repr")


class _ManyLines:
    def __repr__(self):
        return "tensor([1,\n        2])"


def garbage(chance: random.Random, depth: int = 0) -> object:
    """Anything a JSON, HJSON or Python config could hold, and more."""
    names = [
        *GrassConfig.model_fields,
        *StatesConfig.model_fields,
        *LogConfig.model_fields,
        "",
        "auto",
        "x\ny",
    ]
    leaves = [
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        50,
        2**70,
        10**5000,
        0.0,
        0.5,
        float("nan"),
        float("-inf"),
        "auto",
    ]
    leaves += [
        "",
        "\n",
        "\0",
        "\ud800",
        "x" * 10_000,
        b"auto",
        object(),
        _Unprintable(),
        _ManyLines(),
        GrassConfig(),
    ]
    pick = chance.random()
    if depth > 3 or pick < 0.5:
        return chance.choice([*leaves, *names])
    if pick < 0.65:
        return [garbage(chance, depth + 1) for _ in range(chance.randrange(4))]
    keys = [chance.choice([*names, *names, 3, None, (), b"layers"]) for _ in range(chance.randrange(5))]
    return {key: garbage(chance, depth + 1) for key in keys}


def test_random_garbage_raises_nothing_but_one_line_value_errors():
    chance = random.Random(0)
    refusals = []
    for _ in range(1000):
        block = {key: garbage(chance) for key in chance.sample(list(GrassConfig.model_fields), 3)}
        for candidate in (block, garbage(chance)):
            try:
                fingerprint(parse_block(candidate))
            except ValueError as error:
                refusals.append(error)
    assert 1000 < len(refusals) < 2000
    assert {type(error) for error in refusals} == {ValueError}
    assert all(len(str(error).splitlines()) == 1 for error in refusals)


def test_block_that_contains_itself_is_refused():
    block: dict = {}
    block["states"] = block
    paths: list = []
    paths.append(paths)
    assert refusal(block).startswith("grass.states.states is ")
    assert refusal({"layers": paths}).startswith("grass.layers is ")


def test_empty_block_is_the_defaults():
    assert parse_block({}) == GrassConfig()


def test_every_key_can_be_set():
    block = {
        "enabled": False,
        "policy": "top_k",
        "active_layers": 4,
        "layers": ["encoder.block", "decoder.block"],
        "outer": ["lm_head"],
        "probe_steps": 0,
        "sampling_period": 10,
        "refresh_period": 30,
        "temperature": 1,
        "ema": 1,
        "exploration": 0,
        "seed": 0,
        "states": dict(mode="stream", dtype="bf16", master_weights=False, pin_memory=False, buffers=3),
        "log": {"enabled": False, "path": "logs/grass.jsonl"},
    }
    assert parse_block(block).model_dump() == block


@pytest.mark.parametrize("policy", ["grass", "static", "top_k", "lisa", "cyclic"])
def test_changing_only_the_policy_of_the_reference_works(policy):
    block = json.loads((CONFIGS / "reference.json").read_text())["grass"]
    assert parse_block({**block, "policy": policy}).policy == policy


@pytest.mark.parametrize(
    ("sampling_period", "refresh_period"), [(1, 50), (3, 51), (20, 60), (50, 50), (100, 100), (None, None)]
)
def test_refresh_period_left_out_follows_sampling_period(sampling_period, refresh_period):
    assert parse_block({"sampling_period": sampling_period}).refresh_period == refresh_period


def test_refresh_period_null_means_never():
    assert parse_block({"refresh_period": None}).refresh_period is None


def test_config_is_frozen():
    with pytest.raises(ValidationError):
        GrassConfig().seed = 1


def test_measures_is_true_for_policies_that_probe():
    measuring = [
        name for name in ("grass", "static", "top_k", "lisa", "cyclic") if GrassConfig(policy=name).measures
    ]
    assert measuring == ["grass", "static", "top_k"]


def test_check_layers_names_the_key_and_both_numbers():
    GrassConfig(active_layers=32).check_layers(32)
    with pytest.raises(
        ValueError, match="grass.active_layers is 40 but the model has 32 layers; use 1 to 32"
    ):
        GrassConfig(active_layers=40).check_layers(32)


@pytest.mark.parametrize(
    ("block", "num_blocks", "accumulation_steps", "steps"),
    [
        ({}, 12, 1, 10),
        ({}, 12, 4, 10),
        ({}, 48, 1, 10),
        ({}, 48, 4, 24),
        ({"active_layers": 5}, 101, 2, 21),
        ({"probe_steps": 0}, 48, 4, 0),
        ({"probe_steps": 1}, 48, 1, 1),
        ({"probe_steps": 24}, 48, 4, 24),
        ({"probe_steps": 30}, 48, 4, 30),
        ({"policy": "lisa"}, 48, 4, 0),
        ({"policy": "cyclic", "probe_steps": 0}, 48, 1, 0),
    ],
)
def test_probe_steps_for_resolves_null_and_reaches_every_block(block, num_blocks, accumulation_steps, steps):
    assert parse_block(block).probe_steps_for(num_blocks, accumulation_steps) == steps


def test_probe_steps_for_refuses_too_few_under_accumulation():
    with pytest.raises(ValueError, match='grass.probe_steps is 5, .*12 layers 2 at .*write "probe_steps": 6'):
        GrassConfig(probe_steps=5).probe_steps_for(12, 3)


def test_fingerprint_depends_on_every_key_but_those_of_the_log():
    base = fingerprint(GrassConfig())
    assert fingerprint(parse_block({"log": {"enabled": False, "path": "elsewhere.jsonl"}})) == base
    assert fingerprint(parse_block({"temperature": 0.5})) == base
    others = [
        {"seed": 1},
        {"states": {"mode": "stream"}},
        {"outer": "never"},
        {"layers": "h"},
        {"enabled": False},
    ]
    assert len({base, *(fingerprint(parse_block(block)) for block in others)}) == 1 + len(others)


def test_fingerprint_is_the_same_for_equal_numbers():
    assert fingerprint(parse_block({"temperature": 1})) == fingerprint(parse_block({"temperature": 1.0}))


def test_shown_is_short_and_on_one_line():
    for value in (
        "x" * 10_000,
        list(range(10_000)),
        {i: "y" * 99 for i in range(99)},
        _ManyLines(),
        10**5000,
    ):
        assert len(shown(value)) < 500
        assert len(shown(value).splitlines()) == 1


def test_every_key_has_a_docstring_under_it():
    classes = [
        node for node in ast.parse(inspect.getsource(config_module)).body if isinstance(node, ast.ClassDef)
    ]
    documented = set()
    for node in classes:
        for key, doc in zip(node.body, node.body[1:], strict=False):
            is_text = isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
            if isinstance(key, ast.AnnAssign) and is_text:
                documented.add((node.name, key.target.id))
    keys = {
        (model.__name__, key)
        for model in (GrassConfig, StatesConfig, LogConfig)
        for key in model.model_fields
    }
    assert documented == keys


def test_reference_json_holds_every_default_in_order():
    block = json.loads((CONFIGS / "reference.json").read_text())["grass"]
    assert json.dumps(block) == json.dumps(GrassConfig().model_dump())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_config_is_valid(path):
    block = json.loads(path.read_text())["grass"]
    assert "auto" not in json.dumps(block)
    parse_block(block)


def test_reference_json_has_no_auto_left_after_the_trainer():
    integration = pytest.importorskip("transformers.integrations.deepspeed")
    trainer_config = integration.HfTrainerDeepSpeedConfig(str(CONFIGS / "reference.json"))
    batch = {"world_size": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    adam = {"learning_rate": 1e-5, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
    dtype = {"fp16": False, "fp16_full_eval": False, "bf16": True, "bf16_full_eval": False}
    others = {"max_grad_norm": 1.0, "weight_decay": 0.0, "save_on_each_node": False}
    arguments = SimpleNamespace(**batch, **adam, **dtype, **others, get_warmup_steps=lambda num_steps: 0)
    trainer_config.trainer_config_process(arguments)
    trainer_config.trainer_config_finalize(arguments, model=SimpleNamespace(), num_training_steps=100)
    integration.unset_hf_deepspeed_config()
    assert "auto" not in json.dumps(trainer_config.config)
    assert trainer_config.config["bf16"]["enabled"] is True
    assert parse_block(trainer_config.config["grass"]) == GrassConfig()


def test_reference_json_has_no_auto_left_after_accelerate():
    plugins = pytest.importorskip("accelerate.utils.dataclasses")
    with mock.patch.dict(os.environ):  # the plugin writes into it
        plugin = plugins.DeepSpeedPlugin(hf_ds_config=str(CONFIGS / "reference.json"))
        plugin.set_mixed_precision("bf16")
        plugin.deepspeed_config_process(
            must_match=False,
            train_micro_batch_size_per_gpu=4,
            gradient_accumulation_steps=3,
            gradient_clipping=1.0,
        )
    assert "auto" not in json.dumps(plugin.deepspeed_config)
    assert parse_block(plugin.deepspeed_config["grass"]) == GrassConfig()
