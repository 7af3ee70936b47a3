"""After a join, operations without a name still match, although the rank that joined first made fewer."""

import horovod.torch as hvd
import torch

hvd.init()
rank, size = hvd.rank(), hvd.size()
for first in range(size):
    if rank != first:
        total = hvd.allreduce(torch.ones(3), op=hvd.Sum)
        assert total.tolist() == [size - 1.0] * 3
        try:
            hvd.allgather(torch.ones(2))
            raise SystemExit("an allgather without a rank that joined")
        except hvd.HorovodInternalError as error:
            assert "joined" in str(error)
    last = hvd.join()
    assert last != first or size == 1
    assert hvd.allgather(torch.tensor([last])).unique().numel() == 1
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum) == size
print("all good")
