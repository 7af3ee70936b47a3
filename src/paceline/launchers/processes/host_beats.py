"""How the launchers of several hosts know of each other's life while they wait for the end of the job."""

from __future__ import annotations

import time

from torch._C._distributed_c10d import Store

_BEAT_S = 1.0
_SILENT_S = 5.0  # a launcher that has shown no life for so long is gone, or cut off
_LOOK_S = 0.1


class HostBeats:
    """One launcher's beats, and its view of the others'.

    Args:
        store: Of the rendezvous.
        own: This launcher's number among the hosts.
        size: Number of hosts.
        attempt: How often the job was restarted.
    """

    def __init__(self, store: Store, own: int, size: int, attempt: int) -> None:
        self._store, self._own, self._size = store, own, size
        self._prefix = f"hosts/{attempt}"
        self._count, self._next = 0, 0.0

    def beat(self) -> None:
        """Show life; to be called often."""
        if self._size > 1 and time.monotonic() >= self._next:
            self._count += 1
            self._store.set(f"{self._prefix}/beat/{self._own}", str(self._count))
            self._next = time.monotonic() + _BEAT_S

    def wait_for_others(self) -> None:
        """Return when the workers of all hosts have ended, or their launchers are silent."""
        if self._size == 1:
            return
        self._store.set(f"{self._prefix}/ended/{self._own}", "1")
        others = [host for host in range(self._size) if host != self._own]
        heard = dict.fromkeys(others, (b"", time.monotonic()))
        while others:
            self.beat()
            for host in list(others):
                if self._store.check([f"{self._prefix}/ended/{host}"]) or self._is_silent(host, heard):
                    others.remove(host)
            time.sleep(_LOOK_S)

    def _is_silent(self, host: int, heard: dict[int, tuple[bytes, float]]) -> bool:
        key = f"{self._prefix}/beat/{host}"
        beat = bytes(self._store.get(key)) if self._store.check([key]) else b""
        last, since = heard[host]
        if beat != last:
            heard[host] = (beat, time.monotonic())
            return False
        return time.monotonic() - since > _SILENT_S
