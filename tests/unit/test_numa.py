"""Contracts of `ds_grass.numa`: the node that the system names, and no harm where it names none."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ds_grass import host_memory, numa
from ds_grass.host_memory import HostArena

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def sysfs(tmp_path, monkeypatch):
    """Two nodes, and a GPU at 0000:3b:00.0 next to the second."""
    for node in ("node0", "node1"):
        (tmp_path / "devices/system/node" / node).mkdir(parents=True)
    pci = tmp_path / "bus/pci/devices/0000:3b:00.0"
    pci.mkdir(parents=True)
    (pci / "numa_node").write_text("1\n")
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return tmp_path


def test_node_is_the_one_that_the_system_names(sysfs):
    assert numa.node_of(DEVICE, sysfs) == 1


@pytest.mark.parametrize("text", ["-1\n", "", "?"])
def test_node_that_the_system_does_not_know_is_none(sysfs, text):
    (sysfs / "bus/pci/devices/0000:3b:00.0/numa_node").write_text(text)
    assert numa.node_of(DEVICE, sysfs) is None


def test_node_of_a_device_that_is_not_there_is_none(sysfs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    assert numa.node_of(DEVICE, sysfs) is None


def test_one_node_asks_nobody(sysfs, monkeypatch):
    (sysfs / "devices/system/node/node1").rmdir()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: pytest.fail("asked"))
    assert numa.node_of(DEVICE, sysfs) is None


def test_kernel_takes_the_wish_for_a_node_that_is_there():
    pages = torch.frombuffer(mmap.mmap(-1, 1 << 20), dtype=torch.uint8)
    if not numa.prefer(pages.data_ptr(), 1 << 20, 0):
        pytest.skip("this kernel has no NUMA policies, or forbids them")
    maps = Path("/proc/self/numa_maps").read_text()
    assert re.search(rf"^{pages.data_ptr():x} prefer\S*:0", maps, re.MULTILINE)


def test_wishes_that_cannot_be_had_are_false():
    pages = torch.frombuffer(mmap.mmap(-1, 1 << 16), dtype=torch.uint8)
    assert not numa.prefer(pages.data_ptr(), 1 << 16, 1023)
    assert not numa.prefer(pages.data_ptr(), 1 << 16, 5000)
    assert not numa.prefer(pages.data_ptr(), 0, 0)


def test_arena_for_a_gpu_is_wanted_on_its_node_before_it_is_pinned(monkeypatch):
    events = []
    monkeypatch.setattr(numa, "node_of", lambda device: 1)
    monkeypatch.setattr(numa, "prefer", lambda address, nbytes, node: events.append((nbytes, node)))
    monkeypatch.setattr(host_memory, "_register", lambda *arguments: events.append("pinned") or False)
    HostArena(5000, pin_device=DEVICE)
    assert events == [(5000, 1), "pinned"]
    HostArena(5000)
    assert len(events) == 2
