"""The C++ core, if this installation has one: `pip install` builds none where it finds no compiler or wheel.

Without it, training over the torch fabric, simulations, schedules and codecs work as with it, slower; the
native fabric and the backend "paceline" of torch.distributed say what is missing.
"""

from __future__ import annotations

import importlib
from types import ModuleType

module: ModuleType | None
missing: str
"""Why the core cannot be used; "" if it can."""
try:
    module, missing = importlib.import_module("paceline._core"), ""
except ImportError as error:
    module = None
    missing = (
        f"this installation of paceline has no C++ core ({error}). Install a wheel for this Python, or g++"
        " and then: pip install --force-reinstall --no-deps --no-binary paceline paceline"
    )
