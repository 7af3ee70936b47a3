"""Tells Lightning where this process is in its job, whatever started it."""

from __future__ import annotations

import os

from lightning.fabric.plugins.environments import ClusterEnvironment

from paceline.comm.rendezvous.environment import who_am_i


class PacelineEnvironment(ClusterEnvironment):  # type: ignore[misc]
    """Ranks as `paceline.init()` finds them. Lightning starts no processes."""

    def __init__(self) -> None:
        super().__init__()
        self._place = who_am_i(os.environ)

    @property
    def creates_processes_externally(self) -> bool:
        """True: a launcher did."""
        return True

    @property
    def main_address(self) -> str:
        """Where rank 0 is; unused, because the ranks have met already."""
        return self._place.master_address or "127.0.0.1"

    @property
    def main_port(self) -> int:
        return self._place.master_port or 0

    @staticmethod
    def detect() -> bool:
        """Never chosen by Lightning itself."""
        return False

    @property
    def local_size(self) -> int:
        """Ranks on this host."""
        return self._place.local_size

    def world_size(self) -> int:
        return self._place.size

    def set_world_size(self, size: int) -> None:
        """Ignored: the launcher decided."""

    def global_rank(self) -> int:
        return self._place.rank

    def set_global_rank(self, rank: int) -> None:
        """Ignored: the launcher decided."""

    def local_rank(self) -> int:
        """This rank among those of its host."""
        return self._place.local_rank

    def node_rank(self) -> int:
        """Number of this host."""
        return self._place.rank // max(1, self._place.local_size)
