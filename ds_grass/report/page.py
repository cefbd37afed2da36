"""The page of a report: a table of facts, then the figures, in one file that loads nothing.

Contract: pure, text in and text out. Every string that came from a log goes through `html.escape`; images are
data URIs; the page holds no script, and its own policy forbids the browser to run or fetch anything.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timezone
from string import Template
from typing import Any

from ds_grass.report.run import Run, is_count
from ds_grass.telemetry.human import human_bytes, human_count

_NONE = "-"
_MAX_CHARACTERS = 300  # of one cell; a log may hold anything


@dataclass(frozen=True)
class Picture:
    """One figure: `name` of its file, what stands around it, and the image."""

    name: str
    title: str
    caption: str
    png: bytes


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>GRASS report</title>
<style>
:root { color-scheme: light; }
body { margin: 0 auto; padding: 2.5rem 1.5rem; max-width: $width; color: #1b1f24; background: #fff;
 font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; }
h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
p.lead { color: #57606a; margin: 0 0 1.6rem; }
ul.notes { margin: 0 0 1.6rem; padding: .7rem 1rem .7rem 2rem; background: #fff8e5; border-left: 4px solid #d9a400; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; margin-bottom: 2.4rem; }
th, td { text-align: left; vertical-align: top; padding: .28rem .8rem .28rem 0; border-bottom: 1px solid #e4e7eb; }
thead th { border-bottom: 2px solid #1b1f24; }
tbody th { font-weight: 500; color: #57606a; width: 15rem; }
td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
section { margin: 0 0 2.6rem; break-inside: avoid; }
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; }
figcaption { color: #57606a; font-size: .9rem; margin-top: .5rem; max-width: 50rem; }
@media print { body { padding: 0; max-width: none; font-size: 11pt; } }
</style>
</head>
<body>
<h1>GRASS report</h1>
<p class="lead">$lead</p>
$notes
<table>
$head
<tbody>
$rows
</tbody>
</table>
$figures
</body>
</html>
""")

_FIGURE = Template("""<section>
<h2>$title</h2>
<figure>
<img alt="$title" src="data:image/png;base64,$data">
<figcaption><b>Figure $number.</b> $caption</figcaption>
</figure>
</section>
""")


def render(runs: Sequence[Run], pictures: Sequence[Picture]) -> str:
    """The whole page, HTML."""
    lead = (
        "Which blocks trained when, why, and what it cost. One step is one optimizer step that was applied."
    )
    notes = [html.escape(note) for note in remarks(runs)]
    columns = [dict(_facts(run)) for run in runs]
    rows = "\n".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        + "".join(f"<td>{_cell(column[name])}</td>" for column in columns)
        + "</tr>"
        for name in columns[0]
    )
    head = ""
    if len(runs) > 1:
        titles = "".join(
            f'<th scope="col">{html.escape(title(runs, index))}</th>' for index in range(len(runs))
        )
        head = f"<thead><tr><td></td>{titles}</tr></thead>"
    return _PAGE.substitute(
        width="60rem" if len(runs) == 1 else "80rem",
        lead=html.escape(lead),
        notes=f"<ul class='notes'>{''.join(f'<li>{note}</li>' for note in notes)}</ul>" if notes else "",
        head=head,
        rows=rows,
        figures="".join(_figure(number, picture) for number, picture in enumerate(pictures, 1)),
    )


def title(runs: Sequence[Run], index: int) -> str:
    """What tells one of the runs from the other, over its column; plain ASCII text, at most about 40 characters."""
    policy = runs[index].facts.get("policy")
    policy = f"{policy}, " if isinstance(policy, str) else ""
    text = f"({'ab'[index]}) {policy[:16]}run {runs[index].run_id[:12]}"
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text)


def remarks(runs: Sequence[Run]) -> list[str]:
    """What a reader must know before trusting the figures: one line each, not escaped."""
    notes = []
    for path, broken in {run.path: run.broken_lines for run in runs}.items():
        if broken:
            verb = "line is" if broken == 1 else "lines are"
            notes.append(f"{broken} {verb} broken in {path} and left out.")
    for index, run in enumerate(runs):
        unknown = sum(
            end - begin
            for begin, end, known in zip(run.edges, run.edges[1:], run.is_known, strict=False)
            if not known
        )
        if unknown:
            which = f" of {title(runs, index)}" if len(runs) > 1 else ""
            notes.append(f"For {unknown} steps{which} the log does not hold every draw; they are left grey.")
    return notes


def _figure(number: int, picture: Picture) -> str:
    return _FIGURE.substitute(
        number=number,
        title=html.escape(picture.title),
        caption=html.escape(picture.caption),
        data=base64.b64encode(picture.png).decode("ascii"),
    )


def _cell(text: str) -> str:
    return html.escape(text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] + "...")


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    """Rows of the table, the same names for every run; text not escaped."""
    facts, last = run.facts, run.last
    yield "run id", run.run_id
    yield "log", str(run.path)
    yield "time span", _time_span(run)
    yield "resumed", _resumed(run)
    yield "policy", _plain(facts.get("policy"))
    yield "blocks", _blocks(run)
    yield "blocks active at once", str(len(last.active))
    yield "steps at the last line", f"{last.step:,}"
    yield (
        "draws",
        f"{_count(last.counters.get('draws'))}, {_count(last.counters.get('switches'))} of them changed the set",
    )
    yield "refreshes of importance", _count(last.counters.get("refreshes"))
    yield "skipped steps", _count(max(last.counters.get("skipped_steps", 0), len(run.skipped)))
    yield "steps of the probe", _count(last.counters.get("probe_steps"))
    yield "periods", f"draw {_period(facts, 'sampling_period')}, refresh {_period(facts, 'refresh_period')}"
    yield "parameters", _parameters(facts)
    yield "trained outside the blocks", _plain(facts.get("outer"))
    yield "optimizer states", _states(run)
    yield "moved, rank 0", _moved(run)
    yield "time, rank 0", _seconds(run)
    yield "ZeRO stage, ranks", f"{_plain(facts.get('zero_stage'))}, {_plain(facts.get('num_ranks'))}"
    yield (
        "versions",
        f"ds_grass {_plain(facts.get('grass_version'))}, deepspeed {_plain(facts.get('deepspeed_version'))}",
    )


def _time_span(run: Run) -> str:
    if not run.times:
        return _NONE
    first, last = (time.astimezone(timezone.utc) for time in run.times)
    seconds = (last - first).total_seconds()
    span = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    span = span if seconds < 7200 else f"{seconds / 3600:.1f} h"
    return f"{first:%Y-%m-%d %H:%M:%S} to {last:%Y-%m-%d %H:%M:%S} UTC ({span})"


def _resumed(run: Run) -> str:
    steps = [f"{step:,}" for step in run.resumed[-8:]]
    more = "..., " if len(run.resumed) > 8 else ""
    return f"at step{'s' if len(run.resumed) > 1 else ''} {more}{', '.join(steps)}" if steps else "no"


def _blocks(run: Run) -> str:
    others = run.facts.get("other_lists")
    text = f"{run.num_blocks} of {_plain(run.facts.get('lists'))}"
    return f"{text} (not drawn: {_plain(others)})" if others else text


def _parameters(facts: Any) -> str:
    managed, active = facts.get("managed_params"), facts.get("active_params")
    if not (is_count(managed) and is_count(active)):
        return _NONE
    return f"{human_count(managed)} managed, {human_count(active)} active at once"


def _states(run: Run) -> str:
    mode = run.last.mode or run.facts.get("states_mode")
    master = {True: ", with master weights", False: ", without master weights"}.get(
        run.facts.get("master_weights") is True if "master_weights" in run.facts else None, ""
    )
    return f"{_plain(mode)}, {_plain(run.facts.get('states_dtype'))}{master}"


def _moved(run: Run) -> str:
    costs = run.last.costs
    if not {"bytes_to_device", "bytes_to_host"} <= costs.keys():
        return _NONE
    device, host = (human_bytes(int(costs[name])) for name in ("bytes_to_device", "bytes_to_host"))
    return f"{device} to the device, {host} to the host"


def _seconds(run: Run) -> str:
    names = {
        "wait_seconds": "waiting",
        "measuring_seconds": "measuring",
        "switching_seconds": "switching",
        "telemetry_seconds": "telling",
    }
    told = [f"{text} {run.last.costs[name]:.3g} s" for name, text in names.items() if name in run.last.costs]
    return ", ".join(told) or _NONE


def _period(facts: Any, key: str) -> str:
    if key not in facts:
        return _NONE
    return (
        {"sampling_period": "once", "refresh_period": "never"}[key]
        if facts[key] is None
        else f"every {_plain(facts[key])} steps"
    )


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else _NONE


def _plain(value: Any) -> str:
    """Any value of a log as text."""
    if value is None or value == [] or (isinstance(value, float) and math.isnan(value)):
        return _NONE
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
