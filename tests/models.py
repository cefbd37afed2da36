"""Tiny models and data for the tests: an engine step takes milliseconds, yet every shape is there.

Contract: the same seed gives the same weights and the same data in every process; nothing draws from the global
generator at run time (no dropout). Not covered: models that a user would train; those are in `examples/`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

VOCAB = 128
HEADS = 2


def llama(*, tied: bool = False, layers: int = 4, hidden: int = 32, seed: int = 0) -> nn.Module:
    """Return a Llama of transformers with `layers` decoder blocks; `tied` shares embedding and head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=64,
        # powers of 2, the same in every dtype: releases of DeepSpeed differ in whether they cast buffers
        rope_parameters={"rope_type": "default", "rope_theta": 2.0 ** (hidden // HEADS // 2)},
        tie_word_embeddings=tied,
        attn_implementation="eager",
        use_cache=False,
    )
    return LlamaForCausalLM(config)


class Block(nn.Module):
    """A residual block with an odd number of elements, so that shards need padding."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.full((dim,), 0.1))
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * dim + 1)
        self.down = nn.Linear(2 * dim + 1, dim, bias=False)

    def forward(self, x: torch.Tensor, use_shift: bool = True) -> torch.Tensor:
        shifted = x + self.shift if use_shift else x
        return x + self.down(torch.tanh(self.up(self.norm(shifted))))


class Stack(nn.Module):
    """Embedding, a list of blocks, a head tied to the embedding.

    A batch whose first token is odd jumps over block `skipped`, which therefore gets no gradient on that rank, and uses
    all of block `partly` but its `shift`. `checkpoint` is None, "reentrant" or "non_reentrant". The blocks are walked
    through `rounds` times, so that reentrant checkpoints hand over each gradient in as many parts.
    """

    def __init__(
        self,
        dim: int,
        layers: int,
        *,
        tied: bool,
        skipped: int | None,
        partly: int | None,
        checkpoint: str | None,
        rounds: int,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.skipped, self.partly, self.checkpoint, self.rounds = skipped, partly, checkpoint, rounds

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        odd = bool(input_ids[0, 0] % 2)
        for index, block in [*enumerate(self.blocks)] * self.rounds:
            if index == self.skipped and odd:
                continue
            x = self._run(block, x, not (index == self.partly and odd))
        return self.head(self.norm(x))

    def _run(self, block: nn.Module, x: torch.Tensor, use_shift: bool) -> torch.Tensor:
        if self.checkpoint is None:
            return block(x, use_shift)
        return checkpoint(block, x, use_shift, use_reentrant=self.checkpoint == "reentrant")


def stack(
    *,
    dim: int = 16,
    layers: int = 4,
    tied: bool = True,
    skipped: int | None = None,
    partly: int | None = None,
    checkpoint: str | None = None,
    rounds: int = 1,
    seed: int = 0,
) -> Stack:
    """Return a `Stack` initialised from `seed`."""
    torch.manual_seed(seed)
    return Stack(dim, layers, tied=tied, skipped=skipped, partly=partly, checkpoint=checkpoint, rounds=rounds)


BUILDERS = {"llama": llama, "stack": stack}


def build(name: str, **options: object) -> nn.Module:
    """Return the model called `name` (a key of BUILDERS)."""
    return BUILDERS[name](**options)


def tokens(seed: int, *, rank: int = 0, rows: int = 2, length: int = 8) -> torch.Tensor:
    """Return `[rows, length]` int64 tokens that depend on `seed` and `rank` only."""
    generator = torch.Generator().manual_seed(1000003 * (seed + 1) + rank)
    return torch.randint(0, VOCAB, (rows, length), generator=generator)


def step_data(
    step: int, *, ranks: int, accumulation: int, rows: int = 2, length: int = 8
) -> list[list[torch.Tensor]]:
    """Return the tokens of one optimizer step as `data[rank][micro_batch]`."""
    seeds = [step * accumulation + micro for micro in range(accumulation)]
    return [[tokens(s, rank=rank, rows=rows, length=length) for s in seeds] for rank in range(ranks)]


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return the next-token loss in fp32, whatever the dtype of the model or the form of its output."""
    output = model(input_ids=batch)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    return F.cross_entropy(logits[:, :-1].float().reshape(-1, VOCAB), batch[:, 1:].reshape(-1))
