"""The main job on real text, in under four minutes on two cores; `make demo` runs it.

A small Llama is pre-trained on Python's documentation, then fine-tuned on Python code three times from that
checkpoint with equal tokens: with GRASS, with the outer parameters only, and with plain AdamW. Every run is
`deepspeed --num_accelerators 2 train_trainer.py`, an ordinary Trainer script that knows nothing of this package;
GRASS is on where the ds_config.json has a `grass` block, and nowhere else. The numbers, a picture and every file
behind them are left in the output folder. Exit code 1: a check failed; 2: the demo could not run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from demo_picture import draw_picture
from demo_report import Run, print_blocks, print_bytes, print_checks, print_losses, read_run, run_checks
from rich.console import Console
from rich.rule import Rule

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "ds_config.json"
OUTER = "embed_tokens|model[.]norm|lm_head"
NUM_RANKS = 2
# Both are multiples of the sampling period's divisor 10, so that every draw falls on a saved checkpoint.
SAVE_STEPS = 10

console = Console(highlight=False)


@dataclass(frozen=True)
class Method:
    """One way to fine-tune. The learning rate is the best of 1e-3 * (1, 2, 4, 8, 16) for this method, found
    beforehand with other seeds on the same data; giving all the same would favour one of them."""

    name: str
    title: str
    learning_rate: float
    has_block: bool = False
    arguments: tuple[str, ...] = ()


METHODS = (
    Method(
        "grass",
        "GRASS",
        8e-3,
        has_block=True,
        arguments=("--save-steps", str(SAVE_STEPS), "--save-only-model"),
    ),
    Method("outer", "outer only", 1.6e-2, arguments=("--train-only", OUTER)),
    Method("adamw", "plain AdamW", 4e-3),
)


def main() -> int:
    options = parse_arguments()
    if not any(entry.name == "ds_grass" for entry in entry_points(group="torch.backends")):
        console.print(
            "[red]ds_grass is not installed in this environment[/]: run `pip install .`, or `make demo`"
        )
        return 2
    begin = time.perf_counter()
    output = Path(options.output).resolve()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    console.print(Rule("GRASS on a small Llama, two ranks, ZeRO-2"))
    try:
        pretrained = pretrain(output, options)
        runs = [fine_tune(output, method, options) for method in METHODS]
    except subprocess.CalledProcessError as error:
        console.print(f"[red]the job ended with exit code {error.returncode}[/]; its last lines:")
        console.print(error.output, markup=False, soft_wrap=True)
        return 2
    grass, outer, adamw = runs
    print_losses(console, runs)
    print_bytes(console, grass)
    print_blocks(console, grass)
    checks = run_checks(grass, outer, pretrained.folder)
    print_checks(console, checks)
    picture = draw_picture(output / "demo.png", grass, outer, adamw)
    console.print(f"picture: {picture}\n{time.perf_counter() - begin:.0f} s in all")
    return 0 if all(check.passed for check in checks) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="demo-output", metavar="FOLDER", help="is emptied first")
    parser.add_argument("--pretrain-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps of each fine-tuning run")
    parser.add_argument("--seed", type=int, default=1234)
    return parser.parse_args()


def pretrain(output: Path, options: argparse.Namespace) -> Run:
    arguments = ["--dataset", "python-docs", "--max-steps", str(options.pretrain_steps)]
    arguments += ["--learning-rate", "4e-3", "--eval-steps", str(max(1, options.pretrain_steps // 4))]
    method = Method("pretrained", "pre-training", 4e-3)
    return run_script(output, method, [*arguments, "--seed", str(options.seed)])


def fine_tune(output: Path, method: Method, options: argparse.Namespace) -> Run:
    arguments = ["--dataset", "python-code", "--model", str(output / "pretrained")]
    arguments += ["--max-steps", str(options.steps), "--learning-rate", str(method.learning_rate)]
    arguments += ["--eval-steps", str(SAVE_STEPS), "--seed", str(options.seed)]
    return run_script(output, method, [*arguments, *method.arguments])


def run_script(output: Path, method: Method, arguments: list[str]) -> Run:
    """Launch the training script as a user would; returns what it left behind."""
    folder = output / method.name
    folder.mkdir()
    config = json.loads(CONFIG.read_text())
    if not method.has_block:
        del config["grass"]
    (folder / "ds_config.json").write_text(json.dumps(config, indent=2) + "\n")
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(NUM_RANKS)]
    command += ["--master_port", str(free_port()), str(HERE / "train_trainer.py"), "--cpu"]
    command += ["--deepspeed", "ds_config.json", "--output", ".", *arguments]
    begin = time.perf_counter()
    watch(method.title, command, folder)
    run = read_run(method.title, folder, time.perf_counter() - begin)
    console.print(
        f"[bold]{method.title:12}[/] held-out loss {run.losses[0]:.3f} -> {run.losses[-1]:.3f}, "
        f"{run.steps} steps in {run.train_seconds:.0f} of {run.seconds:.0f} s"
    )
    return run


def job_environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // NUM_RANKS)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # DeepSpeed compiles an operator at its first start; by default all its versions share, and break, one folder
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions"),
    }


def watch(title: str, command: list[str], folder: Path) -> None:
    """Run to the end, with the last held-out loss beside a spinner; the whole output goes to output.txt."""
    lines: list[str] = []
    with console.status(f"{title}: starting") as status, open(folder / "output.txt", "w") as file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=job_environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdout is not None
        with process:
            for line in process.stdout:
                file.write(line)
                lines = [*lines[-40:], line]
                if found := re.search(r"'eval_loss': '?([0-9.]+)", line):
                    status.update(f"{title}: held-out loss {found[1]}")
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output="".join(lines))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
