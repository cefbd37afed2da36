"""Contracts of `ds_grass plan`: what it reads, what it refuses in one line, what it advises. Accuracy is measured in
tests/distributed/cases_plan.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_grass import cli
from ds_grass.config import parse_block
from ds_grass.plan import budget as budgets
from ds_grass.plan.advice import Advice, advise, grass_block
from ds_grass.plan.budget import Limits, Planner, candidate_sets
from ds_grass.plan.job import PlannedJob, resolve
from ds_grass.plan.ledger import ACTIVATIONS, STATES, WEIGHTS, Ledger
from ds_grass.plan.replay import Rank
from ds_grass.plan.sizes import gigabytes, parse_size
from tests.planned_models import config_of

REPOSITORY = Path(__file__).parents[2]
DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "grass": {"active_layers": 2},
}


def job_of(*, seq_length: int = 64, **keys) -> PlannedJob:
    """A small job; keys of the grass block."""
    return PlannedJob(parse_block({"active_layers": 2, **keys}), micro_batch=2, seq_length=seq_length)


def advice_for(planner: Planner, job: PlannedJob) -> Advice:
    return advise(planner, planner.budget(job), job)


@pytest.fixture
def files(tmp_path):
    """A folder with a model's config, and a ds_config.json."""
    config = config_of("llama_gqa")
    config.num_hidden_layers = 2
    config.save_pretrained(tmp_path / "model")
    (tmp_path / "ds_config.json").write_text(json.dumps(DS_CONFIG))
    return [str(tmp_path / "model"), "--config", str(tmp_path / "ds_config.json"), "--seq-length", "64"]


# -- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("24GB", 24 * 10**9), ("24gb", 24 * 10**9), ("24 GiB", 24 * 2**30), ("1.5T", 15 * 10**11), ("800", 800)],
)
def test_size_is_read_in_decimal_and_binary_units(text, nbytes):
    assert parse_size(text, "--device-memory") == nbytes


@pytest.mark.parametrize("text", ["", "24 apples", "-1GB", "0GB", "1iB", "GB"])
def test_size_that_is_none_names_its_option(text):
    with pytest.raises(ValueError, match="--device-memory is .* allowed: a size such as 24GB"):
        parse_size(text, "--device-memory")


@pytest.mark.parametrize(
    ("nbytes", "text"), [(16_060_522_496, "16.1 GB"), (999_700, "1.00 MB"), (5e12, "5.00 TB"), (17, "17 B")]
)
def test_bytes_are_written_with_three_digits(nbytes, text):
    assert gigabytes(nbytes) == text


# -- the ledger -----------------------------------------------------------------------------------------------------


def test_ledger_counts_storages_not_views_and_forgets_what_is_freed():
    with Ledger() as ledger:
        tensor = torch.empty(1000, device="meta")
        view = tensor.view(10, 100).t()
        other = view + 1
        assert ledger.peak.total_bytes == 8000
        del tensor, view
        assert ledger.now.total_bytes == 4000
        del other
    assert ledger.now.total_bytes == 0


def test_ledger_tells_kinds_and_where_the_peak_was():
    with Ledger() as ledger:
        ledger.phase, ledger.place = "init", "embedding"
        with ledger.holding(WEIGHTS):
            weights = torch.empty(100, device="meta")
        ledger.phase, ledger.place = "forward", "head"
        weights.exp()
        ledger.place = "later"
        ledger.assign(weights, STATES)
    assert (ledger.peak.phase, ledger.peak.place) == ("forward", "head")
    assert (ledger.peak.of(WEIGHTS), ledger.peak.of(ACTIVATIONS)) == (400, 400)
    assert ledger.now.of(STATES) == 400


# -- the job --------------------------------------------------------------------------------------------------------


def test_job_is_read_from_ds_config():
    job, notes = resolve(
        {**DS_CONFIG, "gradient_accumulation_steps": 4}, seq_length=128, ranks_per_node=2, nodes=3
    )
    assert (job.stage, job.dtype, job.wire_dtype, job.micro_batch, job.accumulation) == (
        2,
        "bf16",
        "bf16",
        2,
        4,
    )
    assert job.ranks == 6
    assert notes == []


def test_what_is_auto_is_taken_from_options_or_named():
    ds_config = json.loads((REPOSITORY / "configs" / "reference.json").read_text())
    job, notes = resolve(ds_config, micro_batch=4, accumulation=8, seq_length=512)
    assert (job.micro_batch, job.accumulation) == (4, 8)
    assert len(notes) == 1
    assert "bf16.enabled" in notes[0]
    assert len(resolve(ds_config)[1]) == 4


def test_batch_sizes_follow_from_the_total():
    ds_config = {**DS_CONFIG, "train_batch_size": 64}
    assert resolve(ds_config, ranks_per_node=4)[0].accumulation == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grass": {"active_layer": 2}}, "grass.active_layer is 2, but there is no such key"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "cpu_offload"),
        ({"train_micro_batch_size_per_gpu": "two"}, "train_micro_batch_size_per_gpu is 'two'; allowed"),
        (
            {"communication_data_type": "int8"},
            "communication_data_type is 'int8'; allowed: fp32, bf16 or fp16",
        ),
    ],
)
def test_what_the_job_would_refuse_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        resolve({**DS_CONFIG, **change})


# -- budgets and advice ---------------------------------------------------------------------------------------------


def test_host_bytes_are_twelve_a_parameter_and_half_with_bf16_moments_and_no_master():
    planner = Planner(config_of("llama_gqa"), Limits())
    numel = sum(param.numel() for param in planner.rank(job_of()).model.parameters())
    fp32 = planner.budget(job_of(states={"mode": "stream"}))
    assert fp32.host_bytes == pytest.approx(12 * numel, rel=1e-3)
    assert fp32.saving_bytes == 0
    bf16 = planner.budget(job_of(states={"mode": "stream", "dtype": "bf16", "master_weights": False}))
    assert bf16.host_bytes == pytest.approx(4 * numel, rel=1e-3)
    assert bf16.saving_bytes == pytest.approx(4 * numel, rel=1e-3)


def test_more_active_blocks_never_take_less():
    planner = Planner(config_of("qwen3"), Limits())
    peaks = [planner.budget(job_of(active_layers=count)).peak.total_bytes for count in (1, 2, 4, 6)]
    assert peaks == sorted(peaks)


def test_outer_at_rest_lets_backward_stop():
    planner = Planner(config_of("gpt_neox"), Limits())
    # long enough that the peak is in backward, not in the update
    never, always = (job_of(outer=outer, seq_length=512) for outer in ("never", "always"))
    rank, states = Rank(never, config_of("gpt_neox")), never.grass.states
    upper, lower = rank.train([2, 3], states), rank.train([0, 1], states)
    assert upper.phase == lower.phase == "backward"
    assert upper.total_bytes < 0.95 * lower.total_bytes
    never, always = planner.budget(never), planner.budget(always)
    assert never.peak.total_bytes < always.peak.total_bytes


def test_states_mode_null_is_decided_by_what_the_peak_leaves():
    config = config_of("llama_gqa")
    stream = Planner(config, Limits()).budget(job_of())
    assert stream.job.grass.states.mode == "stream"
    roomy = Planner(config, Limits(device=10 * stream.peak.total_bytes)).budget(job_of())
    assert roomy.job.grass.states.mode == "resident"
    assert roomy.train.of(STATES) > stream.train.of(STATES)


def test_advice_is_the_largest_that_fits():
    config = config_of("qwen3")
    planner = Planner(config, Limits())
    three, four = (
        planner.budget(job_of(active_layers=count, states={"mode": "resident"})).peak.total_bytes
        for count in (3, 4)
    )
    limited = Planner(config, Limits(device=(three + four) // 2))
    advice = advice_for(limited, job_of(active_layers=1, states={"mode": "resident"}))
    assert advice.given_up == ()
    assert grass_block(advice.budget.job) == {"active_layers": 3, "states": {"mode": "resident"}}


def test_advice_gives_up_what_it_must_and_says_so():
    config = config_of("llama_gqa")
    host = Planner(config, Limits()).budget(job_of()).host_bytes
    advice = advice_for(Planner(config, Limits(host=host // 2)), job_of())
    assert advice.given_up == ("moments in bf16", "what is outside the blocks at rest")
    assert advice.budget.host_bytes <= host // 2
    nothing = advice_for(Planner(config, Limits(device=1000)), job_of())
    assert nothing.budget is None
    assert nothing.given_up[0] == "gradient checkpointing"
    assert len(nothing.given_up) == 4


def test_candidate_sets_are_different_sets_of_the_same_size():
    sets = candidate_sets(8, 3)
    assert [len(set(blocks)) for blocks in sets.values()] == [3, 3, 3]
    assert len(candidate_sets(4, 4)) == 1
    assert list(candidate_sets(5, 1)) == ["lowest", "highest"]


def test_describing_a_job_names_what_differs():
    assert budgets.describe(job_of(outer="never")) == "2 active, outer never, stage 2, bf16"


# -- the command ----------------------------------------------------------------------------------------------------


def test_command_prints_one_json_document_and_draws(files, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    status = cli.main(["plan", *files, "--json", "--device-memory", "1GB", "--picture", str(picture)])
    plan = json.loads(capsys.readouterr().out)
    assert status == 0
    assert plan["plan"]["fits"]
    assert plan["largest_active_layers"] == 2
    assert plan["grass"] == {"active_layers": 2, "states": {"mode": "resident"}}
    assert {"init", "probe", "train", "peak_bytes", "host_bytes_node", "moved_bytes_step"} <= plan[
        "plan"
    ].keys()
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_command_ends_with_the_block_to_write(files, capsys):
    assert cli.main(["plan", *files, "--device-memory", "1GB"]) == 0
    text = capsys.readouterr().out
    assert "The largest active_layers that fits 1.00 GB of device memory is 2" in text
    assert json.loads(text[text.index("{") :]) == {
        "grass": {"active_layers": 2, "states": {"mode": "resident"}}
    }


def test_command_says_in_its_status_and_its_last_line_what_does_not_fit(files, capsys):
    assert cli.main(["plan", *files, "--device-memory", "1MB"]) == 1
    assert "Nothing fits 1.00 MB of device memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all", "--config", "FILE"], "--config is 'FILE', which cannot be read"),
        (["./nowhere", "--config", "GOOD"], "MODEL is './nowhere', whose config cannot be read"),
    ],
)
def test_command_reports_what_is_wrong_in_one_line(files, capsys, arguments, message):
    arguments = [files[2] if argument == "GOOD" else argument for argument in arguments]
    assert cli.main(["plan", *arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_command_refuses_too_many_active_layers(files, capsys, tmp_path):
    (tmp_path / "ds_config.json").write_text(json.dumps({**DS_CONFIG, "grass": {"active_layers": 40}}))
    assert cli.main(["plan", *files]) == 1
    assert "grass.active_layers is 40 but the model has 2 layers; use 1 to 2" in capsys.readouterr().err


def test_planning_a_large_model_takes_no_memory_and_no_deepspeed():
    """The weights alone would be 16 GB; stage 3, which DeepSpeed runs in the job, is planned without it."""
    # getrusage would tell the peak of the process that started this one too, when that has been higher
    source = """
import re, sys
from pathlib import Path
from ds_grass.config import parse_block
from ds_grass.plan.job import PlannedJob
from ds_grass.plan.model import read_config
from ds_grass.plan.replay import Rank
job = PlannedJob(parse_block({}), stage=3, ranks_per_node=8)
Rank(job, read_config("configs/models/llama-3-8b")).train([0, 1], job.grass.states)
print("deepspeed" in sys.modules, re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    loaded, kilobytes = done.stdout.split()
    assert loaded == "False", done.stderr
    assert int(kilobytes) < 1_500_000
