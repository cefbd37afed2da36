"""Contracts of the state store on a CPU that plays the device: same bits in both modes, exact accounting."""

from __future__ import annotations

import pytest
import torch

from ds_grass import ops
from ds_grass.host_memory import host_storages, is_host
from ds_grass.state_store import StateStore
from ds_grass.unit_state import StateLayout
from tests import audit
from tests.state_scripts import (
    UNITS,
    WITHOUT_MASTER,
    assert_same,
    element_bytes,
    first_weights,
    new_store,
    play,
    play_plain,
    random_script,
    random_sets,
    step,
)

DTYPES = [torch.float32, torch.bfloat16]
MODES = ["resident", "stream"]


def layout(key: int, moment_dtype: torch.dtype = torch.float32) -> StateLayout:
    return StateLayout(UNITS[key], key not in WITHOUT_MASTER, moment_dtype)


# -- the same bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(6))
def test_random_run_equals_plain_states_bit_for_bit(seed: int, dtype: torch.dtype, mode: str) -> None:
    script, weights = random_script(seed), first_weights()
    slots = dict(buffers=2 + seed % 3, slot_numel=(5, 16, 40, 64, 96, 1000)[seed % 6])
    store = new_store(weights, moment_dtype=dtype, mode=mode, **slots)
    assert_same(play(script, store, weights), play_plain(script, dtype))


def test_scripts_cover_every_event() -> None:
    names = {event[0] for seed in range(8) for event in random_script(seed)}
    assert names == {"activate", "step", "mode", "round_trip", "look", "skip"}


@pytest.mark.parametrize("mode", MODES)
def test_frozen_unit_keeps_state_and_step_count(mode: str) -> None:
    weights = first_weights()
    store = new_store(weights, mode=mode)
    store.activate([0, 1])
    step(store, weights, [0, 1], 0)
    before = [None if tensor is None else tensor.clone() for tensor in store.home(0)[:3]]
    store.activate([1, 2])
    step(store, weights, [1, 2], 1)
    store.activate([0])
    assert store.steps == {key: {0: 1, 1: 2, 2: 1}.get(key, 0) for key in UNITS}
    for name, expected in zip(("master", "exp_avg", "exp_avg_sq"), before, strict=True):
        assert torch.equal(store.view(0, name), expected)


# -- pieces ---------------------------------------------------------------------------------------------


def spans(store: StateStore, keys: list[int]) -> list[tuple[int, int, int]]:
    return [(piece.key, piece.start, piece.stop) for piece in store.pieces(keys)]


def test_pieces_are_slices_of_a_slot_when_streaming() -> None:
    store = new_store(first_weights())
    store.activate([4, 5, 3])
    expected = [(5, 0, 64), (5, 64, 128), (5, 128, 192), (5, 192, 256), (5, 256, 257), (4, 0, 0), (3, 0, 33)]
    assert spans(store, [5, 4, 3]) == expected


def test_pieces_are_whole_units_when_resident() -> None:
    store = new_store(first_weights(), mode="resident")
    store.activate([4, 5, 1])
    pieces = list(store.pieces([5, 4, 1]))
    assert [piece[:3] for piece in pieces] == [(5, 0, 257), (4, 0, 0), (1, 0, 96)]
    assert [piece.master is None for piece in pieces] == [False, False, True]
    assert pieces[0].exp_avg.shape == (257,)


@pytest.mark.parametrize("mode", MODES)
def test_piece_is_a_device_copy_and_not_the_host_arena(mode: str) -> None:
    store = new_store(first_weights(), mode=mode)
    store.activate([0])
    for piece in store.pieces([0]):
        assert not any(is_host(tensor) for tensor in piece[3:])
    assert is_host(store.home(0).exp_avg)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_start_on_64_bytes(dtype: torch.dtype, mode: str) -> None:
    store = new_store(first_weights(), moment_dtype=dtype, mode=mode, slot_numel=1000)
    store.activate([3, 5, 6])
    held = [tensor for piece in store.pieces([3, 5, 6]) for tensor in piece[3:]]
    held += [tensor for key in (3, 5, 6) for tensor in store.home(key)[:3]]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in held if tensor is not None)


@pytest.mark.parametrize(
    ("slot_numel", "dtype", "key", "copies"),
    [
        (1000, torch.float32, 0, [1]),  # whole units, parts of 64 bytes and not
        (1000, torch.float32, 3, [1]),
        (1000, torch.bfloat16, 3, [1]),
        (100, torch.float32, 5, [1, 1, 1]),  # slices: the parts of one dtype are rows of one copy
        (100, torch.bfloat16, 5, [2, 2, 2]),  # fp32 masters apart from bf16 moments
        (64, torch.bfloat16, 1, [1, 1]),  # without masters
    ],
)
def test_state_moves_in_as_few_copies_as_its_layout_allows(
    monkeypatch: pytest.MonkeyPatch, slot_numel: int, dtype: torch.dtype, key: int, copies: list[int]
) -> None:
    store = new_store(first_weights(), slot_numel=slot_numel, moment_dtype=dtype)
    store.activate([key])
    transferred: list[str] = []
    transfer = ops.transfer_
    monkeypatch.setattr(
        ops, "transfer_", lambda to, source: (transferred.append("copy"), transfer(to, source))
    )
    made = []
    for direction in ("_copy_in", "_copy_out"):
        enqueue = getattr(store._engine, direction)

        def counted(work, after, enqueue=enqueue, direction=direction):
            before = len(transferred)
            enqueue(work, after)
            made.append((direction, len(transferred) - before))

        monkeypatch.setattr(store._engine, direction, counted)
    list(store.pieces([key]))
    assert [count for direction, count in made if direction == "_copy_in"] == copies
    assert [count for direction, count in made if direction == "_copy_out"] == copies


def test_iteration_that_is_left_sends_its_piece_home_and_can_start_again() -> None:
    store = new_store(first_weights())
    store.activate([5])
    for piece in store.pieces([5]):
        piece.exp_avg.fill_(7)
        if piece.start == 64:
            break
    assert store.view(5, "exp_avg").unique(return_counts=True)[1].tolist() == [257 - 128, 128]
    assert len(spans(store, [5])) == 5


def test_active_set_cannot_change_inside_an_iteration() -> None:
    store = new_store(first_weights())
    store.activate([0, 1])
    iteration = store.pieces([0, 1])
    next(iteration)
    for call in (
        lambda: store.activate([2]),
        lambda: store.set_mode("resident"),
        lambda: store.forget(0),
        lambda: list(store.pieces([1])),
    ):
        with pytest.raises(AssertionError):
            call()
    iteration.close()
    store.activate([2])


def test_units_outside_the_active_set_are_refused() -> None:
    store = new_store(first_weights())
    store.activate([0])
    with pytest.raises(AssertionError, match=r"\[1\]"):
        store.prefetch([0, 1])
    with pytest.raises(AssertionError, match=r"\[2\]"):
        list(store.pieces([2]))


# -- prefetch -------------------------------------------------------------------------------------------


def test_prefetch_takes_at_most_the_free_slots_in_order() -> None:
    store = new_store(first_weights(), buffers=3)
    store.activate([5, 0, 2])
    store.prefetch([0])
    assert store.counters["fetches"] == 2  # two slices of 96 elements
    store.prefetch([0, 5, 2])
    store.prefetch([0, 5, 2])
    assert store.counters["fetches"] == 3
    assert store.counters["device_bytes"] == 3 * 64 * 12
    step(store, first_weights(), [0, 5, 2], 0)
    assert store.counters["fetches"] == store.counters["stashes"] == 2 + 5 + 2  # nothing was fetched twice


def test_prefetch_of_other_units_cannot_block_an_update() -> None:
    store = new_store(first_weights(), buffers=2)
    store.activate([0, 2, 5])
    store.prefetch([0])
    assert len(spans(store, [5, 2, 0])) == 9
    assert store.counters["stashes"] == 9
    assert store.counters["fetches"] == 10  # only the last of the two had to make room


def test_prefetch_is_free_when_resident() -> None:
    store = new_store(first_weights(), mode="resident")
    store.activate([0, 1])
    store.prefetch([0, 1])
    assert store.counters["fetches"] == 0


@pytest.mark.parametrize("write", ["restore", "view", "forget"])
def test_state_written_after_a_prefetch_is_the_one_that_is_used(write: str) -> None:
    store = new_store(first_weights())
    store.activate([0])
    list(store.pieces([0]))
    store.prefetch([0])
    if write == "restore":
        store.restore(0, torch.full((96,), 3.0), torch.full((96,), 3.0), torch.full((96,), 3.0), 9)
    elif write == "view":
        store.view(0, "exp_avg").fill_(3.0)
    else:
        store.forget(0)
        store.restore(0, None, torch.full((96,), 3.0), torch.full((96,), 3.0), 9)
        store.activate([0])
    assert all((piece.exp_avg == 3.0).all() for piece in store.pieces([0]))


def test_write_through_a_resident_view_goes_home() -> None:
    store = new_store(first_weights(), mode="resident")
    store.activate([0])
    store.view(0, "master").fill_(4.0)
    store.activate([1])
    assert (store.view(0, "master") == 4.0).all()
    assert is_host(store.view(0, "master"))


# -- bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_stream_moves_exactly_the_state_each_way_each_step(dtype: torch.dtype) -> None:
    weights = first_weights()
    store = new_store(weights, moment_dtype=dtype)
    keys = [0, 1, 3, 4, 5]
    store.activate(keys)
    first = sum(weights[key].nbytes for key in keys if key not in WITHOUT_MASTER)
    assert store.counters["bytes_to_host"] == first  # the weights, once, to make the master
    for number in range(3):
        store.prefetch(keys)
        step(store, weights, keys, number)
    # a whole unit moves with the few bytes between its parts, a slice without
    state = sum(layout(key, dtype).nbytes for key in keys if UNITS[key] <= 64)
    state += sum(UNITS[key] * element_bytes(key, dtype) for key in keys if UNITS[key] > 64)
    assert store.counters["bytes_to_device"] == 3 * state
    assert store.counters["bytes_to_host"] == first + 3 * state


@pytest.mark.parametrize("dtype", DTYPES)
def test_resident_moves_only_units_that_leave_or_return(dtype: torch.dtype) -> None:
    weights = first_weights()
    store = new_store(weights, moment_dtype=dtype, mode="resident")
    unit = {key: UNITS[key] * element_bytes(key, dtype) for key in UNITS}
    store.activate([0, 1])
    step(store, weights, [0, 1], 0)
    assert store.counters["bytes_to_device"] == store.counters["bytes_to_host"] == 0
    store.activate([1, 5])
    step(store, weights, [1, 5], 1)
    assert (store.counters["bytes_to_device"], store.counters["bytes_to_host"]) == (0, unit[0])
    store.activate([5, 0])
    assert (store.counters["bytes_to_device"], store.counters["bytes_to_host"]) == (
        unit[0],
        unit[0] + unit[1],
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_resident_device_bytes_are_the_active_set_and_never_more_than_old_or_new(dtype: torch.dtype) -> None:
    store = new_store(first_weights(), moment_dtype=dtype, mode="resident")
    held = 0
    for keys in random_sets(seed=1, count=40):
        store.counters["device_bytes_peak"] = held
        store.activate(keys)
        needed = sum(layout(key, dtype).nbytes for key in keys)
        assert store.counters["device_bytes"] == needed
        assert store.counters["device_bytes_peak"] == max(held, needed)
        held = needed


def test_resident_unit_takes_over_the_memory_of_one_of_equal_size() -> None:
    store = new_store(first_weights(), mode="resident")
    store.activate([0, 5])
    address = store.view(0, "master").data_ptr()
    store.activate([5, 2])
    assert store.view(2, "master").data_ptr() == address


def test_resident_units_that_will_rest_go_home_one_by_one_under_the_updates() -> None:
    store = new_store(first_weights(), mode="resident")
    store.activate([0, 1, 2])
    before, seen = store.counters["stashes"], []
    for piece in store.pieces([2, 1, 0], then=[1, 7]):
        piece.exp_avg.fill_(piece.key + 1)
        seen.append(store.counters["stashes"] - before)
    assert seen == [0, 1, 1]
    assert store.counters["stashes"] - before == 2
    store.activate([1, 7])
    assert store.counters["stashes"] - before == 2  # none is sent twice
    for key in (0, 2):
        assert torch.equal(store.view(key, "exp_avg"), torch.full((96,), float(key + 1)))


def test_resident_unit_that_changes_again_after_it_went_ahead_goes_home_again() -> None:
    store = new_store(first_weights(), mode="resident")
    store.activate([0, 2])
    for value, then in ((1.0, [2]), (2.0, None)):
        for piece in store.pieces([0, 2], then):
            piece.exp_avg.fill_(value)
    store.activate([2])
    assert torch.equal(store.view(0, "exp_avg"), torch.full((96,), 2.0))


def test_stream_device_holds_slots_only_and_keeps_them() -> None:
    weights = first_weights()
    store = new_store(weights, buffers=3)
    assert store.counters["device_bytes"] == 0
    for keys in random_sets(seed=2, count=20):
        store.activate(keys)
        step(store, weights, keys, 0)
    assert store.counters["device_bytes"] == store.counters["device_bytes_peak"] == 3 * 64 * 12


def test_slot_is_no_larger_than_the_largest_unit() -> None:
    store = new_store(first_weights(), slot_numel=10**9)
    store.activate([6])
    list(store.pieces([6]))
    assert store.counters["device_bytes"] == layout(5).nbytes


def test_slots_grow_with_a_unit_added_later() -> None:
    weights = first_weights()
    store = new_store(weights, slot_numel=10**9)
    store.activate([0])
    store.prefetch([0])
    store.add(100, 1000, lambda: torch.ones(1000), master=True)
    store.activate([0, 100])
    assert spans(store, [0, 100]) == [(0, 0, 96), (100, 0, 1000)]
    assert (store.view(100, "master") == 1).all()


def test_mode_change_never_holds_slots_and_units_at_once() -> None:
    store = new_store(first_weights())
    store.activate([0, 2, 5])
    list(store.pieces([0, 2, 5]))
    slots, units = 2 * 64 * 12, sum(layout(key).nbytes for key in (0, 2, 5))
    store.set_mode("resident")
    assert store.counters["device_bytes"] == store.counters["device_bytes_peak"] == units
    store.set_mode("resident")
    store.set_mode("stream")
    assert store.counters["device_bytes"] == 0
    list(store.pieces([0, 2, 5]))
    assert store.counters["device_bytes"] == slots
    assert store.mode == "stream"
    assert store.active == (0, 2, 5)


def test_host_memory_grows_only_when_a_unit_is_first_drawn() -> None:
    store = new_store(first_weights())
    before = host_storages()
    sizes = []
    for keys in ([0], [0, 5], [2], [0, 2, 5]):
        store.activate(keys)
        sizes.append(store.counters["host_bytes"])
    expected = [layout(key).nbytes for key in (0, 5, 2)]
    assert sizes == [expected[0], sum(expected[:2]), sum(expected), sum(expected)]
    assert len(host_storages() - before) == 3
    assert [store.has_state(key) for key in UNITS] == [key in (0, 2, 5) for key in UNITS]


def test_final_host_bytes_are_those_held_when_all_were_drawn() -> None:
    store = new_store(first_weights())
    expected = store.final_host_bytes
    store.activate(list(UNITS))
    assert store.counters["host_bytes"] == expected


@pytest.mark.parametrize("mode", MODES)
def test_device_bytes_seen_by_the_allocator_are_those_counted(mode: str) -> None:
    numel = 1 << 20
    audit.start()
    weights = torch.ones(numel, dtype=torch.bfloat16)
    store = StateStore(
        device=torch.device("cpu"),
        moment_dtype=torch.float32,
        pin_memory=True,
        buffers=2,
        slot_numel=numel // 4,
        mode=mode,
    )
    for key in range(6):
        store.add(key, numel, lambda: weights, master=True)

    def run() -> None:
        for keys in ([0, 1], [1, 2], [3, 4], [0, 5]):
            store.activate(keys)
            store.prefetch(keys)
            list(store.pieces(keys))
        store.home(0)

    peak = audit.measure_peak(run)
    assert store.counters["device_bytes_peak"] == {"resident": 2, "stream": 0.5}[mode] * 12 * numel
    assert 0 <= peak.extra_bytes - store.counters["device_bytes_peak"] < 4096
    assert 0 <= peak.after - peak.bytes_before - store.counters["device_bytes"] < 4096


# -- looking, saving, restoring -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_unit_never_drawn_has_no_state(mode: str) -> None:
    store = new_store(first_weights(), mode=mode)
    assert not store.has_state(0)
    assert store.home(0) is None
    assert store.view(0, "exp_avg") is None
    assert store.steps[0] == 0


@pytest.mark.parametrize("mode", MODES)
def test_first_state_is_the_weights_and_zeros(mode: str) -> None:
    weights = first_weights()
    store = new_store(weights, mode=mode)
    weights[0].fill_(0.1)  # trained by somebody since `add`
    store.activate([0, 1])
    assert torch.equal(store.home(0).master, torch.full((96,), 0.1, dtype=torch.bfloat16).float())
    assert store.home(1).master is None
    assert store.view(1, "master") is None
    assert not store.home(0).exp_avg.any()
    assert not store.home(0).exp_avg_sq.any()


def test_first_state_from_weights_that_require_grad_takes_no_part_in_autograd() -> None:
    for mode in MODES:
        weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        store = StateStore(
            device=torch.device("cpu"),
            moment_dtype=torch.float32,
            pin_memory=False,
            buffers=2,
            slot_numel=8,
            mode=mode,
        )
        store.add(0, 8, lambda weight=weight: weight, master=True)
        store.activate([0])
        assert not any(tensor.requires_grad for piece in store.pieces([0]) for tensor in piece[3:])


def test_view_is_on_the_device_while_resident_and_at_home_otherwise() -> None:
    store = new_store(first_weights(), mode="resident")
    store.activate([0])
    assert not is_host(store.view(0, "exp_avg"))
    store.activate([1])
    assert is_host(store.view(0, "exp_avg"))
    store.set_mode("stream")
    assert is_host(store.view(1, "exp_avg"))


@pytest.mark.parametrize("into", MODES)
@pytest.mark.parametrize("out_of", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_run_continues_exactly_in_another_store(dtype: torch.dtype, out_of: str, into: str) -> None:
    weights = first_weights()
    store = new_store(weights, moment_dtype=dtype, mode=out_of)
    store.activate([0, 1, 5])
    step(store, weights, [0, 1, 5], 0)
    later = {key: value.clone() for key, value in weights.items()}
    resumed = new_store(later, moment_dtype=dtype, mode=into)
    resumed.activate([1, 2])
    for key in UNITS:
        saved = store.home(key)
        if saved is None:
            resumed.forget(key)
        else:
            resumed.restore(key, *saved)
    resumed.activate([0, 1, 5])
    for each, values in ((store, weights), (resumed, later)):
        step(each, values, [5, 1, 0], 1)
    assert resumed.steps == store.steps
    assert_same(
        (later, {key: resumed.home(key) for key in UNITS if resumed.has_state(key)}),
        (weights, {key: store.home(key) for key in UNITS if store.has_state(key)}),
    )


@pytest.mark.parametrize("mode", MODES)
def test_restore_without_master_starts_from_the_weights(mode: str) -> None:
    weights = first_weights()
    store = new_store(weights, mode=mode)
    store.activate([0])
    store.view(0, "master").fill_(9.0)
    store.restore(0, None, torch.ones(96), torch.ones(96), 4)
    assert torch.equal(store.view(0, "master"), weights[0].float())
    assert (store.view(0, "exp_avg") == 1).all()
    assert store.steps[0] == 4


def test_restore_casts_moments_and_ignores_a_master_nobody_keeps() -> None:
    store = new_store(first_weights(), moment_dtype=torch.bfloat16)
    store.restore(1, torch.ones(96), torch.full((96,), 0.1), torch.full((96,), 0.2), 1)
    assert store.home(1).master is None
    assert torch.equal(store.home(1).exp_avg, torch.full((96,), 0.1).bfloat16())
    assert store.moment_dtype is torch.bfloat16


def test_restore_of_a_wrong_size_names_the_part_and_both_sizes() -> None:
    store = new_store(first_weights())
    with pytest.raises(ValueError, match=r"exp_avg_sq of unit 0 has shape \(95,\).*\(96,\)"):
        store.restore(0, None, torch.ones(96), torch.ones(95), 1)
    assert not store.has_state(0)


@pytest.mark.parametrize("mode", MODES)
def test_forget_returns_to_never_drawn(mode: str) -> None:
    weights = first_weights()
    store = new_store(weights, mode=mode)
    store.activate([0, 2])
    step(store, weights, [0, 2], 0)
    store.forget(0)
    assert not store.has_state(0)
    assert store.steps[0] == 0
    assert store.active == (2,)
    assert store.counters["host_bytes"] == layout(2).nbytes
    store.activate([0, 2])
    assert torch.equal(store.home(0).master, weights[0].float())
    store.forget(3)  # never drawn


def test_ensure_makes_a_state_without_activating() -> None:
    weights = first_weights()
    store = new_store(weights, mode="resident")
    store.ensure(0)
    store.view(0, "exp_avg").fill_(2.0)
    store.ensure(0)
    assert store.active == ()
    assert store.counters["device_bytes"] == 0
    assert torch.equal(store.view(0, "master"), weights[0].float())
    store.activate([0])
    assert (store.view(0, "exp_avg") == 2.0).all()
    assert store.has_master(0)
    assert not store.has_master(1)


@pytest.mark.parametrize("mode", MODES)
def test_close_gives_everything_back(mode: str) -> None:
    before = host_storages()
    store = new_store(first_weights(), mode=mode)
    store.activate([0, 5])
    list(store.pieces([0, 5]))
    store.prefetch([0, 5])
    store.close()
    store.close()
    assert store.counters["device_bytes"] == store.counters["host_bytes"] == 0
    assert host_storages() == before


def test_stores_are_independent() -> None:
    weights, others = first_weights(), first_weights()
    stores = [new_store(weights), new_store(others, mode="resident")]
    for store, values in zip(stores, (weights, others), strict=True):
        store.activate([0, 1])
        step(store, values, [0, 1], 0)
    stores[0].close()
    assert stores[1].counters["stashes"] == 0
    assert torch.equal(stores[1].view(0, "master").bfloat16(), others[0])
