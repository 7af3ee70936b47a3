"""Types of the C++ core; one section per file of csrc/bind."""

# crc32c.cpp
def crc32c(data: bytes | bytearray | memoryview, crc: int = 0) -> int: ...
