"""Apex's `amp` and `parallel` on torch.amp and DDP: `from paceline.compat.apex import amp, parallel`.

Scripts that say `from apex import amp` run unchanged under `paceline run --as-apex`.
"""

from __future__ import annotations

from paceline.compat.apex import amp, parallel

__all__ = ["amp", "parallel"]
