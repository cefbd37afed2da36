"""Contracts of host arenas and of the capacity check."""

from __future__ import annotations

import contextlib
import gc
import logging
import mmap
import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from ds_grass import host_memory
from ds_grass.host_memory import HostArena, check_host_capacity, host_storages, is_host

MIB = 1 << 20
GIB = 1 << 30


def rss() -> int:
    return psutil.Process().memory_info().rss


def test_arena_is_zeroed_page_aligned_and_exact() -> None:
    arena = HostArena(1000)
    assert arena.nbytes == arena.memory.numel() == arena.memory.untyped_storage().nbytes() == 1000
    assert arena.memory.data_ptr() % mmap.PAGESIZE == 0
    assert not arena.memory.any()
    assert not arena.pinned


def test_arena_costs_no_physical_memory_until_written() -> None:
    before = rss()
    arena = HostArena(256 * MIB)
    untouched = rss() - before
    arena.memory[: 64 * MIB].fill_(1)
    assert untouched < 4 * MIB
    assert 60 * MIB < rss() - before < 80 * MIB
    arena.free()
    assert rss() - before < 8 * MIB


def test_arena_of_zero_bytes_is_empty_and_not_registered() -> None:
    before = host_storages()
    arena = HostArena(0)
    assert arena.memory.shape == (0,)
    assert host_storages() == before
    arena.free()


def test_registry_knows_views_until_the_arena_is_freed() -> None:
    arena = HostArena(256)
    view = arena.memory[64:128].view(torch.float32)
    assert view.untyped_storage().data_ptr() in host_storages()
    assert is_host(view)
    assert not is_host(torch.empty(8))
    assert not is_host(torch.empty(8, device="meta"))
    arena.free()
    arena.free()
    assert not is_host(view)
    view.fill_(3)  # the pages stay as long as a view does


def test_registry_forgets_a_collected_arena() -> None:
    before = host_storages()
    arena = HostArena(256)
    assert len(host_storages()) == len(before) + 1
    del arena
    gc.collect()
    assert host_storages() == before


def test_fork_does_not_copy_or_share_the_pages() -> None:
    arena = HostArena(4 * MIB)
    address = arena.memory.data_ptr()
    flags = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = line.split()[0].split("-")
        if len(bounds) == 2:
            inside = int(bounds[0], 16) <= address < int(bounds[1], 16)
        elif line.startswith("VmFlags") and inside:
            flags = line
    assert " dc" in flags  # do not copy on fork


class FakeCudart:
    """Records registrations; answers `error` to each."""

    def __init__(self, error: int = 0, unregister_error: int = 0) -> None:
        self.error, self.unregister_error = error, unregister_error
        self.registered: list[tuple[int, int, int]] = []
        self.unregistered: list[int] = []

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.registered.append((address, nbytes, flags))
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        self.unregistered.append(address)
        return self.unregister_error


def use(monkeypatch: pytest.MonkeyPatch, cudart: FakeCudart) -> FakeCudart:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(host_memory, "_warned_pageable", False)
    return cudart


def test_pinning_registers_exactly_and_ends_before_the_pages_go(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = use(monkeypatch, FakeCudart())
    arena = HostArena(5000, pin_device=torch.device("cpu"))
    address = arena.memory.data_ptr()
    assert arena.pinned
    assert cudart.registered == [(address, 5000, 1)]
    arena.free()
    assert cudart.unregistered == [address]
    collected = HostArena(100, pin_device=torch.device("cpu"))
    address = collected.memory.data_ptr()
    del collected
    gc.collect()
    assert cudart.unregistered[1:] == [address]


def test_pinning_that_fails_falls_back_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cudart = use(monkeypatch, FakeCudart(error=2))
    launches = []

    def launch(*shape: int, device: torch.device) -> None:
        launches.append(shape)
        raise RuntimeError("CUDA error: out of memory")  # what the check after a launch finds and takes away

    monkeypatch.setattr(torch, "ones", launch)
    with caplog.at_level(logging.WARNING):
        arenas = [HostArena(100, pin_device=torch.device("cpu")) for _ in range(3)]
    assert not any(arena.pinned for arena in arenas)
    assert len(launches) == 3
    assert [record.message for record in caplog.records if "could not pin" in record.message] == [
        record.message for record in caplog.records
    ]
    assert len(caplog.records) == 1
    assert "half the speed" in caplog.text
    assert "grass.states.pin_memory" in caplog.text
    arenas[0].memory.fill_(1)
    for arena in arenas:
        arena.free()
    assert cudart.unregistered == []


def test_forked_child_does_not_unregister(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = use(monkeypatch, FakeCudart())
    arena = HostArena(100, pin_device=torch.device("cpu"))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    arena.free()
    assert cudart.unregistered == []


def test_failing_unregister_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(monkeypatch, FakeCudart(unregister_error=713))
    HostArena(100, pin_device=torch.device("cpu")).free()
    assert "713" in caplog.text


def fake_system(
    root: Path, available: int | None, cgroup_line: str = "", files: dict[str, str] | None = None
) -> dict[str, Path]:
    """procfs and cgroup trees below `root`, as arguments for `check_host_capacity`."""
    proc, cgroup = root / "proc", root / "cgroup"
    (proc / "self").mkdir(parents=True)
    if available is not None:
        (proc / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {available // 1024} kB\n")
    (proc / "self" / "cgroup").write_text(f"3:cpuset:/\n{cgroup_line}\n" if cgroup_line else "3:cpuset:/\n")
    for name, text in (files or {}).items():
        (cgroup / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroup / name).write_text(text)
    return {"proc": proc, "cgroup": cgroup}


def test_capacity_allows_what_fits_this_machine() -> None:
    check_host_capacity(MIB, 1)


def test_capacity_error_names_the_numbers_and_the_keys(tmp_path: Path) -> None:
    system = fake_system(tmp_path, available=64 * GIB)
    check_host_capacity(16 * GIB, 4, **system)
    with pytest.raises(RuntimeError) as error:
        check_host_capacity(16 * GIB + 1, 4, **system)
    text = str(error.value)
    for part in (
        "16.00 GiB",
        "64.00 GiB",
        "4 ranks",
        "available memory",
        'states.dtype to "bf16"',
        "master_weights",
    ):
        assert part in text
    assert "\n" not in text


V1_UNLIMITED = "9223372036854771712"


@pytest.mark.parametrize(
    ("line", "files", "room"),
    [
        pytest.param("0::/", {"memory.max": f"{8 * GIB}\n"}, 8 * GIB, id="v2, own namespace"),
        pytest.param("0::/", {"memory.max": "max\n"}, None, id="v2, no limit"),
        pytest.param(
            "0::/a/b",
            {"a/b/memory.max": "max\n", "a/memory.max": f"{9 * GIB}\n", "memory.stat": "file 0\n"},
            9 * GIB,
            id="v2, the limit stands above",
        ),
        pytest.param(
            "0::/a",
            {
                "a/memory.max": f"{8 * GIB}",
                "a/memory.current": f"{5 * GIB}",
                "a/memory.stat": f"anon 7\nactive_file {GIB}\ninactive_file {2 * GIB}\n",
            },
            6 * GIB,
            id="v2, in use less page cache",
        ),
        pytest.param(
            "0::/../elsewhere", {"memory.max": f"{7 * GIB}"}, 7 * GIB, id="v2, outside the namespace"
        ),
        pytest.param(
            "4:cpu,memory:/docker/x",
            {"memory/memory.limit_in_bytes": f"{6 * GIB}", "memory/memory.usage_in_bytes": f"{GIB}"},
            5 * GIB,
            id="v1, path of the host not visible",
        ),
        pytest.param(
            "4:memory:/job",
            {
                "memory/job/memory.limit_in_bytes": f"{6 * GIB}",
                "memory/job/memory.usage_in_bytes": f"{4 * GIB}",
                "memory/job/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n",
                "memory/memory.limit_in_bytes": V1_UNLIMITED,
            },
            3 * GIB,
            id="v1, in use less page cache of the subtree",
        ),
        pytest.param("4:memory:/", {"memory/memory.limit_in_bytes": V1_UNLIMITED}, None, id="v1, no limit"),
        pytest.param("0::/", {"memory.max": "0"}, 0, id="v2, nothing"),
    ],
)
def test_capacity_respects_the_cgroup(
    tmp_path: Path, line: str, files: dict[str, str], room: int | None
) -> None:
    system = fake_system(tmp_path, available=64 * GIB, cgroup_line=line, files=files)
    bound = 64 * GIB if room is None else room
    check_host_capacity(bound // 2, 2, **system)
    with pytest.raises(RuntimeError, match="available memory" if room is None else "cgroup limit"):
        check_host_capacity(bound // 2 + 1, 2, **system)


def test_capacity_asks_psutil_where_there_is_no_procfs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = {"proc": tmp_path / "none", "cgroup": tmp_path / "none"}
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    check_host_capacity(500, 2, **system)
    with pytest.raises(RuntimeError, match="available memory"):
        check_host_capacity(501, 2, **system)


def test_capacity_is_not_checked_where_nothing_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "psutil", None)
    check_host_capacity(1 << 60, 1, proc=tmp_path, cgroup=tmp_path)
