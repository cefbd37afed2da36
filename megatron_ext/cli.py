"""The command ``megatron_ext``: doctor, plan and report for Megatron-core, made of the parts of :mod:`ds_grass.cli`.

Contract: as there. Human output goes through rich, ``--json`` prints one JSON document and nothing else on standard
output. Status 0 = all well, 1 = a problem was found, 2 = wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from ds_grass.cli import Command, add_doctor_arguments, dispatch, positive, tell_findings

if TYPE_CHECKING:
    from rich.console import Console

    from .plan import Crossover

_COLUMNS = 120
"""Characters that tables take; a file or a pipe has 80 by default."""
_LENGTHS = [1024 * 2**power for power in range(11)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse `arguments` (default: the command line), run the subcommand, return its exit status."""
    return dispatch(
        "megatron_ext",
        "Sequence parallelism and recomputation for Megatron-core: tools.",
        _COMMANDS,
        arguments,
    )


def _run_doctor(parsed: argparse.Namespace) -> int:
    from . import doctor

    with redirect_stdout(sys.stderr):  # Megatron-core tells what is not installed while it is imported
        findings = doctor.examine(parsed.config)
    return tell_findings(findings, block="megatron_ext", as_json=parsed.json)


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL",
                        help="a config.json, a folder with one, or paper-bert, paper-llama, paper-gpt")  # fmt: skip
    parser.add_argument("--cluster", required=True, metavar="CLUSTER",
                        help="8xA100-80G, 8xH100-80G, 8xH200, 64xH100, or a JSON file that describes one")  # fmt: skip
    parser.add_argument("--tp", type=positive, default=8, metavar="RANKS",
                        help="of a tensor-parallel group; default: %(default)s")  # fmt: skip
    parser.add_argument(
        "--micro-batch", type=positive, default=1, metavar="ROWS", help="default: %(default)s"
    )
    parser.add_argument("--layers", type=positive, metavar="N",
                        help="of one rank, for a pipeline stage; default: all of the model's")  # fmt: skip
    parser.add_argument("--lengths", type=_length, nargs="+", default=_LENGTHS, metavar="TOKENS",
                        help="such as 4096 32K 1M; default: 1K to 1M in powers of two")  # fmt: skip
    parser.add_argument(
        "--config", metavar="FILE", help="a ds_config.json: its megatron_ext block; default: {}"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write the chart there, as PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")


def _length(text: str) -> int:
    """An argument such as 4096, 32K (32 x 1024) or 1M."""
    unit = {"K": 2**10, "M": 2**20}.get(text[-1:].upper(), 1)
    digits = text[:-1] if unit > 1 else text
    if not (digits.isascii() and digits.isdecimal()) or not 1 <= int(digits) * unit <= 2**40:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: tokens such as 4096, 32K or 1M")
    return int(digits) * unit


def _run_plan(parsed: argparse.Namespace) -> int:
    try:
        crossover = _planned(parsed)
    except (ValueError, RuntimeError) as error:
        return _failed("plan", error)
    if parsed.json:
        from .plan import document

        _tell_json(document(crossover))
    else:
        from .tables import show_crossover

        show_crossover(crossover, _console())
    drawn = _drawn("plan", parsed.output, "draw_crossover", crossover)
    fits = any(point.plan is not None and point.plan.fits for point in crossover.points)
    return 0 if drawn and fits else 1


def _planned(parsed: argparse.Namespace) -> Crossover:
    from .config import NAME, MegatronExtConfig, parse_block
    from .described_job import make_job
    from .described_model import read_model
    from .locate import read
    from .plan import make_crossover
    from .sequence_parallel.cluster import find_cluster

    config = MegatronExtConfig()
    if parsed.config is not None:
        ds_config = read(Path(parsed.config), "--config")
        if NAME not in ds_config:
            raise ValueError(f'--config names {parsed.config}, which has no {NAME} block; add "{NAME}": {{}}')
        config = parse_block(ds_config[NAME])
    job = make_job(
        read_model(parsed.model),
        find_cluster(parsed.cluster, "--cluster"),
        config,
        group_size=parsed.tp,
        micro_batch=parsed.micro_batch,
        num_layers=parsed.layers,
    )
    return make_crossover(job, parsed.lengths)


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("log", metavar="LOG", help="a megatron_ext.jsonl, or the folder that holds one")
    parser.add_argument("--run-id", metavar="ID",
                        help="which run of the file, or how its id begins; default: the last one")  # fmt: skip
    parser.add_argument("-o", "--output", metavar="FILE",
                        help="draw it there, as PNG; what stages recompute, in FILE_memory and _timeline")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")


def _run_report(parsed: argparse.Namespace) -> int:
    from . import report

    try:
        run = report.read_run(parsed.log, parsed.run_id)
    except report.ReportError as error:
        return _failed("report", error)
    if parsed.json:
        _tell_json(report.document(run))
    else:
        from .tables import show_run

        show_run(run, _console())
    return 0 if _drawn("report", parsed.output, "draw_run", run) else 1


def _drawn(command: str, path: str | None, function: str, subject: object) -> bool:
    """Whether the picture is written or not asked for; for want of matplotlib, which is one line, it need not be."""
    if path is None:
        return True
    try:
        from . import picture
    except ImportError as error:
        sys.stderr.write(f"megatron_ext {command}: no picture without matplotlib ({error}): "
                         "pip install ds_grass[report]\n")  # fmt: skip
        return True
    draw: Callable[[object, Path], list[Path]] = getattr(picture, function)
    try:
        written = draw(subject, Path(path))
    except OSError as error:
        sys.stderr.write(f"megatron_ext {command}: -o {path} cannot be written: {error}\n")
        return False
    if written != [Path(path)]:
        sys.stderr.write(f"megatron_ext {command}: drawn: {', '.join(map(str, written)) or 'nothing'}\n")
    return True


def _console() -> Console:
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False)
    console.width = max(console.width, _COLUMNS)
    return console


def _tell_json(document: object) -> None:
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def _failed(command: str, error: Exception) -> int:
    sys.stderr.write(f"megatron_ext {command}: {error}\n")
    return 1


_COMMANDS = {
    "doctor": Command(
        help="say whether a megatron_ext block would run here, and if not, why",
        run=_run_doctor,
        add_arguments=add_doctor_arguments,
    ),
    "plan": Command(
        help="predict what each strategy takes over the sequence length, and which plan would be chosen",
        run=_run_plan,
        add_arguments=_add_plan_arguments,
    ),
    "report": Command(
        help="say which strategy ran for which length, what each stage recomputes, and what was predicted",
        run=_run_report,
        add_arguments=_add_report_arguments,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
