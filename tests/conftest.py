"""What every test shares: small threads, an environment without a launcher's variables, and `--resume`."""

from __future__ import annotations

import os

import pytest

pytest_plugins = ["tests.resume"]

# Two ranks and their threads share two cores in the smallest place these tests must run in. Set before torch is
# imported, and inherited by every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test is not a rank of the job that pytest may have been started from."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
