"""An ordinary Megatron-core script, of which not a word was changed: a file is named, and its layers switch.

The script is examples/pretrain_gpt.py; here it runs on the CPU through tests/megatron_on_cpu.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_ext import cli
from tests.integration import launch

SCRIPT = launch.REPOSITORY / "examples" / "pretrain_gpt.py"
SMALL = ("--steps", 2, "--micro-batches", 2, "--layers", 2, "--sequence-length", 128, "--tensor-parallel", 2)


def losses(output: str) -> list[str]:
    return re.findall(r"step \d+: loss ([\d.]+)", output)


def pretrain(folder: Path, *arguments: object, ranks: int) -> str:
    command = launch.torchrun(SCRIPT, *SMALL, *arguments, ranks=ranks)
    place = command.index(str(SCRIPT))
    return launch.launch([*command[:place], "-m", "tests.megatron_on_cpu", *command[place:]], folder)


def written(folder: Path) -> Path:
    """A ds_config that fixes a strategy which Megatron-core does not have."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ds_config.json"
    path.write_text(json.dumps({"megatron_ext": {"sequence_parallel": {"strategy": "ring"}}}))
    return path


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "megatron_ext.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_unmodified_script_switches_when_a_file_is_named_and_only_then(tmp_path, monkeypatch, ranks):
    stages = ("--pipeline-parallel", ranks // 2)
    monkeypatch.setenv("PYTHONPATH", str(launch.REPOSITORY))
    stock = pretrain(tmp_path / "stock", *stages, ranks=ranks)
    assert not (tmp_path / "stock" / "megatron_ext.jsonl").exists()
    assert "megatron_ext" not in stock
    path = written(tmp_path / "switched")
    switched = pretrain(tmp_path / "switched", *stages, "--deepspeed_config", path, ranks=ranks)
    assert len(losses(stock)) == 2
    assert losses(switched) == losses(stock)
    start, *_, counters = events(tmp_path / "switched")
    assert start["source"].startswith("--deepspeed_config")
    assert set(counters["calls"]) == {"ring"}
    calls = [phases for lengths in counters["calls"].values() for phases in lengths.values()]
    layers = 2 * 2 * 2 // (ranks // 2)  # layers of a stage, micro-batches, steps
    assert sum(phases["forward"] for phases in calls) == layers
    assert sum(phases["backward"] for phases in calls) == layers


@pytest.mark.slow
def test_unmodified_script_obeys_the_variable(tmp_path, monkeypatch):
    path = written(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(launch.REPOSITORY))
    monkeypatch.setenv("MEGATRON_EXT_CONFIG", str(path))
    output = pretrain(tmp_path, "--recompute", ranks=2)
    assert "block from MEGATRON_EXT_CONFIG" in output
    calls = events(tmp_path)[-1]["calls"]["ring"].values()
    assert sum(phases["recomputed"] for phases in calls) == 2 * 2 * 2


@pytest.mark.slow
def test_unmodified_script_recomputes_by_stage(tmp_path, monkeypatch, capsys):
    """Two stages of two ranks, strategies switched and recomputation planned, by one file; and what is told of it."""
    arguments = ("--pipeline-parallel", 2, "--layers", 4, "--steps", 4, "--micro-batches", 4)
    monkeypatch.setenv("PYTHONPATH", str(launch.REPOSITORY))
    stock = pretrain(tmp_path / "stock", *arguments, ranks=4)
    folder = tmp_path / "planned"
    folder.mkdir()
    path = folder / "ds_config.json"
    block = {"memory": {"limit": "60MB"}, "sequence_parallel": {"strategy": "ring"}, "recompute": {}}
    path.write_text(json.dumps({"megatron_ext": block}))
    planned = pretrain(folder, *arguments, "--deepspeed_config", path, ranks=4)
    assert losses(planned) == losses(stock)
    told = [event for event in events(folder) if event["event"] == "recompute_stages"][-1]["stages"]
    assert [stage["stage"] for stage in told] == [0, 1]
    assert all(stage["frozen"] for stage in told)
    saved = json.loads((folder / "recompute_plan.json").read_text())
    assert [stage["layers"] for stage in saved["stages"]] == [stage["chunks"][0]["layers"] for stage in told]
    assert cli.main(["report", str(folder), "-o", str(folder / "run.png")]) == 0
    assert "recomputation by stage: policy stage_aware, 2 stages, 4 micro-batches" in capsys.readouterr().out
    assert {path.name for path in folder.glob("run_*.png")} == {"run_memory.png", "run_timeline.png"}
