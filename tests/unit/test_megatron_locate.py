"""Which ds_config holds the block: one source, or several that name the same file; everything else is one line."""

from __future__ import annotations

import base64
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.locate import Located, locate

REPOSITORY = Path(__file__).parents[2]
DS_CONFIG = {"zero_optimization": {"stage": 1}, "megatron_ext": {"memory": {"limit": "80GB"}}}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file into the working directory and name it."""
    monkeypatch.chdir(tmp_path)

    def written(name: str = "ds_config.json", content: object = DS_CONFIG) -> str:
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return name

    return written


def found(given=None, *, environment=None, arguments=()) -> Located | None:
    return locate(given, environment=environment or {}, arguments=arguments)


def refusal(given=None, **sources) -> str:
    with pytest.raises(ValueError, match=".") as caught:
        found(given, **sources)
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_nothing_named_is_nothing_found():
    assert found() is None
    assert found(environment={"MEGATRON_EXT_CONFIG": ""}, arguments=["--deepspeed", "--lr", "1"]) is None


def test_variable_names_the_file(write):
    name = write()
    located = found(environment={"MEGATRON_EXT_CONFIG": name})
    assert located == Located("MEGATRON_EXT_CONFIG", Path(name).absolute(), DS_CONFIG)
    assert located.block == DS_CONFIG["megatron_ext"]
    assert str(located) == f"MEGATRON_EXT_CONFIG: {Path(name).absolute()}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--deepspeed_config", "ds_config.json"],
        ["--deepspeed_config=ds_config.json"],
        ["--deepspeed-config", "ds_config.json"],
        ["--lr", "1", "--deepspeed-config=ds_config.json", "--seed", "2"],
        ["--deepspeed_config", "gone.json", "--deepspeed_config", "ds_config.json"],
    ],
    ids=" ".join,
)
def test_argument_names_the_file_and_the_last_one_counts(write, arguments):
    write()
    located = found(arguments=arguments)
    assert located.source in ("--deepspeed_config", "--deepspeed-config")
    assert located.path.name == "ds_config.json"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--deepspeed_config"],
        ["--deepspeed_config", "--lr"],
        ["--deepspeed_config="],
        ["--deepspeed_config", ""],
        ["--deepspeed_configs", "ds_config.json"],
        ["deepspeed_config", "ds_config.json"],
    ],
)
def test_argument_without_a_value_is_left_to_the_script(write, arguments):
    write()
    assert found(arguments=arguments) is None


def test_real_environment_and_arguments_are_the_default(write, monkeypatch):
    monkeypatch.setenv("MEGATRON_EXT_CONFIG", write())
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--deepspeed_config", "ds_config.json"])
    assert locate().source == "MEGATRON_EXT_CONFIG"
    monkeypatch.delenv("MEGATRON_EXT_CONFIG")
    assert locate().source == "--deepspeed_config"


def test_dictionary_is_taken_before_any_file():
    located = found(DS_CONFIG, environment={"MEGATRON_EXT_CONFIG": "gone.json"})
    assert (located.source, located.path, located.ds_config) == ("megatron_ext.apply", None, DS_CONFIG)


@pytest.mark.parametrize("kind", [str, Path])
def test_path_may_be_given(write, kind):
    assert found(kind(write())).source == "megatron_ext.apply"


def test_file_may_be_named_twice(write, tmp_path):
    name = write()
    (tmp_path / "link.json").symlink_to(name)
    environment, arguments = (
        {"MEGATRON_EXT_CONFIG": str(tmp_path / name)},
        ["--deepspeed_config", "link.json"],
    )
    assert found("./ds_config.json", environment=environment, arguments=arguments).block


def test_different_files_are_refused(write):
    first, second = write("a.json"), write("b.json")
    message = refusal(environment={"MEGATRON_EXT_CONFIG": first}, arguments=["--deepspeed_config", second])
    assert message == (
        "MEGATRON_EXT_CONFIG names a.json but --deepspeed_config names b.json; allowed: one ds_config for the whole "
        "job; name the same file in both, or leave --deepspeed_config away"
    )
    assert refusal(first, arguments=["--deepspeed_config", second]).startswith(
        "megatron_ext.apply names a.json but"
    )


def test_argument_without_a_block_is_nothing_found_in_silence(write, caplog):
    assert found(arguments=["--deepspeed_config", write(content={"zero_optimization": {}})]) is None
    assert not caplog.records


@pytest.mark.parametrize("source", ["given", "variable", "dictionary"])
def test_file_named_for_the_block_alone_and_without_one_is_warned_about(write, caplog, source):
    name = write(content={})
    environment = {"MEGATRON_EXT_CONFIG": name} if source == "variable" else {}
    with caplog.at_level(logging.WARNING):
        assert found({"given": name, "dictionary": {}}.get(source), environment=environment) is None
    assert "has no megatron_ext block" in caplog.text


def test_block_that_is_null_is_found_and_left_to_the_parser():
    assert found({"megatron_ext": None}).block is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[1, 2]", "holds a JSON list"),
        ('"text"', "holds a JSON str"),
        ("{", "is not JSON"),
        ('{"a": 1, "a": 2}', "is not JSON (a: there twice in one object)"),
        ('{"megatron_ext": {"memory": {}, "memory": {}}}', "memory: there twice"),
        ("{a: 1\n a: 2}", "a: there twice"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_file_that_is_no_object_is_refused(write, content, reason):
    name = write(content=content)
    message = refusal(environment={"MEGATRON_EXT_CONFIG": name})
    assert message.startswith(f"MEGATRON_EXT_CONFIG names {Path(name).absolute()}, which ")
    assert reason in message
    assert message.endswith("repair that file")


@pytest.mark.parametrize("kind", ["missing", "folder", "null byte", "not text"])
def test_file_that_cannot_be_read_is_refused(tmp_path, kind):
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    path = {
        "missing": tmp_path / "gone.json",
        "folder": tmp_path,
        "null byte": "a\0b",
        "not text": tmp_path / "bytes.json",
    }[kind]
    message = refusal(path)
    assert message.startswith("megatron_ext.apply names ")
    assert "gone.json, which cannot be read (No such file or directory)" in message or kind != "missing"


def test_hjson_is_read_where_deepspeed_would(write):
    pytest.importorskip("hjson")
    name = write(content="{\n  # a comment\n  megatron_ext: {memory: {fraction: 0.5}}\n}\n")
    assert found(name).block == {"memory": {"fraction": 0.5}}


def test_json_is_read_without_hjson(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "hjson", None)
    assert found(write()).block
    assert "is not JSON (Expecting property name" in refusal(write(content="{a: 1}"))


def test_base64_is_read_from_the_argument_only():
    text = base64.urlsafe_b64encode(json.dumps(DS_CONFIG).encode()).decode()
    located = found(arguments=["--deepspeed_config", text])
    assert (located.path, located.ds_config) == (None, DS_CONFIG)
    assert "cannot be read" in refusal(environment={"MEGATRON_EXT_CONFIG": text})


@pytest.mark.parametrize("text", ["gone.json", "gone", "bm90IGpzb24=", "WzFd", "a" * 5])
def test_argument_that_is_neither_a_file_nor_base64_is_refused(text):
    assert "cannot be read" in refusal(arguments=["--deepspeed_config", text])


def test_locating_imports_nothing_heavy():
    source = "import sys, megatron_ext.locate as m; m.locate(); print(sorted({'torch', 'megatron', 'pydantic', 'hjson'} & set(sys.modules)))"  # noqa: E501
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[]", done.stderr
