"""Contracts of the command `megatron_ext`: doctor tells the truth, plan predicts, report reads back what was told."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from ds_grass.doctor.finding import Finding
from megatron_ext import cli, compat, doctor
from megatron_ext.config import LogConfig, MegatronExtConfig, parse_block
from megatron_ext.described_job import make_job
from megatron_ext.described_model import PRESETS, read_model
from megatron_ext.plan import make_crossover
from megatron_ext.recompute.plan import ChunkPlan, RecomputePlan
from megatron_ext.report import ReportError, read_run
from megatron_ext.sequence_parallel.cluster import find_cluster
from megatron_ext.telemetry import StartFacts, Telemetry

REPOSITORY = Path(__file__).parents[2]
LLAMA = str(REPOSITORY / "configs" / "models" / "llama-3-8b")
BLOCK, GPT = "megatron.core.transformer.transformer_block", "megatron.core.models.gpt.gpt_model"
LIVE = {"finder": True, "hosts": [BLOCK, GPT], "live": [BLOCK, GPT], "errors": {}, "failures": {}}
PLAN = ["plan", "--model", LLAMA, "--cluster", "8xH100-80G"]


# -- doctor -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def healthy(monkeypatch):
    """A machine on which all is well, as far as the doctor can see."""
    versions = {
        "ds-grass": "0.1.0",
        "torch": "2.13.0",
        "megatron-core": "0.16.1",
        "pydantic": "2",
        "rich": "15",
    }
    entry = EntryPoint("ds_grass", "ds_grass.activate:autoload", "torch.backends")
    monkeypatch.setattr(doctor, "_installed", versions.get)
    monkeypatch.setattr(doctor, "ask_fresh_interpreter", lambda source, timeout_s: LIVE)
    monkeypatch.setattr(doctor, "_symbols", lambda: [Finding("symbols", "megatron-core", "all")])
    monkeypatch.setattr("ds_grass.doctor.entry_points", lambda group: [entry])
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    monkeypatch.delenv("MEGATRON_EXT_CONFIG", raising=False)
    return versions


def problems(config=None):
    return [finding for finding in doctor.examine(config) if finding.state == "problem"]


def written(tmp_path, content) -> str:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_healthy_machine_has_no_problem(healthy):
    assert problems() == []


def test_hook_is_named_with_its_modules(healthy):
    (finding,) = [finding for finding in doctor.examine() if "hook" in finding.name]
    assert finding.value == f"live on {BLOCK}, {GPT}"


@pytest.mark.parametrize("package", ["torch", "megatron-core"])
def test_missing_host_is_a_problem_with_its_cure(healthy, package):
    del healthy[package]
    (problem,) = problems()
    assert (problem.name, problem.value, problem.cure) == (package, "not installed", f"pip install {package}")


@pytest.mark.parametrize(
    ("present", "is_noted"), [((), True), (("amp_C",), False), (("transformer_engine",), False)]
)
def test_norms_for_sequence_parallelism_are_noted_where_there_are_none(
    healthy, monkeypatch, present, is_noted
):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: name if name in present else None)
    notes = [finding for finding in doctor.examine() if finding.name == "a norm for sequence parallelism"]
    assert bool(notes) is is_noted


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"live": [GPT]}, f"the finder is in place but does not hook {BLOCK}"),
        ({"hosts": [], "live": []}, "the finder is in place but does not hook any module of Megatron-core"),
        ({"finder": False, "hosts": [], "live": []}, "not in place after `import torch`"),
        (
            {"live": [], "hosts": [BLOCK], "errors": {BLOCK: "no torch"}},
            f"nothing to hook: {BLOCK}: no torch",
        ),
    ],
)
def test_hook_that_is_not_live_is_a_problem(healthy, monkeypatch, changes, value):
    monkeypatch.setattr(doctor, "ask_fresh_interpreter", lambda source, timeout_s: {**LIVE, **changes})
    assert [problem.value for problem in problems()] == [value]


def test_failed_installer_shows_its_traceback(healthy, monkeypatch):
    text = "Traceback (most recent call last):\n  File x\nLookupError: gone\n"
    found = {**LIVE, "live": [GPT], "failures": {BLOCK: text}}
    monkeypatch.setattr(doctor, "ask_fresh_interpreter", lambda source, timeout_s: found)
    first, second = problems()
    assert (first.value, first.detail) == ("LookupError: gone", text)
    assert "does not hook" in second.value


@pytest.mark.parametrize(
    "error", [subprocess.TimeoutExpired("python", 1), ValueError("status 1"), OSError("gone")]
)
def test_interpreter_that_does_not_answer_is_a_problem_not_an_exception(healthy, monkeypatch, error):
    def fail(source, timeout_s):
        raise error

    monkeypatch.setattr(doctor, "ask_fresh_interpreter", fail)
    (problem,) = problems()
    assert problem.value.startswith("cannot be told")


def test_probe_finds_the_hook_of_this_package_live():
    """In a real interpreter, with the package imported as its entry point would."""
    pytest.importorskip("megatron.core")
    found = doctor.ask_fresh_interpreter("import ds_grass" + doctor._PROBE, 120)
    assert (found["finder"], found["errors"], found["failures"]) == (True, {}, {})
    assert found["live"] == found["hosts"] != []


def test_probe_of_an_interpreter_without_the_package_tells_so():
    without = "import sys; sys.modules['torch'] = sys\n"
    found = doctor.ask_fresh_interpreter(without + doctor._PROBE, 60)
    assert found == {"finder": False, "hosts": [], "live": [], "errors": {}, "failures": {}}


def test_symbols_are_told_module_by_module(monkeypatch):
    table = {
        "megatron.core.a": (1, []),
        "megatron.core.b": (3, ["megatron.core.b.X", "megatron.core.b.Y(z)"]),
    }
    monkeypatch.setattr(compat, "by_module", lambda: table)
    monkeypatch.setattr(compat, "installed_version", lambda: "0.17.0")
    first, second, third = doctor._symbols()
    assert (first.state, first.value) == ("ok", "1 name is as expected")
    assert (second.state, second.value) == ("problem", "lacks megatron.core.b.X, megatron.core.b.Y(z)")
    assert (third.state, third.value) == ("note", "not tried; tried is >=0.12,<=0.16.1")


def test_megatron_core_that_cannot_be_imported_is_a_problem(monkeypatch):
    def fail():
        raise RuntimeError("no such luck")

    monkeypatch.setattr(compat, "installed_version", fail)
    monkeypatch.setattr(compat, "by_module", lambda: {})
    (finding,) = doctor._symbols()
    assert (finding.state, finding.value) == ("problem", "no such luck")


@pytest.mark.parametrize(
    ("content", "state", "part"),
    [
        ({"megatron_ext": {}}, "ok", "every key at its default"),
        ({"megatron_ext": {"memory": {"limit": "80GB"}}}, "ok", "memory {'limit': 80000000000}"),
        ({"megatron_ext": {"memory": 3}}, "problem", "megatron_ext.memory is 3"),
        ({"megatron_ext": {"sequence_parallel": {"enabled": False}}}, "note", "switched off"),
        (
            {"megatron_ext": {"sequence_parallel": {"cost_model": {"load": "gone.json"}}}},
            "note",
            "is no file here",
        ),
        ({}, "problem", "absent: Megatron-core"),
        ([], "problem", "holds a JSON list"),
    ],
)
def test_config_is_looked_at(healthy, tmp_path, content, state, part):
    findings = [
        finding for finding in doctor.examine(written(tmp_path, content)) if finding.section == "config"
    ]
    assert findings[-1].state == state
    assert part in findings[-1].value


@pytest.mark.parametrize(
    ("recompute", "value"),
    [
        ({}, "policy stage_aware, layers in full or every module that the model can recompute by itself; saved to "
             "recompute_plan.json"),
        ({"modules": ["mlp", "core_attn"], "plan": {"save": None}},
         "policy stage_aware, layers in full or mlp, core_attn; not saved"),
        ({"policy": "level", "ratio": 0.5, "plan": {"save": None}},
         "policy level with ratio 0.5, whole layers only, not measured; not saved"),
        ({"policy": "none"}, "policy none, nothing is recomputed; saved to recompute_plan.json"),
    ],
)  # fmt: skip
def test_recompute_block_is_told_also_where_sequence_parallel_is_switched_off(
    healthy, tmp_path, recompute, value
):
    block = {"sequence_parallel": {"enabled": False}, "recompute": recompute}
    findings = {
        finding.name: finding
        for finding in doctor.examine(written(tmp_path, {"megatron_ext": block}))
        if finding.section == "config"
    }
    assert "switched off" in findings["megatron_ext.sequence_parallel"].value
    assert (findings["megatron_ext.recompute"].state, findings["megatron_ext.recompute"].value) == (
        "ok",
        value,
    )


@pytest.mark.parametrize(
    ("recompute", "state", "part"),
    [
        ({"enabled": False}, "note", "switched off by megatron_ext.recompute.enabled"),
        ({"modules": ["mpl"]}, "problem", "names mpl; allowed: core_attn, layernorm, mlp"),
        ({"policy": "level"}, "problem", "megatron_ext.recompute.ratio is None"),
        ({"plan": {"load": "gone.json"}}, "problem", "'gone.json', which cannot be read"),
        ({"plan": {"load": "{HERE}"}}, "problem", "which is no plan"),
        ({"plan": {"save": "no/such/folder.json"}}, "note", "in a folder that is not here"),
    ],
)
def test_recompute_block_that_would_not_run_as_it_stands_is_said(healthy, tmp_path, recompute, state, part):
    here = str(tmp_path / "ds_config.json")
    block = json.loads(json.dumps({"megatron_ext": {"recompute": recompute}}).replace("{HERE}", here))
    *_, last = doctor.examine(written(tmp_path, block))
    assert (last.section, last.state) == ("config", state)
    assert part in last.value


def test_plan_that_would_be_loaded_is_told(healthy, tmp_path):
    path = tmp_path / "plan.json"
    chunks = {(rank, 0): ChunkPlan(("full", "none")) for rank in range(4)}
    RecomputePlan("stage_aware", chunks).save(path)
    block = {"megatron_ext": {"recompute": {"plan": {"load": str(path)}}}}
    *_, told, last = doctor.examine(written(tmp_path, block))
    assert "verified but not measured" in told.value
    assert last.value == f"{path}: policy stage_aware, 8 layers on 4 stages"


def test_config_that_the_variable_names_is_looked_at(healthy, tmp_path, monkeypatch):
    assert "none is named here" in [finding.value for finding in doctor.examine()]
    monkeypatch.setenv("MEGATRON_EXT_CONFIG", written(tmp_path, {"megatron_ext": {"memory": 3}}))
    assert len(problems()) == 1


def test_doctor_prints_a_table_or_json_and_answers_by_its_status(healthy, tmp_path, capsys):
    assert cli.main(["doctor"]) == 0
    assert "A `megatron_ext` block in ds_config runs here." in capsys.readouterr().out
    assert cli.main(["doctor", "--json", "--config", written(tmp_path, {})]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["healthy"] is False
    assert {"section", "name", "value", "state"} <= set(document["findings"][0])


# -- plan -------------------------------------------------------------------------------------------------------------


def crossover(model="paper-gpt", cluster="8xA100-80G", block=None, lengths=(1024, 2**20), **options):
    config = MegatronExtConfig() if block is None else parse_block(block)
    return make_crossover(
        make_job(read_model(model), find_cluster(cluster), config, group_size=8, **options), lengths
    )


def test_plan_moves_from_the_fastest_to_the_leanest_as_lengths_grow():
    stretches = [made_of for _, _, made_of in crossover().stretches]
    assert stretches == ["megatron_ts", "ulysses", "metp + ulysses", "metp", "nothing fits"]


@pytest.mark.parametrize("model", sorted(PRESETS))
def test_plan_is_never_slower_than_a_single_strategy_that_fits_and_never_over_the_limit(model):
    found = crossover(model)
    job = found.job
    for point in found.curve:
        alone = [job.num_layers * cost.seconds for name, cost in point.costs.items()
                 if point.peaks[name] <= job.limit_bytes]  # fmt: skip
        assert point.plan.fits == bool(alone) or not alone
        assert not alone or point.plan.seconds <= min(alone) * (1 + 1e-9)
        assert not point.plan.fits or job.state_bytes + point.plan.peak_bytes <= job.limit_bytes


def test_longest_length_is_the_last_that_fits():
    found = crossover()
    job, longest = found.job, found.longest["the plan"]
    assert longest == max(found.longest.values())
    last, beyond = make_crossover(job, [longest, longest + 16]).points
    assert (last.plan.fits, beyond.plan.fits) == (True, False)


def test_config_decides_strategies_and_limit():
    block = {"memory": {"limit": "60GB"}, "sequence_parallel": {"strategies": ["megatron_ts", "ring"]}}
    found = crossover(block=block)
    assert found.job.strategies == ("megatron_ts", "ring")
    assert found.job.limit_bytes == 60 * 10**9
    fixed = crossover(block={"sequence_parallel": {"strategy": "ring"}}, lengths=[4096])
    assert set(fixed.points[0].plan.names) == {"ring"}


def test_strategy_that_the_heads_forbid_is_left_out_with_the_reason(tmp_path):
    config = json.loads((Path(LLAMA) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 4}))
    found = crossover(str(tmp_path), lengths=[4096])
    assert "metp" not in found.job.strategies
    assert "KV heads" in found.job.refused["metp"]


def test_length_that_nothing_can_run_is_told_and_the_others_are_planned():
    first, second = crossover(lengths=[1001, 1024]).points
    assert (first.plan, first.costs) == (None, {})
    assert "multiple of 8" in first.reason
    assert second.plan is not None


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        (LLAMA, {"num_layers": 32, "num_kv_heads": 8, "head_dim": 128, "gated": True, "linear_bias": False}),
        ({"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_inner": None},
         {"ffn_hidden_size": 256, "num_kv_heads": 4, "gated": False, "linear_bias": True, "tied": True}),
        ({"model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 9,
          "intermediate_size": 96, "num_key_value_heads": 2}, {"qkv_bias": True, "linear_bias": False}),
        ({"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 9,
          "intermediate_size": 96}, {"causal": False, "gated": False}),
    ],
    ids=["llama", "gpt2", "qwen2", "bert"],
)  # fmt: skip
def test_model_is_read_from_its_config(tmp_path, name, facts):
    if isinstance(name, dict):
        (tmp_path / "config.json").write_text(json.dumps(name))
        name = str(tmp_path / "config.json")
    model = read_model(name)
    assert {key: getattr(model, key) for key in facts} == facts


def test_parameters_of_a_rank_add_up_to_the_model():
    model = read_model(LLAMA)
    assert model.rank_parameters(1, 32) == pytest.approx(8_030_261_248, rel=1e-6)
    assert 8 * model.rank_parameters(8, 32) == pytest.approx(8_030_261_248, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama"], "--model is 'llama', which is no preset and cannot be read (No such file"),
        (["--cluster", "9xB300"], "--cluster is '9xB300', no preset"),
        (["--tp", "3"], "--tp is 3 but 8xH100-80G has 8 ranks"),
        (["--tp", "1", "--model", "paper-gpt"], "use a larger --tp"),
        (["--config", "gone.json"], "cannot be read"),
        (["--config", "{EMPTY}"], "has no megatron_ext block"),
        (["--config", "{WRONG}"], "megatron_ext.memory is 3"),
        (["--config", "{FOREST}"], 'cost_model.kind is "forest"'),
        (["--model", "{MOE}"], "mixtures of experts are not planned for"),
        (["--model", "{HALF}"], "--model has no hidden_size or n_embd"),
    ],
)
def test_plan_that_is_impossible_is_one_line(tmp_path, capsys, arguments, message):
    files = {
        "EMPTY": {},
        "WRONG": {"megatron_ext": {"memory": 3}},
        "FOREST": {"megatron_ext": {"sequence_parallel": {"cost_model": {"kind": "forest"}}}},
        "MOE": {"num_local_experts": 8},
        "HALF": {"model_type": "llama"},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    arguments = [text.format(**{name: str(tmp_path / name) for name in files}) for text in arguments]
    assert cli.main([*PLAN, *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megatron_ext plan: ")
    assert message in line


@pytest.mark.parametrize("text", ["0", "-1", "4.5K", "K", "1G", "x"])
def test_length_that_is_none_is_a_wrong_argument(capsys, text):
    with pytest.raises(SystemExit) as caught:
        cli.main([*PLAN, "--lengths", "4096", f"{text}"])
    assert caught.value.code == 2


def test_plan_prints_tables(capsys):
    assert cli.main([*PLAN, "--lengths", "4096", "32K", "1M"]) == 0
    out = capsys.readouterr().out
    parts = (
        "predicted: 32 layers of llama-3-8b on 8xH100-80G",
        "32 x ulysses",
        "does not fit",
        "longest that fits",
    )
    assert all(part in out for part in parts)


def test_plan_prints_json_and_draws(tmp_path, capsys):
    picture = tmp_path / "crossover.png"
    assert cli.main([*PLAN, "--lengths", "32K", "--json", "-o", str(picture)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["predicted"] is True
    assert document["lengths"][0]["layers"] == {"ulysses": 32}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plan_in_which_no_length_fits_is_a_problem(capsys):
    assert cli.main([*PLAN, "--lengths", "1M", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["lengths"][0]["fits"] is False


def test_picture_that_cannot_be_written_is_one_line(tmp_path, capsys):
    assert cli.main([*PLAN, "--lengths", "4K", "--json", "-o", str(tmp_path)]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_missing_matplotlib_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.delitem(sys.modules, "megatron_ext.picture", raising=False)
    monkeypatch.setattr("megatron_ext.picture", None, raising=False)
    monkeypatch.delattr("megatron_ext.picture")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main([*PLAN, "--lengths", "4K", "--json", "-o", str(tmp_path / "a.png")]) == 0
    assert "pip install ds_grass[report]" in capsys.readouterr().err


# -- report -----------------------------------------------------------------------------------------------------------

FACTS = StartFacts("megatron_ext.apply: no file", {}, {}, 2, 2, 1, 1, 4, ("ring",), {}, 10**10, "analytical")


@pytest.fixture
def log(tmp_path):
    """What two runs told; the second is the one to report."""
    path = tmp_path / "megatron_ext.jsonl"
    for scale in (1, 2):
        told = Telemetry(LogConfig(path=str(path)), is_writer=True)
        told.start(FACTS)
        for length, names, fits in ((4096, ["ring"] * 4, True), (128, ["ulysses"] * 3 + ["metp"], False)):
            told.planned(1, length, names, seconds=0.010, peak_bytes=10**9, fits=fits)
        for seconds in (0.011, 0.012, 0.050):
            told.counters.count("ring", 4096, "forward")
            told.ran(1, 4096, ["ring"] * 4, seconds=seconds * scale, peak_bytes=11 * 10**8)
        told.close()
    return path


def test_report_reads_the_last_run_back(log):
    run = read_run(log.parent)
    short, long = run.rows
    assert (short.length, short.plan, short.fits, short.micro_batches) == (
        128,
        "3 x ulysses, 1 x metp",
        False,
        0,
    )
    assert (long.length, long.layers, long.fits, long.micro_batches) == (4096, {"ring": 4}, True, 3)
    assert (long.measured_seconds, long.measured_bytes) == (0.024, 11 * 10**8)
    assert run.facts["limit_bytes"] == 10**10
    assert run.calls == {"ring": {"4096": {"forward": 3, "backward": 0, "recomputed": 0}}}


def test_report_reads_the_run_that_is_asked_for(log):
    first = json.loads(log.read_text().splitlines()[0])["run_id"]
    assert read_run(log, first[:8]).rows[1].measured_seconds == 0.012
    with pytest.raises(ReportError, match="is the beginning of 0 runs"):
        read_run(log, "nothing")


def test_report_counts_what_it_cannot_use(log):
    with open(log, "a") as file:
        run_id = read_run(log).run_id
        unusable = json.dumps({"run_id": run_id, "event": "plan", "batch": True})
        file.write(f'no json\n{unusable}\n{{"run_id": "x", "eve')
    assert read_run(log).broken_lines == 2


@pytest.mark.parametrize("content", ["", '{"run_id": "a", "event": "start"}\n', None])
def test_report_of_nothing_is_one_line(tmp_path, capsys, content):
    path = tmp_path / "empty.jsonl"
    if content is not None:
        path.write_text(content)
    assert cli.main(["report", str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megatron_ext report: ")


def test_report_prints_a_table_or_json_and_draws(log, tmp_path, capsys):
    picture = tmp_path / "run.png"
    assert cli.main(["report", str(log), "-o", str(picture)]) == 0
    out = capsys.readouterr().out
    assert all(
        part in out for part in ("4,096", "24.0 ms (+140%)", "1.10 GB (+10%)", "over the limit", "4 x ring")
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["report", str(log), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2


def test_command_says_what_it_can(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("megatron_ext ")
