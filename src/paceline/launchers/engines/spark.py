"""Workers as one barrier stage of a Spark job: one task per worker, all at once, on any cluster manager.

A task keeps a process and obeys the launcher, which is the Spark driver. When workers are lost, every task
fails, Spark runs the stage again, and the workers resume from the job's last checkpoint.
"""

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
from types import MappingProxyType
from typing import Any

from paceline.errors import CommError, ConfigError, ProtocolError
from paceline.launchers.job import JobSpec
from paceline.launchers.processes import signals
from paceline.launchers.processes.console import Console
from paceline.launchers.remote import driver, wire
from paceline.launchers.remote.supervisor import Event, Member, Order
from paceline.launchers.runner import Engine, Outcome
from paceline.launchers.spark import tasks
from paceline.launchers.spark.session import explain, session, use_own_python

_WAIT_S = 120.0
_ANSWER_S = 120.0
_END_S = 30.0


class Spark(Engine):
    """A barrier stage on the active Spark session, or on one made for the job."""

    extra = "spark"
    packages = ("pyspark", "pandas", "pyarrow")
    options = MappingProxyType(
        {
            "master": "spark://HOST:7077, yarn, local[4] …; default: as Spark is configured",
            "wait": f"seconds to wait for free slots (default {_WAIT_S:g})",
            "spark.…": "any setting of Spark",
            "*": "",
        }
    )
    can_ship = True

    @property
    def dumps(self) -> Callable[[Any], bytes]:
        """Functions of scripts and notebooks travel by value."""
        from pyspark import cloudpickle

        dumps: Callable[[Any], bytes] = cloudpickle.dumps
        return dumps

    def check(self, job: JobSpec) -> None:
        """Options are `master`, `wait` and Spark's own settings; executors are Spark's business."""
        super().check(job)
        driver.check(job, self.name)
        if job.nodes > 1:
            raise ConfigError(
                f"engine spark: it places tasks where slots are free; give -n {job.total_workers} and leave"
                " out --nodes"
            )
        if job.resources is not None and (job.resources.gpus or job.resources.memory_bytes):
            raise ConfigError(
                "engine spark: of --resources only cpus= is a task's; memory and gpus belong to executors:"
                " -o spark.executor.memory=…, -o spark.task.resource.gpu.amount=…"
            )
        for name in job.engine_options:
            if name not in ("master", "wait") and not name.startswith("spark."):
                raise ConfigError(f"engine spark: option {name}: master, wait or spark.… expected")
        driver.wait_s(job, self.name, default=_WAIT_S)

    def run(self, job: JobSpec, *, console: Console) -> Outcome:
        """Run `job` in a barrier stage without data, and leave no stage behind."""
        try:
            with session(job, console) as spark:
                return run_stage(job, spark, console)
        except (KeyboardInterrupt, signals.Stopped) as error:  # while Spark was starting
            number = getattr(error, "sigval", signals.ENDING[1])
            return Outcome(128 + number, signal=number)


def run_stage(job: JobSpec, spark: Any, console: Console, *, frame: Any = None) -> Outcome:
    """Run `job` on session `spark`; with `frame`, each worker finds one partition of that DataFrame."""
    context = spark.sparkContext
    use_own_python(context)
    num_tasks = job.total_workers

    def collect(launcher: tasks.Launcher) -> None:
        if frame is None:
            task = functools.partial(tasks.plain_task, launcher)
            stage = context.parallelize(range(num_tasks), num_tasks).barrier()
            # A stage before a shuffle: Spark runs it again as a whole; a last one it would give up.
            stage.mapPartitionsWithIndex(task).map(lambda row: (row, row)).partitionBy(1).collect()
        else:
            task = functools.partial(tasks.data_task, launcher)
            frame.mapInArrow(task, "nothing long", barrier=True).repartition(1).collect()

    with _shipped(job, context) as code:
        return driver.work(job, _SparkCrew(job, context, collect, code), console)


@contextlib.contextmanager
def _shipped(job: JobSpec, context: Any) -> Iterator[str | None]:
    """Send `job.ship` along as an archive; the name under which tasks find it."""
    if job.ship is None:
        yield None
        return
    name = f"paceline-code-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix="paceline-ship-") as folder:
        archive = shutil.make_archive(f"{folder}/{name}", "zip", job.ship)
        context.addArchive(f"{archive}#{name}")
        yield name


class _Link:
    """The launcher's view of one task."""

    def __init__(self, connection: wire.Wire, member: Member) -> None:
        self.wire, self.member = connection, member
        self.answers: queue.Queue[dict[str, Any]] = queue.Queue()

    def ask(self, header: dict[str, Any], blob: bytes = b"") -> Any:
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


class _SparkCrew(driver.Crew):
    """Keepers in barrier tasks, which connect to this process."""

    def __init__(
        self, job: JobSpec, context: Any, collect: Callable[[tasks.Launcher], None], code: str | None
    ) -> None:
        self._job, self._context = job, context
        self._group = f"paceline-{secrets.token_hex(8)}"
        self._links: dict[int, _Link] = {}
        self._joined = threading.Condition()
        self._events: queue.Queue[tuple[_Link, int, Event]] = queue.Queue()
        self._failure: BaseException | None = None
        self._is_closing = False
        self._secret = secrets.token_bytes(32)
        host = context.getConf().get("spark.driver.host", "") or socket.gethostname()
        self._server = socket.create_server(("", 0))
        launcher = tasks.Launcher(host, self._server.getsockname()[1], self._secret, code)
        threading.Thread(target=self._accept, daemon=True, name="paceline-accept").start()
        self._stage = self._in_background(collect, launcher)

    def _in_background(self, collect: Callable[[tasks.Launcher], None], launcher: Any) -> threading.Thread:
        from pyspark import InheritableThread

        def body() -> None:
            try:
                self._context.setJobGroup(self._group, f"paceline: {self._job.name}", True)
                collect(launcher)
            except BaseException as error:
                self._failure = error
            with self._joined:
                self._joined.notify_all()

        thread: threading.Thread = InheritableThread(target=body, daemon=True, name="paceline-stage")
        thread.start()
        return thread

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        """Body of the thread that reads one task's reports."""
        try:
            connection, index = wire.accept(sock, self._secret)
            hello, _ = connection.receive()
        except (OSError, ProtocolError, ValueError):
            sock.close()
            return
        link = _Link(connection, Member(hello["host"], hello["name"], hello["address"]))
        with self._joined:
            self._links[index] = link
            self._joined.notify_all()
        try:
            while True:
                header, blob = connection.receive()
                if "event" in header:
                    self._events.put((link, index, tasks.read_event(header, blob)))
                else:
                    link.answers.put(header)
        except (OSError, ProtocolError, ValueError):
            with self._joined:
                if self._links.get(index) is link:
                    del self._links[index]
            link.answers.put({"gone": True})
            self._events.put((link, index, driver.gone("its Spark executor is gone")))
        finally:
            connection.close()

    def gather(self, attempt: int) -> list[Member]:
        count, wait_s = self._job.total_workers, driver.wait_s(self._job, "spark", default=_WAIT_S)
        deadline = time.monotonic() + wait_s
        with self._joined:
            while len(self._links) < count:
                if not self._stage.is_alive():
                    raise CommError(f"engine spark: the stage ended: {explain(self._failure)}")
                self._joined.wait(0.5)
                signals.check()
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"engine spark: {len(self._links)} of {count} tasks started within {wait_s:g} s; a"
                        f" barrier stage needs {count} free slots at once, and the cluster has"
                        f" {self._context.defaultParallelism} cores. Ask for less (-n), or wait longer"
                        " (-o wait=)"
                    )
            self._current = [self._links[i] for i in range(count)]
        return [link.member for link in self._current]

    def open_store(self, index: int) -> int:
        return int(self._current[index].ask({"do": "store"}))

    def start(self, index: int, order: Order) -> None:
        values, blob = tasks.write_order(order)
        self._current[index].ask({"do": "start", "order": values}, blob)

    def poll(self, wait_s: float) -> list[tuple[int, Event]]:
        found: list[tuple[int, Event]] = []
        with contextlib.suppress(queue.Empty):
            while True:
                link, index, event = self._events.get(timeout=0 if found else wait_s)
                if self._current[index] is link:
                    found.append((index, event))
        return found

    def stop(self, grace_s: float, attempt: int) -> None:
        self._tell({"do": "stop", "grace_s": grace_s, "attempt": attempt})

    def prepare_restart(self) -> None:
        self._tell({"do": "finish", "retry": True})
        with self._joined:
            for index, link in list(self._links.items()):
                if link in self._current:
                    del self._links[index]

    def close(self, *, succeeded: bool) -> None:
        self._tell({"do": "finish", "retry": False})
        self._stage.join(_END_S if succeeded else 5.0)
        if self._stage.is_alive():
            self._context.cancelJobGroup(self._group)
            self._stage.join(_END_S)
        self._server.close()

    def _tell(self, header: dict[str, Any]) -> None:
        with self._joined:
            links = list(self._links.values())
        for link in links:
            with contextlib.suppress(OSError):
                link.wire.send(header)
