"""The simulated fabric: a deterministic virtual cluster with its own clock, network and faults."""
