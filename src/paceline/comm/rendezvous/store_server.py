"""The key-value store of a job: one thread that serves processes which know the job's key.

torch's own TCPStore believes all that reach its port. This one listens on a Unix socket in a private folder
if the job has one host, else on one address, and answers after mutual authentication only.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import threading
import time
from collections import deque

from paceline.comm.rendezvous import store_protocol as protocol
from paceline.comm.rendezvous.store_protocol import Status, StoreOperation
from paceline.comm.security.authentication import Acceptor
from paceline.comm.security.keys import derive
from paceline.comm.security.listener import Listener
from paceline.comm.security.private_folder import private_folder
from paceline.errors import ConfigError, ProtocolError

_READ_BYTES = 1 << 18


class _Client:
    """One connection: bytes in, bytes out, and the request that waits for keys."""

    def __init__(self, sock: socket.socket, guard: Acceptor, source: str) -> None:
        sock.setblocking(False)
        self.sock, self.guard, self.source = sock, guard, source
        self.received = bytearray()
        self.to_send = bytearray()
        self.waits_for: list[str] = []
        self.deadline = 0.0

    def take(self, count: int) -> bytes | None:
        """The next `count` received bytes, if they are there."""
        if len(self.received) < count:
            return None
        taken = bytes(self.received[:count])
        del self.received[:count]
        return taken


class StoreServer:
    """Serves a store until `close`.

    Args:
        key: The key of the job.
        host: Address to listen on; None: a Unix socket in the private folder of this account.
        port: TCP port; 0: a free one.
        name: Name of the Unix socket in that folder; default: a random one.

    Raises:
        ConfigError: The address or the port cannot be used.
    """

    def __init__(self, key: bytes, *, host: str | None = None, port: int = 0, name: str = "") -> None:
        self._key = derive(key, protocol.PURPOSE)
        self._path = ""
        try:
            if host is None:
                self._path = str(private_folder() / f"store-{name or secrets.token_hex(8)}")
                listening = _listen_at(self._path)
                self.address = f"unix:{self._path}"
            else:
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                listening = socket.create_server((host, port), family=family, backlog=1024)
                self.address = f"tcp:{host}:{listening.getsockname()[1]}"
        except (OSError, OverflowError) as error:
            where = self._path or f"{host}:{port}"
            raise ConfigError(f"the store of the job cannot listen at {where}: {error}") from None
        self._values: dict[str, bytes] = {}
        self._clients: set[_Client] = set()
        self._waiting: deque[_Client] = deque()
        self._wake_in, self._wake_out = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._listener: Listener[_Client] = Listener(
            listening, self._selector, "store of the job", adopt=self._adopt, read=self._turn
        )
        self._selector.register(self._wake_out, selectors.EVENT_READ, None)
        self._is_closed = False
        self._thread = threading.Thread(target=self._serve, name="paceline-store", daemon=True)
        self._thread.start()

    @property
    def num_clients(self) -> int:
        """Connections that are authenticated. May be read by any thread."""
        return len(self._clients)

    def close(self) -> None:
        """Stop serving; clients see closed connections. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        with contextlib.suppress(OSError):
            self._wake_in.send(b"\0")
        self._thread.join(5)

    # The serving thread

    def _serve(self) -> None:
        try:
            while not self._is_closed:
                for key, events in self._selector.select(self._wait_s()):
                    if key.data is self._listener:
                        self._listener.serve()
                    elif isinstance(key.data, _Client):
                        self._turn(key.data, events)
                self._end_waiting()
                self._listener.drop_slow()
        finally:
            self._release()

    def _wait_s(self) -> float:
        limits = [client.deadline - time.monotonic() for client in self._waiting]
        return max(0.0, min([self._listener.wait_s(), *limits]))

    def _release(self) -> None:
        for client in self._clients:
            client.sock.close()
        self._selector.close()
        self._listener.close()
        self._wake_in.close()
        self._wake_out.close()
        if self._path:
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    def _adopt(self, sock: socket.socket, source: str) -> _Client:
        return _Client(sock, Acceptor(self._key, rank=0, size=1), source)

    def _turn(self, client: _Client, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                data = client.sock.recv(_READ_BYTES if client.guard.is_done else client.guard.needs)
                if not data:
                    raise ConnectionResetError("it closed the connection")
                client.received += data
                self._advance(client)
            self._send(client)
        except BlockingIOError:
            return
        except (OSError, ProtocolError, UnicodeDecodeError) as error:
            self._drop(client, str(error))

    def _authenticate(self, client: _Client) -> None:
        while client.guard.needs and (data := client.take(client.guard.needs)):
            client.to_send += client.guard.feed(data)
        if client.guard.is_done:
            self._listener.release(client)
            self._selector.register(client.sock, selectors.EVENT_READ, client)
            self._clients.add(client)

    def _advance(self, client: _Client) -> None:
        if not client.guard.is_done:
            self._authenticate(client)
        while len(client.received) >= protocol.LENGTH.size and not client.waits_for:
            length = protocol.body_length(bytes(client.received[: protocol.LENGTH.size]))
            if len(client.received) < protocol.LENGTH.size + length:
                return
            client.take(protocol.LENGTH.size)
            operation, fields = protocol.decode(client.take(length) or b"")
            self._perform(client, operation, fields)

    def _perform(self, client: _Client, operation: int, fields: list[bytes]) -> None:
        try:
            status, answer = self._answer(client, StoreOperation(operation), fields)
        except (ValueError, IndexError) as error:
            status, answer = Status.REFUSED, [str(error).encode()]
        if not client.waits_for:
            client.to_send += protocol.encode(status, answer)

    def _answer(
        self, client: _Client, operation: StoreOperation, fields: list[bytes]
    ) -> tuple[Status, list[bytes]]:
        match operation:
            case StoreOperation.SET:
                for key, value in zip(fields[::2], fields[1::2], strict=True):
                    self._set(key.decode(), value)
            case StoreOperation.APPEND:
                self._set(fields[0].decode(), self._values.get(fields[0].decode(), b"") + fields[1])
            case StoreOperation.ADD:
                total = int(self._values.get(fields[0].decode(), b"0")) + int(fields[1])
                self._set(fields[0].decode(), str(total).encode())
                return Status.DONE, [str(total).encode()]
            case StoreOperation.COMPARE_SET:
                return Status.DONE, [self._compare_set(fields[0].decode(), fields[1], fields[2])]
            case StoreOperation.DELETE:
                was_there = self._values.pop(fields[0].decode(), None) is not None
                return Status.DONE, [b"1" if was_there else b"0"]
            case StoreOperation.CHECK:
                are_there = all(key.decode() in self._values for key in fields)
                return Status.DONE, [b"1" if are_there else b"0"]
            case StoreOperation.LIST:
                return Status.DONE, [key.encode() for key in self._values]
            case StoreOperation.GET:
                keys = [key.decode() for key in fields[1:]]
                if all(key in self._values for key in keys):
                    return Status.DONE, [self._values[key] for key in keys]
                client.waits_for, client.deadline = keys, time.monotonic() + int(fields[0]) / 1e3
                self._waiting.append(client)
        return Status.DONE, []

    def _compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        """Set `desired` if the value is `expected`, or if there is none and none is expected."""
        current = self._values.get(key)
        if current == expected or (current is None and not expected):
            self._set(key, desired)
            return desired
        return expected if current is None else current

    def _set(self, key: str, value: bytes) -> None:
        self._values[key] = value
        for client in [c for c in self._waiting if key in c.waits_for]:
            if all(k in self._values for k in client.waits_for):
                self._finish(client, Status.DONE, [self._values[k] for k in client.waits_for])

    def _end_waiting(self) -> None:
        now = time.monotonic()
        for client in [c for c in self._waiting if now >= c.deadline]:
            self._finish(
                client, Status.TIMEOUT, [k.encode() for k in client.waits_for if k not in self._values]
            )

    def _finish(self, client: _Client, status: Status, fields: list[bytes]) -> None:
        self._waiting.remove(client)
        client.waits_for = []
        client.to_send += protocol.encode(status, fields)
        try:
            self._send(client)
        except OSError as error:
            self._drop(client, str(error))

    def _send(self, client: _Client) -> None:
        with contextlib.suppress(BlockingIOError):
            while client.to_send:
                del client.to_send[: client.sock.send(client.to_send)]
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.to_send else 0)
        if client in self._clients:
            self._selector.modify(client.sock, events, client)
        else:
            self._listener.watch(client, events)

    def _drop(self, client: _Client, why: str) -> None:
        if client in self._listener.strangers:
            self._listener.drop(client, why)
            return
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(client.sock)
        client.sock.close()
        self._clients.discard(client)
        with contextlib.suppress(ValueError):
            self._waiting.remove(client)


def _listen_at(path: str) -> socket.socket:
    """A listening Unix socket at `path`. One that a killed process left there is replaced."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        else:
            raise OSError("another process of this account listens there")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(1024)
    return listener
