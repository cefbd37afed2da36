"""Contracts of the cost models: exact where the truth has their form, monotone, the same on every rank, honest."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from megatron_ext.sequence_parallel.closed_forms import Event
from megatron_ext.sequence_parallel.cluster import PRESETS
from megatron_ext.sequence_parallel.cost_model import AnalyticalModel, collective_seconds, pairs_of
from megatron_ext.sequence_parallel.forest import ForestModel
from megatron_ext.sequence_parallel.held_out import HeldOutError, held_out_error
from megatron_ext.sequence_parallel.layer_shape import LayerShape
from megatron_ext.sequence_parallel.least_squares import fit_relative
from megatron_ext.sequence_parallel.names import STRATEGIES
from megatron_ext.sequence_parallel.profile import Measurement, Profile, load_profile, save_profiles

SHAPE = LayerShape(1024, 4096, num_heads=16, num_kv_heads=16, head_dim=64, group_size=8)
MODEL = AnalyticalModel(SHAPE, PRESETS["8xH100-80G"])
LENGTHS = [1024 * 2**power for power in range(8)]


def rows_of(scale: float = 1.0, lengths=LENGTHS, strategies=STRATEGIES, batch: int = 1) -> list[Measurement]:
    """What the prior itself would measure on a machine slower by `scale` that needs as much more memory."""
    rows = []
    for name in strategies:
        for length in lengths:
            cost = MODEL.predict(name, batch, length)
            kept, transient = round(cost.kept_bytes * scale), round(cost.transient_bytes * scale)
            rows.append(Measurement(name, batch, length, cost.seconds * scale, kept, transient))
    return rows


def test_collectives_pay_latency_and_bandwidth():
    cluster = replace(MODEL.cluster, link_latency=1.0, link_bandwidth=10.0)
    assert collective_seconds(Event("send", 20, 40), 8, cluster) == 1 + 4
    assert collective_seconds(Event("all_gather", 20, 40), 8, cluster) == 7 + 7 * 4
    assert collective_seconds(Event("reduce_scatter", 80, 160), 8, cluster) == 7 + 7 / 8 * 16


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_prior_grows_with_length_and_batch(strategy):
    costs = [MODEL.predict(strategy, 1, length) for length in LENGTHS]
    assert costs == sorted(costs, key=lambda cost: (cost.seconds, cost.kept_bytes))
    assert MODEL.predict(strategy, 2, 65536).seconds < MODEL.predict(strategy, 1, 131072).seconds


def test_prior_has_the_papers_crossovers():
    """Short sequences: tensor parallelism; long ones: Ulysses is faster and METP the leanest."""
    short, long = ({name: MODEL.predict(name, 1, s) for name in STRATEGIES} for s in (1024, 262144))
    assert min(short, key=lambda name: short[name].seconds) == "megatron_ts"
    assert long["ulysses"].seconds < long["megatron_ts"].seconds
    assert min(long, key=lambda name: long[name].kept_bytes) == "metp"


def test_packed_documents_attend_to_less():
    assert pairs_of(1, 8, (4, 4)) == 32
    packed = MODEL.predict("ring", 1, 65536, (8192,) * 8)
    assert packed.seconds < MODEL.predict("ring", 1, 65536).seconds
    assert packed.kept_bytes == MODEL.predict("ring", 1, 65536).kept_bytes
    with pytest.raises(ValueError, match="documents hold 3 tokens of 4"):
        pairs_of(1, 4, (1, 2))


@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[:3], LENGTHS[2:4], LENGTHS[4:5]])
def test_calibration_finds_a_slower_machine_from_any_number_of_lengths(lengths):
    model = MODEL.calibrated(rows_of(1.5, lengths))
    for name in STRATEGIES:
        for length in (2048, 32768, 500_000 // 16 * 16):
            known, found = MODEL.predict(name, 1, length), model.predict(name, 1, length)
            assert found.seconds == pytest.approx(1.5 * known.seconds, rel=1e-6)
            assert found.kept_bytes == pytest.approx(1.5 * known.kept_bytes, rel=1e-6)
            assert found.transient_bytes == pytest.approx(1.5 * known.transient_bytes, rel=1e-6)


def test_calibration_finds_another_law_than_the_priors():
    def law(length: int) -> float:
        return 0.003 + 2e-7 * length + 3e-12 * length**2

    rows = [replace(row, seconds=law(row.length)) for row in rows_of(strategies=("ring",))]
    model = MODEL.calibrated(rows)
    for length in (3000, 50_000, 1_000_000):
        assert model.predict("ring", 1, length).seconds == pytest.approx(law(length), rel=0.02)


def test_three_lengths_are_enough_where_the_closed_form_has_another_shape():
    """Launches as slow as an attention: the closed form of a GPU is flat over such lengths."""
    lengths = [576, 144, 32]
    rows = [
        replace(row, seconds=0.024 + 1e-7 * row.length**2)
        for row in rows_of(lengths=lengths, strategies=("ring",))
    ]
    model = MODEL.calibrated(rows)
    for length in (320, 576, 1024):
        assert model.predict("ring", 1, length).seconds == pytest.approx(0.024 + 1e-7 * length**2, rel=0.05)


def test_strategies_that_were_not_measured_keep_the_closed_forms():
    model = MODEL.calibrated(rows_of(2.0, strategies=("ring",)))
    assert model.predict("metp", 1, 8192) == MODEL.predict("metp", 1, 8192)


def test_fits_are_never_negative():
    fit = fit_relative([(1.0, x, x * x) for x in (1.0, 2.0, 3.0, 4.0)], [5.0, 4.0, 3.0, 2.0])
    assert min(fit) >= 0
    assert fit_relative([(1.0, 2.0), (1.0, 3.0)], [5.0, 7.0]) == pytest.approx((1.0, 2.0))
    assert sum(c > 0 for c in fit_relative([(1.0, 2.0), (1.0, 3.0)], [5.0, 7.0], most=1)) == 1


def test_fingerprint_tells_models_apart_and_nothing_else():
    calibrated = MODEL.calibrated(rows_of(1.5))
    assert calibrated.fingerprint() == MODEL.calibrated(rows_of(1.5)).fingerprint()
    others = [MODEL, MODEL.calibrated(rows_of(1.6)), replace(MODEL, cluster=PRESETS["8xH200"])]
    others.append(replace(MODEL, shape=replace(SHAPE, causal=False)))
    assert len({calibrated.fingerprint(), *(model.fingerprint() for model in others)}) == 5


def test_held_out_error_is_small_for_the_models_own_law_and_said_for_another():
    errors = held_out_error(MODEL.calibrated, rows_of(1.5))
    assert {error.lengths for error in errors.values()} == {6}
    assert all(
        error.time < 0.01 and error.memory < 0.01 and error.warning is None for error in errors.values()
    )
    rows = [replace(row, seconds=row.seconds * (3 if row.length == 8192 else 1)) for row in rows_of()]
    warning = held_out_error(MODEL.calibrated, rows)["ring"].warning
    assert "time by" in warning
    assert "profile more lengths" in warning


def test_held_out_error_of_two_lengths_says_that_nothing_is_known():
    errors = held_out_error(MODEL.calibrated, rows_of(lengths=LENGTHS[:2]))
    assert errors["ring"] == HeldOutError("ring", 0.0, 0.0, 0)
    assert "nothing is known" in errors["ring"].warning


# -- the forest -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forest() -> ForestModel:
    pytest.importorskip("sklearn")
    return ForestModel(SHAPE, rows_of(lengths=range(1024, 65536, 1024), strategies=("ulysses",)))


def test_forest_follows_dense_measurements_and_the_polynomial_goes_on(forest):
    for length in (10_000, 40_000, 131_072, 500_000):
        known, found = MODEL.predict("ulysses", 1, length), forest.predict("ulysses", 1, length)
        assert found.seconds == pytest.approx(known.seconds, rel=0.1)
        assert found.kept_bytes == pytest.approx(known.kept_bytes, rel=0.1)


def test_forest_walked_by_us_is_scikit_learns(monkeypatch):
    ensemble = pytest.importorskip("sklearn.ensemble")
    fitted = []
    fit = ensemble.RandomForestRegressor.fit
    monkeypatch.setattr(
        ensemble.RandomForestRegressor,
        "fit",
        lambda self, *data: fitted.append(fit(self, *data)) or fitted[-1],
    )
    model = ForestModel(SHAPE, rows_of(strategies=("ring",)))
    for length in (1000, 1500, 1536, 40_000, 130_000):
        wanted = fitted[0].predict([(length, length**2)])[0]
        assert model.predict("ring", 1, length).seconds == pytest.approx(wanted, rel=1e-12)


def test_forest_is_monotone_in_length(forest):
    costs = [forest.predict("ulysses", 1, length) for length in range(512, 131_072, 512)]
    for quantity in ("seconds", "kept_bytes", "transient_bytes"):
        values = [getattr(cost, quantity) for cost in costs]
        assert values == sorted(values)


def test_forest_is_saved_as_its_measurements(forest, tmp_path):
    save_profiles(tmp_path / "profile.json", [Profile(SHAPE, forest.measurements)])
    again = ForestModel(SHAPE, load_profile(tmp_path / "profile.json", SHAPE).measurements)
    assert again.fingerprint() == forest.fingerprint()
    assert again.predict("ulysses", 1, 5000) == forest.predict("ulysses", 1, 5000)


def test_forest_refuses_what_was_not_measured(forest):
    with pytest.raises(
        ValueError, match="'metp' has no measurements; allowed with cost_model.kind forest: ulysses"
    ):
        forest.predict("metp", 1, 1024)


def test_forest_without_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match="pip install scikit-learn, or use analytical"):
        ForestModel(SHAPE, rows_of(lengths=LENGTHS[:3]))


@pytest.mark.parametrize(
    ("told", "now", "is_news"),
    [
        (None, (0.0, 0.0), True),
        ((0.0, 0.0), (0.2, 0.0), True),
        ((0.2, 0.0), (0.22, 0.0), False),
        ((0.2, 0.0), (0.26, 0.0), True),
        ((0.2, 0.0), (0.2, 0.06), True),
        ((0.2, 0.01), (0.2, 0.04), False),
        ((0.3, 0.0), (0.11, 0.0), False),
    ],
)
def test_warning_is_repeated_only_where_the_error_has_become_worse(told, now, is_news):
    before = None if told is None else HeldOutError("ring", *told, lengths=1)
    assert HeldOutError("ring", *now, lengths=1).is_worse_than(before) == is_news
