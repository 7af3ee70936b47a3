"""What runs in a task of a Spark barrier stage: a supervisor that obeys the driver over a socket."""

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
from typing import TYPE_CHECKING, Any

from paceline.errors import ConfigError
from paceline.launchers.processes.failure import ExitReason
from paceline.launchers.remote import wire
from paceline.launchers.remote.events import BarEvent, Event, ExitEvent, LineEvent, ProgressEvent
from paceline.launchers.remote.supervisor import StartCommand, Supervisor
from paceline.options import JobOptions

if TYPE_CHECKING:
    from pyarrow import RecordBatch

PARTITION = "PACELINE_PARTITION"
"""Environment variable: the file with this worker's rows, as an Arrow stream."""

_POLL_S = 0.2


@dataclasses.dataclass(frozen=True)
class DriverAddress:
    """Where the driver listens; travels to tasks inside Spark's own closure."""

    host: str
    port: int
    secret: bytes
    code: str | None
    """Name of the archive with the job's code, if there is one."""


class LostPeers(RuntimeError):
    """Tells Spark to run the whole stage again."""


class _Task:
    """A supervisor in this task, and its connection to the driver."""

    def __init__(self, driver: DriverAddress, link: wire.Wire, partition: str | None) -> None:
        self._driver = driver
        self._link = link
        self._partition = partition
        self._supervisor = Supervisor()
        # Headers of the driver's commands, with their blobs; None: the driver is gone.
        self._commands: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def run(self) -> bool:
        """Obey the driver until the job is over; returns whether Spark is to run the stage again."""
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            with contextlib.suppress(queue.Empty):
                command = self._commands.get_nowait()
                if command is None:
                    return True  # Spark's retry does not reach the driver either, and ends
                if command["do"] == "finish":
                    return bool(command["retry"])
                self._link.send(self._answer(command))
            for event in self._supervisor.events(_POLL_S):
                header, blob = write_event(event)
                self._link.send(header, blob)

    def close(self) -> None:
        self._supervisor.close()

    def _listen(self) -> None:
        """Body of the thread that reads the driver's commands."""
        with contextlib.suppress(OSError, ValueError):
            while True:
                header, blob = self._link.receive()
                if header["do"] == "stop":  # not queued: it waits for the worker's end
                    arguments = (header["grace_s"], header["attempt"])
                    threading.Thread(target=self._supervisor.stop, args=arguments, daemon=True).start()
                else:
                    self._commands.put({**header, "blob": blob})
        self._commands.put(None)

    def _answer(self, command: dict[str, Any]) -> dict[str, object]:
        try:
            if command["do"] == "store":
                secret = self._own_secret(command["secret"])
                return {"answer": self._supervisor.open_store(secret, command["address"])}
            start = _read_start_command(command["order"], command["blob"])
            self._supervisor.start(self._completed(start))
            return {"answer": None}
        except ConfigError as error:
            return {"answer": None, "refused": str(error)}

    def _own_secret(self, given: str) -> str:
        """The job's secret. It never travels over the driver's socket, which is not encrypted."""
        return hmac.new(self._driver.secret, given.encode(), hashlib.sha256).hexdigest()

    def _completed(self, start: StartCommand) -> StartCommand:
        """The command with what only this task knows: the secret, the partition, the code's folder."""
        environment = dict(start.environment)
        options = JobOptions.from_environment(environment)
        secret = self._own_secret(options.secret)
        environment |= dataclasses.replace(options, secret=secret).to_environment()
        if self._partition is not None:
            environment[PARTITION] = self._partition
        directory = start.directory
        if self._driver.code is not None:
            from pyspark import SparkFiles

            directory = SparkFiles.get(self._driver.code)
        return dataclasses.replace(start, environment=environment, directory=directory)


def supervise(driver: DriverAddress, index: int, address: str, partition: str | None = None) -> None:
    """Run workers as the driver says until the job is over. Raises LostPeers for a retry.

    Args:
        driver: Where the driver listens.
        index: This task's number in the stage.
        address: This host's address.
        partition: File with this task's rows; None: there are none.
    """
    link = wire.connect(driver.host, driver.port, driver.secret, index)
    task = _Task(driver, link, partition)
    try:
        link.send({"host": address, "name": address, "address": address})
        if task.run():
            raise LostPeers("workers were lost; all start again from the last checkpoint")
    finally:
        task.close()
        link.close()


def write_event(event: Event) -> tuple[dict[str, object], bytes]:
    """An event as a header and a blob; `read_event` is the other direction."""
    match event:
        case LineEvent(text, is_error):
            return {"event": "line", "value": [text, is_error]}, b""
        case BarEvent(text):
            return {"event": "bar", "value": text}, b""
        case ProgressEvent(content):
            return {"event": "progress", "value": None}, content
        case ExitEvent(reason):
            blob = reason.error if reason.result is None else reason.result
            plain = dataclasses.asdict(dataclasses.replace(reason, result=None, error=None))
            has = "" if blob is None else ("error" if reason.result is None else "result")
            return {"event": "end", "value": plain, "has": has}, blob or b""
        case _:
            raise AssertionError(f"a supervisor does not report {event}")


def read_event(header: dict[str, Any], blob: bytes) -> Event:
    """The event that `write_event` wrote. Raises ValueError for anything else."""
    value = header["value"]
    match header["event"]:
        case "line":
            return LineEvent(*value)
        case "bar":
            return BarEvent(value)
        case "progress":
            return ProgressEvent(blob)
        case "end":
            left = {header["has"]: blob} if header["has"] else {}
            return ExitEvent(ExitReason(**{**value, "traceback": tuple(value["traceback"]), **left}))
    raise ValueError(f"unknown event {header['event']!r}")


def write_start_command(command: StartCommand) -> tuple[dict[str, object], bytes]:
    """A command as a header and a blob."""
    plain = dataclasses.asdict(dataclasses.replace(command, call=None, progress=None))
    sizes = [None if part is None else len(part) for part in (command.call, command.progress)]
    return plain | {"sizes": sizes}, (command.call or b"") + (command.progress or b"")


def _read_start_command(values: dict[str, Any], blob: bytes) -> StartCommand:
    call_bytes, progress_bytes = values.pop("sizes")
    call = None if call_bytes is None else blob[:call_bytes]
    progress = None if progress_bytes is None else blob[call_bytes or 0 :]
    values = {**values, "command": tuple(values["command"]), "call": call, "progress": progress}
    return StartCommand(**values)


def plain_task(driver: DriverAddress, index: int, _rows: Iterator[int]) -> Iterator[int]:
    """A barrier task without data."""
    supervise(driver, index, _own_address())
    return iter(())


def data_task(driver: DriverAddress, batches: Iterator[RecordBatch]) -> Iterator[RecordBatch]:
    """A barrier task over Arrow batches. Yields nothing.

    The batches go into a file on this host, which the worker reads once per epoch.
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
        supervise(driver, context.partitionId(), _own_address(), str(path))
    yield from ()


def _own_address() -> str:
    from pyspark import BarrierTaskContext

    context = BarrierTaskContext.get()
    address = str(context.getTaskInfos()[context.partitionId()].address)
    return address.rsplit(":", 1)[0] if ":" in address else address
