"""Running users' scripts in processes of their own, with the package live as an installation makes it.

Contract: `launch` returns what the job printed and raises with its last lines if it failed or took too long; nothing
of the job outlives it. Scripts run in `folder`, so that is where grass.jsonl appears. Not covered: what the scripts do.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TIMEOUT_SECONDS = 300


def environment(folder: Path) -> dict[str, str]:
    """A fresh job's variables; where the package is not installed, a distribution that declares its entry point."""
    variables = {
        **os.environ,
        "PATH": os.pathsep.join([str(BIN), os.environ.get("PATH", "")]),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        # DeepSpeed compiles an operator at its first start; by default all its versions share, and break, one folder
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions"),
    }
    variables.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    if not any(entry.name == "ds_grass" for entry in entry_points(group="torch.backends")):
        metadata = folder / "installed" / "ds_grass-0.1.0.dist-info"
        metadata.mkdir(parents=True, exist_ok=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ds-grass\nVersion: 0.1.0\n")
        (metadata / "entry_points.txt").write_text(
            "[torch.backends]\nds_grass = ds_grass.activate:autoload\n"
        )
        variables["PYTHONPATH"] = os.pathsep.join([str(metadata.parent), str(REPOSITORY)])
    return variables


def launch(command: Sequence[str | Path], folder: Path, timeout: float = TIMEOUT_SECONDS) -> str:
    """Run `command` in `folder` to its end; returns stdout and stderr together."""
    folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=folder,
        env=environment(folder),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"no end after {timeout} s:\n{output[-4000:]}") from None
    finally:
        _clear_shared_memory(command)
    assert process.returncode == 0, f"exit code {process.returncode}:\n{output[-6000:]}"
    return output


def _clear_shared_memory(command: Sequence[str | Path]) -> None:
    """DeepSpeed 0.19's collectives on a CPU leave 69 MB a rank in /dev/shm, named by the job's port."""
    for option, port in zip(command, command[1:], strict=False):
        if str(option).endswith("_port"):
            for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
                left.unlink(missing_ok=True)


def deepspeed(script: Path, *arguments: object, ranks: int = 2) -> list[str]:
    """The `deepspeed` launcher."""
    options = ["--num_accelerators", str(ranks), "--master_port", str(free_port())]
    return [str(BIN / "deepspeed"), *options, str(script), *map(str, arguments)]


def torchrun(script: Path, *arguments: object, ranks: int = 1) -> list[str]:
    options = [
        "--nproc_per_node",
        str(ranks),
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(free_port()),
    ]
    return [str(BIN / "torchrun"), *options, str(script), *map(str, arguments)]


def accelerate(ds_config: Path, script: Path, *arguments: object, ranks: int = 1) -> list[str]:
    """`accelerate launch` with a DeepSpeed config file."""
    options = ["--use_deepspeed", "--deepspeed_config_file", str(ds_config), "--num_machines", "1"]
    options += [
        "--num_processes",
        str(ranks),
        "--main_process_port",
        str(free_port()),
        "--dynamo_backend",
        "no",
    ]
    return [str(BIN / "accelerate"), "launch", *options, str(script), *map(str, arguments)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_config(path: Path, *, grass: Mapping[str, Any] | None, **keys: Any) -> Path:
    """A ds_config.json with `keys` over the usual ones; `grass` None leaves the block out."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2},
        **keys,
    }
    if grass is not None:
        config["grass"] = dict(grass)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))
    return path


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The events of grass.jsonl in `folder`; no file, no events."""
    log = folder / "grass.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def expected_draws(steps: int, probe_steps: int, sampling_period: int) -> int:
    """Draws in a run of `steps` optimizer steps: one after probing, then one per full period."""
    return 1 + (steps - probe_steps) // sampling_period
