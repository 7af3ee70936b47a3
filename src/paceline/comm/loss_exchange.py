"""The thread of rank 0 that exchanges with the launcher which ranks are gone; see `LostRanks`."""

from __future__ import annotations

import queue
import threading

from paceline.comm.messages.mailbox import Mailbox
from paceline.comm.rendezvous.lost_ranks import LostRanks
from paceline.types import Rank

_INTERVAL_S = 0.5


def start(mailbox: Mailbox, lost_ranks: LostRanks) -> None:
    """Exchange until `mailbox` is closed, in a thread of its own: the launcher may be slow to answer."""
    noticed: queue.SimpleQueue[Rank] = queue.SimpleQueue()
    mailbox.on_lost(noticed.put)
    threading.Thread(
        target=_exchange, args=(mailbox, lost_ranks, noticed), name="paceline-losses", daemon=True
    ).start()


def _exchange(mailbox: Mailbox, lost_ranks: LostRanks, noticed: queue.SimpleQueue[Rank]) -> None:
    known: set[Rank] = set()
    try:
        while not mailbox.is_closed:
            try:
                rank = noticed.get(timeout=_INTERVAL_S)
                lost_ranks.add_lost(rank, mailbox.why_lost(rank))
            except queue.Empty:
                for rank in lost_ranks.ended().keys() - known:
                    known.add(rank)
                    mailbox.report_ended(rank)
    except RuntimeError:  # the store is gone, and the launcher with it
        return
