"""Where scripts import elastic state from."""

from paceline.compat.horovod.elastic import TorchState  # noqa: F401
