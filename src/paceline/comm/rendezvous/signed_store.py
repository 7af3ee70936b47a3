"""Our values in a store that a foreign launcher made and that strangers may write: signed, and verified.

A stranger who reaches such a store can delete or replace what is there, and so end the job; values that do
not come from a process with the key are never used.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
from collections.abc import Sequence
from typing import Any

from torch._C._distributed_c10d import Store

from paceline.comm.rendezvous.job_store import timeout_of
from paceline.errors import CommError

_MAC_BYTES = 32


class SignedStore(Store):
    """Signs what it writes to another store, and refuses what others wrote there.

    Counters (`add`) are not signed: use them only where a wrong number does no harm.

    Args:
        store: The other store.
        key: The key for the signatures.
    """

    def __init__(self, store: Store, key: bytes) -> None:
        super().__init__()
        self._store: Any = store  # torch's declarations leave out `clone`, and that values may be bytes
        self._key = key
        self.set_timeout(timeout_of(store))

    def set(self, key: str, value: str | bytes) -> None:
        """Set the value of `key`, with its signature."""
        content = value.encode() if isinstance(value, str) else bytes(value)
        self._store.set(key, self._mac(key, content) + content)

    def get(self, key: str) -> bytes:
        """The value of `key`; CommError if no process with the key wrote it."""
        found = bytes(self._store.get(key))
        mac, content = found[:_MAC_BYTES], found[_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(key, content)):
            raise CommError(
                f"rendezvous: the value of {key!r} was not written by a process with this job's key: either"
                " a stranger can write to the store, or the hosts have different keys. Copy"
                " ~/.config/paceline/key to every host (mode 600), or let PACELINE_SECRET_FILE name a file"
                " that is the same on all of them"
            )
        return content

    def add(self, key: str, amount: int) -> int:
        """Add to a counter; unsigned."""
        return int(self._store.add(key, amount))

    def delete_key(self, key: str) -> bool:
        """Delete `key`; returns whether it was there."""
        return bool(self._store.delete_key(key))

    def num_keys(self) -> int:
        """The number of keys in the other store."""
        return int(self._store.num_keys())

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys are there; their values are verified by `get`."""
        return bool(self._store.check(list(keys)))

    def wait(self, keys: Sequence[str], timeout: datetime.timedelta | None = None) -> None:
        """Wait until all keys are there."""
        self._store.wait(list(keys), timeout or timeout_of(self))

    # The names by which torch's C++ finds these two.
    deleteKey = delete_key
    getNumKeys = num_keys

    def has_extended_api(self) -> bool:
        """No: append cannot be signed."""
        return False

    def clone(self) -> SignedStore:
        """Another view of the same store."""
        return SignedStore(self._store.clone(), self._key)

    def _mac(self, key: str, content: bytes) -> bytes:
        name = key.encode()
        text = b"%d:%s%s" % (len(name), name, content)
        return hmac.new(self._key, text, hashlib.sha256).digest()
