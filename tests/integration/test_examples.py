"""The example scripts run as their documentation says, and the demo's checks find what they are there to find.

Not covered: the demo as a whole but in `make test-full` (it is the main job and takes minutes); its learning rates.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.integration import launch
from tests.integration.launch import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
SCRIPTS = ("train_trainer.py", "train_loop.py", "corpus.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_does_not_know_of_the_package(script):
    assert "grass" not in (EXAMPLES / script).read_text().lower()


@pytest.mark.distributed
def test_trainer_script_runs_under_the_deepspeed_launcher(tmp_path):
    """A new small model on documentation, with the example's config; 10 steps probe, so two are left."""
    arguments = ["--deepspeed", EXAMPLES / "ds_config.json", "--max-steps", 12, "--output", "out", "--cpu"]
    arguments += [
        "--blocks",
        3,
        "--hidden-size",
        32,
        "--batch-size",
        2,
        "--eval-steps",
        6,
        "--eval-samples",
        8,
    ]
    launch.launch(launch.deepspeed(EXAMPLES / "train_trainer.py", *arguments), tmp_path)
    history = json.loads((tmp_path / "out" / "metrics.json").read_text())
    losses = [entry["eval_loss"] for entry in history["log_history"] if "eval_loss" in entry]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6), "probing does not train"
    assert losses[-1] < losses[0]
    assert [event["event"] for event in launch.read_log(tmp_path)] == ["start", "draw"]
    assert (tmp_path / "out" / "tokenizer.json").exists()


LOOP = ["--blocks", 3, "--hidden-size", 32, "--eval-samples", 8, "--eval-steps", 8]


@pytest.mark.distributed
def test_loop_script_trains_saves_and_resumes(tmp_path):
    config = ["--deepspeed_config", EXAMPLES / "ds_config_loop.json", *LOOP]
    run = launch.torchrun(
        EXAMPLES / "train_loop.py", *config, "--output", "out", "--steps", 16, "--save-steps", 8
    )
    launch.launch(run, tmp_path)
    losses = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in losses] == [0, 8, 16]
    assert losses[0]["held_out_loss"] == losses[1]["held_out_loss"], "probing does not train"
    assert losses[2]["held_out_loss"] < losses[0]["held_out_loss"]
    (tmp_path / "out" / "latest").write_text("global_step8")
    run = launch.torchrun(EXAMPLES / "train_loop.py", *config, "--output", "out", "--steps", 16, "--resume")
    launch.launch(run, tmp_path)
    last = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last == losses[2]


@pytest.mark.slow
@pytest.mark.distributed
def test_demo_passes_its_own_checks(tmp_path):
    output = launch.launch([sys.executable, EXAMPLES / "demo.py"], tmp_path, timeout=1200)
    assert "FAILED" not in output
    assert (tmp_path / "demo-output" / "demo.png").stat().st_size > 10_000


# -- the demo's checks, on a run that is made up ----------------------------------------------------------------------


@pytest.fixture
def report(examples_on_path):
    import demo_report

    return demo_report


def made_up_run(report, folder: Path, *, touch: dict[int, list[str]]):
    """Six steps: two probe, blocks 0 and 2 are active for two each; block 1 rests. `touch`: tensors changed by step."""
    weights = {f"layers.{block}.{name}": torch.zeros(2) for block in range(3) for name in ("a", "b")}
    weights["embed"] = torch.zeros(2)
    (folder / "pretrained").mkdir()
    save_file(weights, folder / "pretrained" / "model.safetensors")
    for step in (2, 4, 6):
        for name in touch.get(step, []):
            weights[name] = weights[name] + 1
        (folder / f"checkpoint-{step}").mkdir()
        save_file(weights, folder / f"checkpoint-{step}" / "model.safetensors")
    save_file(weights, folder / "model.safetensors")
    draws = [
        {"probe_steps": 2, "applied_steps": 0, "active": [0]},
        {"probe_steps": 2, "applied_steps": 2, "active": [2]},
        {"probe_steps": 2, "applied_steps": 4, "active": [1]},
    ]
    start = {"blocks": ["layers.0", "layers.1", "layers.2"], "planned_probe_steps": 2, "num_blocks": 3}
    return report.Run("GRASS", folder, 1.0, 1.0, 6, [0, 6], [3.0, 2.0], start, draws)


GOOD = {4: ["layers.0.a", "layers.0.b", "embed"], 6: ["layers.2.a", "layers.2.b", "embed"]}
WRONG = {
    "drawn but still": ({**GOOD, 6: ["layers.2.a", "embed"]}, 1),
    "never drawn but moved": ({**GOOD, 6: [*GOOD[6], "layers.1.b"]}, 2),
    "moved while probing": ({**GOOD, 2: ["embed"]}, 3),
    "moved after it was frozen": ({**GOOD, 6: [*GOOD[6], "layers.0.a"]}, 4),
}


def other_run(report, loss: float):
    return report.Run("outer only", Path(), 1.0, 1.0, 6, [0, 6], [3.0, loss])


def test_demo_checks_pass_on_a_good_run(report, tmp_path):
    run = made_up_run(report, tmp_path, touch=GOOD)
    checks = report.run_checks(run, other_run(report, 2.5), tmp_path / "pretrained")
    assert [check.passed for check in checks] == [True] * 5


@pytest.mark.parametrize("wrong", WRONG)
def test_demo_check_fails_on(wrong, report, tmp_path):
    touch, index = WRONG[wrong]
    run = made_up_run(report, tmp_path, touch=touch)
    checks = report.run_checks(run, other_run(report, 2.5), tmp_path / "pretrained")
    assert not checks[index].passed


def test_demo_check_fails_when_outer_only_is_as_good(report, tmp_path):
    run = made_up_run(report, tmp_path, touch=GOOD)
    checks = report.run_checks(run, other_run(report, 2.0), tmp_path / "pretrained")
    assert [check.passed for check in checks] == [False, True, True, True, True]
