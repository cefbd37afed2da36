"""Stage-aware recomputation against the best uniform count: each pipeline stage by itself, put together on paper.

    python benchmarks/recompute.py --json benchmarks/results/recompute.jsonl --picture recompute.png    # a GPU
    python benchmarks/recompute.py --cpu --counts 0 5 8                                                 # small

Each stage of a pipeline of 4 x 8 layers runs alone on one device, its passes in the order of Megatron-core's schedule
(`megatron_ext/recompute/emulator.py`): with the first N layers of each stage recomputed, and with the plan that the
solver makes from one measured layer. The vocabulary makes the head about 2.1 layer-forwards wide; the limit lies under
the peak of N = 4, so that N = 5 is the smallest that fits. Peaks are measured, beside what was predicted; step times
are composed from measured passes (`megatron_ext/recompute/timeline.py`), messages free: not measured end to end.
Attention is PyTorch's fused one. Weights and gradients are there, optimizer states are not: the limit is for the rest.
On a CPU the tests' allocator counts, and seconds are of the process, not of the clock on the wall.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import math
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rows import append, new_row
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recompute_results import AWARE, Result, Results, composed, described, draw, medians, show

from megatron_ext.recompute.emulator import (
    Batch,
    Emulated,
    PeakCounter,
    emulate,
    forward_of,
    on_gpu,
    random_message,
)
from megatron_ext.recompute.measured_stage import (
    measured_classes,
    stage_problem,
    without_edges,
    without_layers,
)
from megatron_ext.recompute.plan import ChunkPlan
from megatron_ext.recompute.schedule import Pipeline
from megatron_ext.recompute.solver import Solution
from megatron_ext.recompute.stage import chunk_plans, first_layers
from megatron_ext.recompute.stage_memory import LayerClass, StageProblem
from megatron_ext.recompute.stage_peak import peak_in_order, solve_in_order

STAGES, LAYERS, FEWEST = 4, 8, 5
"""FEWEST: the smallest uniform count that fits."""
HEAD = 2.1
"""Layer-forwards."""
EMULATED, COMPOSED = 8, (8, 16, 64)
"""Micro-batches: more than as many as stages open no more, and take no longer each."""
LIMIT_SHARE = 0.9
"""Of the way from the peak of the smallest count that fits to that of one layer less."""
PROBES = 10
PIPELINE = Pipeline(STAGES, EMULATED)


@dataclass(frozen=True)
class Model:
    hidden: int
    ffn: int
    heads: int
    groups: int
    length: int
    rows: int


MODELS = {
    "llama-8b": Model(4096, 14336, 32, 8, 8192, 1),
    "tiny": Model(256, 768, 8, 4, 256, 1),
}


def main() -> None:
    settings = arguments().parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
    name = settings.model or ("tiny" if settings.cpu else "llama-8b")
    with started(settings.cpu) as device:
        bench = Bench(MODELS[name], device)
        bench.widen_head()
        console.print(f"vocabulary {bench.vocabulary}: the head is {bench.head:.2f} layer-forwards wide")
        problems = bench.problems()
        limit = bench.limit(problems)
        results: Results = {}
        for found in bench.run(problems, limit, sorted({*settings.counts, FEWEST}), settings.rounds):
            for plan, result in found.items():
                results.setdefault(plan, []).append(result)
            console.print(f"stage {len(results[AWARE]) - 1} has run")
    told = [word for word in sys.argv[1:] if word not in ("--picture", str(settings.picture))]
    row = new_row("recompute.py", told, ("torch", "megatron-core", "ds-grass")) | {
        "label": "composed",
        "model": name,
        "settings": asdict(MODELS[name])
        | {
            "stages": STAGES,
            "layers_of_a_stage": LAYERS,
            "vocabulary": bench.vocabulary,
            "head_layer_forwards": round(bench.head, 3),
            "seconds": "of the process" if settings.cpu else "of the clock",
            "limit_bytes": limit,
        },
        "stages": {name: [described(result) for result in row] for name, row in results.items()},
        "steps": [composed(results, limit, micro_batches) for micro_batches in COMPOSED],
    }
    show(console, results, row["steps"], limit)
    if settings.json:
        append(str(settings.json), row)
    if settings.picture:
        draw(results, row["steps"][0]["best_uniform"], limit, settings.picture)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="on the CPU, fp32")
    parser.add_argument("--model", choices=sorted(MODELS), help="default: llama-8b, with --cpu tiny")
    parser.add_argument(
        "--counts",
        type=int,
        nargs="+",
        default=list(range(LAYERS + 1)),
        help=f"uniform ones; {FEWEST} always is",
    )
    parser.add_argument("--rounds", type=int, default=1, help="steps of each stage under each plan")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the row to this file")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="PNG: memory by stage, before and after")
    return parser


@contextlib.contextmanager
def started(cpu: bool) -> Iterator[torch.device]:
    """Megatron-core in a world of one."""
    from tests import audit
    from tests.megatron_on_cpu import on_cpu

    if cpu:
        audit.start()
        torch.set_num_threads(1)  # the time of the process is then the time that passes
    with tempfile.TemporaryDirectory() as folder, on_cpu() if cpu else contextlib.nullcontext():
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        dist.init_process_group(
            "gloo" if cpu else "nccl", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        try:
            parallel_state.initialize_model_parallel()
            model_parallel_cuda_manual_seed(1)
            yield torch.device("cpu") if cpu else torch.device("cuda", torch.cuda.current_device())
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


class Bench:
    """Stages of one model on one device, one at a time."""

    def __init__(self, model: Model, device: torch.device):
        self.model, self.device = model, device
        self.vocabulary = round(HEAD * (2 * model.heads + 2 * model.groups) * model.hidden / model.heads)
        self.vocabulary += round(HEAD * 3 * model.ffn)  # by multiplications, without attention's own
        self.head = HEAD
        cpu = device.type == "cpu"
        self.clock = time.process_time if cpu else time.perf_counter
        self.counter = _counted_by_tests() if cpu else on_gpu(device)

    def chunk(self, stage: int) -> nn.Module:
        """The chunk of a stage; the caller lets go of it before the next."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return build(self.model, self.vocabulary, stage, self.device)

    def batch(self) -> Batch:
        shape = self.model.rows, self.model.length
        tokens, labels = torch.randint(self.vocabulary, (2, *shape), device=self.device)
        return Batch(tokens, labels, torch.arange(shape[1], device=self.device).expand(shape).contiguous())

    def widen_head(self) -> None:
        """A vocabulary with which the head takes as long as it should; measured twice, for it is not in proportion."""
        for _ in range(2):
            self.head = self._head_width()
            self.vocabulary = 64 * round(self.vocabulary * HEAD / self.head / 64)
        self.head = self._head_width()

    def _head_width(self) -> float:
        """Forward of norm, head and loss, in forwards of a layer."""
        batch, chunk = self.batch(), self.chunk(STAGES - 1)
        came = random_message(chunk, batch).requires_grad_()
        whole, alone = [], []
        for _ in range(PROBES):
            whole.append(self._seconds(lambda: forward_of(chunk, came, batch)))
            with without_layers(chunk):
                alone.append(self._seconds(lambda: forward_of(chunk, came, batch)))
        return LAYERS * median(alone) / (median(whole) - median(alone))

    def _seconds(self, run: Callable[[], Any]) -> float:
        self._wait()
        start = self.clock()
        run()
        self._wait()
        return self.clock() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def problems(self) -> list[StageProblem]:
        """Of all stages, without a limit. Layers are measured once, on the second stage."""
        classes = measured_classes([self.chunk(1)], self.batch())
        return [self._problem(stage, classes) for stage in range(STAGES)]

    def _problem(self, stage: int, classes: Mapping[Hashable, LayerClass]) -> StageProblem:
        batch, chunk = self.batch(), self.chunk(stage)
        leanest = [first_layers(LAYERS, LAYERS)]
        static = emulate([chunk], leanest, Pipeline(1, 1), 0, batch, self.counter).static_bytes
        return stage_problem([chunk], classes, PIPELINE, stage, batch, static, 0)

    def limit(self, problems: Sequence[StageProblem]) -> int:
        """The smallest uniform count that fits is FEWEST."""
        fits, too_much = (
            max(peak_in_order(problem, uniform(count, problem)) for problem in problems)
            for count in (FEWEST, FEWEST - 1)
        )
        return fits + round(LIMIT_SHARE * (too_much - fits))

    def run(
        self, problems: Sequence[StageProblem], limit: int, counts: Sequence[int], rounds: int
    ) -> Iterator[dict[str, Result]]:
        """All plans on one stage after another, so those of a stage under the same load of the machine. Uniform counts
        that the device could not hold are left out."""
        counts = [n for n in counts if max(peak_in_order(p, uniform(n, p)) for p in problems) <= self._room()]
        for stage, problem in enumerate(problems):
            solution = solve_in_order(replace(problem, limit_bytes=limit))
            if not solution.fits:
                raise ValueError(f"stage {stage} needs {solution.peak_bytes} bytes, the limit is {limit}")
            plans = {
                f"N = {count}": (first_layers(count, LAYERS), peak_in_order(problem, uniform(count, problem)))
                for count in counts
            }
            yield self._run_stage(stage, problem, solution, plans, rounds)

    def _run_stage(
        self,
        stage: int,
        problem: StageProblem,
        solution: Solution,
        plans: dict[str, tuple[ChunkPlan, int]],
        rounds: int,
    ) -> dict[str, Result]:
        batch, chunk = self.batch(), self.chunk(stage)
        (aware,) = without_edges([chunk], chunk_plans(problem, solution))
        plans = plans | {AWARE: (aware, solution.peak_bytes)}
        ran: dict[str, list[Emulated]] = {name: [] for name in plans}
        for _ in range(rounds):
            for name, (plan, _) in plans.items():
                ran[name].append(emulate([chunk], [plan], PIPELINE, stage, batch, self.counter, self.clock))
        return {
            name: Result(plan, predicted, medians(ran[name])) for name, (plan, predicted) in plans.items()
        }

    def _room(self) -> float:
        if self.device.type == "cpu":
            return math.inf
        return 0.95 * torch.cuda.get_device_properties(self.device).total_memory


def _counted_by_tests() -> PeakCounter:
    from tests import audit

    return PeakCounter(audit.reset_peak, audit.peak_bytes)


def build(model: Model, vocabulary: int, stage: int, device: torch.device) -> nn.Module:
    """Llama-like: no biases, gated, RMS norms."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.heads,
        num_query_groups=model.groups,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=device.type == "cpu",
        gradient_accumulation_fusion=False,  # APEX
        masked_softmax_fusion=False,
        bias_activation_fusion=False,  # compiled, which takes longer than it saves here
        bias_dropout_fusion=False,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    attention = spec.submodules.self_attention
    attention.params["attn_mask_type"] = AttnMaskType.causal
    attention.submodules.core_attention = fused_attention()
    chunk = GPTModel(
        config,
        spec,
        vocabulary,
        model.length,
        pre_process=stage == 0,
        post_process=stage == STAGES - 1,
        position_embedding_type="rope",
    )
    return chunk.to(device=device, dtype=dtype)


@functools.cache
def fused_attention() -> type:
    """Causal attention that writes no scores out."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class FusedAttention(DotProductAttention):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
            """query (s, b, heads, head_dim), key and value with the groups' heads; (s, b, hidden)."""
            q, k, v = (each.permute(1, 2, 0, 3) for each in (query, key, value))
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            return out.permute(2, 0, 1, 3).flatten(2)

    return FusedAttention


def uniform(count: int, problem: StageProblem) -> list[list[str]]:
    """The first `count` layers in full; embedding and head, which stand beside them, have no choice."""
    (chunk,) = problem.chunks
    names = iter(first_layers(count, LAYERS).layers)
    return [[next(names) if len(layer.options) > 1 else layer.options[0].name for layer in chunk.classes]]


if __name__ == "__main__":
    main()
