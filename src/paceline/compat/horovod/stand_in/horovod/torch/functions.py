"""Where scripts import the broadcasts of models and objects from."""

from paceline.compat.horovod.functions import (  # noqa: F401
    allgather_object,
    broadcast_object,
    broadcast_object_fn,
    broadcast_optimizer_state,
    broadcast_parameters,
)
