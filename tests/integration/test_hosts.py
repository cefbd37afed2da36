"""Trainers that people use run unmodified, with the block and without it.

Contract: with a `grass` block in their config grass.jsonl tells the expected number of draws and exactly the drawn
blocks changed; without it nothing of the package is seen. Jobs are real ones: the host's launcher, processes, files.
Not covered: what GRASS computes (tests/distributed).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration import launch
from tests.integration.launch import REPOSITORY, write_config

pytestmark = pytest.mark.distributed

HOSTS = Path(__file__).with_name("hosts")
TRAINER = REPOSITORY / "examples" / "train_trainer.py"
STEPS = 9
GRASS = {"active_layers": 1, "probe_steps": 2, "sampling_period": 3, "refresh_period": 3}
SMALL = (
    "--batch-size",
    "2",
    "--sequence-length",
    "32",
    "--eval-samples",
    "4",
    "--eval-steps",
    "100",
    "--cpu",
)


def check_run(folder: Path, before: Path, after: Path, *, steps: int, probe_steps: int, period: int) -> None:
    """The log tells every draw, and the saved weights agree with it bit by bit."""
    events = launch.read_log(folder)
    assert [event["event"] for event in events].count("start") == 1
    draws = [event for event in events if event["event"] == "draw"]
    assert len(draws) == launch.expected_draws(steps, probe_steps, period)
    assert draws[-1]["probe_steps"] == probe_steps
    trained = {b for draw in draws if probe_steps + draw["applied_steps"] < steps for b in draw["active"]}
    old, new = (load_file(path / "model.safetensors") for path in (before, after))
    for index, name in enumerate(events[0]["blocks"]):
        moved = [not torch.equal(old[key], new[key]) for key in old if key.startswith(f"{name}.")]
        assert moved, name
        assert (all if index in trained else any)(moved) == (index in trained), (name, sorted(trained))


def check_untouched(folder: Path, output: str, before: Path, after: Path) -> None:
    """Without a block: no log, no word, and every block trained."""
    assert not (folder / "grass.jsonl").exists()
    for place in (folder, REPOSITORY, sys.prefix):  # whose own names are not the package's doing
        output = output.replace(str(place), "")
    assert "grass" not in output.lower()
    old, new = (load_file(path / "model.safetensors") for path in (before, after))
    assert all(not torch.equal(old[key], new[key]) for key in old if ".layers." in key)


def run_trl(
    script: str, folder: Path, model: Path, text: Path, *, block: bool, ranks: int = 1, stage: int = 2
) -> str:
    config = write_config(
        folder / "ds_config.json",
        grass=GRASS if block else None,
        zero_optimization={"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
    )
    return launch.launch(
        launch.torchrun(HOSTS / script, model, text, config, folder / "out", STEPS, ranks=ranks), folder
    )


SLOW = pytest.mark.slow
TRL = [
    pytest.param("sft.py", True, 1, 2, id="sft", marks=SLOW),
    pytest.param("dpo.py", True, 1, 2, id="dpo", marks=SLOW),
    pytest.param("sft.py", False, 1, 2, id="sft-without", marks=SLOW),
    pytest.param("dpo.py", False, 1, 2, id="dpo-without", marks=SLOW),
    pytest.param("sft.py", True, 2, 3, id="sft-zero3-2ranks", marks=SLOW),
    pytest.param("dpo.py", True, 2, 3, id="dpo-zero3-2ranks", marks=SLOW),
    pytest.param("dpo.py", True, 2, 2, id="dpo-2ranks", marks=SLOW),
]


@pytest.mark.parametrize(("script", "block", "ranks", "stage"), TRL)
def test_trl_trainer_runs_unmodified(script, block, ranks, stage, tmp_path, model_folder, text_file):
    output = run_trl(script, tmp_path, model_folder, text_file, block=block, ranks=ranks, stage=stage)
    if block:
        check_run(tmp_path, model_folder, tmp_path / "out", steps=STEPS, probe_steps=2, period=3)
    else:
        check_untouched(tmp_path, output, model_folder, tmp_path / "out")


ACCELERATE = [
    pytest.param("reference", 1, id="reference"),
    pytest.param("reference", 2, id="reference-2ranks", marks=SLOW),
    pytest.param("block", 2, id="block-2ranks", marks=SLOW),
    pytest.param(None, 1, id="without", marks=SLOW),
]


@pytest.mark.parametrize(("config", "ranks"), ACCELERATE)
def test_accelerate_loop_runs_unmodified(config, ranks, tmp_path, model_folder, text_file):
    """`reference`: configs/reference.json as it lies there, its "auto" values left to accelerate."""
    if config == "reference":
        file, steps, probe_steps, period = REPOSITORY / "configs" / "reference.json", 13, 10, 50
    else:
        file = write_config(tmp_path / "ds_config.json", grass=GRASS if config else None)
        steps, probe_steps, period = STEPS, 2, 3
    script = launch.accelerate(
        file, HOSTS / "accelerate_loop.py", model_folder, text_file, "out", steps, ranks=ranks
    )
    output = launch.launch(script, tmp_path)
    rates = [float(word) for word in output.split("RATES ")[1].split("\n")[0].split()]
    if config is None:
        check_untouched(tmp_path, output, model_folder, tmp_path / "out")
        assert rates[probe_steps] < rates[0]
        return
    check_run(tmp_path, model_folder, tmp_path / "out", steps=steps, probe_steps=probe_steps, period=period)
    assert rates[: probe_steps - 1] == [rates[0]] * (probe_steps - 1), "the schedule waits while probing"
    assert rates[-1] != rates[0]


def trainer_arguments(config: Path, model: Path, steps: int, output: Path, *more: str) -> list[str]:
    arguments = ["--deepspeed", str(config), "--model", str(model), "--output", str(output)]
    return [*arguments, "--max-steps", str(steps), *SMALL, *more]


@pytest.mark.slow
def test_trainer_runs_with_the_reference_config_copied_whole(tmp_path, model_folder):
    config = REPOSITORY / "configs" / "reference.json"
    arguments = trainer_arguments(config, model_folder, 13, tmp_path / "out")
    launch.launch(launch.torchrun(TRAINER, *arguments), tmp_path)
    check_run(tmp_path, model_folder, tmp_path / "out", steps=13, probe_steps=10, period=50)


@pytest.mark.slow
@pytest.mark.parametrize("has_scheduler", [False, True], ids=["optimizer", "optimizer-scheduler"])
def test_trainer_runs_with_optimizer_block(has_scheduler, tmp_path, model_folder):
    """DeepSpeed makes the optimizer, and the schedule or the Trainer does; the "auto" values are the Trainer's."""
    auto = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    blocks = {"optimizer": {"type": "AdamW", "params": {**auto, "torch_adam": True}}}
    if has_scheduler:
        warm_up = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")
        blocks["scheduler"] = {"type": "WarmupLR", "params": warm_up}
    config = write_config(tmp_path / "ds_config.json", grass=GRASS, **blocks)
    more = () if has_scheduler else ("--warmup-steps", "0")
    arguments = trainer_arguments(config, model_folder, STEPS, tmp_path / "out", *more)
    launch.launch(launch.deepspeed(TRAINER, *arguments), tmp_path)
    check_run(tmp_path, model_folder, tmp_path / "out", steps=STEPS, probe_steps=2, period=3)


@pytest.mark.parametrize("stage", [pytest.param(2, id="zero2"), pytest.param(3, id="zero3", marks=SLOW)])
def test_trainer_without_a_block_sees_nothing_of_the_package(stage, tmp_path, model_folder):
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    config = write_config(tmp_path / "ds_config.json", grass=None, zero_optimization=zero)
    output = launch.launch(
        launch.torchrun(TRAINER, *trainer_arguments(config, model_folder, 3, tmp_path / "out")), tmp_path
    )
    check_untouched(tmp_path, output, model_folder, tmp_path / "out")


RESUME = [
    pytest.param(2, 1, "fp32", (), id="zero2-2ranks", marks=SLOW),
    pytest.param(1, 3, "bf16", (), id="zero1-accumulation-bf16", marks=SLOW),
    pytest.param(3, 1, "fp32", (), id="zero3", marks=SLOW),
    pytest.param(2, 2, "bf16", ("--gradient-checkpointing",), id="zero2-recomputed", marks=SLOW),
]


@pytest.mark.parametrize(("stage", "accumulation", "dtype", "more"), RESUME)
def test_trainer_resumed_ends_with_the_same_bits(stage, accumulation, dtype, more, tmp_path, model_folder):
    """Saved at step 6 of 10, in the middle of a sampling period, and resumed in new processes."""
    config = write_config(
        tmp_path / "ds_config.json",
        # with accumulation blocks are probed in turn, and probing must reach all four
        grass={**GRASS, "probe_steps": 2 if accumulation == 1 else 4},
        bf16={"enabled": "auto"},
        zero_optimization={"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
    )
    more = (
        *more,
        "--accumulation",
        str(accumulation),
        "--save-steps",
        "6",
        *(["--bf16"] if dtype == "bf16" else []),
    )
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    arguments = trainer_arguments(config, model_folder, 10, whole / "out", *more)
    launch.launch(launch.deepspeed(TRAINER, *arguments), whole)
    arguments = trainer_arguments(config, model_folder, 10, resumed / "out", *more)
    resume = ("--resume", str(whole / "out" / "checkpoint-6"))
    launch.launch(launch.deepspeed(TRAINER, *arguments, *resume), resumed)
    first, second = (load_file(folder / "out" / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(first[key], second[key]) for key in first)
    draws = [
        [e["active"] for e in launch.read_log(folder) if e["event"] == "draw"] for folder in (whole, resumed)
    ]
    assert draws[1] == draws[0][-len(draws[1]) :], "the resumed run drew other blocks"
    metrics = [json.loads((folder / "out" / "metrics.json").read_text()) for folder in (whole, resumed)]
    assert [found["steps"] for found in metrics] == [10, 10]
    check_told(launch.read_log(whole), launch.read_log(resumed), [found["log_history"] for found in metrics])


def check_told(whole: list[dict], resumed: list[dict], histories: list[list[dict]]) -> None:
    """The resumed log begins where the run was saved, as the same run; the Trainer's log has the engine's numbers."""
    probe_steps = whole[-1]["probe_steps"]
    assert resumed[0]["event"] == "resume"
    assert resumed[0]["applied_steps"] == 6 - probe_steps
    assert {line["run_id"] for line in resumed} == {line["run_id"] for line in whole}
    assert all(line["loss"] > 0 for line in [*whole, *resumed] if line["event"] == "draw")
    for history in histories:
        (log,) = [entry for entry in history if "loss" in entry]
        assert (log["grass_applied_steps"], log["grass_phase_probe"]) == (10 - probe_steps, 0.0)
        assert log["grass_active_layers"] == 1
        assert not [entry for entry in history if "eval_loss" in entry and "grass_draws" in entry]


def saving_trainer(tmp_path: Path, model: Path, text: Path, stage: int, *more: str) -> Path:
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    config = write_config(tmp_path / "ds_config.json", grass=GRASS, zero_optimization=zero)
    script = launch.torchrun(
        HOSTS / "trainer_saves.py", model, text, config, tmp_path / "out", STEPS, *more, ranks=2
    )
    launch.launch(script, tmp_path)
    return tmp_path / "out"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_trainer_ends_with_its_best_checkpoint(stage, tmp_path, model_folder, text_file):
    """`load_best_model_at_end`: the model saved last is, bit for bit, the second of three checkpoints."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    output = saving_trainer(tmp_path, model_folder, text_file, stage)
    final = load_file(output / "model.safetensors")
    best, last = (
        get_fp32_state_dict_from_zero_checkpoint(str(output / f"checkpoint-{step}")) for step in (6, 9)
    )
    assert all(torch.equal(final[name], best[name]) for name in final)
    assert any(not torch.equal(final[name], last[name]) for name in final)
    events = launch.read_log(tmp_path)  # nothing was trained from it, so nothing of the log is undone
    assert [event["applied_steps"] for event in events if event["event"] == "draw"] == [0, 3, 6]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_trainer_that_saves_only_the_model_saves_all_of_it(stage, tmp_path, model_folder, text_file):
    """`save_only_model`: every block is in the file, resting ones too, and no states lie about."""
    output = saving_trainer(tmp_path, model_folder, text_file, stage, "only-model")
    check_run(tmp_path, model_folder, output, steps=STEPS, probe_steps=2, period=3)
    saved, final = (load_file(folder / "model.safetensors") for folder in (output / "checkpoint-9", output))
    assert saved.keys() == load_file(model_folder / "model.safetensors").keys()
    assert all(torch.equal(saved[name], final[name]) for name in final)
    assert not list(output.glob("checkpoint-*/global_step*"))
