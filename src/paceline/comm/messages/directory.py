"""Where ranks publish the address of their mailbox."""

from __future__ import annotations

from typing import Protocol

from torch._C._distributed_c10d import Store


class Directory(Protocol):
    """Addresses of mailboxes, by rank: in the job's store, or a dict in tests."""

    def publish(self, rank: int, address: str) -> None:
        """Make `address` known as that of `rank`."""

    def lookup(self, rank: int) -> str | None:
        """Return the address of `rank`, or None if it has not published one yet."""


class StoreDirectory:
    """A directory in the store of a job."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def publish(self, rank: int, address: str) -> None:
        self._store.set(f"mailbox/{rank}", address)

    def lookup(self, rank: int) -> str | None:
        key = f"mailbox/{rank}"
        return str(self._store.get(key).decode()) if self._store.check([key]) else None
