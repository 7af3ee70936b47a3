"""Where scripts import elastic state from."""

from paceline.compat.horovod.elastic import ObjectState, State  # noqa: F401
