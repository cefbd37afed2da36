"""Megatron-core's layers as the strategies see them: one file for each module that is read."""
