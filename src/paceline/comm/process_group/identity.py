"""What a process group is besides its collectives: names, sequence numbers, timeouts, coalescing, shutdown.

torch.distributed asks a registered C++ backend for these; a group in Python has to answer itself.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from paceline.comm.native.communicator import NativeCommunicator
from paceline.comm.native.work import DONE
from paceline.comm.process_group.arguments import Finish, Options
from paceline.comm.process_group.membership import GroupMembership, Join, NotConnected
from paceline.comm.process_group.names import BACKEND
from paceline.comm.process_group.self_messages import SelfMessages
from paceline.comm.process_group.work import FINISHED, C10dWork, Result
from paceline.errors import CommError, ConfigError
from paceline.types import CallOptions, Work

_CPU = torch.device("cpu")
UNSET_TIMEOUT = datetime.timedelta(milliseconds=-1)
"""What torch's options hold when the call names no timeout."""


class GroupIdentity(GroupMembership):
    """One member of a group; see `GroupMembership` for the arguments."""

    supports_coalescing = False
    supports_time_estimate = False

    def __init__(
        self, comm: NativeCommunicator | NotConnected, store: Store, *, timeout_s: float, join: Join
    ) -> None:
        super().__init__(comm, store, timeout_s=timeout_s, join=join)
        self._sequence = 0
        self._monitored = 0
        self._coalesced: list[C10dWork] | None = None
        """Works since `_start_coalescing`, if it was called."""
        self._to_self = SelfMessages()

    # Names

    def getBackendName(self) -> str:
        """Name by which init_process_group knows this backend."""
        return BACKEND

    _get_backend_name = name = getBackendName

    @property
    def _device_types(self) -> list[torch.device]:
        return [_CPU, *(torch.device(kind) for kind in self.other_backends)]

    def _get_backend(self, device: torch.device) -> Any:
        kind = torch.device(device).type
        if kind != "cpu" and kind not in self.other_backends:
            raise RuntimeError(f"No backend type associated with device type {kind}")
        return self.other_backends.get(kind, self)

    def _has_hooks(self) -> bool:
        return False  # on completion: torch means those of NCCL

    def _wait_for_pending_works(self) -> None:
        pass

    # Sequence numbers, options

    def _set_sequence_number_for_group(self) -> None:
        pass

    def _get_sequence_number_for_group(self) -> int:
        """Number of collectives called so far: equal on all members unless they are out of step."""
        return self._sequence

    setSequenceNumberForGroup = _set_sequence_number_for_group
    getSequenceNumberForGroup = _get_sequence_number_for_group

    def _options(self, opts: Options, timeout: datetime.timedelta | None = None) -> CallOptions:
        """The options of the operation about to start: its timeout, if the call names one."""
        given = timeout if timeout is not None else getattr(opts, "timeout", None)
        if given is not None and given != UNSET_TIMEOUT and given.total_seconds() > 0:
            return CallOptions(timeout_s=given.total_seconds())
        return self._default_options

    def _root(self, opts: Options, root: int | None) -> int:
        """The root of an operation: named, in torch's options, or in their place."""
        found = root if root is not None else getattr(opts, "rootRank", opts)
        if not isinstance(found, int):
            found = 0
        if not 0 <= found < self._comm.size:
            raise ConfigError(f"invalid root rank: {found} in a group of {self._comm.size}")
        return found

    # Works

    def _work(
        self,
        native: Work,
        result: Result,
        finish: Finish | None = None,
        opts: Options = None,
    ) -> dist.Work:
        """Return the work of a started collective. The caller of a synchronous one waits for it."""
        self._sequence += 1
        is_synchronous = opts is not None and not getattr(opts, "asyncOp", True)
        if native is DONE and finish is None and is_synchronous and self._coalesced is None:
            return FINISHED
        return self._kept(C10dWork(native, result, finish), must_watch=not is_synchronous)

    def _kept(self, work: C10dWork, *, must_watch: bool = True) -> C10dWork:
        """Return `work` after adding it to the coalesced ones, if any.

        Work that has to copy something when it ends is watched unless its caller waits.
        """
        if work.finish is not None and must_watch:
            work.watch()
        if self._coalesced is not None:
            self._coalesced.append(work)
        return work

    def _together(self, works: Sequence[dist.Work], result: Result) -> dist.Work:
        """Return one work for several operations: they run in order, so all are over when the last is."""
        if not works:
            return C10dWork(DONE, result)
        *others, last = [w for w in works if isinstance(w, C10dWork)] or [C10dWork(DONE, result)]
        if all(w.finish is None for w in others):
            return C10dWork(last.native, result, last.finish)

        def finish() -> None:
            for w in (*others, last):
                w.wait()

        return C10dWork(last.native, result, finish)

    def _start_coalescing(self, device: torch.device) -> None:
        self._coalesced = []

    def _end_coalescing(self, device: torch.device) -> dist.Work:
        works, self._coalesced = self._coalesced or [], None

        def finish() -> None:
            for w in works:
                w.wait()

        return C10dWork(works[-1].native if works else DONE, [], finish)

    # Checks

    def _check_list(self, name: str, tensors: Sequence[torch.Tensor], numel: int | None = None) -> None:
        if len(tensors) != self._comm.size:
            raise ConfigError(
                f"paceline backend: {name}: invalid tensor list: {self._comm.size} tensors expected, one for"
                f" each rank, got {len(tensors)}"
            )
        wrong = [t.numel() for t in tensors if numel is not None and t.numel() != numel]
        if wrong:
            raise ConfigError(
                f"paceline backend: {name}: every tensor of the list must have {numel} elements,"
                f" got {wrong[0]}"
            )

    def _check_share(self, name: str, which: str, whole: int, share: int) -> None:
        if whole != share * self._comm.size:
            raise ConfigError(
                f"paceline backend: {name}: {which} tensor size must be equal to world_size times the other's"
                f" size: {self._comm.size} x {share} elements expected, got {whole}"
            )

    def _split_counts(self, name: str, tensor: torch.Tensor, splits: Sequence[int]) -> list[int]:
        size = self._comm.size
        if not splits:
            return [tensor.numel() // size] * size
        rows = tensor.shape[0] if tensor.dim() else 1
        if len(splits) != size or sum(splits) != rows:
            raise ConfigError(
                f"paceline backend: {name}: Split sizes doesn't match total dim 0 size: {list(splits)} for"
                f" {rows} rows and {size} ranks"
            )
        row = tensor.numel() // rows if rows else 0
        return [n * row for n in splits]

    # Barrier with names

    def monitored_barrier(
        self, timeout: datetime.timedelta | None = None, wait_all_ranks: bool = False
    ) -> None:
        """As barrier, but rank 0 names the missing ranks and the group stays usable; it uses the store alone.

        Raises CommError on rank 0 for the first missing rank, or for all with `wait_all_ranks`; on the others
        when rank 0 does not answer.
        """
        limit = timeout if timeout is not None else datetime.timedelta(seconds=self._timeout_s)
        self._monitored += 1
        mine, store, rank = f"monitored/{self._monitored}", self._group_store, self._comm.rank
        if rank == 0:
            self._await_all(mine, limit, wait_all_ranks)
            store.set(f"{mine}/0", "passed")
            return
        store.set(f"{mine}/{rank}", "here")
        try:
            store.wait([f"{mine}/0"], max(limit, datetime.timedelta(milliseconds=1)))
            answer = store.get(f"{mine}/0").decode()
        except RuntimeError:
            answer = f"nothing within {limit}"
        if answer != "passed":
            raise CommError(
                f"Rank {rank} successfully reached monitoredBarrier, but received errors while waiting for"
                f" send/recv from rank 0. Please check rank 0 logs for faulty rank. ({answer})"
            )

    def _await_all(self, mine: str, limit: datetime.timedelta, wait_all_ranks: bool) -> None:
        missing: list[int] = []
        deadline = datetime.datetime.now() + limit
        for r in range(1, self._comm.size):
            left = deadline - datetime.datetime.now()
            if left <= datetime.timedelta() and not missing:
                ms = limit.total_seconds() * 1000
                raise CommError(f"[Rank 0]: Rank 0 timed out in monitoredBarrier after {ms:.0f} ms")
            left = max(left, datetime.timedelta(milliseconds=1))
            try:
                self._group_store.wait([f"{mine}/{r}"], left)
            except RuntimeError:
                missing.append(r)
                if not wait_all_ranks:
                    break
        if missing:
            who = f"Ranks {', '.join(map(str, missing))}" if wait_all_ranks else f"Rank {missing[0]}"
            error = (
                f"[Rank 0]: {who} failed to pass monitoredBarrier in {limit.total_seconds() * 1000:.0f} ms"
            )
            self._group_store.set(f"{mine}/0", error)
            raise CommError(error)
