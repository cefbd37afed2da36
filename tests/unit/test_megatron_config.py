"""The megatron_ext block: every wrong value is one line that names the key; every default is what the docs say."""

from __future__ import annotations

import ast
import inspect
import json
import random
from pathlib import Path

import pytest
from pydantic import ValidationError

from ds_grass.block import fingerprint, shown
from megatron_ext import config as config_module
from megatron_ext.config import MegatronExtConfig, RecomputeConfig, parse_block

CONFIGS = Path(__file__).parents[2] / "configs"
CLASSES = [
    value
    for value in vars(config_module).values()
    if isinstance(value, type) and value.__module__ == config_module.__name__
]

WRONG_BLOCKS = {
    "null": (None, "None"),
    "boolean": (True, "True"),
    "string": ("auto", "'auto'"),
    "list": ([], "[]"),
}

WRONG_VALUES = {
    "memory": [None, 8, []],
    "memory.limit": [0, -1, 8e10, True, "", "80 apples", "0GB", "-1GB", "auto", "1e3GB", "GB", "80GBB"]
    + ["9" * 40 + "TB", 10**30, [80]],
    "memory.fraction": [0, 1.01, -0.5, float("nan"), True, "0.9", None, "auto"],
    "sequence_parallel": [None, True, "metp"],
    "sequence_parallel.enabled": [1, "true", None, "auto"],
    "sequence_parallel.strategy": ["Metp", "auto", "", True, ["metp"]],
    "sequence_parallel.strategies": [
        None,
        [],
        ["metp", "metp"],
        ["metpp"],
        "metp",
        [None],
        ("metp",),
        ["auto"],
    ],
    "sequence_parallel.granularity": ["layers", None, True, "auto"],
    "sequence_parallel.smoothing": [-0.1, 1.5, None, float("inf"), "0.05", 10**400],
    "sequence_parallel.cost_model": [None, "forest"],
    "sequence_parallel.cost_model.kind": ["tree", None, "auto"],
    "sequence_parallel.cost_model.load": ["", " ", "a\0b", 3, "auto"],
    "sequence_parallel.cost_model.save": ["", True],
    "recompute": [True, "none", []],
    "recompute.enabled": ["yes", None],
    "recompute.policy": ["full", None, "auto"],
    "recompute.ratio": [-0.1, 1.1, "half", True, float("nan")],
    "recompute.modules": [[], ["a b"], ["mlp", "mlp"], "mlp", ["auto"], [1]],
    "recompute.plan": [None, "plan.json"],
    "recompute.plan.load": ["", 1],
    "recompute.plan.save": ["  ", False],
    "log": [None, False],
    "log.enabled": ["yes"],
    "log.path": ["", "a\0b", "auto", ["x"]],
}
WRONG = [(key, value) for key, values in WRONG_VALUES.items() for value in values]

# the block, how the message starts, the advice it ends with
UNKNOWN_KEYS = [
    ({"enabled": False}, "megatron_ext.enabled is False", "did you mean megatron_ext.log.enabled?"),
    (
        {"strategy": "metp"},
        "megatron_ext.strategy is 'metp'",
        "did you mean megatron_ext.sequence_parallel.strategy?",
    ),
    (
        {"sequence_parallel": {"cost_model": {"knd": 1}}},
        "megatron_ext.sequence_parallel.cost_model.knd is 1",
        "did you mean megatron_ext.sequence_parallel.cost_model.kind?",
    ),
    (
        {"recompute": {"plan": {"lod": "x"}}},
        "megatron_ext.recompute.plan.lod is 'x'",
        "did you mean megatron_ext.recompute.plan.load?",
    ),
    ({"memory": {"zzz": 1}}, "megatron_ext.memory.zzz is 1", "remove it"),
    ({7: 1}, "megatron_ext.7 is 1", "remove it"),
]

SP, RECOMPUTE = "megatron_ext.sequence_parallel", "megatron_ext.recompute"
# keys that do not go together, how the message starts, what it must hold
WRONG_TOGETHER = [
    (
        {"sequence_parallel": {"strategy": "metp", "strategies": ["ring", "context"]}},
        f'{SP}.strategy is "metp"',
        ['"ring", "context" or null', '"strategies": ["ring", "context", "metp"]'],
    ),
    *(
        ({"recompute": {"policy": policy}}, f"{RECOMPUTE}.ratio is None", [f'"{policy}"', '"ratio": 0.5'])
        for policy in ("merak", "level", "uniform")
    ),
    *(
        (
            {"recompute": {"policy": policy, "ratio": 0.25}},
            f"{RECOMPUTE}.ratio is 0.25",
            [f'"{policy}"', "null"],
        )
        for policy in ("stage_aware", "none")
    ),
]


def block_with(dotted: str, value: object) -> dict:
    """A block with one key set: {"memory": {"limit": value}} for "memory.limit"."""
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value


def refusal(block: object) -> str:
    with pytest.raises(ValueError, match="^megatron_ext") as caught:
        parse_block(block)
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    assert message.isascii()
    return message


@pytest.mark.parametrize("name", WRONG_BLOCKS)
def test_block_that_is_not_an_object_is_refused(name):
    block, given = WRONG_BLOCKS[name]
    assert refusal(block).startswith(f"megatron_ext is {given}; allowed: an object")


@pytest.mark.parametrize(("key", "value"), WRONG, ids=[f"{key}={shown(value)}" for key, value in WRONG])
def test_wrong_value_is_refused_by_name(key, value):
    message = refusal(block_with(key, value))
    assert message.startswith(f"megatron_ext.{key} is {shown(value)}")
    assert "; allowed: " in message
    assert f'; write "{key.split(".")[-1]}": ' in message


def test_advice_repairs_the_value():
    for key, value in WRONG:
        advice = refusal(block_with(key, value)).split(f'"{key.split(".")[-1]}": ')[-1]
        repaired = block_with(key, json.loads(advice.split(" or ")[0]))
        parse_block(repaired)


@pytest.mark.parametrize(("block", "start", "advice"), UNKNOWN_KEYS)
def test_unknown_key_is_refused_with_the_nearest_one(block, start, advice):
    message = refusal(block)
    assert message.startswith(f"{start}, but there is no such key; allowed: ")
    assert message.endswith(advice)


@pytest.mark.parametrize(("block", "start", "parts"), WRONG_TOGETHER)
def test_keys_that_do_not_go_together_are_refused(block, start, parts):
    message = refusal(block)
    assert message.startswith(start)
    assert "; allowed: " in message
    assert all(part in message for part in parts)


def test_other_wrong_keys_are_named_after_the_first():
    message = refusal({"memory": {"fraction": 3}, "sequence_parallel": {"cost_model": {"kind": 7}}, "log": 1})
    assert message.startswith("megatron_ext.memory.fraction is 3")
    assert message.endswith("(also wrong: megatron_ext.log, megatron_ext.sequence_parallel.cost_model.kind)")


@pytest.mark.parametrize(
    ("written", "limit_bytes"),
    [
        ("80GB", 80 * 10**9),
        ("80GiB", 80 * 2**30),
        ("80 gb", 80 * 10**9),
        ("1.5TiB", 3 * 2**39),
        ("512M", 512 * 10**6),
        ("85899345920", 80 * 2**30),
        (85899345920, 80 * 2**30),
        (1, 1),
        (None, None),
    ],
)
def test_limit_is_bytes_however_it_is_written(written, limit_bytes):
    assert parse_block({"memory": {"limit": written}}).memory.limit == limit_bytes


def test_empty_block_is_the_defaults():
    assert parse_block({}) == MegatronExtConfig()
    assert parse_block({}).recompute is None
    assert parse_block({}).sequence_parallel.enabled


def test_every_key_can_be_set():
    block = {
        "memory": {"limit": 1000, "fraction": 0.5},
        "sequence_parallel": {
            "enabled": False,
            "strategy": "ring",
            "strategies": ["ring", "metp"],
            "granularity": "model",
            "smoothing": 0,
            "cost_model": {"kind": "forest", "load": "a.json", "save": "b.json"},
        },
        "recompute": {
            "enabled": False,
            "policy": "merak",
            "ratio": 0.5,
            "modules": ["core_attn", "mlp"],
            "plan": {"load": "c.json", "save": None},
        },
        "log": {"enabled": False, "path": "d.jsonl"},
    }
    assert parse_block(block).model_dump() == block


def test_config_is_frozen():
    with pytest.raises(ValidationError):
        MegatronExtConfig().memory.fraction = 0.5


def test_fingerprint_depends_on_every_key_but_those_of_the_log():
    base = fingerprint(MegatronExtConfig())
    assert fingerprint(parse_block({"log": {"enabled": False, "path": "elsewhere.jsonl"}})) == base
    assert fingerprint(parse_block({"memory": {"fraction": 0.92}})) == base
    others = [
        {"memory": {"limit": 1}},
        {"sequence_parallel": {"strategy": "ring"}},
        {"sequence_parallel": {"smoothing": 0.1}},
        {"recompute": {"enabled": False}},
    ]
    assert len({base, *(fingerprint(parse_block(block)) for block in others)}) == 1 + len(others)


def garbage(chance: random.Random, depth: int = 0) -> object:
    """Anything a JSON, HJSON or Python config could hold, and more."""
    names = [*(name for model in CLASSES for name in model.model_fields), "", "auto", "x\ny", "ring", "80GB"]
    leaves = [
        None,
        True,
        0,
        -1,
        2**70,
        10**5000,
        0.5,
        float("nan"),
        "auto",
        "\0",
        "\ud800",
        b"auto",
        object(),
        "x" * 999,
    ]
    pick = chance.random()
    if depth > 4 or pick < 0.4:
        return chance.choice([*leaves, *names])
    if pick < 0.5:
        return [garbage(chance, depth + 1) for _ in range(chance.randrange(4))]
    keys = [chance.choice([*names, *names, 3, None, ()]) for _ in range(chance.randrange(4))]
    return {key: garbage(chance, depth + 1) for key in keys}


def test_random_garbage_raises_nothing_but_one_line_value_errors():
    chance, refusals = random.Random(0), []
    for _ in range(300):
        block = {key: garbage(chance) for key in chance.sample(list(MegatronExtConfig.model_fields), 3)}
        for candidate in (block, garbage(chance)):
            try:
                fingerprint(parse_block(candidate))
            except ValueError as error:
                refusals.append(error)
    assert len(refusals) > 300
    assert {type(error) for error in refusals} == {ValueError}
    assert all(len(str(error).splitlines()) == 1 for error in refusals)


def test_every_key_has_a_docstring_under_it():
    documented = set()
    for node in ast.parse(inspect.getsource(config_module)).body:
        for key, doc in zip(node.body, node.body[1:], strict=False) if isinstance(node, ast.ClassDef) else ():
            is_text = isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
            if isinstance(key, ast.AnnAssign) and is_text:
                documented.add((node.name, key.target.id))
    assert documented == {(model.__name__, key) for model in CLASSES for key in model.model_fields}


def test_reference_holds_every_default_in_order_and_leaves_recomputation_to_the_script():
    block = json.loads((CONFIGS / "megatron_reference.json").read_text())["megatron_ext"]
    expected = MegatronExtConfig(recompute=RecomputeConfig(enabled=False)).model_dump()
    assert json.dumps(block) == json.dumps(expected)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("megatron_*.json")), ids=lambda path: path.name)
def test_shipped_config_is_valid_and_runs(path):
    block = json.loads(path.read_text())["megatron_ext"]
    assert "auto" not in json.dumps(block)
    parse_block(block)
