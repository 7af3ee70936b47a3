"""Apex's torch interface, on torch's own operations: `from paceline.compat.apex import amp, parallel`.

Scripts that say `from apex import amp` run unchanged under `paceline run --as-apex`.
"""

from __future__ import annotations

from paceline.compat.apex import amp, fp16_utils, normalization, optimizers, parallel

__all__ = ["amp", "fp16_utils", "normalization", "optimizers", "parallel"]
