"""The native fabric: shared memory within a host, TCP between hosts, both driven by the C++ core."""
