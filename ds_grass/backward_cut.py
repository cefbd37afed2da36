"""Where backward may stop: below the lowest block that trains, nothing needs a gradient.

When outer parameters rest, autograd would stop by itself, if nobody asked for more. The Hugging Face Trainer does: with
gradient checkpointing it makes the embedding's output require a gradient, so that reentrant checkpoints of a
frozen embedding work, and backward then recomputes every frozen block down to the embedding.

So at the entrance of each list of blocks, an input that requires a gradient for no parameter's sake (its graph leads to
frozen embeddings' outputs only) is detached. Frozen blocks below the lowest active one then build no graph and
are not recomputed. An input that a trainable parameter or the user's own leaf tensor stands behind is left alone.

Reentrant checkpoints hide the block's input inside a function of their own, which must see an input that requires a
gradient. There backward goes on to the embedding, as without this package; for models whose embeddings are
frozen and that do not ask for it themselves, the embedding's output is made to require a gradient here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ds_grass.layers import Layout

_MARK = "_grass_frozen_embedding_output"
_MAX_NODES = 10_000  # of a graph above a block list; the embedding's has a handful, an encoder's some thousands


class BackwardCut:
    """Hooks on one model. `counters["cuts"]` says how often an input was detached."""

    def __init__(self, model: nn.Module, layout: Layout):
        self.counters = {"cuts": 0, "opened": 0}
        self._outer_trains = True
        self._reentrant: bool | None = None
        entrances = {block.list_name: block.module for block in reversed(layout.blocks)}.values()
        inside = {id(module) for block in layout.blocks for module in block.module.modules()}
        embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding) and id(m) not in inside]
        # prepend=False: after the hook of `enable_input_require_grads`, which was registered before the engine
        self._handles = [m.register_forward_hook(self._mark_embedding) for m in embeddings]
        self._handles += [m.register_forward_pre_hook(self._enter, with_kwargs=True) for m in entrances]

    def on_switch(self, blocks: Sequence[int] | None) -> None:
        """The active set changed; `blocks` None: outer parameters train, so that backward reaches the embeddings."""
        self._outer_trains = blocks is None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _mark_embedding(self, module: nn.Module, args: tuple, output: object) -> None:
        if not isinstance(output, Tensor) or not torch.is_grad_enabled() or _trains(module):
            return
        if not output.requires_grad and self._reentrant is not False and not self._outer_trains:
            output.requires_grad_(True)
            self.counters["opened"] += 1
        if output.is_leaf:
            setattr(output, _MARK, True)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not module.training:
            return None
        # A reentrant checkpoint runs its first forward without autograd.
        self._reentrant = not torch.is_grad_enabled()
        if self._reentrant or self._outer_trains:
            return None
        return tuple(self._cut(a) for a in args), {k: self._cut(v) for k, v in kwargs.items()}

    def _cut(self, value: object) -> object:
        if not isinstance(value, Tensor) or not value.requires_grad or not self._leads_nowhere(value):
            return value
        self.counters["cuts"] += 1
        return value.detach()

    def _leads_nowhere(self, value: Tensor) -> bool:
        """Whether every leaf behind `value` is the output of a frozen embedding."""
        if value.grad_fn is None:
            return hasattr(value, _MARK)
        seen, stack = set(), [value.grad_fn]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if (leaf is not None and not hasattr(leaf, _MARK)) or len(seen) > _MAX_NODES:
                return False
            stack.extend(parent for parent, _ in node.next_functions if parent is not None)
        return True


def _trains(module: nn.Module) -> bool:
    return any(param.requires_grad for param in module.parameters())
