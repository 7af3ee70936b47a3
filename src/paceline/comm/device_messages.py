"""Messages for models on a GPU: they travel as CPU tensors, and what holds numbers arrives on the device.

Floating-point tensors (weights, updates) are moved to the device on arrival; integers (clocks, counts,
payloads) stay on the CPU, where they are read. The way out needs nothing: the mailbox copies to the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from paceline.types import Handler, Message, Rank, Reply


def arrived(message: Message, device: torch.device) -> Message:
    """The message with its floating-point tensors on `device`."""
    tensors = [t.to(device) if t.is_floating_point() else t for t in message.tensors]
    return Message(message.header, tensors)


def handler_on(handler: Handler, device: torch.device) -> Handler:
    """`handler`, given messages as `arrived` makes them."""

    def handle(src: Rank, message: Message) -> Message | Reply | None:
        return handler(src, arrived(message, device))

    return handle


class ReplyOnDevice:
    """A Reply whose answer is as `arrived` makes it."""

    def __init__(self, reply: Reply, device: torch.device) -> None:
        self._reply, self._device = reply, device

    def wait(self, timeout_s: float | None = None) -> Message:
        """Block until the answer is here. Raises PeerLost, Timeout, or the handler's error."""
        return arrived(self._reply.wait(timeout_s), self._device)

    def is_done(self) -> bool:
        """Whether `wait` would return (or raise) at once."""
        return self._reply.is_done()

    def set(self, message: Message) -> None:
        """Answer now (the handler's side)."""
        self._reply.set(message)

    def fail(self, error: BaseException) -> None:
        """Answer with an error."""
        self._reply.fail(error)

    def then(self, callback: Callable[[Message | BaseException], None]) -> None:
        """Call `callback(outcome)` once answered; at once if it is."""
        device = self._device
        self._reply.then(lambda o: callback(arrived(o, device) if isinstance(o, Message) else o))
