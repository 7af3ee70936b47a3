"""Messages of a rank to itself, which c10d allows; they do not reach the fabric."""

from __future__ import annotations

import threading
from collections import defaultdict, deque

import torch

from paceline.comm.native.work import DONE
from paceline.errors import Timeout
from paceline.types import Work


class SelfReceive:
    """A receive that waits for this rank's own send."""

    def __init__(self, tensor: torch.Tensor, limit_s: float) -> None:
        self.tensor = tensor
        self.limit_s = limit_s
        self.arrived = threading.Event()

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until the message has arrived; Timeout if this rank does not send it."""
        limit_s = timeout_s or self.limit_s
        if not self.arrived.wait(limit_s):
            raise Timeout(f"a receive from this rank itself: nothing was sent within {limit_s:g} s")

    def is_done(self) -> bool:
        """Whether the message has arrived."""
        return self.arrived.is_set()

    def exception(self) -> None:
        """Return None: such a message cannot fail."""


class SelfMessages:
    """Sends and receives of one rank with itself, matched by tag in their order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sent: dict[int, deque[torch.Tensor]] = defaultdict(deque)
        self._wanted: dict[int, deque[SelfReceive]] = defaultdict(deque)

    def send(self, tensor: torch.Tensor, tag: int) -> Work:
        """Deliver to the earliest waiting receive, or keep a copy for the next one."""
        with self._lock:
            if self._wanted[tag]:
                receive = self._wanted[tag].popleft()
                receive.tensor.copy_(tensor)
                receive.arrived.set()
            else:
                self._sent[tag].append(tensor.clone())
        return DONE

    def receive(self, tensor: torch.Tensor, tag: int, limit_s: float) -> Work:
        """Take the earliest message; without one, return a receive that waits for the next."""
        with self._lock:
            if self._sent[tag]:
                tensor.copy_(self._sent[tag].popleft())
                return DONE
            receive = SelfReceive(tensor, limit_s)
            self._wanted[tag].append(receive)
            return receive
