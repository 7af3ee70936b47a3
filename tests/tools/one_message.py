"""Time of one message on a topology, from the links that it passes."""

from __future__ import annotations

import numpy as np

from paceline.schedule.topology import Topology


def message_s(topology: Topology, src: int, dst: int, num_bytes: float) -> float:
    """Seconds that a message from `src` to `dst` takes if it meets no other traffic."""
    path = topology.path(np.array([src]), np.array([dst]))
    overhead = topology.overhead_s if src != dst else 0.0
    seconds = topology.latency_s(path)[0] + overhead + num_bytes * topology.seconds_per_byte(path)[0]
    return float(seconds)
