"""The order of a rank's passes against the installed Megatron-core's own loops; counts against closed forms."""

from __future__ import annotations

import contextlib
import importlib.util
from collections import Counter
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from megatron_ext.in_flight import in_flight
from megatron_ext.recompute.schedule import Corner, Pass, Pipeline, corners, open_counts, passes, warm_up

ONE_CHUNK = [Pipeline(p, m) for p in (1, 2, 3, 4) for m in (1, 2, 3, 4, 5, 8, 16)]
INTERLEAVED = [
    Pipeline(2, 2, 2),
    Pipeline(2, 4, 2),
    Pipeline(2, 4, 2, 4),
    Pipeline(2, 5, 2, 3),
    Pipeline(2, 6, 4),
    Pipeline(3, 6, 3),
    Pipeline(4, 4, 2),
    Pipeline(4, 16, 2),
    Pipeline(4, 16, 3, 8),
    Pipeline(4, 13, 2, 8),
    Pipeline(4, 7, 2, 7),
]
WITHOUT_MEGATRON = importlib.util.find_spec("megatron") is None
needs_megatron = pytest.mark.skipif(WITHOUT_MEGATRON, reason="Megatron-core is not installed")


def every_stage(pipelines: list[Pipeline]) -> list:
    return [pytest.param(one, stage, id=f"{one} {stage}") for one in pipelines for stage in range(one.stages)]


def megatron_config(pipeline: Pipeline) -> SimpleNamespace:
    """Everything that the two loops read, off."""
    return SimpleNamespace(
        virtual_pipeline_model_parallel_size=pipeline.chunks if pipeline.chunks > 1 else None,
        microbatch_group_size_per_vp_stage=pipeline.group,
        no_sync_func=contextlib.nullcontext,
        num_microbatches_with_partial_activation_checkpoints=None,
        hidden_size=1,
        **dict.fromkeys(
            """overlap_p2p_comm batch_p2p_comm overlap_p2p_comm_warmup_flush overlap_moe_expert_parallel_comm
            finalize_model_grads_func timers grad_sync_func param_sync_func sequence_parallel
            deallocate_pipeline_outputs fine_grained_activation_offloading calculate_per_token_loss
            variable_seq_lengths""".split()
        ),
        cuda_graph_impl="none",
    )


def run_megatron(pipeline: Pipeline, stage: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Pass, ...]:
    """Passes as Megatron's loop asks for them, with both steps replaced by a note and all messages empty."""
    import torch
    from megatron.core.pipeline_parallel import schedules

    config = megatron_config(pipeline)
    models = [torch.nn.Identity() for _ in range(pipeline.chunks)]
    ran: list[Pass] = []

    def forward_step(_, data_iterator, model, *args, current_microbatch, **kwargs):
        chunk = next(i for i, one in enumerate(models) if one is model)
        ran.append(Pass("forward", current_microbatch, chunk))
        return [(chunk, current_microbatch)] if pipeline.chunks == 1 else (chunk, current_microbatch), 0

    def backward_step(input_tensor, output_tensor, *args):
        chunk, micro_batch = output_tensor[0] if pipeline.chunks == 1 else output_tensor
        ran.append(Pass("backward", micro_batch, chunk))

    ranks = SimpleNamespace(size=lambda: pipeline.stages, rank=lambda: stage)
    communicator = MagicMock(pp_group=ranks, config=config)
    communicator.virtual_pipeline_model_parallel_size = config.virtual_pipeline_model_parallel_size
    for name, width in (
        ("send_forward_backward_recv_forward_backward", 2),
        ("send_forward_recv_forward", 1),
        ("send_backward_recv_backward", 1),
    ):
        getattr(communicator, name).return_value = (None,) * width if width > 1 else None
    zeros = torch.zeros
    for name, replacement in {
        "forward_step": forward_step,
        "backward_step": backward_step,
        "get_model_config": lambda model: config,
        "get_model_type": lambda model: None,
        "get_tensor_shapes": lambda **kwargs: [()],
        "deallocate_output_tensor": lambda *args: None,
        "set_current_microbatch": lambda *args: None,
    }.items():
        monkeypatch.setattr(schedules, name, replacement)
    monkeypatch.setattr(torch, "zeros", lambda *args, device=None, **kwargs: zeros(*args, **kwargs))
    one = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    groups = SimpleNamespace(tp=one, cp=one, pp=ranks, embd=None, pos_embd=None, dp_cp=None)
    several = pipeline.chunks > 1
    loop = (
        schedules.forward_backward_pipelining_with_interleaving
        if several
        else schedules.forward_backward_pipelining_without_interleaving
    )
    loop(
        forward_step_func=None,
        data_iterator=[None] * pipeline.chunks,
        model=models,
        num_microbatches=pipeline.micro_batches,
        seq_length=1,
        micro_batch_size=1,
        p2p_communicator=communicator,
        pg_collection=groups,
    )
    return tuple(ran)


@needs_megatron
@pytest.mark.parametrize(
    ("pipeline", "stage"), every_stage([one for one in ONE_CHUNK if one.stages > 1] + INTERLEAVED)
)
def test_passes_are_those_that_megatrons_own_loop_runs(pipeline, stage, monkeypatch):
    assert passes(pipeline, stage) == run_megatron(pipeline, stage, monkeypatch)


@needs_megatron
@pytest.mark.parametrize(("pipeline", "stage"), every_stage(ONE_CHUNK + INTERLEAVED))
def test_warm_up_and_order_are_those_of_megatrons_functions(pipeline, stage):
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    communicator = SimpleNamespace(
        pp_group=SimpleNamespace(size=lambda: pipeline.stages, rank=lambda: stage),
        virtual_pipeline_model_parallel_size=pipeline.chunks if pipeline.chunks > 1 else None,
    )
    shape = (pipeline.micro_batches, pipeline.chunks, pipeline.group)
    total, _, ahead, _ = get_pp_rank_microbatches(*shape, p2p_communicator=communicator)
    order = passes(pipeline, stage)
    assert (len(order), warm_up(pipeline, stage)) == (2 * total, ahead)
    table = [(one.micro_batch, one.chunk) for one in order if one.kind == "forward"]
    assert table == get_schedule_table(*shape)


@pytest.mark.parametrize(("pipeline", "stage"), every_stage(ONE_CHUNK + INTERLEAVED))
def test_each_pass_runs_once_and_backward_after_forward(pipeline, stage):
    order = passes(pipeline, stage)
    assert set(Counter(order).values()) == {1}
    assert len(order) == 2 * pipeline.micro_batches * pipeline.chunks
    where = {one: i for i, one in enumerate(order)}
    assert all(
        where[one] < where[Pass("backward", one.micro_batch, one.chunk)]
        for one in order
        if one.kind == "forward"
    )


@pytest.mark.parametrize(("pipeline", "stage"), every_stage(ONE_CHUNK))
def test_1f1b_holds_the_closed_form(pipeline, stage):
    held = in_flight(pipeline.stages, stage, micro_batches=pipeline.micro_batches)
    assert open_counts(pipeline, stage) == (held,)
    assert corners(pipeline, stage) == (Corner((held,), 0),)


@pytest.mark.parametrize(("pipeline", "stage"), every_stage(INTERLEAVED))
def test_interleaved_corners_hold_the_closed_form_together(pipeline, stage):
    found = corners(pipeline, stage)
    most = in_flight(pipeline.stages, stage, pipeline.chunks, pipeline.group, pipeline.micro_batches)
    assert max(sum(corner.open) for corner in found) == most
    columns = zip(*(corner.open for corner in found), strict=True)
    assert tuple(max(column) for column in columns) == open_counts(pipeline, stage)


@pytest.mark.parametrize(("pipeline", "stage"), every_stage(ONE_CHUNK + INTERLEAVED))
def test_no_moment_of_the_schedule_holds_more_than_a_corner(pipeline, stage):
    """Walked anew; forwards included, for which any chunk's corner will do."""
    found = corners(pipeline, stage)
    held = [0] * pipeline.chunks
    for one in passes(pipeline, stage):
        held[one.chunk] += one.kind == "forward"
        fitting = [corner for corner in found if one.kind == "forward" or corner.running == one.chunk]
        assert any(all(h <= o for h, o in zip(held, corner.open, strict=True)) for corner in fitting)
        held[one.chunk] -= one.kind == "backward"


def test_corners_of_a_small_interleaved_pipeline_by_hand():
    """Rank 0 of 2, 2 chunks, 4 micro-batches: warm up 00 01 10 11 (chunk, micro-batch), then in turn
    02 | b10, 03 | b11, 12 | b00, 13 | b01, then b12 b13 b02 b03."""
    pipeline = Pipeline(2, 4, 2)
    letters = [
        f"{'F' if one.kind == 'forward' else 'B'}{one.chunk}{one.micro_batch}" for one in passes(pipeline, 0)
    ]
    assert letters == "F00 F01 F10 F11 F02 B10 F03 B11 F12 B00 F13 B01 B12 B13 B02 B03".split()
    # open while they run: B10 (3, 2), B11 (4, 1), B00 (4, 1), B01 (3, 2), B12 (2, 2), B13 (2, 1), B02 (2, 0),
    # B03 (1, 0)
    assert corners(pipeline, 0) == (
        Corner((3, 2), 0),
        Corner((4, 1), 0),
        Corner((3, 2), 1),
        Corner((4, 1), 1),
    )
    assert open_counts(pipeline, 0) == (4, 2)


def test_fewer_micro_batches_than_stages_are_all_run_ahead():
    assert [one.kind for one in passes(Pipeline(4, 2), 0)] == ["forward"] * 2 + ["backward"] * 2
    assert [open_counts(Pipeline(4, 2), stage) for stage in range(4)] == [(2,), (2,), (2,), (1,)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((0, 4), "stages is 0; it must be 1 or more"),
        ((4, 0), "micro_batches is 0"),
        ((4, 4, 0), "chunks is 0"),
        ((1, 4, 2), "chunks is 2 but stages is 1"),
        ((4, 2, 2), "group_size is 4; with 2 chunks Megatron allows 4 .* to 2"),
        ((4, 8, 2, 3), "group_size is 3"),
        ((4, 8, 2, 9), "group_size is 9"),
        ((4, 10, 2), "leaves a last group of 2 with group_size 4; Megatron allows 0, or 4"),
    ],
)
def test_a_pipeline_that_megatron_refuses_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Pipeline(*given)


def test_group_size_means_nothing_for_one_chunk():
    assert passes(Pipeline(4, 8, 1, 3), 1) == passes(Pipeline(4, 8), 1)


def test_stage_outside_the_pipeline_is_refused():
    with pytest.raises(ValueError, match="stage is 4; with 4 stages use 0 to 3"):
        passes(Pipeline(4, 8), 4)
