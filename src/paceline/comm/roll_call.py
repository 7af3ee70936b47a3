"""Which rank is to blame when an operation fails on a fabric that does not say.

c10d's errors name an address or nobody. So the rank that sees an error asks all others over the message
service, which answers even while their main threads wait in an operation: who does not answer is gone or
stopped, who answers that it has not called the operation is late. The first rank that knows tells the others,
because it leaves, and would be blamed next.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from paceline.comm.messages.mailbox import Mailbox
from paceline.errors import CommError, PeerLost, Timeout
from paceline.types import Message, Rank, Reply

_CHANNEL = "paceline/roll_call"
_PATIENCE_S = 3.0  # for an answer


class RollCall:
    """One rank's part of the roll call.

    Args:
        mailbox: This rank's message service.
        hosts: Every rank's host, for the errors.
    """

    def __init__(self, mailbox: Mailbox, hosts: Sequence[str]) -> None:
        self._mailbox, self._hosts = mailbox, hosts
        self._begun: Counter[str] = Counter()
        self._verdict = ""
        mailbox.serve(_CHANNEL, self._answer)

    def begin(self, group: str) -> int:
        """An operation of all ranks of `group` begins; its number, the same on all ranks."""
        self._begun[group] += 1
        return self._begun[group]

    def blame(self, group: str, number: int, ranks: Sequence[Rank]) -> str:
        """Who is missing in operation `number` of `group`, in words; "" if nobody is found to be.

        Args:
            group: As for `begin`.
            number: As `begin` returned it.
            ranks: The ranks of `group`, in the job.
        """
        if not self._verdict:
            found = self._ask(group, number, ranks)
            # Another rank may have told meanwhile; it saw the first error.
            self._verdict = self._verdict or found
            self._tell(ranks)
        return self._verdict

    def _ask(self, group: str, number: int, ranks: Sequence[Rank]) -> str:
        question = Message({"group": group})
        replies: dict[Rank, Reply] = {}
        missing: list[str] = []
        for peer in ranks:
            if peer != self._mailbox.rank:
                try:
                    replies[peer] = self._mailbox.call(peer, _CHANNEL, question)
                except CommError:
                    missing.append(f"{self._name(peer)} is gone")
        until = time.monotonic() + _PATIENCE_S
        for peer, reply in replies.items():
            try:
                begun = int(reply.wait(max(0.0, until - time.monotonic())).header["begun"])
            except PeerLost:
                missing.append(f"{self._name(peer)} is gone")
            except Timeout:
                missing.append(f"{self._name(peer)} does not answer: it is stopped, cut off or gone")
            except CommError:
                continue  # it leaves, as this rank will
            else:
                if begun < number:
                    missing.append(f"{self._name(peer)} has not called it: {begun} operations until now")
        return "; ".join(missing)

    def _tell(self, ranks: Sequence[Rank]) -> None:
        if not self._verdict:
            return
        for peer in ranks:
            if peer != self._mailbox.rank and not self._mailbox.why_lost(peer):
                try:
                    self._mailbox.post(peer, _CHANNEL, Message({"verdict": self._verdict}))
                except CommError:
                    continue

    def _name(self, rank: Rank) -> str:
        return f"rank {rank} (host {self._hosts[rank]})"

    def _answer(self, source: Rank, message: Message) -> Message | None:
        if "verdict" in message.header:
            self._verdict = self._verdict or str(message.header["verdict"])
            return None
        return Message({"begun": self._begun[str(message.header["group"])]})
