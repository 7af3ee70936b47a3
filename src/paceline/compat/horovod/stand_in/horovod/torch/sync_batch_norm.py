"""Where scripts import `SyncBatchNorm` from."""

from paceline.compat.horovod.sync_batch_norm import SyncBatchNorm  # noqa: F401
