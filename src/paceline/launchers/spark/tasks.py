"""What runs in a task of a Spark barrier stage: a keeper that obeys the launcher over a socket."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import queue
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paceline.errors import ConfigError
from paceline.launchers.processes.failure import Ending
from paceline.launchers.remote import supervisor, wire
from paceline.launchers.remote.supervisor import Event, Keeper, Order
from paceline.options import JobOptions

PARTITION = "PACELINE_PARTITION"
"""Environment variable: the file with this worker's rows, as an Arrow stream."""

_TICK_S = 0.2


@dataclasses.dataclass(frozen=True)
class Launcher:
    """Where the launcher listens; travels to tasks inside Spark's own closure."""

    host: str
    port: int
    secret: bytes
    code: str | None
    """Name of the archive with the job's code, when there is one."""


class LostPeers(RuntimeError):
    """Tells Spark to start the whole stage again."""


def keep(launcher: Launcher, index: int, address: str, partition: str | None = None) -> None:
    """Run workers as the launcher says until it says that the job is over. Raises LostPeers for a retry."""
    link = wire.connect(launcher.host, launcher.port, launcher.secret, index)
    own = Keeper()
    try:
        link.send({"host": address, "name": address, "address": address})
        commands: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=_listen, args=(link, commands, own), daemon=True).start()
        if _obey(launcher, link, own, commands, partition):
            raise LostPeers("workers were lost; all start again from the last checkpoint")
    finally:
        own.close()
        link.close()


def _listen(link: wire.Wire, commands: queue.Queue[dict[str, Any] | None], own: Keeper) -> None:
    with contextlib.suppress(OSError, ValueError):
        while True:
            header, blob = link.receive()
            if header["do"] == "stop":  # not queued: it waits for the worker's end
                arguments = (header["grace_s"], header["attempt"])
                threading.Thread(target=own.stop, args=arguments, daemon=True).start()
            else:
                commands.put({**header, "blob": blob})
    commands.put(None)


def _obey(
    launcher: Launcher,
    link: wire.Wire,
    own: Keeper,
    commands: queue.Queue[dict[str, Any] | None],
    partition: str | None,
) -> bool:
    """Returns whether Spark is to start the stage again."""
    while True:
        with contextlib.suppress(queue.Empty):
            command = commands.get_nowait()
            if command is None:
                return True  # the launcher is gone: Spark's retry finds nobody, and ends
            if command["do"] == "finish":
                return bool(command["retry"])
            link.send(_answer(launcher, own, command, partition))
        for event in own.events(_TICK_S):
            _report(link, event)


def _answer(
    launcher: Launcher, own: Keeper, command: dict[str, Any], partition: str | None
) -> dict[str, Any]:
    try:
        if command["do"] == "store":
            return {"answer": own.open_store()}
        order = _read_order(command["order"], command["blob"])
        environment = dict(order.environment)
        options = JobOptions.from_environment(environment)
        # The secret never travels over the launcher's socket, which is not encrypted.
        secret = hmac.new(launcher.secret, options.secret.encode(), hashlib.sha256).hexdigest()
        environment |= dataclasses.replace(options, secret=secret).to_environment()
        if partition is not None:
            environment[PARTITION] = partition
        directory = order.directory
        if launcher.code is not None:
            from pyspark import SparkFiles

            directory = SparkFiles.get(launcher.code)
        own.start(dataclasses.replace(order, environment=environment, directory=directory))
        return {"answer": None}
    except ConfigError as error:
        return {"answer": None, "refused": str(error)}


def _report(link: wire.Wire, event: Event) -> None:
    kind, value = event
    if kind == supervisor.PROGRESS:
        link.send({"event": kind, "value": None}, value)
        return
    if kind != supervisor.END:
        link.send({"event": kind, "value": value})
        return
    blob = value.error if value.result is None else value.result
    plain = dataclasses.asdict(dataclasses.replace(value, result=None, error=None))
    has = "" if blob is None else ("error" if value.result is None else "result")
    link.send({"event": kind, "value": plain, "has": has}, blob or b"")


def read_event(header: dict[str, Any], blob: bytes) -> Event:
    """The launcher's side of what `keep` reports."""
    kind, value = header["event"], header["value"]
    if kind != supervisor.END:
        return kind, blob if kind == supervisor.PROGRESS else value
    left = {header["has"]: blob} if header["has"] else {}
    return kind, Ending(**{**value, "traceback": tuple(value["traceback"]), **left})


def write_order(order: Order) -> tuple[dict[str, Any], bytes]:
    """An order as a header and a blob."""
    plain = dataclasses.asdict(dataclasses.replace(order, call=None, progress=None))
    sizes = [None if part is None else len(part) for part in (order.call, order.progress)]
    return plain | {"sizes": sizes}, (order.call or b"") + (order.progress or b"")


def _read_order(values: dict[str, Any], blob: bytes) -> Order:
    call_bytes, progress_bytes = values.pop("sizes")
    call = None if call_bytes is None else blob[:call_bytes]
    progress = None if progress_bytes is None else blob[call_bytes or 0 :]
    return Order(**{**values, "command": tuple(values["command"]), "call": call, "progress": progress})


def plain_task(launcher: Launcher, index: int, _rows: Iterator[Any]) -> Iterator[Any]:
    """A barrier task without data."""
    keep(launcher, index, _own_address())
    return iter(())


def data_task(launcher: Launcher, batches: Iterator[Any]) -> Iterator[Any]:
    """A barrier task over Arrow batches: they are put into a file of this host, from which the worker reads
    them as often as it has epochs. Yields nothing.
    """
    import pyarrow
    from pyspark import BarrierTaskContext

    with tempfile.TemporaryDirectory(prefix="paceline-rows-") as folder:
        path = Path(folder) / "rows.arrow"
        writer = None
        with pyarrow.OSFile(str(path), "wb") as file:
            for batch in batches:
                if writer is None:
                    writer = pyarrow.ipc.new_file(file, batch.schema)
                writer.write_batch(batch)
            if writer is not None:
                writer.close()
        context = BarrierTaskContext.get()
        keep(launcher, context.partitionId(), _own_address(), str(path))
    yield from ()


def _own_address() -> str:
    from pyspark import BarrierTaskContext

    context = BarrierTaskContext.get()
    address = str(context.getTaskInfos()[context.partitionId()].address)
    return address.rsplit(":", 1)[0] if ":" in address else address
