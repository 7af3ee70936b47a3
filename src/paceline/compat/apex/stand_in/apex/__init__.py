"""Stands where Apex would: put on the path by `paceline run --as-apex` only."""

from paceline.compat.apex import amp, fp16_utils, normalization, optimizers, parallel

__all__ = ["amp", "fp16_utils", "normalization", "optimizers", "parallel"]
