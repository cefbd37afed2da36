"""Contracts of the agreement at start: all ranks go on, or all raise one error that names who differs."""

from __future__ import annotations

import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ds_grass import agreement

FACTS = {"ds_grass version": "0.1.0", "grass.seed": 1234, "grass.layers": None, "zero stage": 2}
LAUNCHER_NAMES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")


def run_ranks(functions, store):
    """Run functions[r](store) in one thread for each rank; returns what each raised, or None."""
    outcomes = [None] * len(functions)

    def run(rank):
        try:
            functions[rank](store)
        except (ValueError, RuntimeError) as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return outcomes


def agreeing(rank, world_size, facts=FACTS, timeout_s=10.0, **kwargs):
    return lambda store: agreement.agree(store, rank, world_size, facts, timeout_s, **kwargs)


def absent(store):
    """A rank that never comes."""


@pytest.fixture(params=["hash", "file", "tcp"])
def store(request, tmp_path):
    if request.param == "hash":
        return dist.HashStore()
    if request.param == "file":
        return dist.FileStore(str(tmp_path / "store"))
    return dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)


@pytest.fixture(autouse=True)
def _host_a(monkeypatch):
    monkeypatch.setattr(agreement, "_host", lambda: "a")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def post_from(store, host, rank, facts, local_world_size="1", name="grass/0"):
    """What a rank on another host leaves on the board."""
    place = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": local_world_size}
    store.set(f"{name}/rank{rank}", json.dumps({"host": host, "place": place, "facts": facts}))
    store.add(f"{name}/readers", 1)  # rank 0 need not wait for this one


def test_equal_facts_let_all_ranks_go_on(store):
    assert run_ranks([agreeing(rank, 3) for rank in range(3)], store) == [None] * 3


def test_one_rank_needs_no_store():
    agreement.agree(None, 0, 1, FACTS)
    agreement.post_failure(None, 0, 1, ValueError("wrong"))


def test_another_seed_stops_every_rank_and_names_host_key_and_values(store):
    post_from(store, "b", 2, {**FACTS, "grass.seed": 7})
    outcomes = run_ranks([agreeing(0, 3), agreeing(1, 3)], store)
    assert [type(error) for error in outcomes] == [ValueError] * 2
    assert "rank 2 (host b) has grass.seed 7, rank 0 (host a) has 1234" in str(outcomes[0])
    assert str(outcomes[0]) == str(outcomes[1])
    assert "\n" not in str(outcomes[0])


def test_the_rank_that_differs_raises_the_same(store):
    others = {**FACTS, "grass.layers": "model.layers"}
    outcomes = run_ranks([agreeing(0, 3), agreeing(1, 3), agreeing(2, 3, others)], store)
    assert len({str(error) for error in outcomes}) == 1
    assert 'rank 2 (host a) has grass.layers "model.layers", rank 0 (host a) has null' in str(outcomes[2])


def test_ranks_that_differ_alike_are_named_together(store):
    post_from(store, "b", 2, {**FACTS, "grass.seed": 7})
    post_from(store, "b", 3, {**FACTS, "grass.seed": 7})
    (error, _) = run_ranks([agreeing(0, 4), agreeing(1, 4)], store)
    assert "ranks 2 and 3 (host b) have grass.seed 7" in str(error)


def test_key_that_only_one_rank_knows_is_named(store):
    (error, _) = run_ranks([agreeing(0, 2), agreeing(1, 2, {**FACTS, "grass.new": 1})], store)
    assert "rank 1 (host a) has grass.new 1, rank 0 (host a) has nothing" in str(error)


def test_disabled_block_on_one_rank_is_what_is_named():
    facts = [{"ds_grass version": "0.1.0", "grass.enabled": True, "grass.seed": 1}, {"grass.enabled": False}]
    (error, _) = run_ranks([agreeing(rank, 2, facts[rank]) for rank in range(2)], dist.HashStore())
    assert str(error).startswith(
        "rank 1 (host a) has grass.enabled false, rank 0 (host a) has true; start all"
    )


def test_many_differences_are_counted_not_listed():
    store = dist.HashStore()
    facts = [{f"key{index}": rank for index in range(20)} for rank in range(2)]
    (error, _) = run_ranks([agreeing(rank, 2, facts[rank]) for rank in range(2)], store)
    assert "and 14 more" in str(error)
    assert len(str(error)) < 600


def test_missing_rank_is_named_with_its_neighbours_host(store, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    post_from(store, "b", 2, FACTS, local_world_size="2")
    outcomes = run_ranks([agreeing(0, 4, timeout_s=0.5), agreeing(1, 4, timeout_s=5.0)], store)
    assert [type(error) for error in outcomes] == [RuntimeError] * 2
    assert "rank 3 (host b) did not answer within 0.5 s" in str(outcomes[0])
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD" in str(outcomes[0])
    assert "\n" not in str(outcomes[0])


def test_missing_rank_on_a_silent_host_is_named_without_it(store):
    (error, _) = run_ranks([agreeing(0, 2, timeout_s=0.3), absent], store)
    assert "rank 1 (host unknown) did not answer" in str(error)


def test_missing_rank_zero_is_named_by_the_others(store):
    outcomes = run_ranks([absent, agreeing(1, 3, timeout_s=0.4), agreeing(2, 3, timeout_s=0.6)], store)
    assert [type(error) for error in outcomes[1:]] == [RuntimeError] * 2
    assert "rank 0 (host unknown) did not answer" in str(outcomes[1])
    assert str(outcomes[1]) == str(outcomes[2])


def test_many_missing_ranks_are_counted_not_listed():
    (error, *_) = run_ranks([agreeing(0, 100, timeout_s=0.1)], dist.HashStore())
    assert "and 91 more did not answer" in str(error)


@pytest.mark.parametrize("failing", [0, 1])
def test_failure_before_agreement_reaches_the_others_at_once(store, failing):
    wrong = ValueError("grass.active_layers is 40 but the model has 32 layers; use 1 to 32\nsecond line")

    def fail(store):
        agreement.post_failure(store, failing, 2, wrong)
        raise wrong

    functions = [agreeing(rank, 2, timeout_s=30.0) for rank in range(2)]
    functions[failing] = fail
    start = time.monotonic()
    outcomes = run_ranks(functions, store)
    assert time.monotonic() - start < 4.0
    assert outcomes[failing] is wrong
    assert type(outcomes[1 - failing]) is ValueError
    assert str(outcomes[1 - failing]) == f"rank {failing} (host a): {str(wrong).splitlines()[0]}"


def test_failure_on_all_ranks_waits_for_nobody(store):
    start = time.monotonic()
    fail = [
        lambda store, rank=rank: agreement.post_failure(store, rank, 3, ValueError("x")) for rank in range(3)
    ]
    assert run_ranks(fail, store) == [None] * 3
    assert time.monotonic() - start < 2.0


def test_failure_of_the_environment_stays_a_runtime_error():
    store = dist.HashStore()
    agreement.post_failure(store, 1, 2, RuntimeError("deepspeed.x is missing"))
    with pytest.raises(RuntimeError, match=r"rank 1 \(host a\): deepspeed.x is missing"):
        agreement.agree(store, 0, 2, FACTS, 5.0)


def test_engines_of_one_process_do_not_read_each_other(store):
    first, second = agreement.next_name(), agreement.next_name()
    assert first != second
    assert run_ranks([agreeing(rank, 2, name=first) for rank in range(2)], store) == [None] * 2
    changed = {**FACTS, "grass.seed": 5}
    assert run_ranks([agreeing(rank, 2, changed, name=second) for rank in range(2)], store) == [None] * 2


def test_store_that_went_away_is_an_error_that_points_to_rank_zero():
    server = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, None, is_master=False, wait_for_workers=False)
    del server
    with pytest.raises(RuntimeError, match="lost the store .* see its log"):
        agreement.agree(client, 1, 2, FACTS, 1.0)
    agreement.post_failure(client, 1, 2, ValueError("x"))


def test_facts_hold_versions_keys_and_layout():
    config = SimpleNamespace(model_dump=lambda **kwargs: {"seed": 3, "states": {"mode": None}})
    params = (("layers.0.weight", torch.zeros(3, 2)),)
    layout = SimpleNamespace(blocks=(SimpleNamespace(name="layers.0", params=params),), outer=())
    facts = agreement.facts_of(config, layout, zero_stage=2)
    assert facts["grass.seed"] == 3
    assert facts["grass.states.mode"] is None
    assert facts["zero stage"] == 2
    assert facts["number of blocks"] == 1
    larger = SimpleNamespace(
        blocks=(SimpleNamespace(name="layers.0", params=(("layers.0.weight", torch.zeros(3, 3)),)),), outer=()
    )
    assert agreement.layout_fingerprint(larger) != agreement.layout_fingerprint(layout)


def test_layout_fingerprint_counts_a_partitioned_parameter_whole():
    whole, shard = torch.zeros(6), torch.zeros(3)
    shard.ds_numel = 6
    layouts = [SimpleNamespace(blocks=(), outer=(("head", parameter),)) for parameter in (whole, shard)]
    assert agreement.layout_fingerprint(layouts[0]) == agreement.layout_fingerprint(layouts[1])


@pytest.mark.parametrize("name", LAUNCHER_NAMES)
def test_ranks_on_node_is_what_any_launcher_says(monkeypatch, name):
    for other in LAUNCHER_NAMES:
        monkeypatch.delenv(other, raising=False)
    assert agreement.ranks_on_node() is None
    monkeypatch.setenv(name, "")
    assert agreement.ranks_on_node() is None
    monkeypatch.setenv(name, "3")
    assert agreement.ranks_on_node() == 3


def test_ranks_on_node_of_torchrun_goes_before_that_of_mpi(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "1")
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert agreement.ranks_on_node() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert agreement.ranks_on_node() == 4


def test_default_store_without_process_group_says_so():
    with pytest.raises(RuntimeError, match="torch.distributed is not initialized"):
        agreement.default_store()


def _process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    store = agreement.default_store()
    agreement.agree(store, rank, 2, FACTS, 20.0, name="grass/0")
    with pytest.raises(ValueError, match="has grass.seed 1, rank 0") as caught:
        agreement.agree(store, rank, 2, {**FACTS, "grass.seed": rank}, 20.0, name="grass/1")
    (folder / f"rank{rank}").write_text(str(caught.value))
    dist.destroy_process_group()


@pytest.mark.distributed
def test_processes_agree_and_differ_through_their_default_store(tmp_path):
    mp.spawn(_process, args=(tmp_path,), nprocs=2)
    assert (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text()


def test_default_store_missing_in_torch_is_named(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.delattr(dist.distributed_c10d, "_get_default_store")
    with pytest.raises(RuntimeError, match=f"_get_default_store is missing in torch {torch.__version__[:4]}"):
        agreement.default_store()
