"""Runs one case on all ranks of a World and holds every rank's result against what it must be."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from native_sweep import OWN, SHARES, Case
from native_values import Array, in_rank_order, inputs, is_same, rounded, tensor
from one_process import World

from paceline import collectives
from paceline.comm.native import uneven
from paceline.comm.native.codes import DTYPE_CODES, OP_CODES, OperationKind
from paceline.comm.native.plan import plan
from paceline.schedule import contract
from paceline.schedule.interpret import interpret
from paceline.schedule.program import Program
from paceline.types import ReduceOp

GATHERING = ("all_gather", "gather")


def check(world: World, case: Case) -> None:
    """AssertionError names the case and the first rank whose result differs."""
    run = check_own if case.algorithm in (OWN, SHARES) else check_program
    for rank, (got, want) in enumerate(run(world, case)):
        if got is not None and want is not None:
            assert is_same(got, want), f"{case}: rank {rank}: {got[:5]} instead of {want[:5]}"


# Programs of paceline.collectives, against the interpreter.


@functools.lru_cache(maxsize=512)
def built(algorithm: str, operation: str, num_ranks: int, root: int) -> Program:
    name, options = collectives.parse(algorithm)
    return collectives.build(name, operation, num_ranks, root=root, **options)


def check_program(world: World, case: Case) -> list[tuple[torch.Tensor | None, Array | None]]:
    p, counts, is_in_place = case.num_ranks, case.counts(), case.memory == "in place"
    program = built(case.algorithm, case.operation, p, case.root_rank)
    layouts = [contract.layout(program, r, counts) for r in range(p)]
    values = inputs(case.dtype, case.op, p, [int(x.input_offsets[-1]) for x in layouts])
    given = [v if contract.defines_input(program, r) else None for r, v in enumerate(values)]
    with np.errstate(all="ignore"):
        want = interpret(program, given, op=case.op, counts=counts)
    if case.dtype == "bfloat16":  # a mean
        want = [None if w is None else rounded(w) for w in want]
    sources, outputs = [], []
    for r, layout in enumerate(layouts):
        source = tensor(values[r], case.dtype)
        output = torch.zeros(int(layout.output_offsets[-1]), dtype=case.torch_dtype)
        if is_in_place:
            offsets = layout.output_offsets if case.operation in GATHERING else layout.input_offsets
            start = int(offsets[contract.in_place_offset(program, r)])
            source, output = _in_place(case, source, output, start)
        sources.append(source)
        outputs.append(output)
    operations = []
    for r, comm in enumerate(world.comms):
        low = plan(
            case.algorithm,
            case.operation,
            p,
            case.root_rank,
            r,
            is_in_place,
            counts,
            case.torch_dtype.itemsize,
        )
        operations.append(
            comm._group.run(
                low,
                OperationKind[case.operation.upper()],
                sources[r].data_ptr(),
                outputs[r].data_ptr(),
                outputs[r].numel(),
                DTYPE_CODES[case.torch_dtype],
                OP_CODES[case.op],
                case.root_rank,
                comm.timeout_s,
            )
        )
    for comm, operation in zip(world.comms, operations, strict=True):
        if operation is not None:
            comm._group.wait(operation, -1.0)
    return list(zip(outputs, want, strict=True))


def _in_place(
    case: Case, source: torch.Tensor, output: torch.Tensor, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Source and output in the same memory: the smaller one is part of the larger one, from `start` on."""
    if case.operation not in GATHERING:
        return source, source[start : start + output.numel()]
    part = output[start : start + source.numel()]
    return part.copy_(source), output


# The fabric's own protocols, against the definition of the operation.


def check_own(world: World, case: Case) -> list[tuple[torch.Tensor | None, Array | None]]:
    operation, p, counts = case.operation, case.num_ranks, case.counts()
    blocks = counts if isinstance(counts, tuple) else (counts,) * p
    if operation == "barrier":
        world.each(lambda comm: comm.barrier())
        return []
    if operation in ("all_reduce", "reduce", "broadcast"):
        return _check_whole(world, case, counts)
    if operation in GATHERING:
        values = inputs(case.dtype, case.op, p, blocks)
        want = [np.concatenate(values)] * p
    elif operation == "all_to_all":
        return _check_all_to_all(world, case, counts)
    else:
        values = inputs(case.dtype, case.op, p, [sum(blocks)] * p)
        whole = _combined(case, values) if operation == "reduce_scatter" else values[case.root_rank]
        want = np.split(whole, np.cumsum(blocks)[:-1])
    outputs, works = [], []
    for r, comm in enumerate(world.comms):
        source, output = _buffers(world, case, r, values[r], want[r].size, blocks)
        is_root = r == case.root_rank
        if operation == "all_gather" and case.size == "uneven":
            works.append(comm.all_gather_v(output, source, counts=blocks))
        elif operation == "all_gather":
            works.append(comm.all_gather(output, source))
        elif operation == "gather":
            works.append(comm.gather(output if is_root else None, source, root=case.root_rank))
            output = output if is_root else None
        elif operation == "scatter":
            works.append(comm.scatter(output, source if is_root else None, root=case.root_rank))
        elif case.size == "uneven":
            works.append(comm.reduce_scatter_v(output, source, counts=blocks, op=case.op))
        else:
            works.append(comm.reduce_scatter(output, source, op=case.op))
        outputs.append(output)
    for work in works:
        work.wait()
    return list(zip(outputs, want, strict=True))


def _check_whole(world: World, case: Case, n: int) -> list[tuple[torch.Tensor | None, Array | None]]:
    p, root = case.num_ranks, case.root_rank
    values = inputs(case.dtype, case.op, p, [n] * p)
    tensors = [_allocated(world, case, r, tensor(v, case.dtype)) for r, v in enumerate(values)]
    if case.operation == "broadcast":
        world.each(lambda comm: comm.broadcast(tensors[comm.rank], root=root))
        return [(t, values[root]) for t in tensors]
    want = _combined(case, values)
    if case.operation == "reduce":
        world.each(lambda comm: comm.reduce(tensors[comm.rank], root=root, op=case.op))
        return [(t, want if r == root else None) for r, t in enumerate(tensors)]
    options = {}
    if case.algorithm == SHARES:  # the first rank has most, the last one nothing unless it is alone
        options["algorithm"] = uneven.name_of([3 * (p - 1 - r) or int(p == 1) for r in range(p)])
    world.each(lambda comm: comm.all_reduce(tensors[comm.rank], op=case.op, **options))
    return [(t, want) for t in tensors]


def _check_all_to_all(
    world: World, case: Case, counts: Any
) -> list[tuple[torch.Tensor | None, Array | None]]:
    p = case.num_ranks
    matrix = np.broadcast_to(np.asarray(counts), (p, p))
    values = inputs(case.dtype, case.op, p, [int(row.sum()) for row in matrix])
    blocks = [np.split(v, np.cumsum(row)[:-1]) for v, row in zip(values, matrix, strict=True)]
    want = [np.concatenate([blocks[s][d] for s in range(p)]) for d in range(p)]
    buffers = [_buffers(world, case, r, v, want[r].size, ()) for r, v in enumerate(values)]

    def call(comm: Any) -> Any:
        source, output = buffers[comm.rank]
        if case.size != "uneven":
            return comm.all_to_all(output, source)
        received, sent = matrix[:, comm.rank].tolist(), matrix[comm.rank].tolist()
        return comm.all_to_all_v(output, source, output_counts=received, source_counts=sent)

    world.each(call)
    return [(output, want[r]) for r, (_, output) in enumerate(buffers)]


def _combined(case: Case, values: Sequence[Array]) -> Array:
    """In the order of ranks; where hosts have several, first within each host, then in the order of hosts."""
    p = case.num_ranks
    if case.fabric != "mixed":
        return in_rank_order(values, case.dtype, case.op, num_ranks=p)
    hosts = [
        [v for v, h in zip(values, case.hosts, strict=True) if h == host]
        for host in dict.fromkeys(case.hosts)
    ]
    sums = [in_rank_order(host, case.dtype, case.op) for host in hosts]
    if case.operation == "reduce_scatter":
        return in_rank_order(sums, case.dtype, case.op, num_ranks=p)
    total = in_rank_order(sums, case.dtype, case.op)
    return in_rank_order([total], case.dtype, case.op, num_ranks=p if case.op is ReduceOp.MEAN else 0)


def _buffers(
    world: World, case: Case, rank: int, values: Array, num_out: int, blocks: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    source = tensor(values, case.dtype)
    output = torch.zeros(num_out, dtype=case.torch_dtype)
    if case.memory == "in place":
        return _in_place(case, source, output, sum(blocks[:rank]))
    return _allocated(world, case, rank, source), _allocated(world, case, rank, output)


def _allocated(world: World, case: Case, rank: int, values: torch.Tensor) -> torch.Tensor:
    if case.memory != "allocated" or values.numel() == 0:
        return values
    memory = torch.utils.dlpack.from_dlpack(world.engines[rank].allocate(values.nbytes)).view(values.dtype)
    return memory.copy_(values)
