"""A Hugging Face model by its config alone, on the meta device: 80 blocks take a second and no memory.

Contract: the module classes are those that a script would load, so blocks, outer and tied weights are found by the
same code as in the job. Weights are in the job's dtype, as the script hands them over; `use_cache` is off, as in the
Trainer. Online, MODEL may be a name on the hub: only its config is read.

Not covered: models whose code is not in transformers, and inputs other than tokens.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


def read_config(name: str) -> Any:
    """The config of a local folder, of a config.json, or of a name on the hub. Raises ValueError in one line."""
    transformers = _transformers()
    path = Path(name)
    local = path.exists() or name.startswith((".", "/", "~"))
    try:
        return transformers.AutoConfig.from_pretrained(
            path.parent if path.is_file() else name, local_files_only=local
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"MODEL is {name!r}, whose config cannot be read ({reason}); give a folder that holds a config.json, or, "
            "online, the name of a model on the Hugging Face hub"
        ) from None


def build(config: Any, dtype: torch.dtype, *, checkpointing: bool) -> nn.Module:
    """The model in training mode; its tensors have shapes and storages, and no data."""
    transformers = _transformers()
    named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()]
    model_class = next((found for found in named if found is not None), None)
    config.use_cache = False
    with _default_dtype(dtype), torch.device("meta"):
        if model_class is not None:
            model = model_class(config)
        else:
            model = _causal_model(transformers, config)
    if checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise ValueError(
                f"--gradient-checkpointing is given but {type(model).__name__} has none; leave the option out"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # version 6 renames it
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def batch(config: Any, rows: int, length: int) -> dict[str, Tensor]:
    """One micro-batch without padding, labels included, so that the model computes its own loss."""
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if (
        limit
        and length > limit
        and not getattr(config, "rope_parameters", None)
        and not config.is_encoder_decoder
    ):
        raise ValueError(f"--seq-length is {length} but the model has {limit} positions; use 1 to {limit}")
    tokens = torch.zeros((rows, length), dtype=torch.int64, device="meta")
    return {"input_ids": tokens, "labels": tokens}


@contextlib.contextmanager
def no_values_asked() -> Iterator[None]:
    """transformers looks into position ids for packed sequences; here they have no values, and nothing is packed."""
    from transformers import masking_utils

    if not hasattr(masking_utils, "find_packed_sequence_indices"):
        yield
        return
    with mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None):
        yield


def _causal_model(transformers: Any, config: Any) -> nn.Module:
    try:
        return transformers.AutoModelForCausalLM.from_config(config)
    except ValueError:
        raise ValueError(
            f"MODEL is of type {config.model_type!r}, for which transformers knows no language model; name its class "
            'in config.json, such as "architectures": ["LlamaForCausalLM"]'
        ) from None


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise RuntimeError(
            f"ds_grass plan builds models with transformers, which cannot be imported ({error}); "
            "pip install transformers"
        ) from None
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it remarks on weights that are not loaded
    return transformers


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
