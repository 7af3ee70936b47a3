"""Prescale and postscale factors of every dtype, on any number of ranks; names Horovod only.

Integers are scaled in float64 and truncated, 16-bit floats in float32 and rounded once; sums keep the dtype.
"""

import horovod.torch as hvd
import torch

hvd.init()
rank, size = hvd.rank(), hvd.size()
FACTOR = 0.1915194503788923
INTEGERS = [torch.uint8, torch.int8, torch.int32, torch.int64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def scaled(tensor, factor):
    if not tensor.dtype.is_floating_point:
        return (tensor.double() * factor).trunc().to(tensor.dtype)
    wide = tensor.float() if tensor.dtype.itemsize == 2 else tensor
    return (wide * torch.tensor(factor, dtype=wide.dtype)).to(tensor.dtype)


def summed(tensor):
    """The sum of `size` equal tensors, rounded to their dtype."""
    return (tensor.to(torch.int64 if not tensor.dtype.is_floating_point else torch.float64) * size).to(
        tensor.dtype
    )


def share(tensor):
    return tensor.tensor_split(size)[rank]


for dtype in INTEGERS + FLOATS:
    low, high = (0, 255 // size) if dtype is torch.uint8 else (-(127 // size), 127 // size)
    given = torch.arange(low, high + 1).to(dtype)
    before, after = summed(scaled(given, FACTOR)), scaled(summed(given), FACTOR)
    assert torch.equal(hvd.allreduce(given, op=hvd.Sum, prescale_factor=FACTOR), before), dtype
    assert torch.equal(hvd.allreduce(given, op=hvd.Sum, postscale_factor=FACTOR), after), dtype
    assert torch.equal(hvd.reducescatter(given, op=hvd.Sum, prescale_factor=FACTOR), share(before)), dtype
    assert torch.equal(hvd.reducescatter(given, op=hvd.Sum, postscale_factor=FACTOR), share(after)), dtype
    several = hvd.grouped_allreduce([given, given.flip(0)], op=hvd.Sum, prescale_factor=FACTOR)
    assert torch.equal(several[0], before)
    assert torch.equal(several[1], before.flip(0))

# An average is one more factor, not one more rounding: the sum times the factor does not fit float16.
for dtype in FLOATS:
    large = torch.full((5,), 10_000.0, dtype=dtype)
    averaged = hvd.allreduce(large, op=hvd.Average, postscale_factor=4.0)
    assert torch.equal(averaged, scaled(summed(large), 4.0 / size)), (dtype, averaged)
    odd = (torch.arange(1.0, 60.0) * 1.1).to(dtype)
    averaged = hvd.reducescatter(odd, op=hvd.Average, postscale_factor=FACTOR)
    assert torch.equal(averaged, share(scaled(summed(odd), FACTOR / size))), dtype

# Integers towards zero, also below zero.
assert hvd.allreduce(torch.tensor([-3, -1, 1, 3]), op=hvd.Sum, prescale_factor=0.5).tolist() == [
    -size,
    0,
    0,
    size,
]
print("all good")
