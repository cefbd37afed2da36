"""Contracts of the report on stages: what was told is read back, what follows is right, and it is shown and drawn."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_ext import cli, recompute_pictures
from megatron_ext.config import LogConfig
from megatron_ext.recompute.schedule import Pipeline, open_counts
from megatron_ext.recompute.stage_plan import StagePlan
from megatron_ext.recompute_report import Stages, error_of, in_words, layer_counts, parse_stages
from megatron_ext.report import ReportError, read_run
from megatron_ext.telemetry import Telemetry

GB = 10**9
LAYERS, RECOMPUTED = 8, (5, 2, 0, 0)


def stage_plan(stage: int, pipeline: Pipeline, **changes) -> StagePlan:
    """Layers of a second forward and two backward, 20 GB of weights, 2 GB kept by a layer and 0.2 if recomputed."""
    recomputed = RECOMPUTED[stage % len(RECOMPUTED)]
    held = open_counts(pipeline, stage)
    layers = LAYERS // pipeline.chunks
    counts = [min(layers, max(0, recomputed - chunk * layers)) for chunk in range(pipeline.chunks)]

    def peak(count: float) -> int:
        return round((20 + sum(held) / pipeline.chunks * (2 * (LAYERS - count) + 0.2 * count) + 2) * GB)

    plan = StagePlan(
        stage=stage,
        policy="stage_aware",
        chunks=tuple({"layers": ["full"] * n + ["none"] * (layers - n), "share": None} for n in counts),
        open=held,
        pipeline=asdict(pipeline),
        limit_bytes=80 * GB,
        static_bytes=20 * GB,
        predicted_bytes=peak(recomputed),
        measured_bytes=peak(recomputed) + stage * GB // 2,
        nothing_recomputed_bytes=peak(0),
        all_recomputed_bytes=peak(LAYERS),
        forward_seconds=(float(layers),) * pipeline.chunks,
        backward_seconds=(2.0 * layers,) * pipeline.chunks,
        recompute_seconds=tuple(map(float, counts)),
        frozen=True,
    )
    return replace(plan, **changes)


def told(pipeline: Pipeline = Pipeline(4, 8), **changes) -> list[dict]:  # noqa: B008
    """The event's stages, as they come out of JSON."""
    plans = [asdict(stage_plan(stage, pipeline, **changes)) for stage in range(pipeline.stages)]
    return json.loads(json.dumps(plans))


def rule_only(pipeline: Pipeline = Pipeline(4, 8)) -> Stages:  # noqa: B008
    """Of a policy that does not measure: every number that it does not know is null."""
    unknown = [key for key, value in asdict(stage_plan(0, pipeline)).items() if key.endswith(("_seconds", "_bytes"))
               and key != "limit_bytes"]  # fmt: skip
    return parse_stages(told(pipeline, **dict.fromkeys(unknown)))


# -- what follows -----------------------------------------------------------------------------------------------------


def test_stages_are_read_back_in_order():
    stages = parse_stages(told()[::-1])
    assert list(stages.plans) == [stage_plan(stage, Pipeline(4, 8)) for stage in range(4)]


def test_step_is_composed_and_recomputation_is_a_share_of_it():
    """p = 1: no waiting, so the step is the sum of its passes."""
    stages = parse_stages(told(Pipeline(1, 6)))
    assert stages.timeline.seconds == 6 * (8 + 16 + 5)
    assert stages.all_recomputed_timeline.seconds == 6 * (8 + 16 + 8)
    assert stages.recompute_shares == (5 / 29,)


def test_step_of_four_stages_is_shorter_than_with_everything_recomputed():
    stages = parse_stages(told())
    assert stages.all_recomputed_timeline.seconds == (8 + 3) * (8 + 16 + 8)
    assert stages.timeline.seconds < stages.all_recomputed_timeline.seconds
    assert [share > 0 for share in stages.recompute_shares] == [True, True, False, False]


def test_nothing_is_composed_where_nothing_was_measured():
    stages = rule_only()
    assert (stages.timeline, stages.all_recomputed_timeline, stages.recompute_shares) == (None, None, None)


def test_step_of_very_many_passes_is_not_composed():
    assert parse_stages(told(Pipeline(4, 30_000))).timeline is None


def test_stage_that_more_micro_batches_left_as_it_was_is_of_the_same_pipeline():
    plans = told()
    plans[3]["pipeline"]["micro_batches"] = 4
    assert parse_stages(plans).pipeline.micro_batches == 8


def test_what_is_outside_of_layers_takes_its_time():
    stages = parse_stages(told(Pipeline(1, 6), outside_seconds=(1.0,)))
    assert stages.timeline.seconds == 6 * (8 + 16 + 5 + 3)


def test_layout_that_would_be_faster_is_told(path, capsys):
    """A head of twice a layer on the last stage, which recomputes nothing, and room for one more layer on the third."""
    heavy = [
        {**plan, "outside_seconds": [2.1 * (plan["stage"] == 3)], "outside_bytes": [0],
         "layer_static_bytes": GB, "layer_options": [
             {"name": "none", "seconds": 0.0, "kept_bytes": 2 * GB, "transient_bytes": 0},
             {"name": "full", "seconds": 1.0, "kept_bytes": GB // 5, "transient_bytes": 2 * GB}]}
        for plan in told(limit_bytes=60 * GB)
    ]  # fmt: skip
    advice = parse_stages(heavy).advice
    assert (advice.layers, advice.gain > 1.02) == ((8, 8, 9, 7), True)
    write(path, heavy)
    assert cli.main(["report", str(path)]) == 0
    assert f"pipeline_model_parallel_layout {advice.layout}" in capsys.readouterr().out
    assert parse_stages(told()).advice is None


@pytest.mark.parametrize(
    ("layers", "share", "counts", "words"),
    [
        (["none"] * 4, None, (0, 4), "nothing"),
        (["full", "full", "mlp", "none"], None, (3, 4), "2 full, 1 mlp"),
        (["full", "none"], (1, "full", 3, 4), (1.75, 2), "1 full, 1 full in 3 of 4 micro-batches"),
        (["full", "mlp"], (1, "full", 1, 4), (2, 2), "1 full, 1 mlp, 1 full in 1 of 4 micro-batches"),
        (["full", "full"], (1, "none", 1, 4), (1.75, 2), "2 full, 1 none in 1 of 4 micro-batches"),
    ],
)
def test_layers_are_counted_and_named(layers, share, counts, words):
    if share is not None:
        share = dict(zip(("layer", "choice", "micro_batches", "window"), share, strict=True))
    plan = stage_plan(0, Pipeline(4, 8), chunks=({"layers": layers, "share": share},))
    assert layer_counts(plan) == counts
    assert in_words(plan) == words


def test_stage_that_held_less_than_predicted_is_told(path, capsys):
    write(path, told(error=-0.012))
    assert cli.main(["report", str(path)]) == 0
    assert "-1.2%" in capsys.readouterr().out


@pytest.mark.parametrize("error", [float("nan"), float("-inf")])
def test_error_that_is_no_share_is_refused(error):
    with pytest.raises(ValueError, match="stage 0 tells an error of"):
        parse_stages(told(error=error))


def test_stages_that_cannot_be_used_are_said_to_be_there(path, capsys):
    write(path, told(static_bytes=-1))
    assert cli.main(["report", str(path)]) == 1
    assert "what it tells of stages cannot be used: stage 0 tells -1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("predicted", "measured", "error"), [(100, 103, 0.03), (None, 5, None), (5, None, None)]
)
def test_error_is_of_the_prediction(predicted, measured, error):
    plan = stage_plan(0, Pipeline(4, 8), predicted_bytes=predicted, measured_bytes=measured)
    assert error_of(plan) == (error if error is None else pytest.approx(error))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda plans: plans.clear(),
        lambda plans: plans.pop(),
        lambda plans: plans[0].pop("open"),
        lambda plans: plans[0].update(limit_bytes="much"),
        lambda plans: plans[0].update(limit_bytes=-1),
        lambda plans: plans[0].update(measured_bytes=2**70),
        lambda plans: plans[0].update(recompute_seconds=[float("nan")]),
        lambda plans: plans[0].update(forward_seconds=[1.0, 1.0]),
        lambda plans: plans[0].update(forward_seconds=None),
        lambda plans: plans[0].update(outside_seconds=[]),
        lambda plans: plans[0].update(layer_options=[{"name": "full"}]),
        lambda plans: plans[0].update(chunks=[{"share": None}]),
        lambda plans: plans[0].update(chunks=[{"layers": ["fast"]}]),
        lambda plans: plans[0].update(chunks=[{"layers": ["full"], "share": {"layer": 0}}]),
        lambda plans: plans[0].update(pipeline={"stages": 4}),
        lambda plans: plans[0].update(pipeline={"stages": 4, "micro_batches": 8, "knots": 1}),
        lambda plans: plans[0]["pipeline"].update(chunks=2),
        lambda plans: plans[1].update(stage=0),
    ],
)
def test_event_that_does_not_hold_together_is_refused(spoil):
    plans = told()
    spoil(plans)
    with pytest.raises(ValueError, match=r"\S"):
        parse_stages(plans)


@pytest.mark.parametrize("nothing", [None, 3, "stages", {"stage": 0}, [3]])
def test_event_of_another_shape_is_refused(nothing):
    with pytest.raises(ValueError, match=r"\S"):
        parse_stages(nothing)


# -- reported ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    return tmp_path / "megatron_ext.jsonl"


def write(path: Path, *events: list[dict], micro_batch: bool = False) -> None:
    """A log with one event for each list of stages."""
    log = Telemetry(LogConfig(path=str(path)), is_writer=True)
    if micro_batch:
        log.planned(1, 4096, ["ring"] * 4, seconds=0.010, peak_bytes=GB)
    for stages in events:
        log.log.write("recompute_stages", stages=stages)
    log.close()


def test_last_event_counts(path):
    write(path, told(measured_bytes=None, frozen=False), told())
    run = read_run(path)
    assert all(plan.frozen for plan in run.stages.plans)
    assert run.rows == ()


def test_event_that_cannot_be_used_is_counted_and_the_one_before_stands(path):
    write(path, told(), told()[:2])
    run = read_run(path)
    assert (len(run.stages.plans), run.broken_lines) == (4, 1)


def test_log_with_nothing_but_an_unusable_event_has_nothing_to_report(path):
    write(path, [{}])
    with pytest.raises(ReportError, match="has planned nothing yet"):
        read_run(path)


def test_report_shows_a_table_by_stage_and_draws_two_pictures(path, tmp_path, capsys):
    write(path, told())
    assert cli.main(["report", str(path), "-o", str(tmp_path / "run.png")]) == 0
    out, err = capsys.readouterr()
    parts = ("policy stage_aware", "4 stages", "8 micro-batches", "5 of 8", "5 full", "59.7 GB", "+0.8%", "80.0 GB",
             "composed", "with every layer recomputed 352.0 s")  # fmt: skip
    assert [part for part in parts if part not in out] == []
    assert "not verified" not in out
    assert "micro-batches of the rank" not in out
    pictures = sorted(picture.name for picture in tmp_path.glob("*.png"))
    assert pictures == ["run_memory.png", "run_timeline.png"]
    assert all(name in err for name in pictures)
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in tmp_path.glob("*.png"))


def test_report_of_strategies_and_stages_shows_and_draws_both(path, tmp_path, capsys):
    write(path, told(), micro_batch=True)
    assert cli.main(["report", str(path), "-o", str(tmp_path / "run.png")]) == 0
    out = capsys.readouterr().out
    assert "4 x ring" in out
    assert "recomputation by stage" in out
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_report_without_the_event_is_as_before(path, tmp_path, capsys):
    write(path, micro_batch=True)
    assert cli.main(["report", str(path), "-o", str(tmp_path / "run.png")]) == 0
    out, err = capsys.readouterr()
    assert "stage" not in out
    assert err == ""
    assert [picture.name for picture in tmp_path.glob("*.png")] == ["run.png"]
    assert cli.main(["report", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recompute"] is None


def test_report_as_json_has_what_was_told_and_what_follows(path, capsys):
    write(path, told())
    assert cli.main(["report", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["recompute"]
    assert found["composed_all_recomputed_seconds"] == 352
    assert found["pipeline"]["micro_batches"] == 8
    assert [stage["layers_recomputed"] for stage in found["stages"]] == list(RECOMPUTED)
    assert found["stages"][0]["predicted_bytes"] == told()[0]["predicted_bytes"]
    assert found["stages"][1]["error"] == pytest.approx(0.5 / found["stages"][1]["predicted_bytes"] * GB)


def test_limit_that_is_exceeded_and_a_stage_that_is_not_verified_are_said(path, capsys):
    write(path, told(limit_bytes=59_500_000_000, frozen=False))
    assert cli.main(["report", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.count("exceeded") == 1
    assert "not verified yet: stage 0, 1, 2, 3" in out


def test_rule_that_does_not_measure_is_reported_without_what_it_does_not_know(path, tmp_path, capsys):
    write(path, [asdict(plan) for plan in rule_only().plans])
    assert cli.main(["report", str(path), "-o", str(tmp_path / "run.png")]) == 0
    out, err = capsys.readouterr()
    assert "5 of 8" in out
    assert "composed" not in out
    assert "drawn: nothing" in err


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plans",
    [
        told(Pipeline(1, 2)),
        told(Pipeline(2, 4, 2)),
        told(Pipeline(16, 20)),
        told(Pipeline(2, 200)),
        told(limit_bytes=10**15),
        told(limit_bytes=10),
        told(nothing_recomputed_bytes=10**13),
        told(static_bytes=None, measured_bytes=None),
        told(static_bytes=0, predicted_bytes=0, measured_bytes=0, nothing_recomputed_bytes=0, all_recomputed_bytes=0),
    ],
    ids=["one stage", "interleaved", "many stages", "many micro-batches", "limit far above", "limit far below",
         "one bar far above", "little is known", "all zero"],
)  # fmt: skip
def test_pictures_are_drawn_whatever_the_numbers(tmp_path, plans):
    written = recompute_pictures.draw_stages(parse_stages(plans), tmp_path / "a.b.png")
    assert [path.name for path in written] == ["a.b_memory.png", "a.b_timeline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def bars(axes):
    """Heights of what stands on one another, by colour."""
    found: dict = {}
    for patch in axes.patches:
        if patch.get_fill():
            found.setdefault(tuple(patch.get_facecolor()[:3]), []).append(patch.get_height())
    return found


def test_memory_of_every_stage_is_drawn_to_scale_and_what_is_over_the_limit_stands_out(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(recompute_pictures, "_legend", lambda figure, stages: drawn.append(figure))
    plans = told()
    recompute_pictures.draw_memory(parse_stages(plans), tmp_path / "a.png")
    (axes,) = drawn[0].axes
    heights = bars(axes)
    rgb = recompute_pictures.matplotlib.colors.to_rgb
    assert heights[rgb(recompute_pictures.BLUE)] == [plan["measured_bytes"] / GB for plan in plans]
    over = [plan["nothing_recomputed_bytes"] / GB - 80 for plan in plans]
    assert heights[rgb(recompute_pictures.ORANGE)] == pytest.approx([height for height in over if height > 0])
    hatched = [patch.get_height() for patch in axes.patches if patch.get_hatch()]
    assert hatched == [20] * 16
    assert "5 of 8 layers" in axes.get_xticklabels()[0].get_text()
    assert [text.get_text() for text in axes.texts if "limit" in text.get_text()] == ["limit 80 GB"]


def test_timeline_says_that_it_is_composed_and_marks_recomputation_of_the_stages_that_have_it(
    tmp_path, monkeypatch
):
    figures = []

    class Kept(recompute_pictures.Figure):
        def savefig(self, *arguments, **options):
            figures.append(self)
            super().savefig(*arguments, **options)

    monkeypatch.setattr(recompute_pictures, "Figure", Kept)
    stages = parse_stages(told())
    recompute_pictures.draw_timeline(stages, stages.timeline, tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert "composed" in axes.get_title(loc="left")
    orange = recompute_pictures.matplotlib.colors.to_rgb(recompute_pictures.ORANGE)
    marked = [each for each in axes.collections if tuple(each.get_facecolor()[0][:3]) == orange]
    assert len(marked) == 2 * 8
    assert [text.get_text() for text in axes.texts if "idle" in text.get_text()][3].startswith("0% recompute")
