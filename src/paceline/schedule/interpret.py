"""The meaning of a Program in NumPy: the oracle for every executor.

Reduction order is canonical: `reduce` computes local (op) incoming, steps follow one another, and writes of
one step happen in the order of its arrays. Executors of the same program give the same bits, up to the sign
and payload of NaN. All ranks of an all_reduce agree bitwise: an algorithm either combines each chunk once and
copies the result, or combines the same two operands on both sides, or uses the order of ranks everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from paceline.errors import ConfigError, ScheduleError
from paceline.schedule import contract
from paceline.schedule.program import INPUT, OUTPUT, REDUCE, Buffer, Op, Program, chunk_offsets
from paceline.types import ReduceOp

Array = npt.NDArray[Any]

COMBINE: dict[ReduceOp, Callable[[Array, Array], Array]] = {
    ReduceOp.SUM: np.add,
    ReduceOp.PRODUCT: np.multiply,
    ReduceOp.MIN: np.minimum,
    ReduceOp.MAX: np.maximum,
    ReduceOp.MEAN: np.add,
    ReduceOp.BAND: np.bitwise_and,
    ReduceOp.BOR: np.bitwise_or,
    ReduceOp.BXOR: np.bitwise_xor,
}


def interpret(
    program: Program,
    inputs: Sequence[Array | None],
    *,
    op: ReduceOp = ReduceOp.SUM,
    counts: contract.BlockCounts | None = None,
) -> list[Array | None]:
    """Run `program` on 1-D arrays of one dtype, one per rank; None on ranks that have no input.

    `counts` as in `contract.layout`; by default they follow from the inputs' lengths, divided evenly where
    blocks are needed. Returns each rank's result, None where the operation promises none.
    """
    p = program.num_ranks
    if len(inputs) != p:
        raise ConfigError(f"{program}: one input per rank expected, got {len(inputs)}")
    combine = COMBINE[op]
    sizes = default_counts(program, inputs) if counts is None else counts
    layouts = [contract.layout(program, rank, sizes) for rank in range(p)]
    memory: list[list[dict[int, Array]]] = [[{}, {}, {}] for _ in range(p)]
    for rank, values in enumerate(inputs):
        if not contract.defines_input(program, rank):
            continue
        offsets = layouts[rank].input_offsets
        if values is None or values.shape != (offsets[-1],):
            got = None if values is None else values.shape
            raise ConfigError(f"{program}: rank {rank} needs an input of shape ({offsets[-1]},), got {got}")
        memory[rank][INPUT] = dict(enumerate(np.split(values, offsets[1:-1])))
    for t, step in enumerate(program.steps()):
        _step(program, t, step.ops(), memory, combine)
    results: list[Array | None] = []
    dtype = next(v.dtype for v in inputs if v is not None)
    for rank in range(p):
        if not contract.defines_output(program, rank):
            results.append(None)
            continue
        held = memory[rank][OUTPUT]
        missing = [c for c in range(len(layouts[rank].output_offsets) - 1) if c not in held]
        if missing:
            raise ScheduleError(f"{program}: rank {rank} ends with nothing in output chunks {missing}")
        whole = np.concatenate([held[c] for c in sorted(held)]) if held else np.zeros(0, dtype)
        results.append(divide(whole, p) if op is ReduceOp.MEAN else whole)
    return results


def _step(
    program: Program,
    t: int,
    ops: list[Op],
    memory: list[list[dict[int, Array]]],
    combine: Callable[[Array, Array], Array],
) -> None:
    taken: list[Array] = []
    for o in ops:
        source = memory[o.src_rank][o.src_buffer]
        for k in range(o.count):
            if o.src_chunk + k not in source:
                raise ScheduleError(f"{program}: step {t}: {o} reads what holds nothing")
            taken.append(source[o.src_chunk + k])
    values = iter(taken)
    for o in ops:
        held = memory[o.dst_rank][o.dst_buffer]
        for k, value in zip(range(o.count), values, strict=False):
            chunk = o.dst_chunk + k
            if o.kind != REDUCE:
                held[chunk] = value
            elif chunk not in held or held[chunk].shape != value.shape:
                have = "nothing" if chunk not in held else f"{held[chunk].size} elements"
                raise ScheduleError(
                    f"{program}: step {t}: {o} combines {value.size} elements with {have} in "
                    f"{Buffer(o.dst_buffer).name.lower()}[{chunk}]"
                )
            else:
                held[chunk] = combine(held[chunk], value)


def divide(total: Array, num_ranks: int) -> Array:
    """Mean from a sum, in the sum's dtype; integers are truncated towards zero, complex numbers by parts."""
    if np.issubdtype(total.dtype, np.integer):
        # Neither the number of ranks nor the magnitude of the smallest integer need fit the dtype.
        wide = total.astype(np.uint64 if np.issubdtype(total.dtype, np.unsignedinteger) else np.int64)
        quotient = wide // num_ranks
        truncated: Array = (quotient + ((wide < 0) & (wide % num_ranks != 0))).astype(total.dtype)
        return truncated
    if np.iscomplexobj(total):  # a division of complex numbers would round twice
        parts: Array = np.stack([total.real, total.imag], axis=-1) / num_ranks
        return parts.view(total.dtype)[..., 0]
    return (total / num_ranks).astype(total.dtype)


def default_counts(program: Program, inputs: Sequence[Array | None]) -> contract.BlockCounts:
    """Return the `counts` that the inputs' lengths imply; blocks are cut evenly."""
    op, p = contract.base_operation(program.operation), program.num_ranks
    lengths = [0 if v is None else int(v.size) for v in inputs]
    if op == "barrier":
        return 0
    if op in contract.WHOLE:
        return lengths[program.root]
    if op in ("all_gather", "gather"):
        return lengths
    if op == "all_to_all":
        return [np.diff(chunk_offsets(n, p)).tolist() for n in lengths]
    return [int(n) for n in np.diff(chunk_offsets(lengths[program.root], p))]


def expected(
    program: Program,
    inputs: Sequence[Array | None],
    *,
    op: ReduceOp = ReduceOp.SUM,
    counts: contract.BlockCounts | None = None,
) -> list[Array | None]:
    """Return what the operation means, for any algorithm: computed directly, in the order of ranks."""
    name, p, root = contract.base_operation(program.operation), program.num_ranks, program.root
    sizes = default_counts(program, inputs) if counts is None else counts
    given = [v for v in inputs if v is not None]
    if name == "barrier":
        return [given[0][:0]] * p
    if name in contract.REDUCING:
        total = given[0]
        for value in given[1:]:
            total = COMBINE[op](total, value)
        total = divide(total, p) if op is ReduceOp.MEAN else total
        if name != "reduce_scatter":
            return [total if contract.defines_output(program, r) else None for r in range(p)]
        return list(_cut(total, sizes, p))
    if name == "broadcast":
        return [inputs[root]] * p
    if name == "scatter":
        source = inputs[root]
        assert source is not None
        return list(_cut(source, sizes, p))
    if name == "all_to_all":
        matrix = np.broadcast_to(np.asarray(sizes, dtype=np.intp), (p, p))
        blocks = [_cut(v, matrix[r], p) for r, v in enumerate(given)]
        return [np.concatenate([blocks[src][dst] for src in range(p)]) for dst in range(p)]
    whole = np.concatenate(given)
    return [whole if contract.defines_output(program, r) else None for r in range(p)]


def _cut(values: Array, sizes: contract.BlockCounts, parts: int) -> list[Array]:
    every = np.broadcast_to(np.asarray(sizes, dtype=np.intp), (parts,))
    return np.split(values, np.cumsum(every)[:-1])
