"""Where scripts import process sets from."""

from paceline.compat.horovod.world import (  # noqa: F401
    ProcessSet,
    add_process_set,
    global_process_set,
    process_set_by_id,
    remove_process_set,
)
