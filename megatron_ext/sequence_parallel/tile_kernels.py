"""Kernels for one tile of the attention matrix, forward and backward.

A kernel gets queries [b, n, s, d] against keys and values [b, g, t, d], strided as they come, heads h of the queries
using KV head ``h // (n / g)``, and returns the tile's output and the logarithm of its softmax denominator
[b, n, s], in fp32 or wider. Tiles that share queries are put together from these two
(:mod:`megatron_ext.sequence_parallel.attention`). In backward a kernel gets the *whole* row's output and logarithm, so
that its probabilities are those of the whole softmax and the tiles' gradients add up.

PyTorch's own flash kernels run where they can: on a CPU in every dtype, on a GPU in fp16 and bf16. :class:`Blockwise`
does the same in plain PyTorch, a block of rows at a time; it is the specification, and what runs with an explicit mask
or attention dropout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_BLOCK_ROWS = 1024
"""Rows of queries that :class:`Blockwise` computes at once: their scores are all it holds."""

MASKED_SCORE = -10000.0
"""What Megatron's own attention writes where an explicit mask is true: a row that is masked everywhere then sees all
keys alike, here as there."""


class Kernel(Protocol):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """The tile's output [b, n, s, d] and log-sum-exp [b, n, s]."""
        ...

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, from the gradient, output and log-sum-exp of whole rows."""
        ...


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: fp64 for fp64, fp32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class CpuFlash:
    """PyTorch's flash kernel for the CPU: every dtype, KV heads shared as they are. It reads heads as if their features
    lay side by side, whatever the strides say."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = (_side_by_side(t) for t in (q, k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v, out = (_side_by_side(t) for t in (grad, q, k, v, out))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )


class CudaFlash:
    """PyTorch's FlashAttention for GPUs, fp16 and bf16; its tensors are [b, s, n, d]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = (_side_by_side(t).transpose(1, 2) for t in (q, k, v))
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale
        )
        return out.transpose(1, 2), lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, grad = (_side_by_side(t).transpose(1, 2) for t in (q, k, v, out, grad))
        unused = torch.zeros(
            2, dtype=torch.uint64, device=q.device
        )  # the state of dropout, of which there is none
        grads = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out, lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0, causal,
            unused, unused, scale=scale,
        )  # fmt: skip
        return tuple(t.transpose(1, 2) for t in grads)


@dataclass(frozen=True)
class Blockwise:
    """Plain PyTorch. `mask`: bool, broadcastable to [b, n, s, t], true where nothing is seen. `dropout`: its
    probability; `seed`: forward and backward of one tile draw the same from it."""

    mask: Tensor | None = None
    dropout: float = 0.0
    seed: int = 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        kind = wide(q.dtype)
        out = q.new_empty(q.shape, dtype=kind)
        lse = q.new_empty(q.shape[:-1], dtype=kind)
        values = _grouped(v, q).to(kind)
        for rows, scores in self._scores(q, k, causal, scale):
            lse[:, :, rows] = scores.logsumexp(-1).flatten(1, 2)
            weights = scores.softmax(-1)
            if self.dropout:
                weights = weights * self._kept(weights, rows)
            out[:, :, rows] = (weights @ values).flatten(1, 2)
        return out, lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind, groups = wide(q.dtype), k.shape[1]
        keys, values = _grouped(k, q).to(kind), _grouped(v, q).to(kind)
        grad, wide_q = grad.to(kind), q.to(kind)
        delta = (grad * out.to(kind)).sum(-1, keepdim=True)
        grad_q = torch.empty_like(wide_q)
        grad_k, grad_v = (torch.zeros(t.shape, dtype=kind, device=t.device) for t in (k, v))
        for rows, scores in self._scores(q, k, causal, scale):
            in_groups = [
                _split_heads(t[:, :, rows], groups) for t in (grad, wide_q, delta, lse.to(kind)[..., None])
            ]
            grad_rows, q_rows, delta_rows, lse_rows = in_groups
            weights = (scores - lse_rows).exp()
            grad_weights = grad_rows @ values.transpose(-1, -2)
            if self.dropout:
                kept = self._kept(weights, rows)
                grad_weights = grad_weights * kept
                grad_v += ((weights * kept).transpose(-1, -2) @ grad_rows).sum(2)
            else:
                grad_v += (weights.transpose(-1, -2) @ grad_rows).sum(2)
            grad_scores = weights * (grad_weights - delta_rows)
            if self.mask is not None:  # a masked score is a constant
                grad_scores = grad_scores.masked_fill(self._mask_of(rows, scores), 0.0)
            grad_scores = grad_scores * scale
            grad_q[:, :, rows] = (grad_scores @ keys).flatten(1, 2)
            grad_k += (grad_scores.transpose(-1, -2) @ q_rows).sum(2)
        return grad_q, grad_k, grad_v

    def _scores(self, q: Tensor, k: Tensor, causal: bool, scale: float) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and their scores [b, g, n / g, rows, t] with what is not seen taken out."""
        keys = _grouped(k, q).to(wide(q.dtype)).transpose(-1, -2)
        for start in range(0, q.shape[2], _BLOCK_ROWS):
            rows = slice(start, min(start + _BLOCK_ROWS, q.shape[2]))
            scores = _split_heads(q[:, :, rows].to(wide(q.dtype)), k.shape[1]) @ keys * scale
            if self.mask is not None:
                scores = scores.masked_fill(self._mask_of(rows, scores), MASKED_SCORE)
            if causal:
                place = torch.arange(k.shape[2], device=q.device)
                scores = scores.masked_fill(place > place[rows, None], float("-inf"))
            yield rows, scores

    def _mask_of(self, rows: slice, scores: Tensor) -> Tensor:
        assert self.mask is not None
        mask = self.mask[:, :, rows]
        return mask[:, :, None] if mask.shape[1] == 1 else _split_heads(mask, scores.shape[1])

    def _kept(self, weights: Tensor, rows: slice) -> Tensor:
        """0 where a weight is dropped, 1 / (1 - dropout) elsewhere."""
        generator = torch.Generator(weights.device).manual_seed((self.seed * 1_000_003 + rows.start) % 2**63)
        draw = torch.rand(weights.shape, generator=generator, device=weights.device)
        return (draw >= self.dropout).to(weights.dtype) / (1 - self.dropout)


def _side_by_side(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _grouped(kv: Tensor, q: Tensor) -> Tensor:
    """[b, g, t, d] -> [b, g, 1, t, d], to be broadcast over the queries that share a KV head."""
    assert q.shape[1] % kv.shape[1] == 0
    return kv[:, :, None]


def _split_heads(tensor: Tensor, groups: int) -> Tensor:
    """[b, n, s, ...] -> [b, g, n / g, s, ...]."""
    return tensor.unflatten(1, (groups, tensor.shape[1] // groups))


def choose(q: Tensor, mask: Tensor | None, dropout: float, seed: int) -> Kernel:
    """The fastest kernel for what is asked."""
    if mask is not None or dropout:
        return Blockwise(mask, dropout, seed)
    if q.device.type == "cpu":
        return CpuFlash()
    if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16):
        return CudaFlash()
    return Blockwise()
