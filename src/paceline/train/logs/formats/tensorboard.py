"""TensorBoard event files, by torch's writer; needs the extra `paceline[tensorboard]`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paceline.errors import ConfigError

_FLUSH_S = 5
_HEAD = ("step", "rank")


def open_log(folder: Path, name: str, first_step: int | None) -> EventFile:
    """Write an event file in `folder`; steps after `first_step` of an earlier run are hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"logging to TensorBoard needs its package ({error}): pip install 'paceline[tensorboard]'"
        ) from error
    return EventFile(SummaryWriter(str(folder), purge_step=first_step, flush_secs=_FLUSH_S), name)


class EventFile:
    """Scalars by step. A row of one rank's summary goes below `ranks/<rank>/`."""

    def __init__(self, writer: Any, name: str) -> None:
        self._writer, self._name = writer, name

    def write(self, row: Mapping[str, Any]) -> None:
        """Add every number of the row; other values are left out."""
        prefix = f"{self._name}/{row['rank']}/" if "rank" in row else ""
        for key, value in row.items():
            if key not in _HEAD and isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer.add_scalar(prefix + key, value, global_step=row.get("step"))

    def close(self) -> None:
        """Write what is still in memory."""
        self._writer.close()
