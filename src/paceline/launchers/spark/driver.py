"""The driver of a job in a Spark barrier stage: it starts the stage, and the stage's tasks connect to it."""

from __future__ import annotations

import contextlib
import functools
import queue
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from paceline.comm.rendezvous.interfaces import listening_address
from paceline.comm.security.authentication import Acceptor
from paceline.comm.security.threaded_listener import ThreadedListener
from paceline.errors import CommError, ConfigError, ProtocolError
from paceline.launchers.job import JobSpec
from paceline.launchers.processes import signals
from paceline.launchers.processes.console import Console
from paceline.launchers.processes.outcome import Outcome
from paceline.launchers.remote import wire
from paceline.launchers.remote.attempts import run_job
from paceline.launchers.remote.driver import Driver, parse_wait
from paceline.launchers.remote.events import Event, LostEvent
from paceline.launchers.remote.supervisor import StartCommand, WorkerLocation
from paceline.launchers.spark import tasks
from paceline.launchers.spark.session import explain, use_own_python
from paceline.launchers.spark.tasks import DriverAddress

if TYPE_CHECKING:
    from pyspark import SparkContext
    from pyspark.sql import DataFrame, SparkSession

WAIT_S = 120.0
"""Seconds to wait for free slots, unless engine option `wait` says otherwise."""
_ANSWER_S = 120.0
_END_S = 30.0
_FAILED_END_S = 5.0


def run_stage(
    job: JobSpec, spark: SparkSession, console: Console, *, frame: DataFrame | None = None
) -> Outcome:
    """Run `job` in one barrier stage of session `spark`.

    Args:
        job: What to run; one task per worker.
        spark: The session.
        console: Where the workers' output goes.
        frame: Each worker finds one partition of this DataFrame; None: the stage has no data.
    """
    context = spark.sparkContext
    use_own_python(context)
    num_tasks = job.total_workers

    def run_tasks(driver: DriverAddress) -> None:
        if frame is None:
            task = functools.partial(tasks.plain_task, driver)
            stage = context.parallelize(range(num_tasks), num_tasks).barrier()
            # A shuffle follows: Spark retries a stage before a shuffle as a whole, but not the last stage.
            stage.mapPartitionsWithIndex(task).map(lambda row: (row, row)).partitionBy(1).collect()
        else:
            task = functools.partial(tasks.data_task, driver)
            frame.mapInArrow(task, "nothing long", barrier=True).repartition(1).collect()

    with _shipped(job, context) as code:
        return run_job(job, SparkDriver(job, context, run_tasks, code), console)


@contextlib.contextmanager
def _shipped(job: JobSpec, context: SparkContext) -> Iterator[str | None]:
    """Send `job.ship` to the executors as an archive; yields its name there."""
    if job.ship is None:
        yield None
        return
    name = f"paceline-code-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix="paceline-ship-") as folder:
        archive = shutil.make_archive(f"{folder}/{name}", "zip", job.ship)
        context.addArchive(f"{archive}#{name}")
        yield name


class _TaskConnection:
    """The driver's connection to the supervisor in one task."""

    def __init__(self, connection: wire.Wire, location: WorkerLocation) -> None:
        self.wire = connection
        self.location = location
        self.answers: queue.Queue[dict[str, Any]] = queue.Queue()

    def ask(self, header: dict[str, object], blob: bytes = b"") -> Any:
        """Send a command and wait for its answer."""
        try:
            self.wire.send(header, blob)
            answer = self.answers.get(timeout=_ANSWER_S)
        except (OSError, queue.Empty):
            raise CommError("its Spark executor is gone") from None
        if "refused" in answer:
            raise ConfigError(answer["refused"])
        if "gone" in answer:
            raise CommError("its Spark executor is gone")
        return answer["answer"]


class SparkDriver(Driver):
    """Supervisors in barrier tasks, which connect to this process.

    Args:
        job: What to run.
        context: The context of the session.
        run_tasks: Runs the stage to its end; its tasks connect to the address that it is given.
        code: Name of the archive with the job's code; None: there is none.
    """

    def __init__(
        self,
        job: JobSpec,
        context: SparkContext,
        run_tasks: Callable[[DriverAddress], None],
        code: str | None,
    ) -> None:
        self._job = job
        self._context = context
        self._run_tasks = run_tasks
        self._job_group = f"paceline-{secrets.token_hex(8)}"
        self._connections: dict[int, _TaskConnection] = {}  # by the task's number
        self._attempt: list[_TaskConnection] = []  # those that `gather` has returned
        self._changed = threading.Condition()
        self._events: queue.Queue[tuple[_TaskConnection, int, Event]] = queue.Queue()
        self._stage_error: BaseException | None = None
        self._secret = secrets.token_bytes(32)
        host = context.getConf().get("spark.driver.host", "") or socket.gethostname()
        if str(context.master).startswith("local["):  # all tasks run in this process's own Java
            host = "127.0.0.1"
        self._listener = ThreadedListener(
            socket.create_server((listening_address(host), 0)),
            "driver of the Spark job",
            guard=lambda: wire.acceptor(self._secret),
            serve=self._serve,
            num_expected=job.total_workers,
        )
        address = DriverAddress(host, self._listener.port, self._secret, code)
        self._stage = self._start_stage(address)

    def _start_stage(self, address: DriverAddress) -> threading.Thread:
        from pyspark import InheritableThread

        def body() -> None:
            try:
                self._context.setJobGroup(self._job_group, f"paceline: {self._job.name}", True)
                self._run_tasks(address)
            except BaseException as error:
                self._stage_error = error
            with self._changed:
                self._changed.notify_all()

        thread: threading.Thread = InheritableThread(target=body, daemon=True, name="paceline-stage")
        thread.start()
        return thread

    def _serve(self, sock: socket.socket, guard: Acceptor) -> None:
        """Body of the thread that reads one task's reports."""
        connection, index = wire.Wire(sock), guard.peer
        try:
            hello, _ = connection.receive()
        except (OSError, ProtocolError, ValueError):
            return
        location = WorkerLocation(hello["host"], hello["name"], hello["address"])
        task = _TaskConnection(connection, location)
        with self._changed:
            self._connections[index] = task
            self._changed.notify_all()
        try:
            while True:
                header, blob = connection.receive()
                if "event" in header:
                    self._events.put((task, index, tasks.read_event(header, blob)))
                else:
                    task.answers.put(header)
        except (OSError, ProtocolError, ValueError):
            with self._changed:
                if self._connections.get(index) is task:
                    del self._connections[index]
            task.answers.put({"gone": True})
            self._events.put((task, index, LostEvent("its Spark executor is gone")))
        finally:
            connection.close()

    def gather(self) -> list[WorkerLocation]:
        count, wait_s = self._job.total_workers, parse_wait(self._job, "spark", default=WAIT_S)
        deadline = time.monotonic() + wait_s
        with self._changed:
            while len(self._connections) < count:
                if not self._stage.is_alive():
                    raise CommError(f"engine spark: the stage ended: {explain(self._stage_error)}")
                self._changed.wait(0.5)
                signals.check()
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"engine spark: {len(self._connections)} of {count} tasks started within"
                        f" {wait_s:g} s; a barrier stage needs {count} free slots at once, and the cluster"
                        f" has {self._context.defaultParallelism} cores. Ask for less (-n), or wait longer"
                        " (-o wait=)"
                    )
            self._attempt = [self._connections[i] for i in range(count)]
        return [task.location for task in self._attempt]

    def open_store(self, index: int, secret: str, address: str | None) -> str:
        return str(self._attempt[index].ask({"do": "store", "secret": secret, "address": address}))

    def start(self, index: int, command: StartCommand) -> None:
        values, blob = tasks.write_start_command(command)
        self._attempt[index].ask({"do": "start", "order": values}, blob)

    def poll(self, wait_s: float) -> list[tuple[int, Event]]:
        found: list[tuple[int, Event]] = []
        with contextlib.suppress(queue.Empty):
            while True:
                task, index, event = self._events.get(timeout=0 if found else wait_s)
                if self._attempt[index] is task:
                    found.append((index, event))
        return found

    def stop(self, grace_s: float, attempt: int) -> None:
        self._tell_all({"do": "stop", "grace_s": grace_s, "attempt": attempt})

    def prepare_restart(self) -> None:
        self._tell_all({"do": "finish", "retry": True})
        with self._changed:
            for index, task in list(self._connections.items()):
                if task in self._attempt:
                    del self._connections[index]

    def close(self, *, succeeded: bool) -> None:
        self._tell_all({"do": "finish", "retry": False})
        self._stage.join(_END_S if succeeded else _FAILED_END_S)
        if self._stage.is_alive():
            self._context.cancelJobGroup(self._job_group)
            self._stage.join(_END_S)
        self._listener.close()

    def _tell_all(self, header: dict[str, object]) -> None:
        with self._changed:
            connected = list(self._connections.values())
        for task in connected:
            with contextlib.suppress(OSError):
                task.wire.send(header)
