"""Rank 1 never submits one tensor."""

import time

import horovod.torch as hvd
import torch

hvd.init()
hvd.allreduce(torch.ones(1), name="both")
if hvd.rank() != 1:
    try:
        hvd.allreduce(torch.ones(1), name="lonely")
        raise SystemExit("the stall was not noticed")
    except hvd.HorovodInternalError as error:
        print("gave up:", error)
else:
    time.sleep(6)  # longer than the others wait, so that this rank's own wait below is not one
hvd.allreduce(torch.ones(1), name="afterwards")
