"""Which other keys of ds_config cannot stand beside a ``grass`` block, and why.

Contract: :func:`check` raises ``ValueError`` with one line that names the first key in conflict, its value,
the reason and the way out. It reads the dict that DeepSpeed parsed and nothing else. A key that is absent,
null, still ``"auto"`` (DeepSpeed then takes its default) or at its default is never in conflict. Keys that
only some releases of DeepSpeed know are listed all the same.
Allowed on purpose: what only concerns code that GRASS replaces (``round_robin_gradients``, bucket sizes), and
``states.master_weights: false`` in fp32 training, where the weights are their own master copy.
Not covered: what it takes a model or an optimizer object to see: MoE layers, pipelines, client optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .config import GrassConfig, shown

DsConfig = Mapping[str, Any]
Predicate = Callable[[object], bool]
Circumstance = Callable[[DsConfig, GrassConfig], bool]


def always(ds_config: DsConfig, config: GrassConfig) -> bool:
    return True


@dataclass(frozen=True)
class Rule:
    """`key` is in conflict when its value `clashes` and the circumstances are those of `when`.

    The message reads "<key> is <value>, but <why>; <do>".
    """

    key: str
    clashes: Predicate
    why: str
    do: str
    when: Circumstance = always


_TRUE = ("true", "1", "1.0", "on", "yes", "t", "y")  # what DeepSpeed's pydantic models take for true
_FALSE = ("false", "0", "0.0", "off", "no", "f", "n")


def _word(value: object) -> str:
    return str(getattr(value, "value", value)).lower()  # an enum member counts as its value


def _number(value: object) -> float:
    try:
        return float(_word(value))
    except ValueError:
        return 0.0  # not a number: DeepSpeed refuses it, or never reads it


def given(value: object) -> bool:
    return True


def is_present(value: object) -> bool:
    return value is not False


def is_on(value: object) -> bool:
    return _word(value) in _TRUE


def is_off(value: object) -> bool:
    return _word(value) in _FALSE


def one_of(*words: str) -> Predicate:
    return lambda value: _word(value) in words


def none_of(*words: str) -> Predicate:
    return lambda value: _word(value) not in words


def above(limit: float) -> Predicate:
    return lambda value: _number(value) > limit


def without_master_weights(ds_config: DsConfig, config: GrassConfig) -> bool:
    return not config.states.master_weights


def below_stage_3(ds_config: DsConfig, config: GrassConfig) -> bool:
    return _number(_value(ds_config, "zero_optimization.stage")) < 3


def norm_is_needed(ds_config: DsConfig, config: GrassConfig) -> bool:
    clipping = _value(ds_config, "gradient_clipping")  # 1.0 by default where compute_grad_norm exists
    return config.measures or clipping is None or _number(clipping) > 0


_STATES = "grass keeps the optimizer states on the host itself and moves those of the active blocks"
_SHARDS = "grass needs gradients and weights sharded over all ranks in their own precision"
_PRECISION = "grass sets the precision of master weights and moments by its own keys"
_ADAM = "grass updates blocks by the rule of Adam or AdamW"


def autocasts(ds_config: DsConfig, config: GrassConfig) -> bool:
    value = _value(ds_config, "torch_autocast.enabled")
    return value is not None and is_on(value)


RULES: tuple[Rule, ...] = (
    Rule(
        "torch_autocast.dtype",
        one_of("float16", "fp16", "half", "torch.float16"),
        "grass does not drive its gradient scaler",
        'use "bfloat16", or fp16.enabled',
        when=autocasts,
    ),
    # where states and parameters live
    Rule("zero_optimization.stage", none_of("0", "1", "2", "3"), "ZeRO ends at 3", "use 0, 1, 2 or 3"),
    Rule(
        "zero_optimization.offload_optimizer.device",
        one_of("cpu", "nvme"),
        _STATES,
        'remove "offload_optimizer"',
    ),
    Rule("zero_optimization.offload_optimizer.super_offload", is_on, _STATES, 'remove "super_offload"'),
    Rule("zero_optimization.cpu_offload", is_on, _STATES, 'remove "cpu_offload"'),
    Rule("zero_optimization.zenflow", given, _STATES, 'remove "zenflow"'),
    Rule(
        "zero_optimization.offload_param.device",
        one_of("cpu", "nvme"),
        "grass needs the weights on the device",
        'remove "offload_param"',
    ),
    Rule(
        "zero_optimization.cpu_offload_param",
        is_on,
        "grass needs the weights on the device",
        'remove "cpu_offload_param"',
    ),
    # how they are sharded
    Rule("zero_optimization.zero_hpz_partition_size", above(1), _SHARDS, "set it to 1"),
    Rule("zero_optimization.zero_quantized_weights", is_on, _SHARDS, "set it to false"),
    Rule("zero_optimization.zero_quantized_gradients", is_on, _SHARDS, "set it to false"),
    Rule(
        "zero_optimization.zero_quantized_nontrainable_weights",
        is_on,
        "every block is frozen most of the time and would lose precision then",
        "set it to false",
    ),
    Rule("zero_optimization.mics_shard_size", above(0), _SHARDS, 'remove "mics_shard_size"'),
    Rule("zero_optimization.legacy_stage1", is_on, "DeepSpeed has dropped it", 'remove "legacy_stage1"'),
    Rule(
        "zero_optimization.elastic_checkpoint",
        is_on,
        "its files have no place for blocks that were never drawn",
        "set it to false, and resume with as many ranks as saved",
        when=below_stage_3,
    ),
    # how checkpoints are written
    *(
        Rule(
            key,
            clashes,
            "grass verifies a checkpoint's files when they are whole, on storage all ranks share",
            do,
        )
        for key, clashes, do in (
            ("checkpoint.writer", given, 'remove "writer"'),
            ("checkpoint.use_node_local_storage", is_on, "save to shared storage"),
            ("nebula.enabled", is_on, 'remove "nebula"'),
            ("datastates_ckpt", is_present, 'remove "datastates_ckpt"'),
            ("checkpoint.checkpoint_serialization", is_off, "set it to true"),
            ("zero_optimization.pipeline_loading_checkpoint", is_on, "set it to false"),
        )
    ),
    Rule("sparse_gradients", is_on, "grass reduces gradients dense", 'remove "sparse_gradients"'),
    # what the optimizer is
    Rule("optimizer.type", none_of("adam", "adamw"), _ADAM, 'write "type": "AdamW" or "Adam"'),
    Rule("optimizer.params.amsgrad", is_on, f"{_ADAM}, without a third state", "set it to false"),
    Rule("optimizer.params.bias_correction", is_off, f"{_ADAM}, with bias correction", "set it to true"),
    Rule(
        "zero_optimization.compute_grad_norm",
        is_off,
        "importance and gradient clipping are gradient norms",
        'set it to true, or use the policy "lisa" or "cyclic" with "gradient_clipping": 0',
        when=norm_is_needed,
    ),
    # in what precision
    Rule(
        "fp16.enabled",
        is_on,
        "grass.states.master_weights is false, and small updates vanish in fp16 weights",
        'write "master_weights": true, or use bf16',
        when=without_master_weights,
    ),
    *(
        Rule(f"{block}.{key}", is_on, _PRECISION, f'remove it and write "grass": {{"states": {{{instead}}}}}')
        for block, key, instead in (
            ("fp16", "fp16_master_weights_and_grads", '"master_weights": true'),
            ("bf16", "bf16_master_weights_and_grads", '"master_weights": false'),
            ("bf16", "bf16_optimizer_states", '"dtype": "bf16"'),
            ("bfloat16", "bf16_master_weights_and_grads", '"master_weights": false'),
            ("bfloat16", "bf16_optimizer_states", '"dtype": "bf16"'),
        )
    ),
    Rule("amp.enabled", is_on, "apex AMP does not work with ZeRO, which grass runs on", "use bf16 or fp16"),
    # who else rewrites the model, the weights or the step
    Rule(
        "compile.deepcompile",
        is_on,
        "DeepCompile reduces gradients in its own graph, where grass cannot see them",
        "set it to false",
    ),
    Rule("hybrid_engine.enabled", is_on, "it swaps the weights for inference copies", "set it to false"),
    Rule("expert_parallel.enabled", is_on, "grass has no mixture-of-experts layers yet", "set it to false"),
    Rule(
        "compression_training.weight_quantization.shared_parameters.enabled",
        is_on,
        "it quantises the weights of frozen blocks too",
        "set it to false",
    ),
    Rule(
        "autotuning.enabled",
        is_on,
        "the steps that it times are those in which grass probes, and its memory model counts all states",
        'tune without the "grass" block, then set it to false',
    ),
)


def check(ds_config: DsConfig, config: GrassConfig) -> None:
    """Raise ``ValueError`` if `ds_config` asks for something that cannot work beside an enabled block."""
    if not config.enabled:
        return
    broken = list(conflicts_of(ds_config, config))
    if broken:
        key, value, why, do = broken[0]
        also = ", ".join(other for other, *_ in broken[1:])
        more = f" (also in conflict: {also})" if also else ""
        raise ValueError(f"{key} is {shown(value)}, but {why}; {do}{more}")


def conflicts_of(ds_config: DsConfig, config: GrassConfig) -> Iterator[tuple[str, object, str, str]]:
    """Every key in conflict, with its value, the reason, and what to do."""
    for rule in RULES:
        value = _conflict(rule, ds_config, config)
        if value is not None:
            yield rule.key, value, rule.why, rule.do


def _conflict(rule: Rule, ds_config: DsConfig, config: GrassConfig) -> object | None:
    """The value in conflict, or None."""
    value = _value(ds_config, rule.key)
    broken = value is not None and rule.clashes(value) and rule.when(ds_config, config)
    return value if broken else None


def _value(ds_config: DsConfig, dotted: str) -> object | None:
    """The value of a dotted key; None where DeepSpeed takes its default."""
    value: object = ds_config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return None if isinstance(value, str) and value == "auto" else value
