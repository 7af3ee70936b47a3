"""The verifier: what it accepts, and what it rejects with rank, instruction, chunk and reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paceline import _core, collectives
from paceline.collectives.verification.sweep import Summary, verify_all, verify_case
from paceline.errors import ConfigError, ScheduleError
from paceline.schedule.builder import Builder
from paceline.schedule.lowering.lower import lower
from paceline.schedule.lowering.lowered import EXECUTED, POSTS, RECEIVES, VERBS, Instruction, Lowered
from paceline.schedule.program import INPUT, OUTPUT, SCRATCH, Program
from paceline.schedule.verification.verify import verify


def test_everything_small_is_accepted() -> None:
    summary = verify_all(range(1, 7))
    assert summary.failures == []
    assert summary.programs > 500 and summary.lowered == 4 * (summary.programs - summary.same)
    assert 2 * summary.executable >= summary.lowered


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_everything_is_accepted() -> None:
    assert verify_all(range(1, 18)).failures == []


@pytest.mark.parametrize(
    "p", [24, pytest.param(48, marks=pytest.mark.slow), pytest.param(64, marks=pytest.mark.slow)]
)
def test_large_all_reduce_is_accepted(p: int) -> None:
    names = None if p > 24 else ["ring", "halving_doubling", "double_binary_tree", "hierarchical", "hybrid"]
    assert verify_all([p], operations=["all_reduce"], algorithms=names).failures == []


def refused(program: Program | Lowered, why: str, **options: bool) -> str:
    with pytest.raises(ScheduleError, match=why) as caught:
        verify(program if isinstance(program, Lowered) else lower(program, **options))
    return str(caught.value)


def all_reduce_of(p: int, chunks: int = 1) -> Builder:
    b = Builder("mine", "all_reduce", num_ranks=p, num_chunks=chunks, num_scratch=2)
    for rank in range(p):
        b.copy((rank, INPUT, 0), (rank, OUTPUT, 0), count=chunks)
    b.step()
    return b


def test_double_counting_is_rejected() -> None:
    """Every rank is in every result, so a boolean checker accepts it; rank 1 is in it twice."""
    b = all_reduce_of(3)
    b.reduce((1, OUTPUT, 0), (0, OUTPUT, 0)).step()
    b.reduce((2, OUTPUT, 0), (0, OUTPUT, 0)).step()
    b.reduce((1, OUTPUT, 0), (0, OUTPUT, 0)).step()
    b.copy((0, OUTPUT, 0), (1, OUTPUT, 0)).copy((0, OUTPUT, 0), (2, OUTPUT, 0)).step()
    for in_place in (False, True):
        for zero_copy in (False, True):
            said = refused(
                b.build(),
                "adds the contribution of rank 1 to chunk 0 a second time",
                in_place=in_place,
                zero_copy=zero_copy,
            )
            assert "rank 0, instruction" in said


def test_missing_contribution_is_rejected() -> None:
    b = all_reduce_of(3)
    b.reduce((1, OUTPUT, 0), (0, OUTPUT, 0)).step()
    b.copy((0, OUTPUT, 0), (1, OUTPUT, 0)).copy((0, OUTPUT, 0), (2, OUTPUT, 0)).step()
    refused(
        b.build(),
        r"rank 0 must end with chunk 0 of ranks 0, 1, 2 in output\[0\] and has chunk 0 of ranks 0, 1",
    )


def test_wrong_chunk_is_rejected() -> None:
    b = all_reduce_of(2, chunks=2)
    b.reduce((1, OUTPUT, 0), (0, OUTPUT, 1)).step()
    refused(b.build(), r"step 1 reduces logical chunk 0 into rank 0 output\[1\], which holds logical chunk 1")


def test_reading_nothing_is_rejected() -> None:
    b = all_reduce_of(2)
    b.reduce((1, SCRATCH, 0), (0, OUTPUT, 0)).step()
    refused(b.build(), r"step 1 reads rank 1 scratch\[0\], which holds nothing")
    b = all_reduce_of(2)
    b.reduce((1, OUTPUT, 0), (0, SCRATCH, 1)).step()
    refused(b.build(), r"step 1 reduces into rank 0 scratch\[1\], which holds nothing")


def test_places_that_do_not_exist_are_rejected() -> None:
    b = all_reduce_of(2)
    b.copy((0, OUTPUT, 0), (1, OUTPUT, 1)).step()
    refused(b.build(), "rank 1 has 1 chunks of OUTPUT; no chunk 1")
    b = all_reduce_of(2)
    b.copy((0, OUTPUT, 0), (2, OUTPUT, 0)).step()
    refused(b.build(), "rank 2 does not exist")


def test_writing_the_input_is_rejected() -> None:
    b = all_reduce_of(2)
    b.copy((0, OUTPUT, 0), (1, INPUT, 0)).step()
    refused(b.build(), "writes the input, which is read-only")


def test_output_of_a_rank_without_result_is_private() -> None:
    b = Builder("mine", "reduce", num_ranks=3, num_chunks=1)
    b.copy((1, INPUT, 0), (2, OUTPUT, 0)).step()
    refused(b.build(), "writes the output of a rank that has none|ends without a result")


def test_message_order_is_checked() -> None:
    lowered = lower(collectives.build("ring", "all_gather", 4), fused=False)
    sends = [i for i in lowered.instructions[1] if i.verb == "send"]
    sends[0].send_message, sends[1].send_message = 1, 0
    refused(lowered, "rank 1, instruction 0 .* posts out of order; message 0 is next")


def test_swapped_payloads_are_found() -> None:
    lowered = lower(collectives.build("ring", "all_gather", 4), fused=False)
    sends = [i for i in lowered.instructions[1] if i.verb == "send"]
    sends[1].src, sends[2].src = sends[2].src, sends[1].src
    refused(lowered, "takes other chunks than")


def test_unmatched_messages_are_found() -> None:
    lowered = lower(collectives.build("ring", "all_gather", 3))
    lowered.instructions[0] = [i for i in lowered.instructions[0] if i.verb != "recv"]
    refused(lowered, "rank 2 sends 2 messages to rank 0 on channel 0, which takes 1")
    lowered = lower(collectives.build("ring", "all_gather", 3))
    lowered.instructions[0] = [i for i in lowered.instructions[0] if i.send_peer < 0]
    refused(lowered, "waits for a message that is never sent|depends on|out of order")


def test_races_are_found() -> None:
    lowered = lower(collectives.build("recursive_doubling", "all_reduce", 4))
    dependent = next(i for i in lowered.instructions[2] if i.deps)
    dependent.deps = []
    said = refused(lowered, "and nothing orders the two")
    assert "rank 2, instruction" in said and "output[0]" in said


def test_a_missing_reclaim_is_a_race() -> None:
    """Zero copy: a buffer may not change before its readers are done, nor may its owner return."""
    lowered = lower(collectives.build("ring", "all_reduce", 4), zero_copy=True, in_place=True)
    mine = lowered.instructions[1]
    assert [i.verb for i in mine].count("reclaim") == 1, "messages order the writes; only the end must wait"
    assert mine.pop().verb == "reclaim"
    refused(lowered, "rank 1 finishes while rank 2 may still read what it exposed")

    program = collectives.build("pairwise", "all_to_all", 6)
    lowered = lower(program, zero_copy=True, in_place=True)
    mine = lowered.instructions[1]
    early = next(i for i in mine if any(mine[d].verb == "reclaim" for d in i.deps))
    early.deps = [d for d in early.deps if mine[d].verb != "reclaim"]
    refused(lowered, r"rank 1 output\[\d\], which rank \d, .* and nothing orders the two")


def test_deadlock_is_found() -> None:
    """A fused ring needs two slots per connection: with one, everyone waits for the next rank's slot."""
    lowered = lower(collectives.build("ring", "all_reduce", 4), slots=1)
    said = refused(lowered, "deadlock with 1 slots per connection")
    assert "waits for rank" in said
    verify(lower(collectives.build("ring", "all_reduce", 4), slots=1, fused=False))

    lowered = lower(collectives.build("recursive_doubling", "all_reduce", 2))
    for mine in lowered.instructions:  # both receive before they send
        assert [i.verb for i in mine] == ["send", "recv_reduce"]
        mine.reverse()
        mine[1].deps = [0]
        mine[0].deps = []
    said = refused(lowered, "deadlock with 2 slots")
    assert (
        "rank 0, instruction 0 (recv_reduce from rank 1" in said and "waits for a message from rank 1" in said
    )


def test_malformed_lists_are_found() -> None:
    def broken(change: Callable[[Instruction], None]) -> Lowered:
        lowered = lower(collectives.build("recursive_doubling", "all_reduce", 4))
        change(next(i for i in lowered.instructions[1] if i.verb == "recv_reduce"))
        return lowered

    refused(broken(lambda i: setattr(i, "verb", "recieve")), "unknown verb")
    refused(broken(lambda i: setattr(i, "recv_peer", 7)), "its peer is no other rank")
    refused(broken(lambda i: setattr(i, "recv_peer", 1)), "its peer is no other rank")
    refused(broken(lambda i: setattr(i, "src", [])), "its operands do not fit its verb")
    refused(broken(lambda i: setattr(i, "dst", [])), "its destination does not fit its verb")
    refused(broken(lambda i: setattr(i, "dst", [(1, 3, 0, 1)])), "do not exist")
    refused(broken(lambda i: setattr(i, "dst", [(0, 0, 0, 1)])), "read-only")
    refused(broken(lambda i: setattr(i, "deps", [99])), "not all of them before it")
    refused(broken(lambda i: setattr(i, "channel", 1)), "never sent")
    lowered = lower(collectives.build("all_pairs", "all_reduce", 4))
    for i in lowered.instructions[0]:
        i.lane = 0
    refused(lowered, "lane 0 .* two peers")


def test_executable_forms_are_those_that_the_core_accepts() -> None:
    """The core's executor has the verbs that `lowered` says it has, and refuses the others by name."""
    assert _core.Plan.VERBS == EXECUTED
    for verb in VERBS:
        plan = _core.Plan(num_ranks=4, scratch_bytes=0, output_bytes=8)
        fields = {"lane": 0, "channel": 0, "num_bytes": 8, "src": [], "operand": [], "deps": []}
        peers = {"recv_peer": 1 if verb in RECEIVES else -1, "send_peer": 2 if verb in POSTS else -1}
        if verb in EXECUTED:
            plan.add(verb=verb, **fields, **peers, dst=[(1, 0, 8)])
        else:
            with pytest.raises(ConfigError, match=f"does not run the verb '{verb}'"):
                plan.add(verb=verb, **fields, **peers, dst=[(1, 0, 8)])
    staged, zero_copy = (
        lower(collectives.build("hierarchical", "all_reduce", 6), zero_copy=z) for z in (False, True)
    )
    assert staged.is_executable and not zero_copy.is_executable
    assert verify(collectives.build("hierarchical", "all_reduce", 6)).executable_forms == 2
    assert verify(staged).messages > 0 and verify(zero_copy).messages > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"lane": -1},
        {"channel": 256},
        {"recv_peer": 4},
        {"recv_peer": -1},
        {"send_peer": 1},
        {"num_bytes": 1 << 50},
        {"dst": [(3, 0, 8)]},
        {"src": [(0, 1 << 50, 8)]},
        {"deps": [0]},
    ],
)
def test_the_core_refuses_instructions_that_no_executor_could_run(wrong: dict[str, Any]) -> None:
    plan = _core.Plan(num_ranks=4, scratch_bytes=0, output_bytes=8)
    good: dict[str, Any] = {"verb": "recv", "lane": 0, "channel": 0, "recv_peer": 1, "send_peer": -1}
    good |= {"num_bytes": 8, "dst": [(1, 0, 8)], "src": [], "operand": [], "deps": []}
    with pytest.raises(ConfigError, match=r"instruction 0: .* is out of range"):
        plan.add(**(good | wrong))
    plan.add(**good)


def test_lowering_of_the_ring_is_tight() -> None:
    """Out of place: no local copies, no stores of partial sums, one lane, no dependency at all."""
    for in_place in (False, True):
        lowered = lower(collectives.build("ring", "all_reduce", 8), in_place=in_place)
        for mine in lowered.instructions:
            verbs = [i.verb for i in mine]
            assert verbs == ["send", *["recv_reduce_send"] * 7, *["recv_send"] * 6, "recv"]
            assert [bool(i.dst) for i in mine[1:7]] == [False] * 6
            assert {i.lane for i in mine} == {0} and not any(i.deps for i in mine)


def test_lowering_removes_what_moves_nothing() -> None:
    for operation in ("all_reduce", "reduce_scatter", "all_gather"):
        lowered = lower(collectives.build("ring", operation, 5), in_place=True)
        assert not any(i.verb == "copy" for mine in lowered.instructions for i in mine)
        alone = lower(collectives.build("ring", operation, 1), in_place=True)
        assert alone.instructions == [[]]
    one_host = collectives.build("hybrid", "all_reduce", 4, hosts=1)
    assert all(len(mine) == 7 for mine in lower(one_host).instructions)


PLUGIN = '''
"""Star: everything to rank 0 and back."""
from fractions import Fraction
from paceline.schedule.cost import Cost
from paceline.schedule.program import INPUT, Program, copy, ranks, reduce, together

OPERATIONS = ("all_reduce",)

def build(operation, num_ranks, *, root=0):
    me = ranks(num_ranks)
    def steps():
        yield copy(me, me, 0, source=INPUT)
        yield reduce(me[1:], 0 * me[1:], 0)
        yield copy(0, me[1:], 0)
    return Program("star", operation, num_ranks, 1, steps)

def supports(operation, num_ranks):
    return operation in OPERATIONS

def cost(operation, num_ranks, *, root=0):
    n = num_ranks - 1
    return Cost(2 * (n > 0), n, Fraction(n), Fraction(n))
'''


def test_an_algorithm_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "star.py").write_text(PLUGIN)
    monkeypatch.setattr(collectives, "__path__", [*collectives.__path__, str(tmp_path)])
    assert "star" in collectives.names()
    summary = verify_all(range(1, 6), algorithms=["star"])
    assert summary.failures == [] and summary.programs == 5


def test_a_false_claim_is_reported() -> None:
    from paceline.collectives.verification.sweep import Case

    class Liar(Case):
        def build(self) -> Program:
            return collectives.build("chain", "reduce", self.num_ranks, root=self.root)

    summary = Summary()
    verify_case(Liar("ring", "all_reduce", 4, 0, {}), summary)
    assert "claims" in summary.failures[0][1] and "counted" in summary.failures[0][1]
