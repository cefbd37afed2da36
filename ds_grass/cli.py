"""The command ``ds_grass``: one table of subcommands, each a function from arguments to an exit status.

Contract: human output goes through rich, a path alone goes as it is; ``--json`` prints one JSON document and
nothing else on standard output. Status 0 = all well, 1 = a problem was found, 2 = wrong arguments. No other file
prints, but :mod:`megatron_ext.cli`, which is made of the same parts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__

if TYPE_CHECKING:
    from .doctor.finding import Finding
    from .plan import Plan


_PLAN_COLUMNS = 100
"""Characters that the tables of a plan take; a file or a pipe has 80 by default."""


@dataclass(frozen=True)
class Command:
    """A subcommand: its line of help, its arguments, and what it does."""

    help: str
    run: Callable[[argparse.Namespace], int]
    add_arguments: Callable[[argparse.ArgumentParser], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse `arguments` (default: the command line), run the subcommand, return its exit status."""
    return dispatch("ds_grass", "GRASS for DeepSpeed: tools for training.", _COMMANDS, arguments)


def dispatch(
    prog: str, description: str, commands: Mapping[str, Command], arguments: Sequence[str] | None
) -> int:
    """Run one of `commands`."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--version", action="version", version=f"{prog} {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, command in commands.items():
        subparser = subparsers.add_parser(name, help=command.help, description=command.help)
        command.add_arguments(subparser)
    parsed = parser.parse_args(arguments)
    return commands[parsed.command].run(parsed)


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `doctor`."""
    parser.add_argument(
        "--config", metavar="FILE", help="look at this ds_config too: its block, and conflicts"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")


def _run_doctor(parsed: argparse.Namespace) -> int:
    from . import doctor

    with redirect_stdout(sys.stderr):  # DeepSpeed logs to standard output while it is imported
        findings = doctor.examine(parsed.config)
    return tell_findings(findings, block="grass", as_json=parsed.json)


def tell_findings(findings: Sequence[Finding], *, block: str, as_json: bool) -> int:
    """Print what `doctor` found out about running a `block`; return the exit status."""
    healthy = all(finding.state != "problem" for finding in findings)
    if as_json:
        document = {"healthy": healthy, "findings": [asdict(finding) for finding in findings]}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        _print_findings(findings, healthy, block)
    return 0 if healthy else 1


def _print_findings(findings: Sequence[Finding], healthy: bool, block: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.padding import Padding
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False)
    signs = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "problem": "[bold red]problem[/]"}
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    table.add_column(width=7)
    table.add_column(style="bold", max_width=32, overflow="fold")
    table.add_column(overflow="fold")
    previous = None
    for finding in findings:
        if finding.section != previous:
            table.add_row("", f"[cyan]{finding.section}[/]", "")
            previous = finding.section
        text = escape(finding.value)
        if finding.cure:
            text += f"\n[dim]-> {escape(finding.cure)}[/]"
        table.add_row(signs[finding.state], escape(finding.name), text)
    console.print(table)
    for finding in findings:
        if finding.detail:
            console.print(f"\n[bold]{escape(finding.name)}[/]")
            console.print(Padding(escape(finding.detail), (0, 2)))
    which = (
        "This ds_config"
        if any(finding.section == "config" for finding in findings)
        else f"A `{block}` block in ds_config"
    )
    verdict = f"[green]{which} runs here.[/]"
    if not healthy:
        verdict = f"[bold red]{which} does not run here; see the problems above.[/]"
    console.print(f"\n{verdict}")


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a grass.jsonl, or the folder that holds one")
    parser.add_argument("run2", metavar="RUN2", nargs="?", help="a second one, to be drawn beside the first")
    parser.add_argument(
        "-o", "--output", metavar="FOLDER", default="grass-report", help="default: %(default)s"
    )
    parser.add_argument("--run-id", action="append", default=[], metavar="ID",
                        help="which run of the file, or how its id begins; once for RUN, again for RUN2; "
                        "default: the last one")  # fmt: skip


def _run_report(parsed: argparse.Namespace) -> int:
    from . import report

    paths = [path for path in (parsed.run, parsed.run2) if path is not None]
    try:
        if len(parsed.run_id) > len(paths):
            raise report.ReportError(f"--run-id was given {len(parsed.run_id)} times for {len(paths)} RUN")
        runs = [report.read_run(path, run_id) for path, run_id in zip_longest(paths, parsed.run_id)]
        page = report.write_report(runs, parsed.output)
    except report.ReportError as error:
        sys.stderr.write(f"ds_grass report: {error}\n")
        return 1
    for remark in report.remarks(runs):
        sys.stderr.write(f"ds_grass report: {remark}\n")
    sys.stdout.write(f"{page}\n")
    return 0


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a folder with a config.json, or a name on the hub when online"
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the ds_config.json of the job")
    parser.add_argument(
        "--seq-length", type=positive, metavar="TOKENS", help="of a row of the batch; default: 2048"
    )
    parser.add_argument("--micro-batch", type=positive, metavar="ROWS", help="default: what FILE says")
    parser.add_argument(
        "--accumulation", type=positive, metavar="N", help="micro-batches of a step; default: as in FILE"
    )
    parser.add_argument(
        "--ranks-per-node", type=positive, default=1, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--nodes", type=positive, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="blocks are recomputed in backward"
    )
    parser.add_argument(
        "--device-memory", metavar="SIZE", help="of one device, such as 24GB; leave 1 to 2 GB for CUDA"
    )
    parser.add_argument("--host-memory", metavar="SIZE", help="of one node, for states, such as 64GB")
    parser.add_argument("--picture", metavar="FILE", help="write the picture there, as PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")


def positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: an integer from 1")
    return int(text)


def _run_plan(parsed: argparse.Namespace) -> int:
    from rich.console import Console

    try:
        with Console(stderr=True).status("reading") as status:
            plan = _planned(parsed, lambda text: status.update(f"replaying {text}"))
    except (ValueError, RuntimeError) as error:
        sys.stderr.write(f"ds_grass plan: {error}\n")
        return 1
    from .plan import table

    if parsed.json:
        sys.stdout.write(json.dumps(table.document(plan), indent=2) + "\n")
    else:
        console = Console(file=sys.stdout, highlight=False)
        console.width = max(console.width, _PLAN_COLUMNS)
        table.show(plan, console)
    if parsed.picture and not _drawn(plan, parsed.picture):
        return 1
    return 0 if table.fits(plan) else 1


def _planned(parsed: argparse.Namespace, say: Callable[[str], None]) -> Plan:
    from .plan import make_plan
    from .plan.budget import Limits
    from .plan.job import read_ds_config, resolve
    from .plan.model import read_config
    from .plan.sizes import parse_size

    device, host = (
        parse_size(text, option) if text else None
        for text, option in ((parsed.device_memory, "--device-memory"), (parsed.host_memory, "--host-memory"))
    )
    job, notes = resolve(
        read_ds_config(parsed.config),
        micro_batch=parsed.micro_batch,
        accumulation=parsed.accumulation,
        seq_length=parsed.seq_length,
        ranks_per_node=parsed.ranks_per_node,
        nodes=parsed.nodes,
        checkpointing=parsed.gradient_checkpointing,
    )
    return make_plan(read_config(parsed.model), job, Limits(device, host), notes, say)


def _drawn(plan: Plan, path: str) -> bool:
    """Whether the picture is written, or cannot be for want of matplotlib, which is one line."""
    try:
        from .plan import picture
    except ImportError as error:
        sys.stderr.write(
            f"ds_grass plan: no picture without matplotlib ({error}): pip install ds_grass[report]\n"
        )
        return True
    try:
        picture.draw(plan, Path(path))
    except OSError as error:
        sys.stderr.write(f"ds_grass plan: --picture {path} cannot be written: {error}\n")
        return False
    return True


_COMMANDS = {
    "doctor": Command(
        help="say whether GRASS would run here, and if not, why",
        run=_run_doctor,
        add_arguments=add_doctor_arguments,
    ),
    "plan": Command(
        help="say what a job will hold and move, and the largest active_layers that fits, before it is launched",
        run=_run_plan,
        add_arguments=_add_plan_arguments,
    ),
    "report": Command(
        help="draw what a run did, or two side by side, from its grass.jsonl",
        run=_run_report,
        add_arguments=_add_report_arguments,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
