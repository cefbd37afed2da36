"""Stage-aware recomputation on Megatron-core: each pipeline stage recomputes only what its memory needs."""
