"""Types of the C++ core; one section per file of csrc/bind."""

# crc32c.cpp
def crc32c(data: bytes | bytearray | memoryview, crc: int = 0) -> int: ...

# codecs.cpp: addresses are those of contiguous float32 or uint8 memory
def codec_max_bytes(codec: str, numel: int, parameter: int) -> int: ...
def codec_encode(
    codec: str,
    x: int,
    residual: int,
    numel: int,
    out: int,
    capacity: int,
    *,
    source: int = 0,
    checksum: bool = False,
    parameter: int = 0,
    tau: float = 0.0,
    entropy: bool = False,
    stochastic: bool = False,
    key: int = 0,
) -> tuple[int, int]: ...
def codec_decode(
    codec: str, payload: int, payload_bytes: int, out: int, numel: int, accumulate: bool
) -> None: ...
def codec_limit_isa(limit: int) -> None: ...
def codec_isa() -> int: ...
