"""The numbers of one transformer layer and of the group that it is cut over.

Contract: pure arithmetic, checked once when it is made; every size that a closed form needs is a property here. In
docstrings p is the group size, h the hidden size, n and g the query and KV heads, d the width of a head, f the width
of the feed-forward layer, u = 2 for a gated one and 1 otherwise.

Not covered: MoE, MLA, windows of attention, weights of different types.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_ext.sequence_parallel.names import STRATEGIES

_BALANCED = ("context", "ring", "metp")
"""Strategies that cut attention along the sequence: causal masks need two chunks for each rank (zigzag)."""
_HEADS = ("megatron_ts", "ulysses", "metp")
"""Strategies that deal out query heads, or weights of whole heads."""


@dataclass(frozen=True)
class LayerShape:
    """One layer, unsharded, in elements, and how many ranks share it."""

    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    group_size: int
    """Ranks of the tensor-parallel group, which is the axis that strategies switch on."""
    gated: bool = False
    """Two up-projections, as SwiGLU has."""
    causal: bool = True
    linear_bias: bool = False
    """Megatron's `add_bias_linear`: all four linears."""
    qkv_bias: bool = False
    """Megatron's `add_qkv_bias`: the first linear alone."""
    element_bytes: int = 2
    """Of weights and activations."""
    unfused_attention: bool = False
    """Megatron's local DotProductAttention, which writes scores out, is the core; only `megatron_ts` runs it."""
    hidden_dropout: bool = False
    """Each layer then keeps two masks."""

    def __post_init__(self) -> None:
        for field in fields(self):
            given = getattr(self, field.name)
            if field.type == "int" and (type(given) is not int or given < 1):
                raise ValueError(
                    f"{field.name} is {given!r}; allowed: an integer from 1; give the layer's own"
                )
            if field.type == "bool" and type(given) is not bool:
                raise ValueError(f"{field.name} is {given!r}; allowed: true or false")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads} with {self.num_heads} heads; allowed: a divisor of num_heads; "
                "give the model's number of query groups"
            )
        for name in ("ffn_hidden_size", "qkv_size", "query_size"):
            if getattr(self, name) % self.group_size:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, of which {self.group_size} ranks cannot hold equal shards; "
                    "allowed: a multiple of group_size; use another tensor_model_parallel_size"
                )

    @classmethod
    def from_json(cls, given: Any, where: str) -> LayerShape:
        """The inverse of `to_json`. `where` names the file and key in errors."""
        known = {field.name for field in fields(cls)}
        if not isinstance(given, dict) or not set(given) <= known:
            unknown = sorted(set(given) - known) if isinstance(given, dict) else given
            raise ValueError(
                f"{where} has {unknown!r}; allowed: an object with the keys {', '.join(sorted(known))}"
            )
        try:
            return cls(**given)
        except TypeError as error:
            raise ValueError(f"{where} is incomplete ({error}); write the file anew") from None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def query_size(self) -> int:
        """Q = n d."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """K = g d: width of the keys, and of the values."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Q + 2 K: output width of the first linear."""
        return self.query_size + 2 * self.kv_size

    @property
    def dealt_kv_size(self) -> int:
        """K' of strategies that deal out heads: with fewer KV heads than ranks, each rank needs one of its own."""
        return max(self.kv_size, self.group_size * self.head_dim)

    @property
    def fc1_size(self) -> int:
        """u f: output width of the third linear."""
        return (2 if self.gated else 1) * self.ffn_hidden_size

    @property
    def cuts_kv_groups(self) -> bool:
        """Whether a rank's shard of QKV ends inside a KV group."""
        return self.num_kv_heads % self.group_size != 0

    @property
    def qkv_weight(self) -> int:
        return self.qkv_size * self.hidden_size

    @property
    def proj_weight(self) -> int:
        return self.query_size * self.hidden_size

    @property
    def fc1_weight(self) -> int:
        return self.fc1_size * self.hidden_size

    @property
    def fc2_weight(self) -> int:
        return self.ffn_hidden_size * self.hidden_size

    @property
    def weight(self) -> int:
        """W: elements of the four weights; 12 h^2 for the layer of the paper."""
        return self.qkv_weight + self.proj_weight + self.fc1_weight + self.fc2_weight

    @property
    def has_qkv_bias(self) -> bool:
        return self.linear_bias or self.qkv_bias

    @property
    def wide_bytes(self) -> int:
        """Bytes of an element of what is summed in fp32 or wider."""
        return max(4, self.element_bytes)

    def obstacle(self, strategy: str, batch: int, length: int) -> str | None:
        """Why `strategy` can't run on `batch` sequences of `length` tokens, and what would help; None: it can."""
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy is {strategy!r}; allowed: {', '.join(STRATEGIES)}; correct the name")
        if batch < 1 or length < 1:
            raise ValueError(
                f"batch and length are {batch} and {length}; allowed: from 1; give the micro-batch's"
            )
        return self.obstacle_of_heads(strategy) or self._obstacle_of_length(strategy, length)

    def obstacle_of_heads(self, strategy: str) -> str | None:
        """The part of `obstacle` that no sequence changes."""
        p, heads, kv_heads = self.group_size, self.num_heads, self.num_kv_heads
        if strategy in _HEADS and heads % p:
            return f"{strategy} deals out heads and {heads} heads are no multiple of {p} ranks; use context or ring"
        if strategy == "metp" and kv_heads % p:
            return f"metp needs whole KV heads on each rank and {kv_heads} are no multiple of {p} ranks; use ring"
        if strategy in _HEADS and kv_heads % p and p % kv_heads:
            return f"{strategy} needs KV heads ({kv_heads}) and ranks ({p}) of which one divides the other; use ring"
        return None

    def _obstacle_of_length(self, strategy: str, length: int) -> str | None:
        p = self.group_size
        if length % p:
            return f"a length of {length} is no multiple of {p} ranks; pad sequences to a multiple of {p}"
        if p > 1 and self.causal and strategy in _BALANCED and length % (2 * p):
            return (
                f"{strategy} balances a causal mask with two chunks for each of {p} ranks and a length of {length} is "
                f"no multiple of {2 * p}; pad sequences to a multiple of {2 * p}"
            )
        return None
