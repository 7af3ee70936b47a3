"""Where scripts import process sets from."""

from paceline.compat.horovod.world import ProcessSet, global_process_set, process_set_by_id  # noqa: F401
