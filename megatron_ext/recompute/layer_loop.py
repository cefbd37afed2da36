"""The seam to ``TransformerBlock``: its layers are recomputed in full, in parts or not, as a :class:`ChunkPlan` says.

A block asks its config at every forward whether to recompute, and then calls its own ``_checkpointed_forward``. So an
instance gets a copy of its config that says "full", and a ``_checkpointed_forward`` that goes through the layers one by
one. The copy is needed because all chunks of a rank and the schedule share one config; the layers keep theirs. Modules
are recomputed by Megatron-core's own switches, plain flags of a layer's parts that are read at every forward.

Contract: :func:`attach` and :func:`detach` are inverses, to the bit. A micro-batch that is evaluated is left to
Megatron-core. What ran is counted where it runs: :attr:`LayerLoop.calls`.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .plan import FULL, NONE, ChunkPlan, parse_choice

_MARK = "_megatron_ext_recompute"
_FORWARD = "_checkpointed_forward"

FLAGS: dict[str, tuple[tuple[str, str], ...]] = {
    "core_attn": (("self_attention", "checkpoint_core_attention"),),
    "layernorm": (("", "recompute_input_layernorm"), ("", "recompute_pre_mlp_layernorm")),
    "mla_up_proj": (("self_attention", "recompute_up_proj"),),
    "mlp": (("", "recompute_mlp"),),
    "moe": (("mlp", "moe_layer_recompute"),),
    "moe_act": (("mlp.experts", "activation_recompute"),),
    "shared_experts": (("mlp", "shared_experts_recompute"),),
}
"""Module -> (part of the layer, its flag) that Megatron-core reads in forward."""


class LayerLoop:
    """The recomputation of one block."""

    def __init__(self, block: nn.Module):
        self.plan = ChunkPlan((NONE,) * len(block.layers))
        self.number = 0
        """Training passes so far: which of them a share is for."""
        self.chosen: dict[int, str] = {}
        """Place of a layer -> the choice that its flags are set for; without what others may have changed."""
        self.evaluates = False
        """Whether the passes that come are of no step."""
        self.calls: Counter[tuple[str, str]] = Counter()
        """("forward" or "recomputed", choice) -> layers. Modules count in forward: Megatron-core runs them again."""
        self.arrived: Callable[[nn.Module, Tensor, dict[str, Any]], None] | None = None
        """Called before a training pass, with the block, its input and the other arguments of its layers."""
        self._config = block.config
        self._forward = block.__dict__.get(_FORWARD)
        self._before = {id(part): (part, _flags_of(part)) for layer in block.layers for part in _parts(layer)}

    def restore(self, block: nn.Module) -> None:
        """The settings that were found."""
        block.config = self._config
        if self._forward is not None:  # somebody else's
            block.__dict__[_FORWARD] = self._forward
        for part, flags in self._before.values():
            for flag, value in flags.items():
                setattr(part, flag, value)


def counted(loops: Iterable[LayerLoop]) -> dict[str, dict[str, int]]:
    """{choice: {"forward": layers, "recomputed": layers}} of all these."""
    total: Counter[tuple[str, str]] = Counter()
    for loop in loops:
        total.update(loop.calls)
    found: dict[str, dict[str, int]] = {}
    for (phase, choice), calls in sorted(total.items()):
        found.setdefault(choice, {"forward": 0, "recomputed": 0})[phase] = calls
    return found


def attach(block: nn.Module) -> LayerLoop:
    """Let a plan decide for a ``TransformerBlock``; the one that is attached already where there is one."""
    known = getattr(block, _MARK, None)
    if known is not None:
        return known
    loop = LayerLoop(block)
    config = copy.copy(block.config)
    # The config's own rules have been checked: this says no more than "call _checkpointed_forward".
    config.recompute_granularity, config.recompute_method = "full", "block"
    config.recompute_num_layers = len(block.layers)
    object.__setattr__(block, _MARK, loop)
    block.config = config
    setattr(block, _FORWARD, MethodType(_run_layers, block))
    return loop


def detach(block: nn.Module) -> None:
    """Give the block back as it was."""
    loop = getattr(block, _MARK, None)
    if loop is None:
        return
    for name in (_MARK, _FORWARD):
        del block.__dict__[name]
    loop.restore(block)


def _run_layers(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    context: Tensor | None,
    context_mask: Tensor | None,
    rotary_pos_emb: Any,
    attention_bias: Tensor | None = None,
    packed_seq_params: Any = None,
    padding_mask: Tensor | None = None,
    **_quantization: Any,
) -> Tensor:
    from megatron.core import tensor_parallel

    loop: LayerLoop = getattr(self, _MARK)
    trains = torch.is_grad_enabled() and not loop.evaluates  # in training mode a model may be evaluated, too
    options: dict[str, Any] = {"attention_bias": attention_bias, "packed_seq_params": packed_seq_params}
    if padding_mask is not None:  # earlier releases know no such argument
        options["padding_mask"] = padding_mask
    if trains and loop.arrived is not None:
        others = {"attention_mask": attention_mask, "context": context, "context_mask": context_mask}
        loop.arrived(self, hidden_states, {**options, **others, "rotary_pos_emb": rotary_pos_emb})
    number = loop.number
    loop.number += trains
    for place, layer in enumerate(self.layers):
        choice = loop.plan.choice(place, number) if trains else NONE
        run = _Layer(loop, place, layer, choice, options, trains)
        inputs = (hidden_states, attention_mask, context, context_mask, rotary_pos_emb)
        if choice == FULL:
            if _must_begin_graph(layer, hidden_states):
                inputs = (hidden_states.detach().requires_grad_(), *inputs[1:])
            hidden_states, context = tensor_parallel.checkpoint(run, False, *inputs)
        else:
            hidden_states, context = run(*inputs)
    return hidden_states


def _must_begin_graph(layer: nn.Module, hidden_states: Tensor) -> bool:
    """After a frozen embedding no input needs a gradient, and Megatron-core's checkpoint would give none to weights."""
    return not hidden_states.requires_grad and any(
        parameter.requires_grad for parameter in layer.parameters()
    )


class _Layer:
    """One layer of one micro-batch, which may run a second time."""

    def __init__(
        self,
        loop: LayerLoop,
        place: int,
        layer: nn.Module,
        choice: str,
        options: dict[str, Any],
        counts: bool,
    ):
        self._loop, self._place, self._layer, self._choice = loop, place, layer, choice
        self._options, self._counts = options, counts
        self._runs = 0

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        context: Tensor | None,
        context_mask: Tensor | None,
        rotary_pos_emb: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if self._counts:
            self._loop.calls["recomputed" if self._runs else "forward", self._choice] += 1
        self._runs += 1
        if self._loop.chosen.get(self._place) != self._choice:
            set_modules(self._layer, self._choice)
            self._loop.chosen[self._place] = self._choice
        return self._layer(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            context=context,
            context_mask=context_mask,
            rotary_pos_emb=rotary_pos_emb,
            inference_context=None,
            **self._options,
        )


def set_modules(layer: nn.Module, choice: str) -> None:
    """Let the layer's next forward recompute these modules and no others."""
    wanted = parse_choice(choice)
    for module, places in FLAGS.items():
        for part_name, flag in places:
            part = _part(layer, part_name)
            if part is not None and flag in part.__dict__:
                setattr(part, flag, module in wanted)


def _part(layer: nn.Module, name: str) -> nn.Module | None:
    part: Any = layer
    for step in filter(None, name.split(".")):
        part = getattr(part, step, None)
    return part


def _parts(layer: nn.Module) -> list[nn.Module]:
    names = dict.fromkeys(name for places in FLAGS.values() for name, _ in places)
    return [part for name in names if (part := _part(layer, name)) is not None]


_NAMES = frozenset(flag for places in FLAGS.values() for _, flag in places)


def _flags_of(part: nn.Module) -> dict[str, bool]:
    return {name: part.__dict__[name] for name in _NAMES if name in part.__dict__}


def has_experts(layer: nn.Module) -> bool:
    """Whether a layer of experts stands in the place of its dense feed-forward layer."""
    return _part(layer, "mlp.experts") is not None


def obstacle(layer: nn.Module, module: str) -> str | None:
    """Why a layer cannot recompute this module by itself, None where it can."""
    for part_name, flag in FLAGS[module]:
        part = _part(layer, part_name)
        if part is None or flag not in part.__dict__:
            return f"{type(layer).__name__} has no {'.'.join(filter(None, (part_name, flag)))}"
    check = _CHECKS.get(module)
    return check(layer) if check else None


def _norms(layer: nn.Module) -> str | None:
    """Megatron-core frees a norm's output and computes it again just before it is needed, in the place of the freed
    storage: the norm must be a module of its own, and one that Transformer Engine computes."""
    for name in ("input_layernorm", "pre_mlp_layernorm"):
        kind = type(getattr(layer, name, None))
        if kind.__name__ == "IdentityOp":
            return f"{name} is a part of the linear after it"
        if not kind.__module__.startswith("transformer_engine"):
            return f"{name} is a {kind.__module__}.{kind.__qualname__}, not one of Transformer Engine's"
    return None


def _dense(layer: nn.Module) -> str | None:
    """A feed-forward layer hands out its second bias to be added later. As an output of a checkpoint the parameter
    itself becomes a result of the checkpoint's node, and running that again ends in itself, again and again."""
    if has_experts(layer):
        return "the layer is one of experts; name moe"
    linear = _part(layer, "mlp.linear_fc2")
    if linear is None:
        return f"its mlp is a {type(_part(layer, 'mlp')).__qualname__}"
    bias = getattr(linear, "bias", None)
    if bias is not None and bias.numel():
        return "its linear_fc2 has a bias, with which Megatron-core's recomputation of mlp never ends"
    return None


def _fused_attention(layer: nn.Module) -> str | None:
    kind = type(_part(layer, "self_attention.core_attention"))
    if kind.__name__ == "DotProductAttention":
        return None
    return f"core_attention is a {kind.__qualname__}, which keeps no scores"


def _shared(layer: nn.Module) -> str | None:
    if _part(layer, "mlp.shared_experts") is None:
        return "the layer has no shared experts"
    if getattr(layer.mlp, "shared_expert_overlap", False):
        return "its shared experts run beside the communication (moe_shared_expert_overlap), which recomputes none"
    return None


_CHECKS: dict[str, Callable[[nn.Module], str | None]] = {
    "layernorm": _norms,
    "mlp": _dense,
    "core_attn": _fused_attention,
    "shared_experts": _shared,
}
