"""Rank 0's side of the negotiation: ranks submit in any order and all perform in one order.

An operation starts when every rank of its process set has asked for it by name. Small all-reduces that are
ready together are fused. Ranks that have joined (ran out of data) count as having asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from paceline.compat.horovod.request import Request, Response
from paceline.types import named


@dataclass
class _Waiting:
    """A name that some ranks have asked for."""

    by_rank: dict[int, Request] = field(default_factory=dict)
    since_s: float = 0.0
    is_reported: bool = False


class Coordinator:
    """Decides what is performed next. Not thread-safe: the engine calls it under its lock."""

    def __init__(self, process_sets: Mapping[int, Sequence[int]], *, fusion_bytes: int) -> None:
        self._process_sets = process_sets
        self._fusion_bytes = fusion_bytes
        self._waiting: dict[tuple[int, str], _Waiting] = {}
        self._joined: list[int] = []

    def submit(self, rank: int, requests: Sequence[Request], now_s: float) -> list[Response]:
        """Take the requests of one rank; return what has become ready, in the order to perform it."""
        ready: list[tuple[int, str]] = []
        for request in requests:
            if request.kind == "join":
                self._joined.append(rank)
                ready += [k for k in self._waiting if k not in ready and self._is_complete(k)]
                continue
            key = (request.process_set, request.name)
            waiting = self._waiting.setdefault(key, _Waiting(since_s=now_s))
            waiting.by_rank[rank] = request
            if key not in ready and self._is_complete(key):
                ready.append(key)
        responses = self._fuse([self._respond(k) for k in ready])
        if len(self._joined) == len(self._process_sets[0]):
            responses.append(Response([Request("join", "join")], last_joined=self._joined[-1]))
            self._joined = []
        return responses

    def stalled(self, now_s: float, after_s: float) -> list[str]:
        """One sentence, once, for each name that some ranks have waited for longer than `after_s` seconds."""
        found = []
        for (process_set, name), waiting in self._waiting.items():
            if waiting.is_reported or now_s - waiting.since_s < after_s:
                continue
            waiting.is_reported = True
            missing = self._missing((process_set, name))
            found.append(
                f"{name} (asked for by {named(sorted(waiting.by_rank))}) "
                f"has waited {now_s - waiting.since_s:.0f} s for {named(missing)}"
            )
        return found

    def fail_stalled(self, now_s: float, after_s: float) -> list[Response]:
        """Give up the names that have waited longer than `after_s`; their ranks get an error."""
        late = [k for k, w in self._waiting.items() if now_s - w.since_s >= after_s]
        failed = []
        for key in late:
            missing = self._missing(key)
            waiting = self._waiting.pop(key)
            request = next(iter(waiting.by_rank.values()))
            error = f"{key[1]}: {named(missing)} did not ask for it for {after_s:.0f} s"
            failed.append(Response([request], error=error))
        return failed

    def forget(self, process_set: int) -> None:
        """Drop what waits in a process set that is removed; its ranks fail their own operations."""
        for key in [k for k in self._waiting if k[0] == process_set]:
            del self._waiting[key]

    def _missing(self, key: tuple[int, str]) -> list[int]:
        asked = self._waiting[key].by_rank
        return [r for r in self._process_sets[key[0]] if r not in asked and r not in self._joined]

    def _is_complete(self, key: tuple[int, str]) -> bool:
        return bool(self._waiting[key].by_rank) and not self._missing(key)

    def _respond(self, key: tuple[int, str]) -> Response:
        waiting = self._waiting.pop(key)
        (first_rank, first), *others = sorted(waiting.by_rank.items())
        for rank, request in others:
            if request.signature() != first.signature():
                return Response(
                    [first],
                    error=f"ranks disagree about {first.name}: rank {first_rank} has {first.signature()}, "
                    f"rank {rank} has {request.signature()}",
                )
        if self._joined and first.kind not in ("allreduce", "barrier"):
            return Response(
                [first],
                error=f"{first.kind} {first.name} after {named(sorted(self._joined))} joined is undefined",
            )
        rows: list[list[int]] = []
        if first.kind == "allgather":
            rows = [[s[0] for s in waiting.by_rank[r].shapes] for r in sorted(waiting.by_rank)]
        elif first.kind == "alltoall":
            rows = [waiting.by_rank[r].splits for r in sorted(waiting.by_rank)]
        return Response([first], rows=rows)

    def _fuse(self, responses: Sequence[Response]) -> list[Response]:
        fused: list[Response] = []
        open_bytes = 0
        for response in responses:
            request = response.requests[0]
            size = request.num_bytes()
            last = fused[-1] if fused else None
            if (
                last is not None
                and not response.error
                and not last.error
                and _can_share(last.requests[0], request)
                and open_bytes + size <= self._fusion_bytes
            ):
                fused[-1] = Response([*last.requests, request])
                open_bytes += size
            else:
                fused.append(response)
                open_bytes = size
        return fused


def _can_share(a: Request, b: Request) -> bool:
    """Whether two requests fit one buffer and one operation."""
    key = ("op", "prescale", "postscale", "process_set")
    return (
        a.kind == b.kind == "allreduce"
        and a.op != "Adasum"
        and all(getattr(a, k) == getattr(b, k) for k in key)
        and len(set(a.dtypes) | set(b.dtypes)) == 1
    )
