"""`grass::adamw_`: one AdamW step over a flat shard, in place.

One element of `adamw_`, every operation in fp32 (hyper-parameters are computed in double and rounded once)::

    g = float(grad) * inv_scale                  (negated to maximize)
    g = g + w * weight_decay                     (only when not decoupled and weight_decay is not 0)
    w = w * (1 - lr * weight_decay)              (only when decoupled)
    m = m * beta1 + g * (1 - beta1)
    v = v * beta2 + (g * (1 - beta2)) * g
    d = sqrt(v) * (1 / sqrt(1 - beta2^step)) + eps
    w = w - (m * (lr / (1 - beta1^step))) / d

These are the formulas of torch.optim.AdamW and Adam, of Kingma and Ba (arXiv 1412.6980, algorithm 1) and of Loshchilov
and Hutter (arXiv 1711.05101). The update uses m and v unrounded. Stored as bf16, m is rounded to nearest even, v
stochastically: rounded to nearest it would never fall while beta2 is above 0.998, since the decay is less than half an
ulp. Without master weights a bf16 weight is rounded stochastically too. The random bits, 16 for the weight and 16 for
v, depend on `seed`, `step` and the element's index `offset + i` alone: how a shard is cut makes no difference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ds_grass.ops.library import FLOATS, FLOATS_TEXT, chunks, define

_NAME = "grass::adamw_"
_SCHEMA = (
    "adamw_(Tensor(a!) param, Tensor(b!)? master, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor grad,"
    " Tensor inv_scale, float lr, float beta1, float beta2, float eps, float weight_decay, int step, bool decoupled,"
    " bool maximize, int seed, int offset) -> ()"
)
_MASK32 = 0xFFFFFFFF


def adamw_(
    param: Tensor,
    master: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    inv_scale: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    decoupled: bool = True,
    maximize: bool = False,
    seed: int = 0,
    offset: int = 0,
) -> None:
    """One AdamW (or, with `decoupled` false, Adam) step over a flat shard of `n` elements, in place.

    param: [n] fp32, bf16 or fp16, the model's weights; master: [n] fp32 or None; exp_avg, exp_avg_sq: [n], both fp32
    or both bf16; grad: [n] fp32, bf16 or fp16, never written; inv_scale: one fp32 value on the same device by which
    the gradient is multiplied (unscaling times clipping). `n` may be 0, and shards may start anywhere in their storage,
    but must not overlap.

    step: this block's own count, 1 at its first update. With a master, the master is updated and `param` is the master
    rounded to nearest even. Without, an fp32 `param` is updated itself and a bf16 one rounded stochastically; fp16 is
    refused. Give each unit its own `seed` (any integer; the low 63 bits count), or units share their randomness.

    Raises RuntimeError when shapes, dtypes, devices or values are not as described.
    """
    _op(
        param, master, exp_avg, exp_avg_sq, grad, inv_scale, lr, beta1, beta2, eps, weight_decay, step, decoupled,
        maximize, seed & (2**63 - 1), offset,
    )  # fmt: skip


def _check(
    param, master, exp_avg, exp_avg_sq, grad, inv_scale, lr, beta1, beta2, eps, weight_decay, step, decoupled, maximize,
    seed, offset,
) -> None:  # fmt: skip
    """The preconditions of `adamw_`: all that the fake does. Native kernels repeat them, text for text."""
    _check_tensor("param", param, param, FLOATS_TEXT, FLOATS)
    if master is not None:
        _check_tensor("master", master, param, "float32", (torch.float32,))
    torch._check(
        master is not None or param.dtype != torch.float16,
        lambda: (
            f"{_NAME}: param is float16 without master weights; pass a float32 master or bfloat16 weights"
        ),
    )
    _check_tensor("exp_avg", exp_avg, param, "float32 or bfloat16", (torch.float32, torch.bfloat16))
    _check_tensor("exp_avg_sq", exp_avg_sq, param, "the dtype of exp_avg", (exp_avg.dtype,))
    _check_tensor("grad", grad, param, FLOATS_TEXT, FLOATS)
    torch._check(
        inv_scale.numel() == 1 and inv_scale.dtype == torch.float32 and inv_scale.device == param.device,
        lambda: f"{_NAME}: inv_scale must be one float32 value on the device of param",
    )
    torch._check(
        0 <= beta1 < 1 and 0 <= beta2 < 1,
        lambda: f"{_NAME}: betas are ({beta1:g}, {beta2:g}); use values of at least 0 and below 1",
    )
    torch._check(step >= 1, lambda: f"{_NAME}: step is {step}; the first step is 1")
    torch._check(
        offset >= 0, lambda: f"{_NAME}: offset is {offset}; use the index of the shard's first element"
    )


def _check_tensor(name: str, tensor: Tensor, param: Tensor, allowed: str, dtypes: tuple) -> None:
    what = f"{_NAME}: {name}"
    torch._check(
        tensor.dim() == 1 and tensor.is_contiguous(),
        lambda: f"{what} has {tensor.dim()} dimensions or gaps; pass a flat contiguous shard",
    )
    length, expected = tensor.numel(), param.numel()
    torch._check(
        length == expected,
        lambda: f"{what} has {length} elements but param has {expected}; pass shards of one length",
    )
    torch._check(
        tensor.device == param.device,
        lambda: f"{what} is on {tensor.device} but param is on {param.device}; pass tensors of one device",
    )
    torch._check(tensor.dtype in dtypes, lambda: f"{what} is {tensor.dtype}; use {allowed}")


def adamw_specification(
    param, master, exp_avg, exp_avg_sq, grad, inv_scale, lr, beta1, beta2, eps, weight_decay, step, decoupled, maximize,
    seed, offset,
) -> None:  # fmt: skip
    """The PyTorch kernel and specification: the module docstring's operations over one chunk after another."""
    _check(param, master, exp_avg, exp_avg_sq, grad, inv_scale, lr, beta1, beta2, eps, weight_decay, step, decoupled,
           maximize, seed, offset)  # fmt: skip
    step_size = lr / (1.0 - beta1**step)
    root_correction2 = 1.0 / math.sqrt(1.0 - beta2**step)
    weights = param if master is None else master
    for chunk in chunks(param.numel(), offset, param.device):
        # of an fp32 tensor `float` makes no copy: the slice itself is updated
        w, m, v = weights[chunk].float(), exp_avg[chunk].float(), exp_avg_sq[chunk].float()
        g = grad[chunk].float() * inv_scale
        if maximize:
            g.neg_()
        if not decoupled and weight_decay != 0:
            g.add_(w * weight_decay)
        elif decoupled:
            w.mul_(1.0 - lr * weight_decay)
        m.mul_(beta1).add_(g * (1.0 - beta1))
        v.mul_(beta2).add_((g * (1.0 - beta2)).mul_(g))
        # torch.sqrt of fp32 tensors on the CPU is off by one ulp for a sixth of all values (MKL); the double root of an
        # fp32 value, rounded to fp32, is the correctly rounded one.
        denominator = v.double().sqrt_().float().mul_(root_correction2).add_(eps)
        w.sub_((m * step_size).div_(denominator))
        rounds_weight = master is None and param.dtype == torch.bfloat16
        rounds_moments = exp_avg.dtype != torch.float32
        if rounds_weight or rounds_moments:
            random = _random_bits(w, seed, step, offset + chunk.start)
        if rounds_moments:
            exp_avg[chunk].copy_(m)
            exp_avg_sq[chunk].copy_(_round_stochastic(v, random & 0xFFFF))
        if rounds_weight:
            param[chunk].copy_(_round_stochastic(w, random >> 16))
        elif master is not None:
            param[chunk].copy_(w)


def _random_bits(like: Tensor, seed: int, step: int, first: int) -> Tensor:
    """32 random bits an element, int64 `[n]`. `first` is the index of like[0]; all lie on one page of 2^32 elements."""
    index = torch.arange(like.numel(), device=like.device).add_(first & _MASK32)
    return _hash32(index ^ _random_key(seed, step, first >> 32))


def _round_stochastic(values: Tensor, random: Tensor) -> Tensor:
    """fp32 values `[n]` that are bf16 values, each rounded away from zero with the probability of what it lost.

    random: int64 `[n]`, uniform below 2^16.
    """
    rounded = ((values.view(torch.int32) + random.int()) & ~0xFFFF).view(torch.float32)
    return torch.where(values.isnan(), values, rounded)


def _hash32(x):
    """A permutation of the integers below 2^32, for a Python int or an int64 tensor, in int64 arithmetic.

    [16 21f0aaad 15 d35a2d97 15], found by TheIronBorn with the hash prospector, avalanche bias 0.1076
    (https://github.com/skeeto/hash-prospector, "Two round functions", public domain).
    """
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _MASK32
    x = x ^ (x >> 15)
    x = (x * 0xD35A2D97) & _MASK32
    return x ^ (x >> 15)


def _random_key(seed: int, step: int, page: int) -> int:
    """One key for each (seed, step, page). The odd constant keeps zero from mapping to zero."""
    key = 0
    for word in (seed, seed >> 32, step, step >> 32, page):
        key = _hash32(((key ^ (word & _MASK32)) + 0x9E3779B9) & _MASK32)
    return key


_op = define(_SCHEMA, kernel=adamw_specification, fake=_check)
