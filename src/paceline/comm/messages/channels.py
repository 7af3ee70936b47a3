"""Handlers by channel, and what happens when one fails, defers its answer, or is not installed yet.

No threads here: the service of a rank calls it.
"""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from collections.abc import Callable

from paceline.errors import CommError
from paceline.types import Handler, Message

_log = logging.getLogger("paceline")
_HELD_MESSAGES = 4096

Answer = Callable[[Message | BaseException], None]


class Channels:
    """The handlers of one rank. All methods run on that rank's service thread, except `raise_stored`."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._handlers: dict[str, Handler] = {}
        self._held: dict[str, deque[tuple[int, Message, Answer | None]]] = defaultdict(deque)
        self._stored: CommError | None = None

    def serve(self, channel: str, handler: Handler) -> None:
        """Install a handler and hand it the messages that were waiting for it."""
        self._handlers[channel] = handler
        for src, message, answer in self._held.pop(channel, ()):
            self.deliver(src, channel, message, answer)

    def deliver(self, src: int, channel: str, message: Message, answer: Answer | None) -> None:
        """Run the handler; `answer` takes its outcome (None for a posted message)."""
        handler = self._handlers.get(channel)
        if handler is None:
            self._hold(src, channel, message, answer)
            return
        try:
            result = handler(src, message)
            if answer is None:
                return
            if result is None:
                answer(Message())
            elif isinstance(result, Message):
                answer(result)
            elif hasattr(result, "then"):
                result.then(answer)
            else:
                raise TypeError(f"a handler returns None, Message or comm.deferred(), not {result!r:.80}")
        except Exception as error:
            self._failed(src, channel, error, answer)

    def store(self, what: str, error: Exception) -> None:
        """Keep an error that no caller can be told of, for `raise_stored`: the first one."""
        _log.error("rank %d: %s: %s: %s", self._rank, what, type(error).__name__, error)
        if self._stored is None:
            self._stored = CommError(f"rank {self._rank}: {what}: {type(error).__name__}: {error}")
            self._stored.__cause__ = error

    def raise_stored(self) -> None:
        """Raise the stored error, once."""
        stored, self._stored = self._stored, None
        if stored is not None:
            raise stored

    def _hold(self, src: int, channel: str, message: Message, answer: Answer | None) -> None:
        if len(self._held[channel]) < _HELD_MESSAGES:
            self._held[channel].append((src, message, answer))
            return
        error = CommError(
            f"no handler serves channel {channel!r} and {_HELD_MESSAGES} messages wait; call serve() first"
        )
        self._failed(src, channel, error, answer)

    def _failed(self, src: int, channel: str, error: Exception, answer: Answer | None) -> None:
        if answer is not None:
            answer(error)
            return
        self.store(f"handler of channel {channel!r} failed on a message from rank {src}", error)
