"""Where backward may stop: below the lowest block that trains, nothing needs a gradient.

When the embeddings rest, autograd would stop by itself, if nobody asked for more. The Hugging Face Trainer does: with
gradient checkpointing it makes the embedding's output require a gradient, so that reentrant checkpoints of a
frozen embedding work, and backward then recomputes every frozen block down to the embedding.

So at the entrance of each list of blocks, an input that requires a gradient for no parameter's sake (its graph leads to
frozen embeddings' outputs only) is detached, and the input of the lowest active block is made to require one instead.
Frozen blocks below build no graph and are not recomputed. An input that a trainable parameter or the user's own
leaf tensor stands behind is left alone.

Where a reentrant checkpoint runs a block's hooks inside itself (transformers before 5), it hides the input from them:
there backward goes on to the embedding, whose output is made to require a gradient if nobody else did.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ds_grass.layers import Block, Layout

_MARK = "_grass_frozen_embedding_output"
_MAX_NODES = (
    10_000  # of a graph above a block list; the embedding's has a handful, an encoder's some thousands
)


class BackwardCut:
    """Hooks on one model. `counters` says how often an input was detached, opened, or an embedding's output was."""

    def __init__(self, model: nn.Module, layout: Layout):
        self.counters = {"cut": 0, "opened": 0, "embedding_opened": 0}
        self._blocks = layout.blocks
        self._entrances = set({block.list_name: block.index for block in reversed(layout.blocks)}.values())
        self._lowest: set[int] = set()
        self._hides_inputs: bool | None = None  # not known before the first forward
        inside = {id(module) for block in layout.blocks for module in block.module.modules()}
        embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding) and id(m) not in inside]
        # These run after the hook of `enable_input_require_grads`, which was registered before the engine was built.
        self._handles = [module.register_forward_hook(self._mark_embedding) for module in embeddings]
        for block in layout.blocks:
            hook = functools.partial(self._enter, block)
            self._handles.append(block.module.register_forward_pre_hook(hook, with_kwargs=True))

    def on_switch(self, blocks: Sequence[int]) -> None:
        """These blocks train from now on. What else trains shows in the graph of an input."""
        lowest = {self._blocks[index].list_name: index for index in sorted(blocks, reverse=True)}
        self._lowest = set(lowest.values())

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()

    def _mark_embedding(self, module: nn.Module, args: tuple, output: object) -> None:
        if not isinstance(output, Tensor) or not torch.is_grad_enabled() or _trains(module):
            return
        if self._hides_inputs is not False and not output.requires_grad:
            output.requires_grad_(True)
            self.counters["embedding_opened"] += 1
        if output.is_leaf:
            setattr(output, _MARK, True)

    def _enter(self, block: Block, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not module.training:
            return None
        if self._hides_inputs is None:
            # a reentrant checkpoint around the hooks has turned it off
            self._hides_inputs = not torch.is_grad_enabled()
        if self._hides_inputs:
            return None
        if block.index in self._entrances:
            args = tuple(self._cut(value) for value in args)
            kwargs = {name: self._cut(value) for name, value in kwargs.items()}
        if block.index in self._lowest:
            args, kwargs = self._open(args, kwargs)
        return args, kwargs

    def _cut(self, value: object) -> object:
        if not isinstance(value, Tensor) or not value.requires_grad or not _leads_to_embeddings_only(value):
            return value
        self.counters["cut"] += 1
        return value.detach()

    def _open(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """A reentrant checkpoint of this block needs an input that requires a gradient: the first that can."""
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()]
        if not tensors or any(tensor.requires_grad for tensor in tensors):
            return args, kwargs
        self.counters["opened"] += 1
        opened = tensors[0].detach().requires_grad_(True)
        swap = {id(tensors[0]): opened}
        return tuple(swap.get(id(v), v) for v in args), {
            name: swap.get(id(v), v) for name, v in kwargs.items()
        }


def _leads_to_embeddings_only(value: Tensor) -> bool:
    """Whether every leaf behind `value` is the output of a frozen embedding."""
    if value.grad_fn is None:
        return hasattr(value, _MARK)
    seen, stack = set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if _hides_parameters(node):
            return False
        leaf = getattr(node, "variable", None)
        if (leaf is not None and not hasattr(leaf, _MARK)) or len(seen) > _MAX_NODES:
            return False
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    return True


def _hides_parameters(node: object) -> bool:
    """A function written in Python, such as a reentrant checkpoint, may use parameters that its graph does not show.

    Those with which ZeRO-3 gathers parameters only pass tensors on, and so do those that stand for them in a plan.
    """
    forward = getattr(type(node), "_forward_cls", None)
    if forward is None or getattr(forward, "passes_tensors_on", False):
        return False
    return not forward.__module__.startswith("deepspeed.runtime.zero")


def _trains(module: nn.Module) -> bool:
    return any(param.requires_grad for param in module.parameters())
