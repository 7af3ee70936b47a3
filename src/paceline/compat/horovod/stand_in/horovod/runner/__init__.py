"""`horovod.run` from Python."""

from paceline.compat.horovod.common.launch import run  # noqa: F401
