"""Where the bytes of a codec went, by cause; kept in its state, so that it survives a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from paceline.codecs.kernel.payload import HEADER_BYTES, PayloadHeader

_COUNTS = (
    "encodes",
    "elements",
    "hits",
    "payload_bytes",
    "index_bytes",
    "header_bytes",
    "coded_bits",
    "entropy_bound_bits",
    "not_finite",
    "encode_s",
    "extra_memory_bytes",
)


def record(state: dict[str, Any], header: PayloadHeader, num_bytes: int) -> dict[str, Any]:
    """Add one payload to state["ledger"] and return the ledger.

    payload_bytes are values, signs and scales. index_bytes say where they belong; a bitmap counts as index,
    except one bit per hit. header_bytes are 32 per payload.
    """
    ledger: dict[str, Any] = state.setdefault("ledger", dict.fromkeys(_COUNTS, 0))
    body = num_bytes - HEADER_BYTES
    index = 0
    if header.codec == "threshold":
        index = body - min(body, math.ceil(header.count / 8))
    elif header.codec == "topk":
        index = body - 4 * header.count
    ledger["encodes"] += 1
    ledger["elements"] += header.numel
    ledger["payload_bytes"] += body - index
    ledger["index_bytes"] += index
    ledger["header_bytes"] += HEADER_BYTES
    if header.codec == "threshold":
        ledger["hits"] += header.count
        ledger["coded_bits"] += 8 * body
        ledger["entropy_bound_bits"] += entropy_bound_bits(header.numel, header.count)
    return ledger


def entropy_bound_bits(numel: int, hits: int) -> float:
    """Return the entropy of which of `numel` independent elements are hit, plus one sign bit per hit."""
    if hits == 0:
        return 0.0
    p = hits / numel
    entropy = -p * math.log2(p) - ((1 - p) * math.log2(1 - p) if p < 1 else 0.0)
    return numel * entropy + hits


def stats(state: dict[str, Any]) -> dict[str, float]:
    """Return totals since the start with their ratios: what `job.stats()` shows.

    encoded_bytes = payload_bytes + index_bytes + header_bytes. bits_per_hit is to be compared with
    entropy_bound_bits_per_hit (sparse codecs; 0 without hits). encode_s is in seconds.
    """
    return total([state["ledger"]] if "ledger" in state else [])


def total(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the stats of several tensors as one: counts are added, ratios computed from the sums."""
    parts = list(parts)
    shown: dict[str, float] = {key: sum(part.get(key, 0) for part in parts) for key in _COUNTS}
    shown["encoded_bytes"] = shown["payload_bytes"] + shown["index_bytes"] + shown["header_bytes"]
    shown["raw_bytes"] = 4 * shown["elements"]
    hits = shown["hits"]
    shown["bits_per_hit"] = shown["coded_bits"] / hits if hits else 0.0
    shown["entropy_bound_bits_per_hit"] = shown["entropy_bound_bits"] / hits if hits else 0.0
    shown["density"] = hits / shown["elements"] if hits else 0.0
    return shown
