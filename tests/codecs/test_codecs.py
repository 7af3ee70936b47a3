from __future__ import annotations

import math

import pytest
import torch
from codec_inputs import nearly_infinite

from paceline import codecs, registry
from paceline.codecs.kernel.ledger import entropy_bound_bits
from paceline.errors import ConfigError, ProtocolError

ALL = registry.names("paceline.codecs")


def test_the_names() -> None:
    assert ALL == [
        "bf16",
        "error_feedback",
        "fp16",
        "int4",
        "int8",
        "onebit",
        "powersgd",
        "threshold",
        "topk",
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("int9", "Did you mean 'int8'"),
        ("int8(blok=3)", "It takes: block=256"),
        ("int8(block=100)", "power of two"),
        ("onebit(block=16)", "power of two"),
        ("threshold(tau=0)", "tau must be"),
        ("threshold(tau=-1.0)", "tau must be"),
        ("threshold(density=2)", "density must be"),
        ("threshold(tau=0.1, band=0.5)", "band"),
        ("topk(density=0)", "density must be"),
        ("topk(k=0)", "k=0: a whole number >= 1"),
        ("topk(k=3, density=0.1)", "not both"),
        ("error_feedback", "It takes: codec"),
        ("error_feedback(codec=error_feedback(codec=int8))", "once is enough"),
        ("error_feedback(codec=powersgd)", "way to reduce"),
        ("powersgd(rank=2)", "all_reduce(codec=powersgd(rank=2))"),
        ("int8+int4", "one name expected"),
        ("int8(seed=-1)", "seed"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        codecs.make(spec)
    assert message in str(error.value)


def test_bad_tensors() -> None:
    codec = codecs.make("int8")
    with pytest.raises(ConfigError, match=r"got torch\.int64"):
        codec.encode(torch.arange(5), {})
    payload = codec.encode(torch.ones(5), {})
    with pytest.raises(ConfigError, match="floating"):
        codec.decode(payload, torch.zeros(5, dtype=torch.int32))
    with pytest.raises(ConfigError, match="uint8"):
        codec.decode(payload.float(), torch.zeros(5))
    with pytest.raises(ValueError, match="max_encoded_bytes"):
        codec.encode(torch.ones(5), {}, out=torch.empty(10, dtype=torch.uint8))
    with pytest.raises(ProtocolError, match=r"5 elements.* has 6"):
        codec.decode(payload, torch.zeros(6))
    with pytest.raises(ProtocolError, match="codec int8 was given to codec onebit"):
        codecs.make("onebit").decode(payload, torch.zeros(5))
    state: dict[str, object] = {}
    feedback = codecs.make("error_feedback(codec=int8)")
    feedback.encode(torch.ones(5), state)
    with pytest.raises(ConfigError, match="one state belongs to one tensor"):
        feedback.encode(torch.ones(6), state)


@pytest.mark.parametrize(
    ("spec", "most_bytes"),
    [
        ("fp16", 2.01),
        ("bf16", 2.001),
        ("int8", 1.02),
        ("int4", 0.54),
        ("onebit", 0.13),
        ("threshold(density=0.001)", 0.01),
        ("topk(density=0.01)", 0.0801),
    ],
)
def test_sizes(spec: str, most_bytes: float) -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert codecs.make(spec).encode(x, {}).numel() <= most_bytes * x.numel() + 32


@pytest.mark.parametrize(
    ("spec", "error"),
    [("fp16", 2**-11), ("bf16", 2**-8), ("int8", 0.02), ("int4", 0.35)],
)
def test_accuracy(spec: str, error: float) -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 1e-6
    out = torch.empty_like(x)
    codec = codecs.make(spec)
    codec.decode(codec.encode(x, {}), out)
    assert (out - x).abs().max() <= error * 4e-6


@pytest.mark.parametrize("spec", ["int8(stochastic=true)", "int4(stochastic=true)"])
def test_stochastic_rounding_is_unbiased(spec: str) -> None:
    codec = codecs.make(spec)
    assert codec.is_unbiased
    assert not codecs.make(spec.replace("true", "false")).is_unbiased
    x = torch.linspace(-1, 1, 4096)
    state: dict[str, object] = {"stream": 5}
    mean, out = torch.zeros(4096, dtype=torch.float64), torch.empty(4096)
    for _ in range(2000):
        codec.decode(codec.encode(x, state), out)
        mean += out.double() / 2000
    step = 2 / (14 if "int4" in spec else 254)
    assert (mean - x).abs().max() < step * 0.5 / 2000**0.5 * 5
    assert abs((mean - x).mean().item()) < step * 0.5 / (2000 * 4096) ** 0.5 * 5


def test_stochastic_streams_differ() -> None:
    x = torch.full((1000,), 0.5)
    x[0] = 127.0
    codec = codecs.make("int8(block=1024, stochastic=true)")
    other_seed = codecs.make("int8(block=1024, stochastic=true, seed=1)")
    state: dict[str, object] = {}
    payloads = [
        codec.encode(x, state),
        codec.encode(x, state),
        codec.encode(x, {"stream": 1}),
        other_seed.encode(x, {}),
    ]
    assert len({p.numpy().tobytes() for p in payloads}) == 4
    assert torch.equal(codec.encode(x, {}), payloads[0])


def test_threshold_sends_what_strom_says() -> None:
    codec, state = codecs.make("threshold(tau=1.0)"), {}
    out = torch.empty(64)
    x = torch.zeros(64)
    x[3], x[10], x[20] = 0.6, -2.5, 1.0
    codec.decode(codec.encode(x, state), out)
    assert out.nonzero().view(-1).tolist() == [10, 20]
    assert (out[10], out[20]) == (-1, 1)
    codec.decode(codec.encode(x, state), out)  # 3: 1.2 now; 10: -4; 20: 1
    assert [round(v, 5) for v in state["residual"][[3, 10, 20]].tolist()] == [0.2, -3.0, 0.0]
    assert out[[3, 10, 20]].tolist() == [1, -1, 1]


def test_adaptive_threshold_reaches_its_density() -> None:
    generator = torch.Generator().manual_seed(1)
    codec = codecs.make("threshold(tau=100.0, density=0.005)")
    state: dict[str, object] = {}
    for _ in range(400):
        codec.encode(torch.randn(20_000, generator=generator), state)
    before = codec.stats(state)
    for _ in range(100):
        codec.encode(torch.randn(20_000, generator=generator), state)
    after = codec.stats(state)
    density = (after["hits"] - before["hits"]) / (after["elements"] - before["elements"])
    assert 0.0025 <= density <= 0.01
    first = codecs.make("threshold(density=0.005)")
    state = {}
    first.encode(torch.randn(200_000, generator=generator), state)
    assert 0.003 < first.stats(state)["density"] < 0.007


@pytest.mark.parametrize("density", [1e-2, 1e-3, 1e-4])
def test_rice_code_is_within_5_percent_of_the_entropy_bound(density: float) -> None:
    numel = 4_000_000
    generator = torch.Generator().manual_seed(int(1 / density))
    hits = torch.rand(numel, generator=generator) < density
    signs = torch.where(torch.rand(numel, generator=generator) < 0.5, -1.0, 1.0)
    codec, state = codecs.make("threshold(tau=1.0, entropy=true)"), {}
    payload = codec.encode(hits * signs, state)
    count = int(hits.sum())
    bound = entropy_bound_bits(numel, count)
    assert bound / count == pytest.approx(-math.log2(density) + math.log2(math.e) + 1, rel=0.01)
    assert bound <= 8 * payload.numel() <= 1.05 * bound
    stats = codec.stats(state)
    assert stats["bits_per_hit"] <= 1.05 * stats["entropy_bound_bits_per_hit"]
    out = torch.empty(numel)
    codec.decode(payload, out)
    assert torch.equal(out, hits * signs)


def test_the_ledger_adds_up() -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    for name in ALL:
        if name == "powersgd":
            continue
        codec = codecs.make("error_feedback(codec=int8)" if name == "error_feedback" else name)
        state: dict[str, object] = {}
        sizes = [codec.encode(x, state).numel() for _ in range(3)]
        stats = codec.stats(state)
        assert stats["encodes"] == 3
        assert stats["raw_bytes"] == 3 * 4 * 5000
        assert stats["encoded_bytes"] == sum(sizes)
        assert stats["header_bytes"] == 3 * 32
        assert stats["extra_memory_bytes"] == (4 * 5000 if "residual" in state else 0)
        assert (stats["index_bytes"] > 0) == codec.is_sparse
        assert stats["encode_s"] > 0


def test_checksums_find_every_damaged_bit() -> None:
    codec = codecs.make("onebit", checksum=True)
    payload = codec.encode(torch.randn(64), {})
    out = torch.zeros(64)
    codecs.decode(payload, out)
    for bit in range(8 * payload.numel()):
        damaged = payload.clone()
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError):
            codecs.decode(damaged, torch.zeros(64))


@pytest.mark.parametrize("use_reference", [True, False], ids=["reference", "kernel"])
@pytest.mark.parametrize("block", [32, 512, 4096])
def test_onebit_of_finite_values_is_finite(block: int, use_reference: bool) -> None:
    codec = codecs.make(f"onebit(block={block})", use_reference=use_reference)
    x, decoded = nearly_infinite(5000), torch.empty(5000)
    codec.decode(codec.encode(x, {}), decoded)
    assert decoded.isfinite().all()
    whole = 5000 // block * block
    means = x[:whole].double().abs().view(-1, block).mean(1)
    assert torch.allclose(decoded[:whole].double().abs().view(-1, block)[:, 0], means, rtol=0.01)
    x[3] = torch.inf
    codec.decode(codec.encode(x, {}), decoded)
    assert decoded[:block].isinf().all()
    assert decoded[block:].isfinite().all()
