"""`from apex.amp import initialize` means `paceline.compat.apex.amp`."""

from paceline.compat.apex.amp import *  # noqa: F403
