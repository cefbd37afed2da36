"""Which optimizers are taken over, and what is read from their groups."""

import pytest
import torch

from ds_grass.adam import check_optimizer, read_group


def params():
    return [torch.nn.Parameter(torch.zeros(2))]


@pytest.mark.parametrize(("make", "decoupled"), [(torch.optim.AdamW, True), (torch.optim.Adam, False)])
def test_torch_adam_is_taken_with_its_kind_of_decay(make, decoupled):
    optimizer = make(params(), lr=0.1, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-3)
    check_optimizer(optimizer)
    hyper = read_group(optimizer, optimizer.param_groups[0])
    assert (hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay) == (0.1, 0.8, 0.9, 1e-3, 0.3)
    assert hyper.decoupled is decoupled
    assert hyper.maximize is False


def test_a_tensor_learning_rate_is_read_as_a_number():
    optimizer = torch.optim.AdamW(params(), lr=torch.tensor(0.25))
    assert read_group(optimizer, optimizer.param_groups[0]).lr == 0.25


def test_the_group_is_read_at_every_call():
    optimizer = torch.optim.AdamW(params(), lr=0.1)
    optimizer.param_groups[0]["lr"] = 0.05
    assert read_group(optimizer, optimizer.param_groups[0]).lr == 0.05


def test_a_subclass_that_only_configures_is_taken():
    class Configured(torch.optim.AdamW):
        pass

    check_optimizer(Configured(params(), lr=0.1))


def test_a_subclass_with_its_own_rule_is_refused_by_name():
    class Own(torch.optim.AdamW):
        def step(self, closure=None):
            return None

    with pytest.raises(ValueError, match=r"Own.*use torch\.optim\.AdamW"):
        check_optimizer(Own(params(), lr=0.1))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adafactor, torch.optim.RMSprop])
def test_other_rules_are_refused_by_name(make):
    with pytest.raises(ValueError, match=make.__name__):
        check_optimizer(make(params(), lr=0.1))


def test_amsgrad_is_refused_with_its_group():
    optimizer = torch.optim.AdamW([{"params": params()}, {"params": params(), "amsgrad": True}], lr=0.1)
    with pytest.raises(ValueError, match="group 1 has amsgrad"):
        check_optimizer(optimizer)


def test_a_group_without_bias_correction_is_refused():
    optimizer = torch.optim.AdamW([{"params": params(), "bias_correction": False}], lr=0.1)
    with pytest.raises(ValueError, match="group 0 has bias_correction false"):
        check_optimizer(optimizer)


def test_deepspeed_classes_say_their_mode_on_the_instance():
    pytest.importorskip("deepspeed")
    from deepspeed.ops.adam import FusedAdam

    class Stand(FusedAdam):  # the real constructor compiles a kernel
        def __init__(self, groups, adam_w_mode):
            torch.optim.Optimizer.__init__(self, groups, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8})
            self.adam_w_mode = adam_w_mode

    for mode in (1, 0):
        optimizer = Stand(params(), mode)
        check_optimizer(optimizer)
        assert read_group(optimizer, optimizer.param_groups[0]).decoupled is bool(mode)
