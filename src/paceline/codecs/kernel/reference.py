"""Steps that the reference implementations share."""

from __future__ import annotations

import torch

from paceline.codecs.kernel import payload
from paceline.codecs.kernel.payload import MAX_RICE_PARAMETER, PayloadHeader
from paceline.errors import ProtocolError


def keep_remainder(residual: torch.Tensor, value: torch.Tensor, sent: torch.Tensor) -> None:
    """Set residual = value - sent, but keep the old residual where that is not finite."""
    remainder = value - sent
    residual.copy_(torch.where(remainder.isfinite(), remainder, residual))


def in_blocks(flat: torch.Tensor, block: int) -> torch.Tensor:
    """Return a 1-D tensor as (blocks, block), zero-padded."""
    count = payload.num_blocks(flat.numel(), block)
    return torch.nn.functional.pad(flat, (0, count * block - flat.numel())).view(count, block)


def largest_bits(rows: torch.Tensor) -> torch.Tensor:
    """Return the bits (int32) of each row's largest magnitude: as integers NaN > infinity > every number."""
    if rows.shape[0] == 0:
        return torch.zeros(0, dtype=torch.int32)
    return rows.view(torch.int32).bitwise_and(0x7FFFFFFF).amax(dim=1)


def plan_rice(indexes: list[int], *, has_sign: bool) -> tuple[int, int]:
    """Return the Rice parameter that needs the fewest bytes for increasing indexes, and their number."""
    if not indexes:
        return 0, 0
    middle = (indexes[-1] // len(indexes)).bit_length()
    gaps = [b - a - 1 for a, b in zip([-1, *indexes], indexes, strict=False)]
    sizes = {
        k: (sum(gap >> k for gap in gaps) + len(gaps) * (1 + k + has_sign) + 7) // 8
        for k in range(max(middle - 2, 0), min(middle, MAX_RICE_PARAMETER) + 1)
    }
    best = min(sizes, key=lambda k: (sizes[k], k))
    return best, sizes[best]


def write_rice(indexes: list[int], signs: list[int] | None, parameter: int) -> bytes:
    """Encode gap >> k in unary (zeros, then a one), k remainder bits, maybe a sign; least bit first."""
    value, length, previous = 0, 0, -1
    for i, index in enumerate(indexes):
        gap = index - previous - 1
        previous = index
        length += gap >> parameter
        value |= 1 << length
        value |= (gap & ((1 << parameter) - 1)) << length + 1
        length += 1 + parameter
        if signs is not None:
            value |= signs[i] << length
            length += 1
    return value.to_bytes((length + 7) // 8, "little")


def read_rice(header: PayloadHeader, data: bytes, *, has_sign: bool) -> tuple[list[int], list[int]]:
    """Return (indexes, signs) of header.count hits; ProtocolError when the bits do not hold exactly these."""
    if header.parameter > MAX_RICE_PARAMETER:
        raise ProtocolError(f"{header.codec} payload: Rice parameter above {MAX_RICE_PARAMETER}")
    value, end = int.from_bytes(data, "little"), 8 * len(data)
    indexes: list[int] = []
    signs: list[int] = []
    position, index = 0, -1
    for _ in range(header.count):
        unread = value >> position
        zeros = (unread & -unread).bit_length() - 1
        stop = position + zeros + 1 + header.parameter + has_sign
        if unread == 0 or stop > end:
            raise ProtocolError("entropy-coded payload: it ends in the middle of a hit")
        remainder = unread >> zeros + 1
        index += 1 + (zeros << header.parameter) + (remainder & ((1 << header.parameter) - 1))
        if index >= header.numel:
            raise ProtocolError("entropy-coded payload: an index beyond the tensor's end")
        indexes.append(index)
        signs.append(remainder >> header.parameter & 1 if has_sign else 0)
        position = stop
    if end - position >= 8 or value >> position:
        raise ProtocolError("entropy-coded payload: bytes left over after the last hit")
    return indexes, signs


def scatter(header: PayloadHeader, indexes: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return a sparse body as dense float32; ProtocolError unless the indexes increase within the tensor."""
    if indexes.numel() and (bool((indexes.diff() <= 0).any()) or int(indexes[-1]) >= header.numel):
        raise ProtocolError(
            f"{header.codec} payload: indexes are not increasing, or go beyond the tensor's end"
        )
    dense = torch.zeros(header.numel)
    dense[indexes] = values
    return dense
