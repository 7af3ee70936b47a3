"""The executor against the interpreter: every algorithm over TCP, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from shm_ranks import run

from paceline import registry
from paceline.comm.native_codes import DTYPE_CODES, OP_CODES, Kind
from paceline.comm.native_plan import plan
from paceline.schedule import contract
from paceline.schedule.interpret import interpret
from paceline.types import ReduceOp

pytestmark = pytest.mark.xdist_group("processes")
OPERATIONS = (
    "all_reduce",
    "reduce",
    "reduce_scatter",
    "all_gather",
    "broadcast",
    "gather",
    "scatter",
    "all_to_all",
)


def run_program(comm, algorithm, operation, source, output, counts, op, root, in_place):
    program = plan(
        algorithm,
        operation,
        comm.size,
        root,
        comm.rank,
        in_place,
        counts,
        (source if source is not None else output).itemsize,
    )
    tensor = output if output is not None else source
    started = comm._group.run(
        program,
        Kind.ALL_REDUCE,
        0 if source is None else source.data_ptr(),
        0 if output is None else output.data_ptr(),
        tensor.numel(),
        DTYPE_CODES[tensor.dtype],
        OP_CODES[op],
        root,
        comm.timeout_s,
    )
    if started is not None:
        comm._group.wait(started, -1.0)


def check_program(comm, algorithm, operation, n, dtype, op, root):
    """`n`: elements of the whole buffer, or of each block."""
    me, p = comm.rank, comm.size
    module = registry.load("paceline.collectives", algorithm, kind="collective")
    program = module.build(operation, p, root=root)
    layouts = [contract.layout(program, r, n) for r in range(p)]
    rng = np.random.default_rng(n)
    inputs = [
        rng.integers(-4, 5, int(x.input_offsets[-1])).astype(np.int64)
        if dtype == torch.int64
        else rng.standard_normal(int(x.input_offsets[-1])).astype(np.float32)
        for x in layouts
    ]
    given = [v if contract.defines_input(program, r) else None for r, v in enumerate(inputs)]
    want = interpret(program, given, op=op, counts=n)[me]
    source = torch.from_numpy(inputs[me].copy())
    output = torch.zeros(int(layouts[me].output_offsets[-1]), dtype=dtype)
    for in_place in (False, True) if operation in ("all_reduce", "reduce", "broadcast") else (False,):
        if in_place:
            output = source
        run_program(comm, algorithm, operation, source, output, n, op, root, in_place)
        if want is not None:
            assert np.array_equal(output.numpy(), want), (algorithm, operation, n, dtype, op, root, in_place)


def sweep_body(comm):
    checked = 0
    for algorithm in registry.names("paceline.collectives"):
        module = registry.load("paceline.collectives", algorithm, kind="collective")
        for operation in OPERATIONS:
            if module.supports(operation, comm.size) is not True:
                continue
            roots = (0, comm.size - 1) if operation in contract.ROOTED else (0,)
            for root in roots:
                sizes = (37, 150_001) if comm.size == 3 else (0, 1, 37, 150_001)  # three ranks: quickly
                cases = [(n, torch.float32, ReduceOp.SUM) for n in sizes]
                cases += [(37, torch.int64, ReduceOp.MEAN), (101, torch.float32, ReduceOp.MAX)]
                for n, dtype, op in cases:
                    check_program(comm, algorithm, operation, n, dtype, op, root)
                    checked += 1
    return checked


LONG = [pytest.param(p, marks=pytest.mark.exhaustive) for p in (2, 4, 5, 6, 7, 8)]


@pytest.mark.parametrize("size", [3, *LONG])
def test_executor_equals_interpreter(size):
    assert min(run(size, sweep_body, network=True, limit_s=200)) > 30
