"""Process sets come and go on all ranks together, also while their operations are in flight."""

import time

import horovod.torch as hvd
import torch

even = hvd.ProcessSet(range(0, 2, 2))
assert even.size() is None
assert even.rank() is None
hvd.init(process_sets=[even, hvd.ProcessSet([0])])
rank, size = hvd.rank(), hvd.size()
assert even.size() == 1
assert even.included() == (rank == 0)

again = hvd.ProcessSet([0])
for duplicate in ([0], range(size), again):
    try:
        hvd.add_process_set(duplicate)
        raise SystemExit("a duplicate was added")
    except ValueError as error:
        assert "duplicate process set" in str(error)
assert again.process_set_id is None

added = [hvd.add_process_set([r]) for r in range(1, size)]
for turn in range(3):
    pair = hvd.add_process_set([0, 1]) if size > 2 else added[0]
    number = pair.process_set_id
    if pair.included():
        total = hvd.allreduce(torch.ones(1), op=hvd.Sum, process_set=pair)
        assert total == pair.size()
    # The first rank asks long before the last: nobody goes on until all have asked.
    time.sleep(0.2 * rank)
    left = hvd.allreduce_async(torch.ones(1), name=f"meanwhile.{turn}")
    if pair is not added[0]:
        assert hvd.remove_process_set(pair)
        assert pair.process_set_id is None
        assert not hvd.remove_process_set(pair)
        try:
            hvd.process_set_by_id(number)
            raise SystemExit("it is still known")
        except ValueError:
            pass
    hvd.synchronize(left)

# An operation that only one member asked for ends when its set does.
handle = hvd.allreduce_async(torch.ones(1), name="alone", process_set=even) if rank == 0 else None
if handle is not None:
    assert hvd.synchronize(handle) == 1
assert hvd.remove_process_set(added.pop())
assert not hvd.remove_process_set(hvd.global_process_set)
assert not hvd.remove_process_set(hvd.ProcessSet([0]))
hvd.barrier()
print("all good")
