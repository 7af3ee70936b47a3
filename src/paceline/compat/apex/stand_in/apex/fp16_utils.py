"""`from apex.fp16_utils import FP16_Optimizer` means `paceline.compat.apex.fp16_utils`."""

from paceline.compat.apex.fp16_utils import *  # noqa: F403
