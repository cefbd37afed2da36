"""Lets Megatron-core train on a CPU over gloo. For tests, and for trying an example without a GPU; never for users.

Contract: inside `on_cpu()` Megatron-core 0.12 to 0.16 runs with tensor, sequence and pipeline parallelism on the CPU;
after it everything is as before. `cuda_types()` around an optimizer's construction and its steps adds what Megatron's
optimizers ask of their parameters. As a program it does both and then runs a script that was written for GPUs:

    torchrun --nproc_per_node 2 -m tests.megatron_on_cpu examples/pretrain_gpt.py ...

Each replacement says why it is needed; what is not needed is not replaced. Megatron-core is imported when `on_cpu()` is
entered, not before. Not covered: Transformer Engine, CUDA graphs, expert and stock context parallelism.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Megatron-core on the CPU; may be nested."""
    with warnings.catch_warnings():  # that Apex and Transformer Engine are missing is why we are here
        warnings.simplefilter("ignore")
        from megatron.core.models.gpt import gpt_layer_specs  # noqa: F401  warns too; import it now
        from megatron.core.tensor_parallel import random
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

    with contextlib.ExitStack() as stack:
        # Buffers and messages are made on the current device.
        stack.enter_context(patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")))
        stack.enter_context(patch.object(torch.cuda, "set_device", lambda device: None))
        # Pipeline stages wait for the device after each exchange.
        stack.enter_context(patch.object(torch.cuda, "synchronize", lambda device=None: None))
        # The tracker of random states: dropout on a CPU draws from the CPU's one generator.
        stack.enter_context(patch.object(torch.cuda, "manual_seed", torch.manual_seed))
        stack.enter_context(patch.object(torch.cuda, "get_rng_state", lambda device="cuda": _rng_state()))
        stack.enter_context(patch.object(random, "_get_cuda_rng_state", _rng_state))
        stack.enter_context(patch.object(random, "_set_cuda_rng_state", _set_rng_state))
        # It warns when the CPU's generator moved in a region of the GPU's, which is the point here.
        stack.enter_context(patch.object(logging.getLogger(random.__name__), "disabled", True))
        norm = _sequence_parallel_norm(WrappedTorchNorm.__new__)
        stack.enter_context(patch.object(WrappedTorchNorm, "__new__", norm))
        stack.enter_context(_CudaMeansCpu())
        # A mode is off inside of what it handles, and inside of backward layers are recomputed.
        run_backward = torch.autograd._engine_run_backward
        stack.enter_context(patch.object(torch.autograd, "_engine_run_backward", _in_mode(run_backward)))
        yield


def _in_mode(function: Callable) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _CudaMeansCpu():
            return function(*args, **kwargs)

    return run


class _CudaMeansCpu(TorchFunctionMode):
    """`device="cuda"` makes a tensor on the CPU, and `Tensor.cuda()` leaves it there.

    Megatron-core writes the device down where it counts tokens, makes a causal mask and adds up gradient norms.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if not kwargs:
            return func(*args)
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs = kwargs | {"device": "cpu"}
        return func(*args, **kwargs)


class cuda_types(TorchFunctionMode):
    """A context in which `Tensor.type()` says `torch.cuda.FloatTensor`.

    Megatron's optimizers sort parameters by it, and clipping asserts it.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _rng_state(device: object = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: object = None, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _sequence_parallel_norm(original: Callable) -> Callable:
    """Megatron-core's choice without Apex and Transformer Engine, made to do what theirs do.

    The torch norm refuses sequence parallelism only because it would not mark its parameters, whose gradients Megatron
    then sums over the tensor-parallel group.
    """

    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        without = copy.copy(config)
        without.sequence_parallel = False
        norm = original(cls, without, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    return new


def main() -> None:
    """Run the script named first, with the arguments that follow it, as `python` would."""
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    with on_cpu(), cuda_types():
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
