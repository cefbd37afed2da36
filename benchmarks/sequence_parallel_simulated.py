"""Switching sequence parallelism on simulated machines: regret against an oracle, gains, lengths. No GPU is used.

    python benchmarks/sequence_parallel_simulated.py --json benchmarks/results/sequence_parallel_simulated.jsonl

The truth that plans are charged with is never the planner's model: "published" are the authors' fitted times of their
8 x A100 node, "fine" a simulator of kernels and messages with noise (`megatron_ext/sequence_parallel/truths.py`). The
planner sees eight profiled lengths, 1K to the longest of the data, with 2 % noise; "from nothing", it profiles as a job
does without a saved profile, while its sequences come, beginning with the closed forms of an H100. Lengths follow the
ParaDySe paper's table for each data set; shapes are its own (non-causal, 12 h^2 weights). "saved" is time saved against
a strategy that never switches, over the sequences that it can hold; the paper's headlines compare with the worst
strategy, so both are printed. Every figure is simulated.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rows
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ext.sequence_parallel import simulator as sim
from megatron_ext.sequence_parallel.cluster import PRESETS, PRIOR_CLUSTER, Cluster
from megatron_ext.sequence_parallel.cost_model import AnalyticalModel
from megatron_ext.sequence_parallel.forest import ForestModel
from megatron_ext.sequence_parallel.held_out import held_out_error
from megatron_ext.sequence_parallel.layer_shape import LayerShape
from megatron_ext.sequence_parallel.truths import FineTruth, PublishedTruth, Truth

MODELS = {"BERT": (1024, 16, 24), "LLaMA": (8192, 64, 8), "GPT": (12288, 96, 8)}
"""Hidden size, heads, layers of the paper's experiments."""
STATE_BYTES = 18
"""For a parameter: bf16 weight, fp32 gradient, master and two moments."""
MEMORY_FRACTION = 0.92
PAPER = {
    ("GPT", "GRCh38"): "329,728 tokens; +181 % over the shortest single strategy",
    ("GPT", "GitHubCode"): "+144 % over the shortest single strategy",
    ("BERT", "GRCh38"): "58 % of time saved against the slowest single strategy",
    ("BERT", "GitHubCode"): "89 % of time saved against the slowest single strategy",
}


def main() -> None:
    settings = parse_arguments()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    row = rows.new_row("sequence_parallel_simulated.py", sys.argv[1:], ("numpy", "scikit-learn", "ds-grass"))
    row["label"] = "simulated"
    row["settings"] = {key: value for key, value in vars(settings).items() if key != "json"}
    row["results"] = []
    for cluster in settings.cluster:
        for model in settings.model:
            for truth in truths_of(PRESETS[cluster], model):
                for data in sim.DISTRIBUTIONS.values():
                    row["results"].append(simulate(PRESETS[cluster], model, truth, data, settings))
    print_tables(console, row["results"])
    if settings.json:
        rows.append(settings.json, row)


def truths_of(cluster: Cluster, model: str) -> list[Truth]:
    hidden, heads, _ = MODELS[model]
    shape = LayerShape(hidden, 4 * hidden, heads, heads, hidden // heads, cluster.group_size, causal=False)
    published = [PublishedTruth(shape)] if cluster.name == "8xA100-80G" else []
    return [*published, FineTruth(shape, cluster)]


def simulate(
    cluster: Cluster, model: str, truth: Truth, data: sim.Distribution, settings: argparse.Namespace
) -> dict[str, Any]:
    layers = MODELS[model][2]
    weights = layers * truth.shape.weight + data.vocabulary * truth.shape.hidden_size
    limit = int(MEMORY_FRACTION * cluster.memory_bytes) - STATE_BYTES * weights // cluster.group_size
    case = sim.Case(truth, layers, limit, data.vocabulary, cluster.replicas)
    measurements = case.profile(sim.profiled_lengths(data.longest, settings.profiled))
    prior = AnalyticalModel(truth.shape, cluster)
    forest = settings.kind == "forest"
    factory = (lambda seen: ForestModel(truth.shape, seen)) if forest else prior.calibrated
    fitted = factory(measurements)
    from_nothing = factory if forest else AnalyticalModel(truth.shape, PRESETS[PRIOR_CLUSTER]).calibrated
    lengths = data.draw(settings.sequences, settings.seed)
    orders = {
        "sorted": sorted(lengths),
        "shuffled": random.Random(settings.seed).sample(lengths, len(lengths)),
    }
    errors = held_out_error(factory, measurements)
    return {
        "label": "simulated",
        "cluster": cluster.name,
        "model": model,
        "truth": type(truth).__name__,
        "data": data.name,
        "held_out_time": {name: round(error.time, 4) for name, error in errors.items()},
        "held_out_memory": {name: round(error.memory, 4) for name, error in errors.items()},
        "max_tokens": max_tokens(case, fitted),
        "orders": {name: compare(case, fitted, from_nothing, given) for name, given in orders.items()},
        "warnings": [error.warning for error in errors.values() if error.warning],
        "paper": PAPER.get((model, data.name)),
    }


def max_tokens(case: sim.Case, model: Any) -> dict[str, int]:
    """The longest sequence that each can hold; the planner's: by its own prediction and in truth."""
    planner = case.planner(model)
    policy = sim.planned(case, planner)
    found = {
        name: sim.longest(lambda s, name=name: case.single(name)(s).fits) for name in case.truth.strategies
    }
    found["planner"] = sim.longest(lambda s: planner.best(1, s).fits and policy(s).fits)
    found["oracle"] = sim.longest(lambda s: case.oracle(s).fits)
    return found


def compare(
    case: sim.Case, model: Any, from_nothing: Callable[..., Any], lengths: list[int]
) -> dict[str, Any]:
    """The planner beside the oracle and beside every strategy that never switches."""
    oracle = sim.run(case, lengths, case.oracle)
    ours = sim.run(case, lengths, sim.planned(case, case.planner(model)))
    growing = sim.Growing(case, from_nothing)
    variants = {
        "regret": ours,
        "regret_unsmoothed": sim.run(case, lengths, sim.planned(case, case.planner(model, smoothing=0.0))),
        "regret_model": sim.run(case, lengths, sim.planned(case, case.planner(model, "model"))),
        "regret_from_nothing": sim.run(case, lengths, growing),
    }
    singles = {name: sim.run(case, lengths, case.single(name)) for name in case.truth.strategies}
    by_all = np.logical_and.reduce([run.trained for run in singles.values()]) & ours.trained
    order = sorted(singles, key=lambda name: singles[name].seconds(by_all))
    return {
        **{name: regret(run, oracle) for name, run in variants.items()},
        "profiled_from_nothing": len(growing.profiled),
        "over_limit": int((oracle.trained & ~ours.trained).sum()),
        "excess": max(
            0.0, max(c.peak_bytes for c in np.array(ours.choices)[oracle.trained]) / case.limit_bytes - 1
        ),
        "untrainable": int((~oracle.trained).sum()),
        "switches": ours.switches,
        "switches_unsmoothed": variants["regret_unsmoothed"].switches,
        "saved": {name: saved(ours, run, run.trained & ours.trained) for name, run in singles.items()},
        "trained": {name: int(run.trained.sum()) for name, run in singles.items()},
        "best_single": order[0],
        "worst_single": order[-1],
        "saved_best": saved(ours, singles[order[0]], by_all),
        "saved_worst": saved(ours, singles[order[-1]], by_all),
    }


def regret(run: sim.Run, oracle: sim.Run) -> float:
    """Over the sequences that both hold within the limit; how many the plans do not is told apart."""
    both = run.trained & oracle.trained
    return run.seconds(both) / oracle.seconds(both) - 1


def saved(ours: sim.Run, other: sim.Run, where: np.ndarray) -> float:
    return 1 - ours.seconds(where) / other.seconds(where)


def print_tables(console: Console, results: list[dict[str, Any]]) -> None:
    table = Table(
        title="simulated: time, planner with eight profiled lengths, sorted / shuffled; from nothing: shuffled"
    )
    for column in (
        "case",
        "regret %",
        "unsmoothed %",
        "from nothing %",
        "over the limit",
        "switches",
        "saved against TS %",
        "best single %",
        "worst single %",
        "paper",
    ):
        table.add_column(column)
    for result in results:
        orders = result["orders"].values()
        some = result["orders"]["shuffled"]
        table.add_row(
            f"{result['cluster']} {result['model']} {result['data']} {result['truth']}",
            " / ".join(f"{100 * order['regret']:.2f}" for order in orders),
            " / ".join(f"{100 * order['regret_unsmoothed']:.2f}" for order in orders),
            f"{100 * some['regret_from_nothing']:.2f}",
            " / ".join(str(order["over_limit"]) for order in orders),
            " / ".join(str(order["switches"]) for order in orders),
            " / ".join(f"{100 * order['saved']['megatron_ts']:.1f}" for order in orders),
            f"{some['best_single']} {100 * some['saved_best']:.1f}",
            f"{some['worst_single']} {100 * some['saved_worst']:.1f}",
            result["paper"] or "",
        )
    console.print(table)
    lengths = Table(title="simulated: longest sequence, tokens")
    names = ("megatron_ts", "ulysses", "context", "ring", "metp", "planner", "oracle")
    for column in ("case", *names, "planner over shortest", "planner over longest"):
        lengths.add_column(column)
    for result in results:
        found = result["max_tokens"]
        singles = [found[name] for name in names[:5] if name in found]
        lengths.add_row(
            f"{result['cluster']} {result['model']} {result['data']} {result['truth']}",
            *(f"{found[name]:,}" if name in found else "-" for name in names),
            *(
                f"{100 * (found['planner'] / max(1, single) - 1):+.0f} %"
                for single in (min(singles), max(singles))
            ),
        )
    console.print(lengths)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cluster", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--kind", choices=("analytical", "forest"), default="analytical")
    parser.add_argument("--profiled", type=int, default=sim.PROFILED, help="lengths that the planner sees")
    parser.add_argument("--sequences", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file to append the row to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
