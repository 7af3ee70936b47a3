"""Messages of a rank to itself: c10d allows them, and no fabric needs to see them."""

from __future__ import annotations

import threading
from collections import defaultdict, deque

import torch

from paceline.comm.native.work import DONE
from paceline.errors import Timeout
from paceline.types import Work


class OwnReceive:
    """A receive that waits for this rank's own send."""

    def __init__(self, tensor: torch.Tensor, limit_s: float) -> None:
        self.tensor = tensor
        self.limit_s = limit_s
        self.arrived = threading.Event()

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until the message is here; Timeout if this rank does not send it."""
        if not self.arrived.wait(timeout_s or self.limit_s):
            raise Timeout("a receive from this rank itself: nothing sent in time")

    def is_done(self) -> bool:
        """Whether the message is here."""
        return self.arrived.is_set()

    def exception(self) -> None:
        """Nothing can go wrong on the way."""


class OwnMessages:
    """Sends and receives of one rank with itself, matched by tag in their order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sent: dict[int, deque[torch.Tensor]] = defaultdict(deque)
        self._wanted: dict[int, deque[OwnReceive]] = defaultdict(deque)

    def send(self, tensor: torch.Tensor, tag: int) -> Work:
        """Deliver to the earliest receive, or keep a copy for the next one."""
        with self._lock:
            if self._wanted[tag]:
                receive = self._wanted[tag].popleft()
                receive.tensor.copy_(tensor)
                receive.arrived.set()
            else:
                self._sent[tag].append(tensor.clone())
        return DONE

    def receive(self, tensor: torch.Tensor, tag: int, limit_s: float) -> Work:
        """Take the earliest message, or wait for the next one."""
        with self._lock:
            if self._sent[tag]:
                tensor.copy_(self._sent[tag].popleft())
                return DONE
            receive = OwnReceive(tensor, limit_s)
            self._wanted[tag].append(receive)
            return receive
