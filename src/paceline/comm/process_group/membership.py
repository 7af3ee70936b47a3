"""Who belongs to a group: groups of some of its members, and the same group with other members."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import uuid4

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from paceline.comm.native.communicator import NativeCommunicator
from paceline.comm.process_group.hooks import HookedGroup
from paceline.comm.process_group.work import FINISHED
from paceline.errors import CommError, ConfigError
from paceline.types import CallOptions

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on

Join = Callable[[Store, int, int, float], NativeCommunicator]
"""Connects rank `r` of `n`, which meet in a store of their own, within a number of seconds."""


class NotConnected:
    """Stands for the communicator of a group that `reconfigure` will connect."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def close(self) -> None:
        """Nothing to leave."""

    def __getattr__(self, name: str) -> NoReturn:
        raise CommError(
            "paceline backend: the group was made with enable_reconfigure=True and is not connected yet: call"
            " torch.distributed._reconfigure(uuid, handles) with the handles of all members first"
        )


class GroupMembership(HookedGroup):
    """The members of one group.

    Args:
        comm: Moves the bytes among the members; NotConnected until the first `reconfigure`.
        store: The part of torch's store that belongs to the group.
        timeout_s: Seconds until an operation that names no timeout fails.
        join: Connects other sets of ranks.
    """

    def __init__(
        self, comm: NativeCommunicator | NotConnected, store: Store, *, timeout_s: float, join: Join
    ) -> None:
        super().__init__(store, comm.rank, comm.size)
        self._group_store = store
        self._join = join
        self._num_splits = 0
        self._handle = uuid4().hex
        self._name, self._description = "", "undefined"
        self._changes_members = isinstance(comm, NotConnected)
        # Backends are classes of C++ without a common type for what is called here.
        self.other_backends: dict[str, Any] = {}
        """By device type: backends for tensors that are not on the CPU."""
        self.set_timeout(datetime.timedelta(seconds=timeout_s))
        self._adopt(comm)

    def _adopt(self, comm: NativeCommunicator | NotConnected) -> None:
        """Have the members of `comm` from now on."""
        self._comm: Any = comm

    def rank(self) -> int:
        """This member's number in the group."""
        return int(self._comm.rank)

    def size(self) -> int:
        """How many members there are."""
        return int(self._comm.size)

    getRank, getSize = rank, size  # by which C++ asks

    def get_group_store(self) -> Store:
        """Return the part of the store that belongs to this group."""
        return self._group_store

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        """Set the timeout of operations that name none."""
        self._timeout_s = timeout.total_seconds()
        self._default_options = CallOptions(timeout_s=self._timeout_s)

    _set_default_timeout = setTimeout = set_timeout

    # Its name

    def getGroupName(self) -> str:
        """Name that torch gave this group."""
        return self._name

    def setGroupName(self, name: str) -> None:
        """Keep the name that torch gives."""
        self._name = name

    _set_group_name = setGroupName
    group_name = property(getGroupName)

    def getGroupDesc(self) -> str:
        """Purpose of this group, for logs."""
        return self._description

    def setGroupDesc(self, description: str) -> None:
        """Keep the purpose of this group."""
        self._description = description

    _set_group_desc = setGroupDesc  # type: ignore[assignment]
    group_desc = property(getGroupDesc)

    # Some of the members

    supports_splitting = True

    def perform_nocolor_split(self, device: torch.device) -> None:
        """Take no part in a split; its members need nothing from the others."""

    def eager_connect_single_device(self, device: torch.device | None) -> None:
        """Nothing to do: the group is connected when it is made."""

    def split_group(
        self,
        new_ranks: Sequence[int],
        timeout: datetime.timedelta | None = None,
        opts: object = None,
        group_name: str | None = None,
        group_desc: str | None = None,
        device_types: Sequence[torch.device] | None = None,
    ) -> Self | None:
        """Make a group of some members; all members call it, each with the ranks of its own part.

        Args:
            new_ranks: Ranks in this group, in the order of their new ranks.
            timeout: Of operations that name none; default: as in this group.
            opts: Options of a backend; unused.
            group_name: Its name in torch; default: made from this group's name.
            group_desc: Its purpose, for logs.
            device_types: Devices whose tensors it takes; the CPU is the only one possible.

        Returns:
            The group, or None on ranks that are not in `new_ranks`.

        Raises:
            ConfigError: Another device is asked for, or this group has a backend for one.
            CommError: A member did not come in time.
        """
        kinds = {d.type for d in device_types} if device_types is not None else {"cpu", *self.other_backends}
        if kinds != {"cpu"}:
            raise ConfigError(
                f"split_group: only groups for CPU tensors can be split, not for {', '.join(sorted(kinds))}."
                " Use new_group(ranks), or device_types=[torch.device('cpu')]"
            )
        self._num_splits += 1
        ranks = list(new_ranks)
        if self.rank() not in ranks:
            return None
        limit = timeout.total_seconds() if timeout is not None else self._timeout_s
        part = f"split/{self._num_splits}/{','.join(map(str, ranks))}"
        store = PrefixStore(part, self._group_store)
        comm = self._join(store, ranks.index(self.rank()), len(ranks), limit)
        group = type(self)(comm, store, timeout_s=limit, join=self._join)
        group.setGroupName(group_name or f"{self.group_name}:{part}")
        group.setGroupDesc(group_desc or f"{self.group_desc}:{part}")
        return group

    # Other members

    @property
    def supports_reconfigure(self) -> bool:
        """Whether the group was made with `enable_reconfigure=True`."""
        return self._changes_members

    def get_reconfigure_handle(self) -> str:
        """What the others name this member by in `reconfigure`."""
        return self._handle

    def reconfigure(self, opts: Any) -> dist.Work:
        """Connect the group to the members that `opts.handles` names; all of them call it.

        Args:
            opts: torch's ReconfigureOptions: `uuid`, which no earlier call had; `handles`, of all members, in
                the order of their ranks (a list) or in any (a set); `timeout` to wait for them, default: that
                of the group's operations.

        Returns:
            A work that is done.

        Raises:
            ConfigError: The group was not made with `enable_reconfigure=True`, or this member is not named.
            CommError: A member did not come in time; the group is then not connected.
        """
        if not self.supports_reconfigure:
            raise ConfigError(
                "reconfigure: this group keeps its members. Make it by"
                " init_process_group('paceline', enable_reconfigure=True)"
            )
        handles = list(opts.handles) if isinstance(opts.handles, list) else sorted(opts.handles)
        if self._handle not in handles:
            raise ConfigError(
                f"reconfigure: the {len(handles)} handles do not name this member; add its own, which"
                " get_reconfigure_handle() returns"
            )
        rank, size = handles.index(self._handle), len(handles)
        self._leave()
        self._adopt(NotConnected(rank, size))
        limit = opts.timeout.total_seconds() if opts.timeout is not None else self._timeout_s
        self._adopt(self._join(PrefixStore(f"reconfigure/{opts.uuid}", self._group_store), rank, size, limit))
        return FINISHED

    def _leave(self) -> None:
        """Part from members that may be dead."""
        if not isinstance(self._comm, NotConnected):
            self._comm.core_group.abort("the process group got other members")
            self._comm.close()

    # Shutdown

    def abort(self) -> None:
        """Fail what is in flight, here and on the other members; the group cannot be used any more."""
        for other in self.other_backends.values():
            other.abort()
        if not isinstance(self._comm, NotConnected):
            self._comm.core_group.abort("the process group was aborted")
            self._comm.unusable = "it was aborted"

    def shutdown(self) -> None:
        """Leave the group; idempotent."""
        for other in self.other_backends.values():
            other.shutdown()
        self.other_backends = {}
        self._comm.close()
