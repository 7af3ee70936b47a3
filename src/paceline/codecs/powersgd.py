"""PowerSGD: each gradient matrix M (a × b) travels as two thin factors, one power iteration per step.

    M ← M + E;  P ← Σ M Q;  P ← orthonormal(P);  Q ← Σ Mᵀ P;  M̂ ← P Qᵀ ≈ Σ M;  E ← M − M̂ / number of ranks

Q starts from the previous step. Tensors of one dimension, and matrices that two factors would not shrink,
travel uncompressed in the first of the two all-reduces.

Bytes: 4r(a + b) per matrix, in both all-reduces together.   [tested]
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, final

import torch

from paceline import local_work
from paceline.codecs.kernel import ledger
from paceline.codecs.reducers.reducer import Layout, Reducer
from paceline.errors import ConfigError
from paceline.local_work import WorkKind
from paceline.spec import whole_number
from paceline.types import Communicator, ReduceOp, Work


@final
class PowerSgd(Reducer):
    """Low-rank factors of gradient matrices, with error feedback: 4r(a + b) bytes per a × b matrix.

    Args:
        rank: Columns r of the factors, at least 1; default 2. A larger one sends more and approximates
            better: try 4 when accuracy falls behind.
        warmup_steps: First steps that travel uncompressed, at least 0; default 0. A few hundred help where
            gradients change much at the start.
        seed: Seed from which all ranks draw the first Q; default 0. The same on all ranks.

    Raises:
        ConfigError: A rank below 1 or a negative number of steps.

    Example:
        `all_reduce(codec=powersgd(rank=2))`

    Source: Vogels, Karimireddy & Jaggi, NeurIPS 2019.
    """

    def __init__(self, *, rank: int = 2, warmup_steps: int = 0, seed: int = 0) -> None:
        self._rank = whole_number("powersgd: rank", rank, least=1)
        self._warmup_steps = whole_number("powersgd: warmup_steps", warmup_steps, least=0)
        self._seed = seed

    def stages(
        self, flat: torch.Tensor, layout: Layout, comm: Communicator, state: dict[str, Any]
    ) -> Iterator[Work]:
        """Left factors and uncompressed tensors, then right factors."""
        step = state["step"] = state.get("step", 0) + 1
        if step <= self._warmup_steps:
            _count(state, flat.numel(), flat.numel(), 0.0)
            yield comm.all_reduce(flat, op=ReduceOp.SUM)
            return
        started = time.perf_counter()
        matrices, uncompressed = self._views(flat, layout)
        residual = state.setdefault("residual", torch.zeros_like(flat))
        if "q" not in state:
            generator = torch.Generator().manual_seed(self._seed)
            drawn = [torch.randn(m.shape[1], self._rank, generator=generator) for m in matrices]
            state["q"] = [q.to(flat.device) for q in drawn]
        errors, _ = self._views(residual, layout)
        for matrix, error in zip(matrices, errors, strict=True):
            matrix.add_(error)
        left = [m @ q for m, q in zip(matrices, state["q"], strict=True)]
        packed = torch.cat([t.reshape(-1) for t in [*left, *uncompressed]])
        spent = time.perf_counter() - started
        self._charge(0, flat, layout, comm, state)
        yield comm.all_reduce(packed, op=ReduceOp.SUM)

        started = time.perf_counter()
        left, sums = _unpacked(packed, left, uncompressed)
        for tensor, total in zip(uncompressed, sums, strict=True):
            tensor.copy_(total)
        left = [torch.linalg.qr(p).Q for p in left]
        right = [m.T @ p for m, p in zip(matrices, left, strict=True)]
        num_sent = packed.numel() + sum(q.numel() for q in right)
        if right:
            packed = torch.cat([q.reshape(-1) for q in right])
            spent += time.perf_counter() - started
            self._charge(1, flat, layout, comm, state)
            yield comm.all_reduce(packed, op=ReduceOp.SUM)
            started = time.perf_counter()
            state["q"], _ = _unpacked(packed, right, [])
        for matrix, error, p, q in zip(matrices, errors, left, state["q"], strict=True):
            approximation = p @ q.T
            torch.sub(matrix, approximation, alpha=1 / comm.size, out=error)
            error.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            matrix.copy_(approximation)
        _drop_infinite_factors(state)
        _count(state, flat.numel(), num_sent, spent + time.perf_counter() - started)
        self._charge(2 if right else 1, flat, layout, comm, state)

    def _charge(
        self, part: int, flat: torch.Tensor, layout: Layout, comm: Communicator, state: dict[str, Any]
    ) -> None:
        """Charge what lies before exchange number `part`; after both exchanges, it is decoding."""
        if not local_work.is_heard():
            return
        alone: Any = _Alone(comm.size)

        def rehearsal() -> Callable[[], object]:
            stages = self.stages(flat.clone(), layout, alone, copy.deepcopy(state))
            for _ in range(part):
                next(stages)
            return functools.partial(next, stages, None)

        matrices, _ = self._views(flat, layout)
        shapes = "+".join(f"{m.shape[0]}x{m.shape[1]}" for m in matrices)
        kind = WorkKind.ENCODE if part < (2 if matrices else 1) else WorkKind.DECODE
        local_work.charge(
            kind, f"powersgd(rank={self._rank}) part {part} of {shapes}", flat.numel(), rehearsal
        )

    def _views(self, flat: torch.Tensor, layout: Layout) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Matrices to compress, and the 1-D tensors between them, as views of `flat`."""
        matrices, uncompressed, position = [], [], 0
        for offset, shape in sorted(layout):
            numel = torch.Size(shape).numel()
            rows = shape[0] if len(shape) > 1 else 1
            columns = numel // max(rows, 1)
            if offset < position or offset + numel > flat.numel():
                raise ConfigError(
                    f"powersgd: the layout's tensor at {offset} overlaps, or ends beyond the buffer"
                )
            if self._rank * (rows + columns) >= numel:
                continue
            if offset > position:
                uncompressed.append(flat[position:offset])
            matrices.append(flat[offset : offset + numel].view(rows, columns))
            position = offset + numel
        if position < flat.numel():
            uncompressed.append(flat[position:])
        return matrices, uncompressed

    def traffic(self, numel: int, layout: Layout, size: int) -> float:
        """4r(a + b) per matrix, 4 per other element."""
        matrices, uncompressed = self._views(torch.empty(numel, device="meta"), layout)
        factors = sum(self._rank * sum(m.shape) for m in matrices)
        return 4.0 * (factors + sum(t.numel() for t in uncompressed))

    def stats(self, state: dict[str, Any]) -> dict[str, float]:
        """Bytes given to all-reduces, encode seconds, and the memory of residual and factors."""
        memory = [state.get("residual", torch.empty(0)), *state.get("q", [])]
        counted = {"extra_memory_bytes": sum(4 * t.numel() for t in memory)}
        return ledger.total([state.get("ledger", {}), counted])


class _Alone:
    """What a rehearsal sums over: this rank, whose sums are there at once."""

    def __init__(self, size: int) -> None:
        self.size = size

    def all_reduce(self, tensor: torch.Tensor, **_: object) -> None:
        pass


def _unpacked(
    packed: torch.Tensor, first: list[torch.Tensor], second: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    parts = torch.split(packed, [t.numel() for t in [*first, *second]])
    shaped = [part.view(t.shape) for part, t in zip(parts, [*first, *second], strict=True)]
    return [t.clone() for t in shaped[: len(first)]], shaped[len(first) :]


def _drop_infinite_factors(state: dict[str, Any]) -> None:
    """Drop Q after a step with infinities, which a loss scaler will skip: else it would never recover."""
    if not all(bool(q.isfinite().all()) for q in state["q"]):
        del state["q"]


def _count(state: dict[str, Any], numel: int, sent: int, seconds: float) -> None:
    counts = state.setdefault("ledger", {"elements": 0, "payload_bytes": 0, "encode_s": 0.0, "encodes": 0})
    counts["elements"] += numel
    counts["payload_bytes"] += 4 * sent
    counts["encode_s"] += seconds
    counts["encodes"] += 1
