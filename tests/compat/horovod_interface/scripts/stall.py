"""Rank 1 never submits one tensor; `argv[1]` is a directory where the others say that they gave it up."""

import sys
import time
from pathlib import Path

import horovod.torch as hvd
import torch

given_up = Path(sys.argv[1])
hvd.init()
hvd.allreduce(torch.ones(1), name="both")
if hvd.rank() != 1:
    try:
        hvd.allreduce(torch.ones(1), name="lonely")
        raise SystemExit("the stall was not noticed")
    except hvd.HorovodInternalError as error:
        print("gave up:", error)
        (given_up / str(hvd.rank())).touch()
else:
    while len(list(given_up.iterdir())) < hvd.size() - 1:
        time.sleep(0.05)
hvd.allreduce(torch.ones(1), name="afterwards")
