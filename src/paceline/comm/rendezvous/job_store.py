"""A client of the job's store, as a Store of torch.distributed: for our meetings and for torch's groups."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from paceline.comm.rendezvous import store_protocol as protocol
from paceline.comm.rendezvous.store_protocol import Status, StoreOperation
from paceline.comm.security.authentication import Initiator, authenticate
from paceline.comm.security.keys import derive
from paceline.comm.security.receive import receive_exactly
from paceline.errors import ProtocolError

_SLACK_S = 8.0  # on top of the time that the server itself waits
_RETRY_S = 0.02
_AGAIN_S = 2.0  # for a second connection when the first one broke
# Asking these twice is asking them once: a broken connection is replaced.
_REPEATABLE = (StoreOperation.GET, StoreOperation.SET, StoreOperation.CHECK, StoreOperation.LIST)


class Prefixed(PrefixStore):
    """The keys of `store` that begin with `prefix`.

    Keeps the Python object of `store` alive, without which torch finds no methods of a store in Python. Our
    own calls do not pass through torch's C++: a thread that is in such a call when the process ends would
    abort it.
    """

    def __init__(self, prefix: str, store: Store) -> None:
        super().__init__(prefix, store)
        self._prefix = prefix
        self._base: Any = store  # torch's declarations leave out some methods, and that values may be bytes

    def set(self, key: str, value: str | bytes) -> None:
        """As `Store.set`; so are the others below."""
        self._base.set(f"{self._prefix}/{key}", value)

    def get(self, key: str) -> bytes:
        return bytes(self._base.get(f"{self._prefix}/{key}"))

    def add(self, key: str, amount: int) -> int:
        return int(self._base.add(f"{self._prefix}/{key}", amount))

    def append(self, key: str, value: str | bytes) -> None:
        self._base.append(f"{self._prefix}/{key}", value)

    def check(self, keys: Sequence[str]) -> bool:
        return bool(self._base.check([f"{self._prefix}/{key}" for key in keys]))

    def wait(self, keys: Sequence[str], timeout: datetime.timedelta | None = None) -> None:
        self._base.wait([f"{self._prefix}/{key}" for key in keys], timeout or timeout_of(self._base))


class JobStore(Store):
    """The store that a `StoreServer` serves. Each thread that waits has a connection of its own.

    Args:
        address: `StoreServer.address`.
        key: The key of the job.
        timeout: How long to wait for the server now, and for missing keys later.

    Raises:
        DistNetworkError: The server does not come.
        ProtocolError: Who listens there does not know the key.
    """

    def __init__(self, address: str, key: bytes, timeout: datetime.timedelta) -> None:
        super().__init__()
        self._address, self._key = address, key
        self._lock = threading.Lock()
        self._idle: list[socket.socket] = []
        self._pid = os.getpid()
        self.set_timeout(timeout)
        self._give_back(self._connect(time.monotonic() + timeout.total_seconds()))

    @property
    def host(self) -> str:
        """The address of the server; "" if it is a Unix socket."""
        return self._address.removeprefix("tcp:").rpartition(":")[0] if self._address[:4] == "tcp:" else ""

    def set(self, key: str, value: str | bytes) -> None:
        """Set the value of `key`."""
        self._ask(StoreOperation.SET, [key.encode(), _raw(value)])

    def get(self, key: str) -> bytes:
        """The value of `key`, once it is there; DistStoreError after the timeout."""
        return self._wait([key], timeout_of(self))[0]

    def add(self, key: str, amount: int) -> int:
        """Add to the number that `key` holds, and return the sum."""
        return int(self._ask(StoreOperation.ADD, [key.encode(), str(amount).encode()])[0])

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """Set `desired` if the value is `expected` ("" also: if there is none); returns the value then."""
        return self._ask(StoreOperation.COMPARE_SET, [key.encode(), _raw(expected), _raw(desired)])[0]

    def append(self, key: str, value: str | bytes) -> None:
        """Append to the value of `key`."""
        self._ask(StoreOperation.APPEND, [key.encode(), _raw(value)])

    def delete_key(self, key: str) -> bool:
        """Delete `key`; returns whether it was there."""
        return self._ask(StoreOperation.DELETE, [key.encode()])[0] == b"1"

    def num_keys(self) -> int:
        """The number of keys."""
        return len(self._ask(StoreOperation.LIST, []))

    def list_keys(self) -> list[str]:
        """Every key of the store, with its prefix."""
        return [key.decode() for key in self._ask(StoreOperation.LIST, [])]

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all `keys` are there."""
        return self._ask(StoreOperation.CHECK, [key.encode() for key in keys])[0] == b"1"

    def wait(self, keys: Sequence[str], timeout: datetime.timedelta | None = None) -> None:
        """Wait until all `keys` are there; DistStoreError after the timeout."""
        self._wait(keys, timeout or timeout_of(self))

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """The values of `keys`, once all are there."""
        return self._wait(keys, timeout_of(self))

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        """Set several values at once."""
        self._ask(
            StoreOperation.SET,
            [part for k, v in zip(keys, values, strict=True) for part in (k.encode(), _raw(v))],
        )

    # The names by which torch's C++ finds these two.
    deleteKey = delete_key
    getNumKeys = num_keys

    def has_extended_api(self) -> bool:
        """Yes: append, multi_get and multi_set."""
        return True

    def clone(self) -> JobStore:
        """Another client of the same server."""
        return JobStore(self._address, self._key, timeout_of(self))

    def close(self) -> None:
        """Close the connections; the store can be used again."""
        with self._lock:
            for sock in self._idle:
                sock.close()
            self._idle.clear()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def _wait(self, keys: Sequence[str], timeout: datetime.timedelta) -> list[bytes]:
        seconds = timeout.total_seconds()
        fields = [str(int(seconds * 1e3)).encode(), *(key.encode() for key in keys)]
        return self._ask(StoreOperation.GET, fields, wait_s=seconds)

    def _ask(self, operation: StoreOperation, fields: Sequence[bytes], *, wait_s: float = 0.0) -> list[bytes]:
        try:
            return self._exchange(self._take(), operation, fields, wait_s)
        except TimeoutError as error:
            raise self._gone(error) from None
        except (OSError, ProtocolError) as error:
            self.close()
            if operation not in _REPEATABLE:
                raise self._gone(error) from None
        try:
            sock = self._connect(time.monotonic() + _AGAIN_S)
            return self._exchange(sock, operation, fields, wait_s)
        except (OSError, ProtocolError) as error:
            raise self._gone(error) from None

    def _gone(self, error: Exception) -> dist.DistNetworkError:
        return dist.DistNetworkError(f"the store of the job at {self._address} is gone: {error}")

    def _exchange(
        self, sock: socket.socket, operation: StoreOperation, fields: Sequence[bytes], wait_s: float
    ) -> list[bytes]:
        try:
            sock.settimeout(wait_s + _SLACK_S)
            sock.sendall(protocol.encode(operation, fields))
            length = protocol.body_length(bytes(receive_exactly(sock, protocol.LENGTH.size)))
            status, answer = protocol.decode(bytes(receive_exactly(sock, length)))
        except BaseException:  # an answer would be taken for that of the next request
            sock.close()
            raise
        self._give_back(sock)
        if status == Status.TIMEOUT:
            missing = ", ".join(key.decode() for key in answer[:4])
            raise dist.DistStoreError(f"the store of the job: no {missing} within {wait_s:g} s")
        if status != Status.DONE:
            raise dist.DistStoreError(f"the store of the job refused: {b' '.join(answer).decode()}")
        return answer

    def _take(self) -> socket.socket:
        with self._lock:
            if self._pid != os.getpid():  # after a fork, the connections belong to the parent
                for sock in self._idle:
                    sock.close()
                self._idle.clear()
                self._pid = os.getpid()
            if self._idle:
                return self._idle.pop()
        return self._connect(time.monotonic() + min(timeout_of(self).total_seconds(), _SLACK_S))

    def _give_back(self, sock: socket.socket) -> None:
        with self._lock:
            self._idle.append(sock)

    def _connect(self, deadline: float) -> socket.socket:
        """A connection that is authenticated on both sides. Waits for a server that is not there yet."""
        while True:
            sock = None
            try:
                sock = _open(self._address, max(1.0, deadline - time.monotonic()))
                guard = Initiator(derive(self._key, protocol.PURPOSE), rank=0, peer=0)
                authenticate(sock, guard, timeout_s=_SLACK_S)
            except (OSError, ProtocolError) as error:
                if sock is not None:
                    sock.close()
                if isinstance(error, ProtocolError):
                    raise ProtocolError(
                        f"the process that listens at {self._address} does not know this job's key; do all"
                        " hosts have the same key, and do two jobs share an address?"
                    ) from None
                if time.monotonic() >= deadline:
                    raise dist.DistNetworkError(f"no store of the job at {self._address}: {error}") from None
                time.sleep(_RETRY_S)
            else:
                return sock


def timeout_of(store: Store) -> datetime.timedelta:
    """How long the methods of `store` wait. torch's own declarations leave the property out."""
    found: Any = store
    timeout: datetime.timedelta = found.timeout
    return timeout


def _open(address: str, timeout_s: float) -> socket.socket:
    kind, _, where = address.partition(":")
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(timeout_s)
        try:
            sock.connect(where)
        except OSError:
            sock.close()
            raise
        return sock
    host, _, port = where.rpartition(":")
    sock = socket.create_connection((host, int(port)), timeout=timeout_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _raw(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
