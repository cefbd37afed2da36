"""The names of the sequence-parallel strategies, in the order in which they are listed everywhere."""

from __future__ import annotations

STRATEGIES = ("megatron_ts", "ulysses", "context", "ring", "metp")
"""Tensor parallelism with Megatron's sequence parallelism (the host's own path), Ulysses, context parallelism by an
all-gather of keys and values, by a ring, and METP. Between them the paper's five: `ring` stands for MegatronCZ and
ColossalZ."""

NATIVE = "megatron_ts"
"""The strategy that is Megatron-core's own code: what runs where nothing else may."""
