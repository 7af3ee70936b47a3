"""`horovod.torch.elastic` means `paceline.compat.horovod.elastic`."""

from paceline.compat.horovod.elastic import *  # noqa: F403
