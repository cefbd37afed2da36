"""Real text that needs no download: two domains that every Python installation carries.

`python-docs` is the language reference of `pydoc_data.topics` (English prose), `python-code` the sources of the
standard library. Anything else is a text file, a folder of text files, a saved data set or the name of a data
set on the Hugging Face hub (which needs a network). Every source becomes two lists of documents; each tenth
document is held out, so no held-out text is seen in training. Order and split depend on names only.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HOLD_OUT_EVERY = 10
CODE_BYTES = 1_500_000
END_OF_TEXT = "<|endoftext|>"


def documents(name: str, text_column: str = "text", split: str = "train") -> list[str]:
    """The documents of a data set: a built-in domain, a path, or a name on the hub."""
    path = Path(name)
    if name == "python-docs":
        return list(_topics())
    if name == "python-code":
        return list(_standard_library())
    if path.is_file():
        return [part for part in path.read_text(encoding="utf-8").split("\n\n\n") if part.strip()]
    if path.is_dir() and not (path / "dataset_info.json").exists():
        files = sorted(file for file in path.rglob("*") if file.suffix in {".txt", ".md", ".py", ".rst"})
        return [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return _hugging_face(path, name, text_column, split)


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Training and held-out documents: each tenth document is held out."""
    if len(texts) < 2:
        raise ValueError(f"the data set has {len(texts)} documents; it takes at least 2 to hold one out")
    held_out = [text for index, text in enumerate(texts) if index % HOLD_OUT_EVERY == HOLD_OUT_EVERY // 2]
    training = [text for index, text in enumerate(texts) if index % HOLD_OUT_EVERY != HOLD_OUT_EVERY // 2]
    return training, held_out or texts[-1:]


def train_tokenizer(texts: list[str], vocabulary_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer trained on `texts`; it can spell every string."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def _standard_library() -> Iterator[str]:
    total = 0
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="replace")
        total += len(text)
        if total > CODE_BYTES:
            return
        yield text


def _hugging_face(path: Path, name: str, text_column: str, split: str) -> list[str]:
    from datasets import load_dataset, load_from_disk

    loaded = load_from_disk(str(path)) if path.is_dir() else load_dataset(name, split=split)
    if text_column not in loaded.column_names:
        raise ValueError(f"{name} has no column {text_column!r}; it has {', '.join(loaded.column_names)}")
    return [text for text in loaded[text_column] if text and text.strip()]
