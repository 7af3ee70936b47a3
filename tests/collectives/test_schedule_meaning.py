"""Interpreter and lowered rehearsal against the plain definition of every operation."""

from __future__ import annotations

import random
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rehearse import rehearse

from paceline import collectives
from paceline.collectives.verification.sweep import Case, cases
from paceline.errors import ConfigError
from paceline.schedule import contract
from paceline.schedule.interpret import default_counts, expected, interpret
from paceline.schedule.lowering.lower import lower
from paceline.schedule.program import Program, chunk_offsets
from paceline.types import ReduceOp

SCATTERS = ("reduce_scatter", "scatter", "all_to_all")


def make_inputs(program: Program, counts: object, draw: np.random.Generator, dtype: str = "int64") -> list:
    found = []
    for rank in range(program.num_ranks):
        size = int(contract.layout(program, rank, counts).input_offsets[-1])
        values = draw.integers(-9, 10, size)
        if dtype.startswith(("float", "complex")):
            found.append((draw.standard_normal(size) * 3).astype(dtype))
        else:
            found.append(
                np.abs(values).astype(dtype) if dtype.startswith(("u", "bool")) else values.astype(dtype)
            )
    return found


def counts_of(program: Program, size: int) -> object:
    """A full buffer of `size` elements, cut as evenly as it goes."""
    op, p = contract.base_operation(program.operation), program.num_ranks
    if op in contract.WHOLE:
        return 0 if op == "barrier" else size
    row = np.diff(chunk_offsets(size, p)).tolist()
    return [row] * p if op == "all_to_all" else row


def assert_equal(got: list, want: list) -> None:
    for rank, (g, w) in enumerate(zip(got, want, strict=True)):
        assert (g is None) == (w is None), f"rank {rank}"
        if g is not None:
            assert g.dtype == w.dtype
            np.testing.assert_array_equal(g, w, err_msg=f"rank {rank}")


@pytest.mark.parametrize("name", collectives.names())
def test_interpreter_is_exact(name: str) -> None:
    """Every operation and P = 1 … 17, sizes around P and beyond, smaller than P, and none."""
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    for case in cases(range(1, 18), algorithms=[name]):
        p = case.num_ranks
        if case.root not in (0, p // 2, p - 1):
            continue
        program = case.build()
        for size in {0, 1, p - 1, p, p + 1, 1000}:
            counts = counts_of(program, size)
            inputs = make_inputs(program, counts, draw)
            got = interpret(program, inputs, counts=counts)
            assert_equal(got, expected(program, inputs, counts=counts))


@pytest.mark.parametrize("name", collectives.names())
def test_lowered_programs_compute_the_same_bits(name: str) -> None:
    """Floats, so that the order of every sum counts; all four lowered forms, and without fusion."""
    draw = np.random.default_rng(7)
    for case in cases((1, 2, 3, 5, 6, 8), algorithms=[name]):
        if case.root not in (0, case.num_ranks - 1):
            continue
        program = case.build()
        counts = counts_of(program, 3 * case.num_ranks + 1)
        inputs = make_inputs(program, counts, draw, "float32")
        want = interpret(program, inputs, counts=counts)
        for in_place in (False, True):
            for zero_copy in (False, True):
                lowered = lower(program, in_place=in_place, zero_copy=zero_copy, fused=not zero_copy)
                assert_equal(rehearse(lowered, inputs, counts=counts), want)
        assert_equal(rehearse(lower(program), inputs, counts=counts), want)
        if program.operation == "all_reduce":
            assert all(np.array_equal(w, want[0]) for w in want), f"{case}: ranks differ in bits"


@pytest.mark.parametrize("name", collectives.names())
def test_any_order_that_is_allowed_gives_the_same_bits(name: str) -> None:
    """Lanes advance at random, slice by slice: dependencies alone keep the result."""
    order = random.Random(name)
    for case in cases((2, 4, 5, 6), algorithms=[name]):
        if (case.root != case.num_ranks // 2 and case.root) or case.operation in contract.V_FORMS:
            continue
        program = case.build()
        counts = counts_of(program, 5 * case.num_ranks + 2)
        inputs = make_inputs(program, counts, np.random.default_rng(2), "float32")
        want = interpret(program, inputs, counts=counts)
        for in_place in (False, True):
            for zero_copy in (False, True):
                lowered, slices = (
                    lower(program, in_place=in_place, zero_copy=zero_copy),
                    order.choice((1, 2, 3)),
                )
                assert_equal(rehearse(lowered, inputs, counts=counts, slices=slices, draw=order), want)
                assert_equal(rehearse(lowered, inputs, counts=counts, slices=slices), want)


def test_random_order_finds_a_missing_dependency() -> None:
    """The random rehearsal can fail: without its dependencies recursive doubling sends what it should not."""
    program = collectives.build("recursive_doubling", "all_reduce", 4)
    lowered = lower(program)
    for i in (i for mine in lowered.instructions for i in mine):
        i.deps = []
    inputs = make_inputs(program, 8, np.random.default_rng(2))
    want = expected(program, inputs)

    def goes_wrong(seed: int) -> bool:
        try:
            got = rehearse(lowered, inputs, counts=8, draw=random.Random(seed))
        except KeyError:  # read before it was written
            return True
        return any(not np.array_equal(g, w) for g, w in zip(got, want, strict=True))

    assert any(goes_wrong(seed) for seed in range(20))


@pytest.mark.parametrize("op", list(ReduceOp))
@pytest.mark.parametrize("dtype", ["int8", "uint16", "int64", "float16", "float64"])
def test_operations_and_dtypes(op: ReduceOp, dtype: str) -> None:
    if dtype.startswith("float") and op in (ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR):
        pytest.skip("bit operations are for integers")
    program = collectives.build("ring", "all_reduce", 5)
    inputs = make_inputs(program, 13, np.random.default_rng(3), dtype)
    got = interpret(program, inputs, op=op)
    assert_equal(rehearse(lower(program), inputs, counts=13, op=op), got)
    for result, want in zip(got, expected(program, inputs, op=op), strict=True):
        assert result.dtype == np.dtype(dtype)
        if dtype.startswith("float"):
            np.testing.assert_allclose(result, want, rtol=0.02 if dtype == "float16" else 1e-12)
        else:
            np.testing.assert_array_equal(result, want)


def test_integer_mean_truncates_towards_zero() -> None:
    program = collectives.build("recursive_doubling", "all_reduce", 2)
    got = interpret(program, [np.array([-3, 3, 2]), np.array([0, 0, -1])], op=ReduceOp.MEAN)
    np.testing.assert_array_equal(got[0], [-1, 1, 0])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_v_forms_with_any_counts(data: st.DataObject) -> None:
    """Counts are data: zero blocks, very unequal blocks, any matrix for all_to_all."""
    p = data.draw(st.integers(1, 6))
    found = [c for c in cases((p,)) if c.operation in contract.V_FORMS]
    case = data.draw(st.sampled_from(found))
    program = case.build()
    row = st.lists(st.integers(0, 9), min_size=p, max_size=p)
    is_matrix = case.operation == "all_to_all_v"
    counts = data.draw(st.lists(row, min_size=p, max_size=p) if is_matrix else row)
    inputs = make_inputs(program, counts, np.random.default_rng(1))
    want = expected(program, inputs, counts=counts)
    assert_equal(interpret(program, inputs, counts=counts), want)
    for in_place in (False, True):
        lowered = lower(program, in_place=in_place, zero_copy=data.draw(st.booleans()))
        assert_equal(rehearse(lowered, inputs, counts=counts), want)


@pytest.mark.parametrize("channels, instances", [(2, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("name", collectives.names())
def test_channels_and_instances(name: str, channels: int, instances: int) -> None:
    """Parallel copies change neither the result nor the claimed bytes."""
    for case in cases((3, 4), algorithms=[name]):
        options = {**case.options, "channels": channels, "instances": instances}
        program = Case(name, case.operation, case.num_ranks, case.root, options).build()
        counts = counts_of(program, 17)
        inputs = make_inputs(program, counts, np.random.default_rng(5))
        want = expected(program, inputs, counts=counts)
        assert_equal(interpret(program, inputs, counts=counts), want)
        assert_equal(rehearse(lower(program), inputs, counts=counts), want)


def test_wrong_inputs_are_refused() -> None:
    program = collectives.build("ring", "all_reduce", 3)
    with pytest.raises(ConfigError, match="one input per rank"):
        interpret(program, [np.zeros(2)])
    with pytest.raises(ConfigError, match=r"rank 1 needs an input of shape \(4,\), got \(5,\)"):
        interpret(program, [np.zeros(4), np.zeros(5), np.zeros(4)])
    assert default_counts(program, [np.zeros(4)] * 3) == 4
