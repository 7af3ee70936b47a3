"""Collectives that continue without ranks that die: by messages through rank 0, over the living ranks.

A fabric's own collectives end with the first death: no rank can know to which of them the dead rank had still
contributed. Here rank 0 collects the arguments, computes over those that came, in rank order, and answers; a
rank that died or left is not waited for. Used where `min_size` is below the size, by strategies that
exchange their models by messages anyway: what remains for collectives is small. When rank 0 dies, the job
ends.
"""

from __future__ import annotations

import itertools
import json
import threading
from dataclasses import dataclass, field
from typing import Any

import torch

from paceline.comm.messages.mailbox import Mailbox
from paceline.comm.messages.reply import Deferred
from paceline.comm.reference_operations import Apply, ReferenceCall, ReferenceOperations, argument
from paceline.errors import CommError, Mismatch
from paceline.types import Message, Rank, Reply

CHANNEL = "survivors"


class SurvivorWork:
    """An operation at rank 0, and where its result goes."""

    def __init__(self, reply: Reply, target: torch.Tensor | None) -> None:
        self._reply, self._target = reply, target
        self._error: CommError | None = None

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until done. Raises PeerLost when rank 0 died, or the operation's root."""
        if self._error is not None:
            raise self._error
        try:
            answer = self._reply.wait(timeout_s)
        except CommError as error:
            self._error = error
            raise
        if self._target is not None and answer.tensors:
            self._target.copy_(answer.tensors[0].view_as(self._target))
            self._target = None

    def is_done(self) -> bool:
        """Whether `wait` would not block."""
        return self._reply.is_done()

    def exception(self) -> BaseException | None:
        """The error of a finished operation, else None."""
        if self._error is None and self.is_done():
            try:
                self.wait()
            except CommError as error:
                return error
        return self._error


@dataclass
class _Operation:
    """What has come for one collective. An argument is what `reference` expects."""

    signature: str = ""
    arguments: dict[Rank, Any] = field(default_factory=dict)
    replies: dict[Rank, Reply] = field(default_factory=dict)
    error: CommError | None = None


class Survivors(ReferenceOperations):
    """The collectives of one communicator, in the form that a fabric implements (`start_…`).

    Args:
        mailbox: This rank's message service; it carries everything.
        rank: This rank.
        size: Number of ranks at the start.
    """

    def __init__(self, mailbox: Mailbox, rank: Rank, size: int) -> None:
        self._mailbox, self._rank, self.size = mailbox, rank, size
        self._next = itertools.count()
        self._gone: set[Rank] = set()
        self._lock = threading.Lock()
        self._pending: dict[int, _Operation] = {}
        self._apply: dict[int, Apply] = {}
        """Rank 0's own calls say what an operation does."""
        if rank == 0:
            mailbox.serve(CHANNEL, self._collect)
            mailbox.on_lost(self._on_lost)
            mailbox.on_left(self._on_gone)
        else:
            mailbox.serve(CHANNEL, self._learn)

    def perform(self, call: ReferenceCall) -> SurvivorWork:
        """Send the source and, where it is another tensor, the target that the result is laid over."""
        index = next(self._next)
        if self._rank == 0:
            with self._lock:
                self._apply[index] = call.apply
        is_in_place = call.source is call.target
        target = None if is_in_place else call.target
        counts = None if call.counts is None else torch.tensor(call.counts)
        header: dict[str, int | str | bool] = {
            "index": index,
            "signature": json.dumps([call.name, *call.signature]),
            "is_in_place": is_in_place,
            "has_source": call.source is not None,
            "has_target": target is not None,
        }
        message = Message(header, [t for t in (call.source, target, counts) if t is not None])
        return SurvivorWork(self._mailbox.call(0, CHANNEL, message), call.target)

    # On rank 0's message service.

    def _collect(self, src: Rank, message: Message) -> Reply:
        index = int(message.header["index"])
        operation = self._pending.setdefault(index, _Operation(str(message.header["signature"])))
        reply = Deferred("a deferred reply")
        tensors = list(message.tensors)
        source = tensors.pop(0) if message.header["has_source"] else None
        target = tensors.pop(0) if message.header["has_target"] else None
        counts = tensors[0].tolist() if tensors else None
        operation.arguments[src] = argument(
            source, target, counts, is_in_place=bool(message.header["is_in_place"])
        )
        operation.replies[src] = reply
        if operation.error is not None:
            reply.fail(operation.error)
        elif operation.signature != message.header["signature"]:
            what = f"rank {src} called {message.header['signature']}, another {operation.signature}"
            self._fail(index, Mismatch(f"collective #{index}: {what}; all ranks must call the same ones"))
        else:
            self._finish_if_complete(index)
        return reply

    def _finish_if_complete(self, index: int) -> None:
        operation = self._pending[index]
        if operation.error is not None or set(range(self.size)) - self._gone - set(operation.replies):
            return  # it failed, or a rank is still to come
        with self._lock:
            apply = self._apply.pop(index)
        arguments = {r: operation.arguments[r] for r in sorted(operation.arguments)}
        try:
            apply(arguments)
        except Exception as error:  # of any kind: no rank may wait for this collective any more
            known = error if isinstance(error, CommError) else CommError(f"collective #{index}: {error}")
            self._fail(index, known)
            return
        del self._pending[index]
        for rank, reply in operation.replies.items():
            argument = arguments[rank]
            result = argument[0] if isinstance(argument, tuple) else argument
            reply.set(Message({}, [] if result is None else [result]))

    def _fail(self, index: int, error: CommError) -> None:
        self._pending[index].error = error
        for reply in self._pending[index].replies.values():
            reply.fail(error)

    def _on_lost(self, rank: Rank) -> None:
        for peer in range(1, self.size):
            if peer != rank and peer not in self._gone:
                try:
                    self._mailbox.post(peer, CHANNEL, Message({"lost": rank}))
                except CommError:
                    continue  # it is gone too, and will be noticed by itself
        self._on_gone(rank)

    def _on_gone(self, rank: Rank) -> None:
        self._gone.add(rank)
        for index in sorted(self._pending):
            self._finish_if_complete(index)

    # On the others'.

    def _learn(self, src: Rank, message: Message) -> None:
        self._mailbox.declare_lost(int(message.header["lost"]), f"rank {src} has lost it")
