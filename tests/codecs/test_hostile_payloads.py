"""Every decoder, given damaged payloads: ProtocolError and an untouched output, or a tensor. Never more."""

from __future__ import annotations

import random

import pytest
import torch

from paceline import _core, codecs
from paceline.codecs.kernel import payload as payloads
from paceline.codecs.kernel.codec import decode_any
from paceline.errors import ProtocolError

SPECS = [
    "fp16(block=32)",
    "bf16",
    "int8(block=64)",
    "int4(block=32)",
    "onebit(block=32)",
    "threshold(tau=2.5)",
    "threshold(tau=2.0, entropy=true)",
    "threshold(tau=0.01)",
    "topk(k=9)",
    "topk(k=9, entropy=true)",
]
TRIALS = 400


def damaged(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        kind = chance.randrange(6)
        place = chance.randrange(len(changed)) if changed else 0
        if kind == 0:
            del changed[place:]
        elif kind == 1:
            changed += chance.randbytes(chance.randint(1, 40))
        elif kind == 2 and changed:
            changed[place] ^= 1 << chance.randrange(8)
        elif kind == 3 and changed:
            changed[place] = chance.choice([0, 1, 127, 128, 255])
        elif kind == 4 and len(changed) >= 32:  # a field of the header
            field, size = chance.choice([(5, 1), (6, 1), (7, 1), (8, 8), (16, 4), (20, 4), (24, 4)])
            changed[field : field + size] = chance.choice(
                [
                    b"\0" * size,
                    b"\xff" * size,
                    chance.randbytes(size),
                    (2**31 - 1).to_bytes(8, "little")[:size],
                ]
            )
        else:
            del changed[place : place + chance.randint(1, 8)]
    return bytes(changed)


def attempt(data: bytes, out: torch.Tensor, *, accumulate: bool, use_reference: bool) -> bool:
    payload = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    )
    before = out.clone()
    try:
        decode_any(payload, out, accumulate=accumulate, use_reference=use_reference)
    except ProtocolError as error:
        assert len(str(error)) > 20
        assert torch.equal(out, before)
        return False
    return True


@pytest.mark.parametrize("spec", SPECS)
def test_damaged_payloads(spec: str) -> None:
    chance = random.Random(spec)
    numel = 100
    x = torch.randn(numel, generator=torch.Generator().manual_seed(1))
    valid = codecs.make(spec).encode(x, {}).numpy().tobytes()
    decoded = 0
    for trial in range(TRIALS):
        data = damaged(valid, chance)
        _core.codec_limit_isa(trial % 3)
        outs = [torch.full((numel,), 0.5) for _ in range(2)]
        results = [
            attempt(data, out, accumulate=trial % 2 == 0, use_reference=use_reference)
            for out, use_reference in zip(outs, (False, True), strict=True)
        ]
        assert results[0] == results[1], data.hex()  # both accept or both reject
        if results[0]:
            decoded += 1
            assert torch.equal(outs[0].nan_to_num(nan=1e30), outs[1].nan_to_num(nan=1e30)), data.hex()
    _core.codec_limit_isa(2)
    assert 0 < decoded < TRIALS


def test_a_huge_announced_size_allocates_nothing() -> None:
    header = payloads.PayloadHeader("threshold", 2**31 - 1, scale=1.0, count=2**31 - 1, layout=2)
    data = torch.frombuffer(bytearray(payloads.join(header, b"\xff" * 8)), dtype=torch.uint8)
    with pytest.raises(ProtocolError):
        codecs.decode(data, torch.zeros(64))
