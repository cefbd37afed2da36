"""The native ops: schema, fake and PyTorch kernel of each; `ds_grass._C`, where loaded, overrides a device's kernels.

Contract: callers never ask which kernel runs. The PyTorch kernel is the specification, and every other kernel gives
the same bits (NaN payloads aside), because both are the same elementary operations, each rounded once.
This package is the only one that names `torch.ops`. Not covered: what to move and when, what to update, clipping.
"""

from ds_grass.ops.adamw import adamw_, adamw_specification
from ds_grass.ops.extension import ensure_native, native
from ds_grass.ops.library import chunk_numel
from ds_grass.ops.squared_norm import squared_norm, squared_norm_specification
from ds_grass.ops.transfer import transfer_

__all__ = [
    "adamw_",
    "adamw_specification",
    "chunk_numel",
    "ensure_native",
    "native",
    "squared_norm",
    "squared_norm_specification",
    "transfer_",
]
