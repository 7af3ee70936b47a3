"""Work that shares a server: bytes on a link, reductions on a rank.

A server starts when its first user arrives and is done when it has done all work; users that arrive in the
same step finish together. No time gets earlier when a user arrives later or brings more work.
"""

from __future__ import annotations

import numpy as np

from paceline.schedule.topology import FloatArray, IntArray


def last_finish(start_s: FloatArray, work_s: FloatArray, group: IntArray, first: IntArray) -> FloatArray:
    """When the server of each group has done its work: max over i of start(i) + work of i and all after it.

    Entries are sorted by group; `first` is where each group begins. Shape (groups,).
    """
    latest = np.maximum.reduceat(start_s, first)
    if np.array_equal(latest, np.minimum.reduceat(start_s, first)):
        return np.asarray(latest + np.add.reduceat(work_s, first))
    order = np.lexsort((start_s, group))
    start_s, work_s = start_s[order], work_s[order]
    total = np.add.reduceat(work_s, first)
    # Work of the entries before this one, within its own group.
    running = np.cumsum(work_s) - work_s
    before = running - np.repeat(running[first], np.diff(np.append(first, len(work_s))))
    remaining = np.repeat(total, np.diff(np.append(first, len(work_s)))) - before
    return np.asarray(np.maximum.reduceat(start_s + remaining, first))


class Servers:
    """Who uses which server (link, reducer) in a step; made once for a pattern of transfers."""

    def __init__(self, server: IntArray, user: IntArray, work_s: FloatArray) -> None:
        uses = np.bincount(server)
        self.ids = np.flatnonzero(uses)
        self.is_shared = bool(len(self.ids) < len(server))
        if not self.is_shared:  # `finish` and `latest` are then not used
            return
        order = np.argsort(server, kind="stable")
        self.server, self.user, self.work_s = server[order], user[order], work_s[order]
        self.sizes = uses[self.ids]
        self.first = np.cumsum(self.sizes) - self.sizes

    def finish(self, start_s: FloatArray, num_users: int) -> FloatArray:
        """When each user is served, shape (num_users,); for users of no server, their start."""
        finish = start_s.copy()
        ends = last_finish(start_s[self.user], self.work_s, self.server, self.first)
        np.maximum.at(finish, self.user, np.repeat(ends, self.sizes))
        return finish

    def latest(self, time_s: FloatArray) -> FloatArray:
        """Latest of `time_s` (per user) over the users of each server, in the order of `ids`."""
        return np.asarray(np.maximum.reduceat(time_s[self.user], self.first))


def raise_to(clock_s: FloatArray, at: IntArray, time_s: FloatArray, *, once: bool) -> None:
    """clock[at] = max(clock[at], time); `once` says that no index occurs twice, which is faster."""
    if once:
        clock_s[at] = np.maximum(clock_s[at], time_s)
    else:
        np.maximum.at(clock_s, at, time_s)
