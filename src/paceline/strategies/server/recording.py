"""The order in which shards handled exchanges: recorded in a real run, enforced in a replay.

A run of the parameter server is determined by the data each worker sees and by this order alone, so a replay
in the simulated fabric repeats a recorded run of real processes bit for bit.
"""

from __future__ import annotations

import glob
import json
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paceline import user_input
from paceline.errors import ConfigError
from paceline.strategies.server.protocol import ShardExchange
from paceline.types import Rank, Reply

_MOST_THREADS = 4096


@dataclass(frozen=True)
class HeldExchange:
    """An exchange that came before its turn, and the reply that its worker waits for."""

    src: Rank
    exchange: ShardExchange
    reply: Reply


class Recording:
    """Per shard the (worker, exchange number) pairs in the order of handling.

    Args:
        replay: Path of a recording whose order is enforced; "" enforces none.
        record: Path that the order of this run is written to, one file per rank; "" writes none.
    """

    def __init__(self, *, replay: str = "", record: str = "") -> None:
        self.record_to = record
        self._order: dict[int, list[tuple[Rank, int]]] = defaultdict(list)
        self._expected: dict[int, deque[tuple[Rank, int]]] | None = None
        self._waiting: dict[tuple[int, Rank, int], HeldExchange] = {}
        self._source = replay
        if replay:
            self._expected = {j: deque(order) for j, order in load(replay).items()}

    def check(self, num_shards: int, num_workers: int) -> None:
        """Raise ConfigError if the run to be repeated had other workers or shards."""
        if self._expected is None:
            return
        workers = {src for order in self._expected.values() for src, _ in order}
        if set(self._expected) != set(range(num_shards)) or workers != set(range(num_workers)):
            raise ConfigError(
                f"{self._source} recorded {len(workers)} workers and {len(self._expected)} shards, "
                f"this run has {num_workers} and {num_shards}: repeat it with the same numbers"
            )

    def may_go(self, shard: int, src: Rank, number: int) -> bool:
        """Whether this exchange is next; it is then taken as handled."""
        if self._expected is not None:
            expected = self._expected.get(shard)
            if expected:
                if expected[0] != (src, number):
                    return False
                expected.popleft()
        self._order[shard].append((src, number))
        return True

    def hold(self, src: Rank, exchange: ShardExchange, reply: Reply) -> None:
        """Keep an exchange that came before its turn."""
        self._waiting[exchange.shard, src, exchange.number] = HeldExchange(src, exchange, reply)

    def released(self, shard: int) -> list[HeldExchange]:
        """Exchanges whose turn has come, in order; once the recording is over, all others as they came."""
        turns = []
        expected = (self._expected or {}).get(shard)
        while expected and (shard, *expected[0]) in self._waiting:
            turns.append((shard, *expected.popleft()))
        if not expected:
            turns += [turn for turn in self._waiting if turn[0] == shard and turn not in turns]
        self._order[shard] += [(src, number) for _, src, number in turns]
        return [self._waiting.pop(turn) for turn in turns]

    def save(self, rank: Rank) -> None:
        """Write what this rank's shards did to `<record>.<rank>`."""
        if self.record_to:
            content = {
                "format": 1,
                "threads": torch.get_num_threads(),
                "shards": {str(j): order for j, order in sorted(self._order.items())},
            }
            Path(f"{self.record_to}.{rank}").write_text(json.dumps(content))


def recorded_threads(path: str) -> int:
    """Intra-op threads of the recorded run: another number gives other bits. Raises ConfigError."""
    file = _files(path)[0]
    threads = _content(file).get("threads")
    if isinstance(threads, bool) or not isinstance(threads, int) or not 0 < threads <= _MOST_THREADS:
        raise ConfigError(f"{file} is not a recording of parameter_server: threads: {threads!r:.80}")
    return threads


def load(path: str) -> dict[int, list[tuple[Rank, int]]]:
    """Read a recording: `path`.0, `path`.1, … of all ranks, or one file. Raises ConfigError."""
    order: dict[int, list[tuple[Rank, int]]] = {}
    for file in _files(path):
        try:
            for j, entries in _content(file)["shards"].items():
                order[int(j)] = [(int(src), int(number)) for src, number in entries]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ConfigError(f"{file} is not a recording of parameter_server: {error}") from None
    return order


def _content(file: Path) -> dict[str, Any]:
    content = user_input.read_json(file, what="recording")
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is not a recording of parameter_server: {content!r:.80}")
    return content


def _files(path: str) -> list[Path]:
    folder, name = Path(path).parent, glob.escape(Path(path).name)
    try:
        return sorted(folder.glob(f"{name}.[0-9]*")) or [Path(path)]
    except (OSError, ValueError):  # no name of a file; reading it says why
        return [Path(path)]
