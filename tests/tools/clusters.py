"""Real clusters on this machine, in processes of their own, surely stopped."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_bodies as bodies
import pytest
from engine_bodies import EPOCHS, SPARK_SETTINGS

import paceline
from paceline.launchers.processes import watchdog

# Where workers find the functions that tests send them by name.
_HERE = Path(__file__).resolve().parent
TESTS = os.pathsep.join(
    str(p) for p in (_HERE, _HERE.parent / "compat", _HERE.parent / "launchers" / "engines")
)


@pytest.fixture(scope="session")
def local() -> list[dict[str, Any]]:
    """The same training on this host: what an engine must reproduce."""
    return paceline.launch(bodies.all_strategies, num_workers=2, args=(EPOCHS,))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run with checkpoints, which nobody kills."""
    folder = str(tmp_path_factory.mktemp("undisturbed"))
    return paceline.launch(
        bodies.with_a_kill, num_workers=2, args=(5, -1, folder), checkpoint=f"{folder}/checkpoint"
    )[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def servers() -> Iterator[tuple[dict[str, str], Path]]:
    """An environment that marks a cluster's processes, and its folder; at the end both are gone.

    Paceline's own guard ends the marked processes, also if these tests are killed.
    """
    token = secrets.token_hex(16)
    folder = Path(tempfile.mkdtemp(prefix="pl-", dir="/tmp"))  # short: Ray puts sockets there
    with subprocess.Popen(
        [sys.executable, "-I", "-S", watchdog.__file__, token],
        stdin=subprocess.PIPE,
        start_new_session=True,
    ) as watch:
        try:
            yield {**os.environ, watchdog.VARIABLE: token}, folder
        finally:
            assert watch.stdin is not None
            watch.stdin.close()  # unlike a dismissal: it sweeps
            watch.wait(30)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A Ray cluster with two CPUs."""
    pytest.importorskip("ray", reason="the extra paceline[ray] is not installed")
    before = os.environ.get("RAY_AUTH_MODE")
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with servers() as (environment, folder):
        port = free_port()
        tests = TESTS
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))
        subprocess.run(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}"),
                *("--node-ip-address=127.0.0.1", "--num-cpus=2", "--include-dashboard=false"),
                *(f"--temp-dir={folder}", f"--object-store-memory={128 << 20}", "--disable-usage-stats"),
            ],
            env=environment,
            check=True,
            timeout=120,
            stdout=subprocess.DEVNULL,
        )
        yield f"127.0.0.1:{port}"
    if before is None:
        del os.environ["RAY_AUTH_MODE"]
    else:
        os.environ["RAY_AUTH_MODE"] = before


@pytest.fixture(scope="session")
def spark_master() -> Iterator[str]:
    """A standalone Spark cluster: a master and two workers, as three processes."""
    pytest.importorskip("pyspark", reason="the extra paceline[spark] is not installed")
    import pyspark

    home = Path(pyspark.__file__).parent
    with servers() as (environment, folder):
        tests = TESTS
        environment |= {
            "SPARK_HOME": str(home),
            "SPARK_LOCAL_IP": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")])),
        }
        port = free_port()
        url = f"spark://127.0.0.1:{port}"
        place = ("--host", "127.0.0.1", "--webui-port", "0")
        commands = [("master.Master", *place, "--port", str(port))]
        for i in range(2):
            work = ("--cores", "2", "--memory", "2g", "--work-dir", str(folder / f"worker{i}"), url)
            commands.append(("worker.Worker", *place, *work))
        spark_class = str(home / "bin" / "spark-class")
        with open(folder / "log", "wb") as log:
            for command in commands:
                subprocess.Popen(
                    [
                        spark_class,
                        f"org.apache.spark.deploy.{command[0]}",
                        *command[1:],
                    ],
                    env=environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        yield url


@pytest.fixture(scope="session")
def spark(spark_master: str) -> Iterator[Any]:
    """A session with two executors of one core, on different workers."""
    from pyspark import SparkConf
    from pyspark.sql import SparkSession

    conf = SparkConf().setAll(list(SPARK_SETTINGS.items())).setMaster(spark_master).setAppName("tests")
    session = SparkSession.builder.config(conf=conf).getOrCreate()
    try:
        yield session
    finally:
        session.stop()
        gateway = session.sparkContext._gateway
        gateway.shutdown()
        gateway.proc.stdin.close()
        gateway.proc.wait(20)
