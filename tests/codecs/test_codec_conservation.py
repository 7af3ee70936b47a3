"""Nothing is lost: Σ sent + residual = Σ updates, for every codec that keeps a residual."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import codecs

pytestmark = pytest.mark.property

STEPS = 1000
EXACT = [
    "threshold(tau=16)",
    "threshold(tau=64, entropy=true)",
    "error_feedback(codec=threshold(tau=32))",
    "error_feedback(codec=topk(density=0.02))",
    "error_feedback(codec=topk(k=5, entropy=true))",
    "error_feedback(codec=onebit(block=64))",
]
TO_TOLERANCE = [
    *EXACT,
    "threshold(density=0.01)",
    "error_feedback(codec=onebit)",
    "error_feedback(codec=int8)",
    "error_feedback(codec=int4(stochastic=true))",
    "error_feedback(codec=fp16)",
    "error_feedback(codec=bf16)",
]


def restored(state: dict[str, Any]) -> dict[str, Any]:
    """The state after a checkpoint: written, and read as plain values and tensors only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def run(spec: str, updates: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(Σ sent, residual, Σ updates) in float64; saved and restored in a new codec every 300 steps."""
    codec, state = codecs.make(spec), {}
    sent = torch.zeros_like(updates[0], dtype=torch.float64)
    total = sent.clone()
    decoded = torch.empty_like(updates[0])
    for step, update in enumerate(updates):
        if step % 300 == 299:
            codec, state = codecs.make(spec), restored(state)
        codec.decode(codec.encode(update, state), decoded)
        sent += decoded
        total += update
    return sent, state["residual"].double(), total


@pytest.mark.parametrize("spec", EXACT)
def test_conservation_is_exact_for_integers(spec: str) -> None:
    # 1-bit scales have 8 significant bits: means of at least 128 are integers.
    generator = torch.Generator().manual_seed(3)
    scale = 1000 if "onebit" in spec else 40
    updates = [torch.randint(-scale, scale + 1, (333,), generator=generator).float() for _ in range(STEPS)]
    sent, residual, total = run(spec, updates)
    assert sent.any()
    assert torch.equal(sent + residual, total)


@pytest.mark.parametrize("spec", TO_TOLERANCE)
def test_conservation_in_floats(spec: str) -> None:
    generator = torch.Generator().manual_seed(4)
    updates = [torch.randn(1111, generator=generator) * 10 for _ in range(STEPS)]
    sent, residual, total = run(spec, updates)
    # Each step rounds once at the magnitude of the residual; roundings add up like a random walk.
    size = 10 + residual.abs().max().item()
    assert (sent + residual - total).abs().max() <= 2**-23 * size * STEPS**0.5 * 4


@settings(max_examples=60, deadline=None)
@given(
    spec=st.sampled_from(EXACT[:5]),
    rows=st.lists(st.lists(st.integers(-(2**18), 2**18), min_size=7, max_size=7), min_size=1, max_size=12),
)
def test_conservation_of_any_integers(spec: str, rows: list[list[int]]) -> None:
    sent, residual, total = run(spec, [torch.tensor(row, dtype=torch.float32) for row in rows])
    assert torch.equal(sent + residual, total)


def test_a_restored_codec_continues_bit_by_bit() -> None:
    for spec in [*TO_TOLERANCE, "int8(stochastic=true, seed=3)"]:
        generator = torch.Generator().manual_seed(5)
        updates = [torch.randn(500, generator=generator) for _ in range(20)]
        codec, state = codecs.make(spec), {}
        for update in updates[:10]:
            codec.encode(update, state)
        other, copied = codecs.make(spec), restored(state)
        for update in updates[10:]:
            assert torch.equal(codec.encode(update, state), other.encode(update, copied)), spec


def test_what_is_not_finite_travels_or_is_counted_but_never_stays() -> None:
    bad = torch.randn(2000, generator=torch.Generator().manual_seed(6))
    bad[5], bad[700], bad[1500] = torch.nan, torch.inf, -torch.inf
    good = torch.randn(2000, generator=torch.Generator().manual_seed(7))
    for spec in TO_TOLERANCE:
        codec, state = codecs.make(spec), {}
        decoded = torch.empty(2000)
        codec.decode(codec.encode(bad, state), decoded)
        if "threshold" in spec:
            assert codec.stats(state)["not_finite"] == 3
        elif "topk" not in spec or "density" in spec:
            assert not decoded.isfinite().all(), spec  # a loss scaler must see it
        for _ in range(3):
            codec.decode(codec.encode(good, state), decoded)
            assert decoded.isfinite().all(), spec
            assert state["residual"].isfinite().all(), spec
