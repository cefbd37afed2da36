"""GRASS as DeepSpeed ZeRO optimizers: an own one for stages 0-2, a subclass for stage 3, one shared core."""
