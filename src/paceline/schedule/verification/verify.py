"""The verifier: proves a lowered program correct, or says which rank, instruction and chunk is wrong and why.

It works on the instruction lists, after fusion, in-place layout, parallel copies and zero-copy.

What is executed and what is modelled. `verify` of a Program proves four forms of it: in and out of place,
staged and zero-copy. The C++ executor (csrc/core/network/execute.cpp) runs the staged forms, between hosts
that have one rank each. It refuses the verbs of zero-copy forms (expose, read, read_reduce, reclaim): a form
that has any of them is modelled only, that is proved but not executed by anything yet.
`Lowered.is_executable` tells them apart.

Proved are:

- matching: on every connection messages are posted and taken in the same order, with the same chunks;
- no deadlock: every rank finishes its list in order, one thread per rank, with `slots` messages in flight.
  Lanes and more slots only remove reasons to wait, so they cannot deadlock either;
- no race: any two accesses to the same memory, one of them a write, are ordered by lanes, dependencies,
  messages and acknowledgements alone. Peers' reads of exposed memory are accesses too;
- provenance: contributions are counted as multisets. A reduction that would count a rank twice is rejected
  at once, because nothing can remove it again; so all sets that are held have multiplicity one;
- the postcondition of every rank, out of place with an unchanged input, or in place.

Cost: one pass over the instructions; what happens before each is one big integer used as a bit set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from paceline.errors import ScheduleError
from paceline.schedule import contract
from paceline.schedule.lowering.lower import lower
from paceline.schedule.lowering.lowered import POSTS, RECEIVES, Instruction, Lowered
from paceline.schedule.program import Buffer, Program
from paceline.schedule.verification.matching import PostedMessage, check_form, match


@dataclass(frozen=True)
class Verified:
    """What was proved, for reports: forms, and the instructions, messages and dependencies of all ranks.

    `executable_forms`: forms that the C++ executor runs; the others are modelled only.
    """

    forms: int
    executable_forms: int
    instructions: int
    messages: int
    dependencies: int


def verify(lowered: Lowered | Program) -> Verified:
    """Prove `lowered` correct; raises ScheduleError otherwise.

    A Program is lowered first, to all four forms: in and out of place, staged and zero-copy.
    """
    if isinstance(lowered, Program):
        forms = [(place, zero) for place in (False, True) for zero in (False, True)]
        proved = [verify(lower(lowered, in_place=place, zero_copy=zero)) for place, zero in forms]
        return Verified(
            forms=len(forms),
            executable_forms=sum(v.executable_forms for v in proved),
            instructions=sum(v.instructions for v in proved),
            messages=sum(v.messages for v in proved),
            dependencies=sum(v.dependencies for v in proved),
        )
    check_form(lowered)
    posts = match(lowered)
    run = _Run(lowered, posts)
    run.execute()
    run.check_results()
    lists = lowered.instructions
    return Verified(
        forms=1,
        executable_forms=int(lowered.is_executable),
        instructions=sum(map(len, lists)),
        messages=len(posts),
        dependencies=sum(len(i.deps) for instructions in lists for i in instructions),
    )


Value = tuple[int, int]
"""(logical chunk, bit set of contributors)"""


class _Run:
    """Executes every rank's list once, on values that say whose contributions they hold."""

    def __init__(self, lowered: Lowered, posts: dict[tuple[int, int, int, int], PostedMessage]) -> None:
        self.lowered, self.posts = lowered, posts
        inputs, outputs = lowered.input_chunks, lowered.output_chunks
        self._base = (0, inputs, inputs + outputs)
        self._width = inputs + outputs + lowered.scratch_chunks
        self._barrier = lowered.operation == "barrier"
        self._next = [0] * lowered.num_ranks
        self._taken: dict[tuple[int, int, int], int] = {}
        self._before: list[int] = []  # by order of execution: bit set of what happens before
        self._done: list[list[int]] = [[] for _ in range(lowered.num_ranks)]  # order of execution
        self._lane_last: dict[tuple[int, int], int] = {}
        self._who: list[tuple[int, int]] = []  # by order of execution: rank, index
        self._writer: dict[int, int] = {}
        self._readers: dict[int, list[int]] = {}
        self._values: dict[int, Value] = {}
        for rank in range(lowered.num_ranks):
            if contract.defines_input(lowered, rank):
                start = self._start(rank, 0, outputs > inputs)
                for chunk, logical in enumerate(contract.logical_input(lowered, rank).tolist()):
                    self._values[start + chunk] = (logical, 1 << rank)

    def _start(self, rank: int, buffer: int, is_smaller: bool) -> int:
        """Memory of the first chunk of `rank`'s INPUT or OUTPUT; in place, one may lie inside the other."""
        low = self.lowered
        if not low.in_place:
            return rank * self._width + self._base[buffer]
        larger = 0 if low.input_chunks > low.output_chunks else 1
        offset = contract.in_place_offset(low, rank) if is_smaller else 0
        return rank * self._width + self._base[larger] + offset

    def execute(self) -> None:
        """Run all ranks to the end; ScheduleError at the first wrong instruction, or on deadlock."""
        lists = self.lowered.instructions
        waiting: dict[tuple[int, int, int], list[int]] = {}
        ready = list(range(len(lists)))
        while ready:
            rank = ready.pop()
            mine = lists[rank]
            while self._next[rank] < len(mine):
                i = mine[self._next[rank]]
                missing = self._blocked(rank, i)
                if missing is not None:
                    waiting.setdefault(missing, []).append(rank)
                    break
                self._perform(rank, self._next[rank], i)
                self._next[rank] += 1
                for key in self._touched(rank, i):
                    if key in waiting:
                        ready += waiting.pop(key)
        if any(n < len(mine) for n, mine in zip(self._next, lists, strict=True)):
            self._report_deadlock()

    @staticmethod
    def _touched(rank: int, i: Instruction) -> list[tuple[int, int, int]]:
        keys = []
        if i.verb in POSTS:
            keys.append((rank, i.send_peer, i.channel))
        if i.verb in RECEIVES:
            keys.append((i.recv_peer, rank, i.channel))
        return keys

    def _blocked(self, rank: int, i: Instruction) -> tuple[int, int, int] | None:
        """Return the connection whose counters `i` must wait for, or None if it can run now."""
        if i.recv_peer >= 0:
            key = (i.recv_peer, rank, i.channel)
            if self.posts[(*key, i.recv_message)].posted < 0:
                return key
        if i.send_peer >= 0:
            key = (rank, i.send_peer, i.channel)
            needed = i.send_message if i.verb == "reclaim" else i.send_message - self.lowered.slots
            if self._taken.get(key, 0) <= needed:
                return key
        return None

    def _perform(self, rank: int, index: int, i: Instruction) -> None:
        now = len(self._who)
        self._who.append((rank, index))
        self._done[rank].append(now)
        before = 0
        lane = (rank, i.lane)
        if lane in self._lane_last:
            last = self._lane_last[lane]
            before = self._before[last] | (1 << last)
        self._lane_last[lane] = now
        for d in i.deps:
            at = self._done[rank][d]
            before |= self._before[at] | (1 << at)
        incoming: list[Value] = []
        if i.recv_peer >= 0:
            post = self.posts[(i.recv_peer, rank, i.channel, i.recv_message)]
            before |= self._before[post.posted] | (1 << post.posted)
            incoming = post.payload
            post.taken = now
            self._taken[(i.recv_peer, rank, i.channel)] = i.recv_message + 1
        if i.verb == "reclaim":
            taken = self.posts[(rank, i.send_peer, i.channel, i.send_message)].taken
            before |= self._before[taken] | (1 << taken)
        self._before.append(before)
        self._move(rank, i, now, incoming)

    def _move(self, rank: int, i: Instruction, now: int, incoming: list[Value]) -> None:
        own = self._read(rank, i, i.src, now)
        if i.operand:
            incoming = self._read(i.recv_peer if i.recv_peer >= 0 else rank, i, i.operand, now)
        if i.verb in ("recv_reduce", "recv_reduce_send", "read_reduce", "reduce"):
            if len(own) != len(incoming):
                self._reject(now, f"combines {len(own)} chunks with {len(incoming)}")
            result = [self._combine(a, b) for a, b in zip(own, incoming, strict=True)]
        else:
            result = incoming if i.recv_peer >= 0 else own
        if i.dst:
            self._write(rank, i, now, result)
        if i.verb in POSTS:
            post = self.posts[(rank, i.send_peer, i.channel, i.send_message)]
            post.posted, post.payload = now, result

    def _cells(self, rank: int, runs: list[tuple[int, int, int, int]]) -> list[tuple[int, int]]:
        """(memory, logical chunk) of every chunk of `runs`."""
        start = rank * self._width
        if len(runs) == 1 and runs[0][3] == 1:
            buffer, chunk, logical, _ = runs[0]
            return [(start + self._base[buffer] + chunk, logical)]
        return [
            (start + self._base[buffer] + chunk + k, logical + k)
            for buffer, chunk, logical, n in runs
            for k in range(n)
        ]

    def _read(
        self, owner: int, i: Instruction, runs: list[tuple[int, int, int, int]], now: int
    ) -> list[Value]:
        values, before = [], self._before[now]
        for mem, logical in self._cells(owner, runs):
            value = self._values.get(mem)
            if value is None:
                self._reject(now, f"reads {self._name(mem)}, which holds nothing")
            if value[0] != logical:
                self._reject(
                    now, f"takes {self._name(mem)} for logical chunk {logical}; it holds chunk {value[0]}"
                )
            writer = self._writer.get(mem)
            if writer is not None and not (before >> writer) & 1:
                self._race(now, writer, mem, "reads", "writes")
            self._readers.setdefault(mem, []).append(now)
            values.append(value)
        return values

    def _write(self, rank: int, i: Instruction, now: int, result: list[Value]) -> None:
        before, cells = self._before[now], self._cells(rank, i.dst)
        if len(cells) != len(result):
            self._reject(now, f"stores {len(result)} chunks in {len(cells)} places")
        for (mem, logical), value in zip(cells, result, strict=True):
            if value[0] != logical:
                self._reject(
                    now, f"stores chunk {value[0]} in {self._name(mem)} as if it were logical chunk {logical}"
                )
            writer = self._writer.get(mem)
            if writer is not None and not (before >> writer) & 1:
                self._race(now, writer, mem, "writes", "writes")
            for reader in self._readers.pop(mem, ()):
                if reader != now and not (before >> reader) & 1:
                    self._race(now, reader, mem, "writes", "reads")
            self._writer[mem] = now
            self._values[mem] = value

    def _combine(self, own: Value, incoming: Value) -> Value:
        if own[0] != incoming[0]:
            self._reject(len(self._who) - 1, f"combines logical chunk {own[0]} with chunk {incoming[0]}")
        twice = own[1] & incoming[1]
        if twice and not self._barrier:
            who = ", ".join(str(r) for r in range(self.lowered.num_ranks) if (twice >> r) & 1)
            self._reject(
                len(self._who) - 1, f"adds the contribution of rank {who} to chunk {own[0]} a second time"
            )
        return own[0], own[1] | incoming[1]

    def check_results(self) -> None:
        """Check every rank's postcondition."""
        low = self.lowered
        for rank in range(low.num_ranks):
            if not contract.defines_output(low, rank):
                continue
            start = self._start(rank, 1, low.input_chunks > low.output_chunks)
            logical = contract.logical_output(low, rank).tolist()
            for chunk, (number, wanted) in enumerate(zip(logical, contract.masks(low, rank), strict=True)):
                got = self._values.get(start + chunk)
                if got != (number, wanted):
                    raise ScheduleError(
                        f"{low}: rank {rank} must end with {self._describe((number, wanted))} in "
                        f"output[{chunk}] and has {self._describe(got)}"
                    )

    def _describe(self, value: Value | None) -> str:
        if value is None:
            return "nothing"
        who = [r for r in range(self.lowered.num_ranks) if (value[1] >> r) & 1]
        return f"chunk {value[0]} of ranks {', '.join(map(str, who))}"

    def _name(self, mem: int) -> str:
        rank, place = divmod(mem, self._width)
        buffer = max(b for b in range(3) if self._base[b] <= place)
        return f"rank {rank} {Buffer(buffer).name.lower()}[{place - self._base[buffer]}]"

    def _say(self, now: int) -> str:
        rank, index = self._who[now]
        i = self.lowered.instructions[rank][index]
        step = f", step {i.step}" if i.step >= 0 else ""
        return f"rank {rank}, instruction {index} ({i}{step})"

    def _reject(self, now: int, why: str) -> NoReturn:
        raise ScheduleError(f"{self.lowered}: {self._say(now)} {why}")

    def _race(self, now: int, other: int, mem: int, does: str, did: str) -> NoReturn:
        self._reject(
            now,
            f"{does} {self._name(mem)}, which {self._say(other)} {did}, and nothing orders the two: "
            "a dependency, message or reclaim is missing",
        )

    def _report_deadlock(self) -> NoReturn:
        stuck = []
        for rank, mine in enumerate(self.lowered.instructions):
            if self._next[rank] < len(mine):
                i = mine[self._next[rank]]
                missing = self._blocked(rank, i)
                assert missing is not None
                what = f"a message from rank {missing[0]}" if missing[1] == rank else f"rank {missing[1]}"
                stuck.append(f"rank {rank}, instruction {self._next[rank]} ({i}) waits for {what}")
        more = f"; and {len(stuck) - 4} more ranks" if len(stuck) > 4 else ""
        raise ScheduleError(
            f"{self.lowered}: deadlock with {self.lowered.slots} slots per connection: "
            f"{'; '.join(stuck[:4])}{more}"
        )
