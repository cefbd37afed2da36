"""A small pre-trained model on disk, made once: what users' scripts are given by path."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="session")
def examples_on_path() -> Iterator[Path]:
    """The examples' own modules can be imported, as they are when one of the scripts runs."""
    sys.path.insert(0, str(EXAMPLES))
    yield EXAMPLES
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory, examples_on_path: Path) -> Path:
    """Documentation text, a paragraph a line."""
    import corpus

    paragraphs = "\n".join(corpus.documents("python-docs")[:12]).split("\n\n")
    lines = [" ".join(paragraph.split()) for paragraph in paragraphs]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(line for line in lines if len(line) > 40))
    return file


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A Llama of 4 blocks with random weights, and its tokenizer."""
    import corpus
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    trained = corpus.train_tokenizer(text_file.read_text().splitlines(), 320)
    end = corpus.END_OF_TEXT
    PreTrainedTokenizerFast(tokenizer_object=trained, eos_token=end, pad_token=end).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        use_cache=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
