"""Every rank sends its sparse payload to all and adds all of them in rank order.

Bytes received per rank grow with P, but they are P − 1 sparse payloads. All decode the same ones in the same
order: replicas stay bit-identical.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch

from paceline.codecs.kernel.codec import Codec
from paceline.codecs.kernel.random_stream import use_stream
from paceline.codecs.reducers.reducer import Layout, Reducer, payload_buffer
from paceline.errors import ProtocolError
from paceline.types import Communicator, Work


@final
class AllPayloads(Reducer):
    """Sum with a codec whose payload sizes depend on the values."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    def stages(
        self, flat: torch.Tensor, layout: Layout, comm: Communicator, state: dict[str, Any]
    ) -> Iterator[Work]:
        """Exchange sizes, then payloads."""
        use_stream(state, "part", state.get("tensor", 0), comm.rank)
        room = payload_buffer(self._codec.max_encoded_bytes(flat.numel()), flat, comm)
        payload = self._codec.encode(flat, state, out=room)
        sizes = torch.zeros(comm.size, dtype=torch.int64, device=room.device)
        yield comm.all_gather(sizes, torch.tensor([payload.numel()], device=room.device))

        counts = sizes.tolist()
        limit = self._codec.max_encoded_bytes(flat.numel())
        for rank, count in enumerate(counts):
            if not 0 < count <= limit:
                raise ProtocolError(
                    f"rank {comm.rank}: rank {rank} announces a payload of {count} bytes; at most {limit} "
                    f"are possible for {flat.numel()} elements: do all ranks use the same codec?"
                )
        gathered = payload_buffer(sum(counts), flat, comm)
        yield comm.all_gather_v(gathered, payload, counts=counts)

        for i, part in enumerate(torch.split(gathered, counts)):
            self._codec.decode(part, flat, accumulate=i > 0)

    def traffic(self, numel: int, layout: Layout, size: int) -> float:
        """At most a full payload and its size; `threshold` usually sends far less."""
        return 8.0 + self._codec.max_encoded_bytes(numel)

    def stats(self, state: dict[str, Any]) -> dict[str, float]:
        return self._codec.stats(state)
