"""Contracts of profiles and cluster descriptions: files that say what is wrong with them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_ext.sequence_parallel.cluster import PRESETS, find_cluster
from megatron_ext.sequence_parallel.layer_shape import LayerShape
from megatron_ext.sequence_parallel.profile import (
    Measurement,
    Profile,
    load_profile,
    load_profiles,
    save_profiles,
)

SHAPE = LayerShape(64, 256, num_heads=8, num_kv_heads=8, head_dim=8, group_size=4)
ROW = Measurement("ring", 1, 1024, 0.5, 10, 20)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "profile.json"
    save_profiles(path, [Profile(SHAPE, (ROW,), {"device": "a CPU"})])
    return path


def change(path, **keys):
    """Keys of the file, or of its only layer."""
    content = json.loads(path.read_text())
    (layer,) = content["layers"]
    for key, value in keys.items():
        (layer if key in layer else content)[key] = value
    path.write_text(json.dumps(content))


def test_profile_comes_back_as_it_was_saved(saved):
    loaded = load_profile(saved, SHAPE)
    assert (loaded.shape, loaded.measurements, loaded.source) == (SHAPE, (ROW,), {"device": "a CPU"})


def test_profile_of_another_layer_says_what_differs(saved):
    with pytest.raises(ValueError, match="another layer \\(num_kv_heads 8 instead of 4\\)"):
        load_profile(saved, replace(SHAPE, num_kv_heads=4))


def test_file_holds_a_profile_of_each_layer(tmp_path):
    path, wide = tmp_path / "profile.json", replace(SHAPE, ffn_hidden_size=512)
    save_profiles(path, [Profile(SHAPE, (ROW,)), Profile(wide, (replace(ROW, seconds=2.0),))])
    assert [load_profile(path, shape).measurements[0].seconds for shape in (SHAPE, wide)] == [0.5, 2.0]
    assert [profile.shape for profile in load_profiles(path)] == [SHAPE, wide]


def test_profile_without_the_layer_says_what_differs_from_the_closest(tmp_path):
    path, wide = tmp_path / "profile.json", replace(SHAPE, ffn_hidden_size=512, num_kv_heads=4)
    save_profiles(path, [Profile(SHAPE, (ROW,)), Profile(wide, (ROW,))])
    with pytest.raises(ValueError, match=r"2 other layers; of the closest \(causal True instead of False\)"):
        load_profile(path, replace(wide, causal=False))


def test_newer_measurements_take_the_place_of_older_ones():
    old, new = Profile(SHAPE, (ROW, replace(ROW, length=64))), Profile(SHAPE, (replace(ROW, seconds=9.0),))
    assert [(row.length, row.seconds) for row in old.merged(new).measurements] == [(1024, 9.0), (64, 0.5)]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"version": 1}, "of version 1; allowed: 2; profile again"),
        ({"format": "other"}, "which is no profile"),
        ({"layers": []}, "has no layers"),
        ({"layers": [7]}, "whose layer 0 is 7, no object"),
        ({"measurements": []}, "layer 0 has no measurements"),
        ({"measurements": [{"strategy": "ring"}]}, "layer 0 has a measurement 0 that is wrong"),
        ({"shape": None}, "layer 0: shape has None"),
    ],
)
def test_wrong_profile_names_key_and_cause(saved, keys, message):
    change(saved, **keys)
    with pytest.raises(ValueError, match=f"(?s)cost_model.load.*{message}"):
        load_profile(saved, SHAPE)


def test_profile_that_is_no_file_or_no_json(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load_profiles(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("text")
    with pytest.raises(ValueError, match="is not JSON"):
        load_profiles(tmp_path / "text.json")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"strategy": "other"}, "strategy is 'other'; allowed"),
        ({"length": 0}, "length is 0; allowed: an integer from 1"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"kept_bytes": -1}, "kept_bytes is -1; allowed: an integer from 0"),
    ],
)
def test_impossible_measurement_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        replace(ROW, **keys)


def test_clusters_are_found_by_name_and_in_files(tmp_path):
    assert find_cluster("8xH200") is PRESETS["8xH200"]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(PRESETS["8xA100-80G"].to_json()))
    assert find_cluster(str(path)) == PRESETS["8xA100-80G"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no preset and not readable .* allowed: 8xA100-80G"),
        ("text", "is not JSON"),
        ('{"colour": 1}', "must hold an object with the keys"),
        ('{"name": "x"}', "is incomplete"),
    ],
)
def test_wrong_cluster_names_option_and_presets(tmp_path, content, message):
    path = tmp_path / "cluster.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"--cluster is .*{message}"):
        find_cluster(str(path), "--cluster")


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"gemm_flops": 0}, "gemm_flops is 0"), ({"replicas": 1.5}, "replicas is 1.5; allowed: an integer"),
     ({"link_bandwidth": float("inf")}, "finite number from 1")],
)  # fmt: skip
def test_impossible_cluster_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        replace(PRESETS["8xH200"], **keys)
