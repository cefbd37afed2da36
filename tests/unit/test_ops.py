"""Contracts of ds_grass.ops: the update equals torch.optim's, every kernel equals the PyTorch one bit for bit.

The PyTorch kernel is called directly, so its contracts are tested with and without the extension; those of the native
kernel are skipped where it is not loaded.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from ds_grass import host_memory, ops
from ds_grass.ops import extension, library
from tests.tensors import BF16, FP16, FP32, WEIGHTS, LargestResult, assert_same_bits, bits, clone, make_shard

HYPER = dict(
    lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=1, decoupled=True, maximize=False
)
HYPER |= dict(seed=0, offset=0)
ONE = torch.ones(1)


@pytest.fixture(params=["pytorch", "native"])
def kernel(request):
    """A function with the signature of `ops.adamw_`, that is sure to run the kernel named."""
    if request.param == "pytorch":
        return pytorch_kernel
    if not ops.native()[0]:
        pytest.skip(ops.native()[1])
    return native_kernel


def pytorch_kernel(param, master, exp_avg, exp_avg_sq, grad, inv_scale=ONE, **hyper):
    hyper = HYPER | hyper
    ops.adamw_specification(param, master, exp_avg, exp_avg_sq, grad, inv_scale, **hyper)


def native_kernel(param, master, exp_avg, exp_avg_sq, grad, inv_scale=ONE, **hyper):
    ops.adamw_(param, master, exp_avg, exp_avg_sq, grad, inv_scale, **(HYPER | hyper))


# -- the update rule -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_update_equals_torch_optimizer(kernel, decoupled, maximize, weight_decay):
    """Against torch.optim in double: a step costs half an ulp of the weight and less for its update."""
    steps, n = 20, 500
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(n, generator=generator)
    reference = torch.nn.Parameter(weights.double())
    cls = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = cls([reference], lr=1e-2, weight_decay=weight_decay, maximize=maximize)
    exp_avg, exp_avg_sq = torch.zeros(n), torch.zeros(n)
    for step in range(1, steps + 1):
        grad = torch.randn(n, generator=generator)
        reference.grad = grad.double()
        optimizer.step()
        kernel(weights, None, exp_avg, exp_avg_sq, grad, step=step, weight_decay=weight_decay,
               decoupled=decoupled, maximize=maximize)  # fmt: skip
    tolerance = steps * torch.finfo(FP32).eps * reference.abs().max().item()
    torch.testing.assert_close(weights.double(), reference.data, rtol=0, atol=tolerance)
    assert not torch.equal(weights, torch.randn(n, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_low_precision_gradient_counts_with_its_exact_value(kernel, dtype):
    low = make_shard(300, grad=dtype)
    full = clone(low)
    full[4] = low[4].float()
    kernel(*low)
    kernel(*full)
    assert_same_bits(low[:4], full[:4])


def test_inv_scale_multiplies_the_gradient_and_leaves_it_as_it_was(kernel):
    scaled = make_shard(300)
    plain = clone(scaled)
    plain[4].mul_(0.25)  # a power of two is exact
    before = scaled[4].clone()
    kernel(*scaled, torch.tensor(0.25))
    kernel(*plain)
    assert_same_bits(scaled[:4], plain[:4])
    assert torch.equal(scaled[4], before)


def test_step_count_is_the_one_given_not_a_global_one(kernel):
    early, late = make_shard(300), make_shard(300)
    kernel(*early, step=1)
    kernel(*late, step=1000)
    assert not torch.equal(early[0], late[0])
    assert torch.equal(early[2], late[2])


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_master_is_updated_in_fp32_and_param_is_the_master_rounded(kernel, dtype):
    shard = make_shard(300, param=dtype, master=True)
    alone = make_shard(300)
    kernel(*shard)
    kernel(*alone)
    assert torch.equal(shard[1], alone[0])
    assert torch.equal(bits(shard[0]), bits(alone[0].to(dtype)))


def test_bf16_moments_are_rounded_when_stored_not_when_used(kernel):
    low, full = make_shard(300, moments=BF16), make_shard(300)
    for tensor in (low[2], low[3], full[2], full[3]):
        tensor.zero_()
    kernel(*low)
    kernel(*full)
    assert torch.equal(low[0], full[0])
    assert torch.equal(bits(low[2]), bits(full[2].bfloat16()))
    neighbours = (bits(low[3]) - (full[3].view(torch.int32) >> 16)).unique()
    assert neighbours.tolist() == [0, 1]  # the bf16 value below or above, both occur


@pytest.mark.parametrize("param", [FP32, BF16])
def test_zero_size_shard_is_accepted(kernel, param):
    kernel(*make_shard(0, param=param))
    kernel(*make_shard(0, param=param, master=True))


def test_unaligned_slice_updates_only_itself(kernel):
    whole = make_shard(1000, param=BF16, master=True, grad=BF16)
    before = clone(whole)
    kernel(*[tensor[7:508] for tensor in whole])
    alone = [tensor[7:508].clone() for tensor in before]
    kernel(*alone)
    assert_same_bits([tensor[7:508] for tensor in whole], alone)
    for now, then in zip(whole, before, strict=True):
        assert torch.equal(now[:7], then[:7])
        assert torch.equal(now[508:], then[508:])


def test_infinite_and_nan_gradients_reach_the_weights(kernel):
    shard = make_shard(3, param=BF16, master=True, moments=BF16)
    shard[4][0], shard[4][1] = float("inf"), float("nan")
    kernel(*shard)
    assert shard[1].isnan().tolist() == [True, True, False]
    assert shard[0].isnan().tolist() == [True, True, False]


# -- native against PyTorch ----------------------------------------------------------------------------------


@pytest.mark.skipif(not ops.native()[0], reason=ops.native()[1])
@pytest.mark.parametrize("n", [0, 1, 7, 1000, 40_003])
@pytest.mark.parametrize(("param", "master"), WEIGHTS)
def test_native_kernel_equals_pytorch_kernel_bit_for_bit(param, master, n):
    rules = [(True, False, 0.1), (False, True, 0.1), (True, True, 0.0)]
    scale = torch.tensor([0.37])
    cases = list(itertools.product((FP32, BF16), (FP32, BF16, FP16), rules))
    for moments, grad, rule in cases if n <= 1000 else cases[::7]:  # the large ones are about threads
        native = make_shard(n, param, master, moments, grad, seed=n, start=3)
        specified = clone(native)
        for step in (1, 500):
            hyper = dict(zip(("decoupled", "maximize", "weight_decay"), rule, strict=True))
            hyper |= dict(step=step, seed=12345678901234, offset=2**32 - 20)
            native_kernel(*native, scale, **hyper)
            pytorch_kernel(*specified, scale, **hyper)
        assert_same_bits(native, specified)


@pytest.mark.skipif(not ops.native()[0], reason=ops.native()[1])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_native_kernel_rounds_every_exponent_and_tie_as_pytorch_does(dtype):
    """Every upper half of an fp32, with lower halves just below, at and just above the ties of bf16 and fp16."""
    lower = torch.tensor(
        [0x0000, 0x0001, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32
    )
    master = ((torch.arange(2**16, dtype=torch.int32) << 16)[:, None] | lower).flatten().view(FP32)
    master = master[~master.isnan()]
    param = torch.empty(master.numel(), dtype=dtype)
    zeros = torch.zeros_like(master)
    native_kernel(param, master, zeros, zeros.clone(), zeros.clone(), weight_decay=0.0)
    assert torch.equal(bits(param), bits(master.to(dtype)))


@pytest.mark.skipif(not ops.native()[0], reason=ops.native()[1])
def test_native_kernel_does_not_depend_on_the_number_of_threads():
    alone, together = make_shard(100_001, param=BF16), make_shard(100_001, param=BF16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        native_kernel(*alone)
        torch.set_num_threads(2)
        native_kernel(*together)
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(alone, together)


@pytest.mark.slow
@pytest.mark.skipif(not ops.native()[0], reason=ops.native()[1])
def test_native_kernel_takes_more_than_2_to_the_31_elements():
    n = 2**31 + 5
    if (host_memory.available_bytes() or 0) < 7 * n:
        pytest.skip("needs 15 GB of memory")
    weights, exp_avg, exp_avg_sq, grad = (host_memory.host_zeros(n, BF16) for _ in range(4))
    grad[-5:] = 1.0
    native_kernel(weights, None, exp_avg, exp_avg_sq, grad, weight_decay=0.0)
    assert (weights[-5:] < 0).all()
    assert not weights[:-5].view(torch.int16).any()


def test_native_kernel_is_what_the_dispatcher_runs_when_loaded():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("grass::adamw_", "CompositeExplicitAutograd")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("grass::adamw_", "CPU") == ops.native()[0]


# -- stochastic rounding -------------------------------------------------------------------------------------


def round_with(kernel, value, n, seed=0, step=1, offset=0):
    """`n` weights stepped from 1.0 to about `value` and rounded to bf16."""
    zeros = torch.zeros(n)
    weights = torch.ones(n, dtype=BF16)
    kernel(weights, None, zeros, zeros.clone(), zeros.clone(), lr=1.0, weight_decay=1.0 - value, seed=seed, step=step,
           offset=offset)  # fmt: skip
    return weights.float()


@pytest.mark.parametrize("share", [0.0625, 0.5, 0.9])
def test_stochastic_rounding_is_unbiased_over_seeds_and_over_elements(kernel, share):
    spacing = 2.0**-8  # of bf16 just below 1
    value = 1.0 - spacing * share
    n, seeds = 2000, 50
    drawn = torch.stack([round_with(kernel, value, n, seed=seed) for seed in range(seeds)])
    assert set(drawn.unique().tolist()) == {1.0, 1.0 - spacing}
    deviation = spacing * (share * (1 - share)) ** 0.5
    assert abs(drawn.mean().item() - value) < 4 * deviation / (n * seeds) ** 0.5
    assert (drawn.mean(1) - value).abs().max() < 5 * deviation / n**0.5  # each seed, over elements
    assert (drawn.mean(0) - value).abs().max() < 5.5 * deviation / seeds**0.5  # each element, over seeds


def test_stochastic_rounding_repeats_for_the_same_seed_and_step_alone(kernel):
    first = round_with(kernel, 0.999, 500, seed=3, step=7)
    assert torch.equal(first, round_with(kernel, 0.999, 500, seed=3, step=7))
    for other in (dict(seed=4, step=7), dict(seed=3, step=8), dict(seed=3 + 2**40, step=7)):
        agreement = (first == round_with(kernel, 0.999, 500, **other)).float().mean()
        assert agreement < 0.85  # 0.61 by chance at this value


@pytest.mark.parametrize("offset", [0, 5, 2**16 - 9, 2**32 - 9, 2**40])
def test_stochastic_rounding_does_not_depend_on_how_the_shard_is_cut(kernel, offset):
    whole = round_with(kernel, 0.999, 300, offset=offset)
    for cut in (1, 9, 150):
        parts = [
            round_with(kernel, 0.999, cut, offset=offset),
            round_with(kernel, 0.999, 300 - cut, offset=offset + cut),
        ]
        assert torch.equal(whole, torch.cat(parts))


def test_stochastic_rounding_keeps_exact_values_infinities_and_nans(kernel):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BF16)
    weights, zeros = every.clone(), torch.zeros(every.numel())
    kernel(weights, None, zeros, zeros.clone(), zeros.clone(), lr=0.0, seed=9)
    numbers = ~every.isnan()
    assert torch.equal(bits(weights)[numbers], bits(every)[numbers])
    assert weights[~numbers].isnan().all()


def test_any_python_integer_is_a_seed():
    shard = make_shard(10, param=BF16)
    for seed in (-1, 2**63, 2**200 + 1):
        native_kernel(*shard, seed=seed)


# -- the op as PyTorch sees it -------------------------------------------------------------------------------


@pytest.mark.parametrize(("param", "master"), [(BF16, True), (BF16, False)])
def test_op_passes_opcheck(param, master):
    shard = make_shard(40, param=param, master=master)
    torch.library.opcheck(torch.ops.grass.adamw_.default, (*shard, ONE, *HYPER.values()))


WRONG = [
    (lambda s: s.__setitem__(4, s[4][:-1]), {}, "grad has 9 elements but param has 10"),
    (lambda s: s.__setitem__(2, s[2].reshape(2, 5)), {}, "exp_avg has 2 dimensions or gaps"),
    (lambda s: s.__setitem__(0, torch.ones(20)[::2]), {}, "param has 1 dimensions or gaps"),
    (lambda s: s.__setitem__(0, s[0].double()), {}, r"param is \S+; use float32, bfloat16 or float16"),
    (lambda s: s.__setitem__(1, s[0].bfloat16()), {}, r"master is \S+; use float32"),
    (
        lambda s: s.__setitem__(0, s[0].half()),
        {},
        "param is float16 without master weights.*pass a float32 master",
    ),
    (lambda s: s.__setitem__(2, s[2].half()), {}, r"exp_avg is \S+; use float32 or bfloat16"),
    (lambda s: s.__setitem__(3, s[3].bfloat16()), {}, r"exp_avg_sq is \S+; use the dtype of exp_avg"),
    (lambda s: s.__setitem__(4, s[4].int()), {}, r"grad is \S+; use float32, bfloat16 or float16"),
    (lambda s: s.__setitem__(4, s[4].to("meta")), {}, "grad is on meta but param is on cpu"),
    (lambda s: s.append(torch.ones(2)), {}, "inv_scale must be one float32 value"),
    (lambda s: s.append(torch.ones(1, dtype=torch.float64)), {}, "inv_scale must be one float32 value"),
    (lambda s: None, dict(beta2=1.0), r"betas are \(0.9, 1\); use values of at least 0 and below 1"),
    (lambda s: None, dict(step=0), "step is 0; the first step is 1"),
    (lambda s: None, dict(offset=-1), "offset is -1; use the index"),
]


@pytest.mark.parametrize(("spoil", "hyper", "message"), WRONG, ids=[message[:25] for *_, message in WRONG])
def test_wrong_arguments_are_named_and_change_nothing(kernel, spoil, hyper, message):
    shard = make_shard(10)
    spoil(shard)
    before = clone(shard)
    with pytest.raises(RuntimeError, match="grass::adamw_: " + message):
        kernel(*shard, **hyper)
    assert all(
        then is None or now.is_meta or torch.equal(now, then) for now, then in zip(shard, before, strict=True)
    )


def test_fake_kernel_checks_like_the_others():
    shard = [tensor if tensor is None else tensor.to("meta") for tensor in make_shard(10)]
    native_kernel(*shard, ONE.to("meta"))
    with pytest.raises(RuntimeError, match="step is 0; the first step is 1"):
        native_kernel(*shard, ONE.to("meta"), step=0)


def test_native_keeps_the_text_of_the_import_error(monkeypatch):
    monkeypatch.setattr(
        extension, "_import_error", ImportError("libexample.so.1: cannot open shared object file")
    )
    loaded, reason = ops.native()
    assert not loaded
    assert "libexample.so.1: cannot open shared object file" in reason
    monkeypatch.setattr(extension, "_import_error", ModuleNotFoundError("No module named 'ds_grass._C'"))
    assert "GRASS_BUILD_NATIVE=1" in ops.native()[1]


@pytest.mark.skipif(not ops.native()[0], reason=ops.native()[1])
def test_native_says_for_which_devices_it_has_kernels():
    assert ops.native("cpu") == (True, "ds_grass._C is loaded and has kernels for cpu")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("grass::adamw_", "CUDA"):
        loaded, reason = ops.native("cuda")
        assert not loaded
        assert "GRASS_BUILD_CUDA=1" in reason


# -- memory of the PyTorch kernel, small moments --------------------------------------------------------------


@pytest.mark.parametrize(("param", "master"), WEIGHTS)
def test_pytorch_kernel_makes_only_chunks_and_chunks_do_not_matter(monkeypatch, param, master):
    whole = make_shard(1000, param=param, master=master, moments=BF16, grad=BF16)
    cut = clone(whole)
    pytorch_kernel(*whole, offset=5)
    monkeypatch.setattr(library, "CHUNK_CPU", 64)
    with LargestResult() as largest:
        pytorch_kernel(*cut, offset=5)
    assert_same_bits(whole, cut)
    assert 0 < largest.numel <= 64


def test_a_bf16_second_moment_falls_when_gradients_do(kernel):
    shard = make_shard(2048, moments=BF16)
    shard[3].fill_(1.0)
    shard[4].zero_()
    for step in range(1, 301):
        kernel(*shard, step=step, beta2=0.999)
    assert abs(shard[3].float().mean().item() - 0.999**300) < 0.005
