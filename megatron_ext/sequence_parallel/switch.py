"""The switch: Megatron's attention and feed-forward layers run the strategy that their micro-batch's plan names.

Each ``SelfAttention``, ``MLP`` and ``TransformerBlock`` of a model gets a ``forward`` of its own, as an attribute of
the instance: types, parameters, state dicts and hooks of others stay as they are, and deleting the attribute restores
the class's. A layer that runs the native strategy calls that at once: what a switch costs is one look at a variable and
one at a tuple.

Contract: :func:`attach` and :func:`detach` are inverses, to the bit; both can be called again. What cannot be switched
stays native and is told with its reason by :meth:`BlockSwitch.refusals`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, Protocol

from torch import Tensor, nn

from . import micro_batch as running_batch
from .host import attention as host_attention
from .host import feed_forward as host_feed_forward
from .host import linears
from .micro_batch import MicroBatch
from .names import NATIVE, STRATEGIES
from .strategies import BODIES

_MARK = "_megatron_ext_switch"


class Policy(Protocol):
    """What decides: the strategy of each layer of a block for a micro-batch, the same on every rank of the group."""

    def __call__(self, batch: int, length: int, documents: tuple[int, ...] | None) -> tuple[str, ...]: ...


class LayerSwitch:
    """One transformer layer's place in the plan."""

    def __init__(self, block: BlockSwitch, position: int, layer: nn.Module):
        self.block, self.position, self.layer = block, position, layer
        self.reasons = tuple(_obstacles(layer))

    def strategy(self) -> tuple[str, MicroBatch | None]:
        """What the plan says for the micro-batch that runs, native where there is none."""
        micro_batch = running_batch.current()
        if micro_batch is None or micro_batch.block is not self.block:
            return NATIVE, None
        return micro_batch.names[self.position], micro_batch


class BlockSwitch:
    """One transformer block: its layers' switches, and the policy that plans its micro-batches."""

    def __init__(self, block: nn.Module, policy: Policy):
        self.policy = policy
        self.group = group_of(block)
        self.block = block
        self.layers = [LayerSwitch(self, place, layer) for place, layer in enumerate(block.layers)]
        self.is_causal = all(
            switch.layer.self_attention.attn_mask_type.name in host_attention.CAUSAL_KINDS
            for switch in self.layers
            if not switch.reasons
        )
        self.call: dict[str, Any] = {}
        """Keyword arguments of the block's forward while it is planned."""
        self.begun: Callable[[MicroBatch, Tensor], None] | None = None
        """Called before each forward of the block, with its plan and input."""
        self.finished: Callable[[MicroBatch, Tensor, Tensor], None] | None = None
        """Called after each forward of the block, with what ran, its input and its output."""

    def refusals(self) -> dict[int, tuple[str, ...]]:
        """Number of a layer, from 1 as Megatron counts -> why it stays native."""
        return {switch.layer.layer_number: switch.reasons for switch in self.layers if switch.reasons}

    def plan(self, batch: int, length: int, documents: tuple[int, ...] | None) -> MicroBatch:
        """The micro-batch that is about to run, planned; refused layers run natively whatever the policy says."""
        names = self.policy(batch, length, documents)
        if len(names) != len(self.layers):
            raise ValueError(f"the plan has {len(names)} layers but the block has {len(self.layers)}")
        unknown = set(names) - set(STRATEGIES)
        if unknown:
            raise ValueError(f"the plan names {sorted(unknown)}; strategies are {', '.join(STRATEGIES)}")
        names = tuple(
            NATIVE if switch.reasons else name for switch, name in zip(self.layers, names, strict=True)
        )
        return MicroBatch(self, names, batch, length, documents)


def attach(block: nn.Module, policy: Policy) -> BlockSwitch:
    """Let `policy` decide for a ``TransformerBlock``; a block that has a switch gets the new policy."""
    known = getattr(block, _MARK, None)
    if known is not None:
        known.policy = policy
        return known
    switch = BlockSwitch(block, policy)
    replacements: list[tuple[nn.Module, Any, Callable[..., Any]]] = [(block, switch, _block_forward)]
    for layer in switch.layers:
        if not layer.reasons:
            replacements.append((layer.layer.self_attention, layer, _attention_forward))
            replacements.append((layer.layer.mlp, layer, _feed_forward_forward))
    for module, _, _ in replacements:
        _check_own_forward(module)
    for replacement in replacements:
        _replace(*replacement)
    _capture_checkpoints()
    return switch


def detach(block: nn.Module) -> None:
    """Take the switch of a block out again. The last one takes out the hook on ``tensor_parallel.checkpoint``."""
    switch = getattr(block, _MARK, None)
    if switch is None:
        return
    attached = [s.layer for s in switch.layers if not s.reasons]
    for module in [block, *(part for layer in attached for part in (layer.self_attention, layer.mlp))]:
        for name in (_MARK, "forward"):
            module.__dict__.pop(name, None)
    _release_checkpoints()


def _check_own_forward(module: nn.Module) -> None:
    if "forward" in module.__dict__:
        raise RuntimeError(
            f"{type(module).__name__}.forward has been replaced on this instance by another tool; "
            "megatron_ext must come first, or not at all"
        )


def _replace(module: nn.Module, switch: Any, forward: Callable[..., Any]) -> None:
    object.__setattr__(module, _MARK, switch)
    module.forward = MethodType(forward, module)


def _block_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    switch: BlockSwitch = getattr(self, _MARK)
    stock = type(self).forward
    if _inferring(kwargs):
        return stock(self, *args, **kwargs)
    hidden = self.input_tensor if not self.pre_process else (args[0] if args else kwargs["hidden_states"])
    if not isinstance(hidden, Tensor):  # Megatron's WrappedTensor, which gives its tensor away once
        hidden = hidden._wrapper[0]
    length = hidden.shape[0] * switch.group.size()
    documents = _documents(kwargs.get("packed_seq_params"), length, switch.is_causal)
    switch.call = kwargs
    try:
        micro_batch = switch.plan(hidden.shape[1], length, documents)
    finally:
        switch.call = {}
    if switch.begun:
        switch.begun(micro_batch, hidden)
    with running_batch.running(micro_batch):
        output = stock(self, *args, **kwargs)
    if switch.finished:
        switch.finished(micro_batch, hidden, output)
    return output


def _attention_forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    switch: LayerSwitch = getattr(self, _MARK)
    name, micro_batch = switch.strategy()
    if micro_batch is not None:
        micro_batch.calls["recomputed" if micro_batch.recomputing else "forward", name] += 1
        stands_in = micro_batch.documents is not None and host_attention.is_local_core(self.core_attention)
        if name != NATIVE or stands_in:
            return _run_attention(self, switch, name, micro_batch, hidden_states, *args, **kwargs)
    return type(self).forward(self, hidden_states, *args, **kwargs)


def _run_attention(
    attention: nn.Module,
    switch: LayerSwitch,
    name: str,
    micro_batch: MicroBatch,
    x: Tensor,
    attention_mask: Tensor | None = None,
    *,
    rotary_pos_emb: Any = None,
    attention_bias: Tensor | None = None,
    **_others: Any,
) -> tuple[Tensor, Tensor | None]:
    if attention_bias is not None:
        raise ValueError(
            f"strategy {name} cannot use the attention_bias that layer {attention.layer_number} was given; "
            f'write "strategies": ["{NATIVE}"] in megatron_ext.sequence_parallel'
        )
    weights, bias = host_attention.read_weights(attention)  # first: it waits for the norm's weights too
    x = linears.normalised(x, attention.linear_qkv, attention.config)
    angles = host_attention.angles_of(attention, rotary_pos_emb)
    layer = host_attention.read_layer(attention, switch.block.group, angles, micro_batch.rows_of)
    pattern = host_attention.pattern_of(
        attention, attention_mask, micro_batch.length, micro_batch.documents, micro_batch.is_causal
    )
    return BODIES[name].attention(x, weights, layer, pattern), bias


def _feed_forward_forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    switch: LayerSwitch = getattr(self, _MARK)
    name, micro_batch = switch.strategy()
    if name == NATIVE or micro_batch is None:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    if args or any(value is not None for value in kwargs.values()):  # Megatron's per_token_scale
        raise ValueError(
            f"strategy {name} gives a feed-forward layer its input alone, but layer {switch.layer.layer_number} was "
            f'given {", ".join(kwargs) or "more"}; write "strategies": ["{NATIVE}"] in megatron_ext.sequence_parallel'
        )
    weights, bias = host_feed_forward.read_weights(self)  # first: it waits for the norm's weights too
    x = linears.normalised(hidden_states, self.linear_fc1, self.config)
    layer = host_feed_forward.read_layer(self, switch.block.group)
    return BODIES[name].feed_forward(x, weights, layer), bias


def _inferring(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("inference_context") is not None or kwargs.get("inference_params") is not None


def _documents(packed: Any, length: int, causal: bool) -> tuple[int, ...] | None:
    """Boundaries of packed documents, on the host: one synchronisation a micro-batch.

    Padding at a document's end counts as its tokens: under a causal mask no token before it sees it.
    """
    if packed is None:
        return None
    if packed.qkv_format != "thd":
        raise ValueError(f"packed_seq_params.qkv_format is {packed.qkv_format!r}; megatron_ext knows thd")
    padded = packed.cu_seqlens_q_padded
    documents = tuple((packed.cu_seqlens_q if padded is None else padded).tolist())
    if documents[-1] != length:
        raise ValueError(
            f"packed_seq_params ends at token {documents[-1]} but the micro-batch has {length} tokens; let "
            "cu_seqlens_q, or cu_seqlens_q_padded, end with the last token, padding included"
        )
    if not causal and padded is not None and documents != tuple(packed.cu_seqlens_q.tolist()):
        raise ValueError(
            "packed_seq_params has padding between documents, which tokens would see as attention is not causal; "
            "pack without padding, or count the padding as documents of its own in cu_seqlens_q"
        )
    return documents


def group_of(block: nn.Module) -> Any:
    """The tensor-parallel group; releases before 0.13 keep it nowhere but in parallel_state."""
    for holder in (block, getattr(block, "pg_collection", None)):
        group = getattr(holder, "tp_group", None) or getattr(holder, "tp", None)
        if group is not None:
            return group
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def _obstacles(layer: nn.Module) -> list[str]:
    kind = type(layer)
    if (kind.__module__, kind.__qualname__) != (
        "megatron.core.transformer.transformer_layer",
        "TransformerLayer",
    ):
        return [f"the layer is a {kind.__module__}.{kind.__qualname__}, not TransformerLayer"]
    return [*_of_config(layer.config), *host_attention.obstacles(layer.self_attention),
            *host_feed_forward.obstacles(layer.mlp)]  # fmt: skip


_REFUSED: Sequence[tuple[str, Any]] = (
    ("fp8", None),
    ("fp4", None),
    ("tp_comm_overlap", False),
    ("delay_wgrad_compute", False),
    ("cpu_offloading", False),
    ("fine_grained_activation_offloading", False),
    ("enable_cuda_graph", False),
    ("external_cuda_graph", False),
    ("cuda_graph_impl", "none"),
)


def _of_config(config: Any) -> list[str]:
    """Settings under which a layer cannot be run by anything but Megatron's own code."""
    return [
        f"config.{key} is {getattr(config, key)!r}"
        for key, plain in _REFUSED
        if getattr(config, key, plain) not in (plain, None, False)
    ]


_attached = 0
_capturing: Callable[..., Any] | None = None


def _capture_checkpoints() -> None:
    global _attached, _capturing
    from megatron.core import tensor_parallel

    if _attached == 0:
        _capturing = tensor_parallel.checkpoint = running_batch.capturing(tensor_parallel.checkpoint)
    _attached += 1


def _release_checkpoints() -> None:
    global _attached, _capturing
    from megatron.core import tensor_parallel

    _attached -= 1
    if _attached == 0 and _capturing is not None:
        # Where another tool has wrapped ours it stays, and only passes calls on.
        if tensor_parallel.checkpoint is _capturing:
            tensor_parallel.checkpoint = _capturing.__wrapped__
        _capturing = None
