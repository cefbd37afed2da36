"""Keys of ds_config that cannot stand beside the grass block are refused by name; defaults never are."""

from __future__ import annotations

import enum
import json
from pathlib import Path

import pytest

from ds_grass.config import GrassConfig, parse_block
from ds_grass.conflicts import RULES, check

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = [path for path in sorted(CONFIGS.glob("*.json")) if not path.name.startswith("megatron_")]
LISA = {"policy": "lisa"}
NO_MASTERS = {"states": {"master_weights": False}}

# dotted key of ds_config, value in conflict, the rest of ds_config, the grass block
CONFLICTS = [
    ("checkpoint.writer", {"type": "STANDARD"}, {}, {}),
    ("checkpoint.use_node_local_storage", True, {}, {}),
    ("nebula.enabled", True, {}, {}),
    ("checkpoint.checkpoint_serialization", False, {}, {}),
    ("zero_optimization.pipeline_loading_checkpoint", True, {"zero_optimization": {"stage": 3}}, {}),
    ("datastates_ckpt", {"host_cache_size": 16}, {}, {}),
    ("zero_optimization.stage", 4, {}, {}),
    ("zero_optimization.stage", -1, {}, {}),
    ("zero_optimization.offload_optimizer.device", "cpu", {}, {}),
    ("zero_optimization.offload_optimizer.device", "nvme", {}, LISA),
    ("zero_optimization.offload_optimizer.super_offload", True, {}, {}),
    ("zero_optimization.cpu_offload", True, {}, {}),
    ("zero_optimization.zenflow", {"topk_ratio": 0.1}, {}, {}),
    ("zero_optimization.zenflow", {}, {}, {}),
    ("zero_optimization.offload_param.device", "cpu", {}, {}),
    ("zero_optimization.offload_param.device", "nvme", {}, {}),
    ("zero_optimization.cpu_offload_param", True, {}, {}),
    ("zero_optimization.zero_hpz_partition_size", 8, {}, {}),
    ("zero_optimization.zero_quantized_weights", True, {}, {}),
    ("zero_optimization.zero_quantized_gradients", True, {}, {}),
    ("zero_optimization.zero_quantized_nontrainable_weights", True, {}, {}),
    ("zero_optimization.mics_shard_size", 4, {}, {}),
    ("zero_optimization.legacy_stage1", True, {}, {}),
    ("zero_optimization.elastic_checkpoint", True, {"zero_optimization": {"stage": 1}}, {}),
    ("zero_optimization.elastic_checkpoint", True, {"zero_optimization": {"stage": 2}}, {}),
    ("zero_optimization.compute_grad_norm", False, {"gradient_clipping": 0}, {}),
    ("zero_optimization.compute_grad_norm", False, {"gradient_clipping": 0}, {"policy": "static"}),
    ("zero_optimization.compute_grad_norm", False, {"gradient_clipping": 1.0}, LISA),
    ("zero_optimization.compute_grad_norm", False, {}, LISA),
    ("sparse_gradients", True, {}, {}),
    *(
        ("optimizer.type", name, {}, {})
        for name in (
            *(
                "Muon",
                "OneBitAdam",
                "ZeroOneAdam",
                "OneBitLamb",
                "Lamb",
                "Lion",
                "Adagrad",
                "Adafactor",
                "SGD",
            ),
            *("NAdam", "MuAdamW", "AdamW8bit"),
        )
    ),
    ("optimizer.params.amsgrad", True, {"optimizer": {"type": "AdamW"}}, {}),
    ("optimizer.params.bias_correction", False, {"optimizer": {"type": "AdamW"}}, {}),
    ("fp16.enabled", True, {}, NO_MASTERS),
    ("torch_autocast.dtype", "float16", {"torch_autocast": {"enabled": True}}, {}),
    ("fp16.fp16_master_weights_and_grads", True, {}, {}),
    ("bf16.bf16_master_weights_and_grads", True, {}, {}),
    ("bf16.bf16_optimizer_states", True, {}, {}),
    ("bfloat16.bf16_master_weights_and_grads", True, {}, {}),
    ("bfloat16.bf16_optimizer_states", True, {}, {}),
    ("amp.enabled", True, {}, {}),
    ("compile.deepcompile", True, {}, {}),
    ("hybrid_engine.enabled", True, {}, {}),
    ("expert_parallel.enabled", True, {}, {}),
    ("compression_training.weight_quantization.shared_parameters.enabled", True, {}, {}),
    ("autotuning.enabled", True, {}, {}),
]

ALLOWED = [
    ({}, {}),
    ({"zero_optimization": True}, {}),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}}, {}),
    ({"zero_optimization": {"offload_optimizer": {}, "offload_param": {}, "zenflow": None}}, {}),
    ({"zero_optimization": {"offload_optimizer": None, "offload_param": {"device": "none"}}}, {}),
    ({"zero_optimization": {"stage": 3, "elastic_checkpoint": True}}, {}),
    ({"zero_optimization": {"zero_hpz_partition_size": 1, "mics_shard_size": -1}}, {}),
    ({"zero_optimization": {"zero_hpz_partition_size": "many"}}, {}),
    ({"zero_optimization": {"stage": 2, "round_robin_gradients": True, "overlap_comm": True}}, {}),
    ({"zero_optimization": {"compute_grad_norm": False}, "gradient_clipping": 0.0}, LISA),
    ({"zero_optimization": {"compute_grad_norm": True}, "gradient_clipping": 1.0}, {}),
    ({"zero_optimization": {"zero_quantized_weights": "auto", "offload_param": "auto"}}, {}),
    ({"optimizer": {"type": "Adam", "params": {"amsgrad": False, "adam_w_mode": False}}}, {}),
    ({"optimizer": {"type": "adamw", "params": {"torch_adam": True, "maximize": True}}}, {}),
    ({"optimizer": {"type": "AdamW"}, "zero_allow_untested_optimizer": True}, {}),
    ({"fp16": {"enabled": True}}, {}),
    ({"fp16": {"enabled": False}}, NO_MASTERS),
    ({"fp16": {"enabled": "auto"}}, NO_MASTERS),
    ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": False}}, NO_MASTERS),
    ({"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}, {}),
    ({"elasticity": {"enabled": True}, "progressive_layer_drop": {"enabled": True}}, {}),
    ({"compile": {"deepcompile": False}, "hybrid_engine": {}, "autotuning": {"enabled": False}}, {}),
    ({"tensor_parallel": {"autotp_size": 2}, "prescale_gradients": True}, {}),
]


def merged(base: dict, dotted: str, value: object) -> dict:
    """A copy of `base` with one dotted key set."""
    first, _, rest = dotted.partition(".")
    return {**base, first: merged(base.get(first, {}), rest, value) if rest else value}


def refusal(ds_config: dict, block: dict) -> str:
    with pytest.raises(ValueError, match=", but .+; .+") as caught:
        check(ds_config, parse_block(block))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(("key", "value", "rest", "block"), CONFLICTS)
def test_conflict_is_refused_by_name(key, value, rest, block):
    message = refusal(merged(rest, key, value), block)
    assert message.startswith(f"{key} is {value!r}, but ")
    assert "also in conflict" not in message


@pytest.mark.parametrize(("ds_config", "block"), ALLOWED)
def test_harmless_config_is_allowed(ds_config, block):
    check(ds_config, parse_block(block))


def test_every_rule_is_tested():
    assert {rule.key for rule in RULES} == {key for key, *_ in CONFLICTS}


def test_fp16_conflict_names_the_grass_key_too():
    assert "grass.states.master_weights is false" in refusal({"fp16": {"enabled": True}}, NO_MASTERS)


def test_further_conflicts_are_named_after_the_first():
    ds_config = {"zero_optimization": {"offload_param": {"device": "cpu"}}, "compile": {"deepcompile": True}}
    message = refusal(ds_config, {})
    assert message.startswith("zero_optimization.offload_param.device is 'cpu'")
    assert message.endswith("(also in conflict: compile.deepcompile)")


@pytest.mark.parametrize("value", [True, 1, 1.0, "true", "True", "on", "yes"])
def test_every_spelling_of_true_that_deepspeed_takes_is_seen(value):
    assert refusal({"compile": {"deepcompile": value}}, {}).startswith("compile.deepcompile is ")


def test_resolved_values_are_seen():
    device = enum.Enum("Device", {"cpu": "cpu", "none": "none"})
    ds_config = {"zero_optimization": {"offload_optimizer": {"device": device.cpu}}}
    assert refusal(ds_config, {}).startswith("zero_optimization.offload_optimizer.device is <Device.cpu")
    check({"zero_optimization": {"offload_optimizer": {"device": device.none}, "stage": 2}}, GrassConfig())


def test_disabled_block_has_no_conflicts():
    check({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, GrassConfig(enabled=False))


@pytest.mark.parametrize("value", [None, 7, "x", [], [1], {"enabled": {}}, {"x": 1}, float("nan"), object()])
def test_odd_shapes_are_left_to_deepspeed(value):
    for rule in RULES:
        parent = rule.key.rpartition(".")[0]
        if parent:
            check(merged({}, parent, value), GrassConfig())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_config_has_no_conflict(path):
    ds_config = json.loads(path.read_text())
    check(ds_config, parse_block(ds_config["grass"]))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("block", [{}, LISA, NO_MASTERS], ids=["grass", "lisa", "no masters"])
def test_defaults_of_deepspeed_are_no_conflict(stage, block):
    ds_config = deepspeed_defaults(stage)
    assert {"offload_optimizer", "compute_grad_norm"} & set(ds_config["zero_optimization"])
    check(ds_config, parse_block(block))


def deepspeed_defaults(stage: int) -> dict:
    """A ds_config with the installed DeepSpeed's default written out for every key that has one."""
    config = pytest.importorskip("deepspeed.runtime.config")
    offload = pytest.importorskip("deepspeed.runtime.zero.offload_config")
    ds_config = {"train_batch_size": 1, "zero_optimization": {"stage": stage}}
    parsed = config.DeepSpeedConfig(ds_config)
    zero = parsed.zero_config.model_dump()
    zero["offload_optimizer"] = offload.DeepSpeedZeroOffloadOptimizerConfig().model_dump()
    zero["offload_param"] = offload.DeepSpeedZeroOffloadParamConfig().model_dump()
    return {
        **ds_config,
        "zero_optimization": zero,
        "bf16": parsed.bfloat16_config.model_dump(),
        "fp16": parsed.float16_config.model_dump(),
        "compile": parsed.compile_config.model_dump(),
        "hybrid_engine": parsed.hybrid_engine.model_dump(),
        "autotuning": {"enabled": parsed.autotuning_config.enabled},
        "gradient_clipping": parsed.gradient_clipping,
        "optimizer": {"type": parsed.optimizer_name, "params": parsed.optimizer_params},
    }


def test_fp16_autocast_is_refused_only_where_it_is_on():
    check({"torch_autocast": {"enabled": False, "dtype": "float16"}}, GrassConfig())
