"""What Ray and Spark share, without either: supervisors in this process, real workers."""

from __future__ import annotations

import io
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from paceline.comm.security.authentication import authenticate
from paceline.errors import CommError, ConfigError, ProtocolError
from paceline.launchers.function_call import FunctionCall
from paceline.launchers.job import JobSpec
from paceline.launchers.processes.console import Console
from paceline.launchers.processes.outcome import Outcome
from paceline.launchers.remote import wire
from paceline.launchers.remote.attempts import run_job
from paceline.launchers.remote.driver import Driver
from paceline.launchers.remote.events import Event, ExitEvent
from paceline.launchers.remote.supervisor import StartCommand, Supervisor, WorkerLocation

pytestmark = pytest.mark.xdist_group("processes")


class LocalDriver(Driver):
    """Two hosts that are one."""

    def __init__(self, hosts: tuple[str, ...] = ("b", "a", "b")) -> None:
        self.supervisors = [Supervisor() for _ in hosts]
        self.hosts = hosts
        self.was_closed = False

    def gather(self) -> list[WorkerLocation]:
        return [WorkerLocation(h, f"host {h}", "127.0.0.1") for h in self.hosts]

    def open_store(self, index: int, secret: str, address: str | None) -> str:
        return self.supervisors[index].open_store(secret, address)

    def start(self, index: int, command: StartCommand) -> None:
        self.supervisors[index].start(command)

    def poll(self, wait_s: float) -> list[tuple[int, Event]]:
        return [(i, e) for i, k in enumerate(self.supervisors) for e in k.events(wait_s / 10)]

    def stop(self, grace_s: float, attempt: int) -> None:
        for supervisor in self.supervisors:
            threading.Thread(target=supervisor.stop, args=(grace_s, attempt), daemon=True).start()

    def prepare_restart(self) -> None:
        pass

    def close(self, *, succeeded: bool) -> None:
        for supervisor in self.supervisors:
            supervisor.close()
        self.was_closed = True


def run(fn: Any, *args: Any, **values: Any) -> tuple[Outcome, list[Any], str]:
    text = io.StringIO()
    with FunctionCall(fn, args) as call:
        job = JobSpec(command=call.command, call=call, num_workers=3, **values)
        driver = LocalDriver()
        outcome = run_job(job, driver, Console(text, text))
        assert driver.was_closed
        return outcome, call.results() if outcome.exit_code == 0 else [], text.getvalue()


def placed() -> tuple[str, ...]:
    print("hello")
    return tuple(
        os.environ[n] for n in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "WORLD_SIZE")
    )


def killed_once(folder: str) -> str:
    if os.environ["RANK"] == "2" and not (marker := Path(folder) / "killed").exists():
        marker.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    elif not (Path(folder) / "killed").exists():
        time.sleep(60)
    return os.environ["TORCHELASTIC_RESTART_COUNT"]


def killed_always() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raises_late() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("the cause")
    time.sleep(60)


def test_ranks_on_one_host_are_neighbours_and_lines_have_their_rank() -> None:
    outcome, results, text = run(placed)
    assert outcome.exit_code == 0
    assert results == [("0", "0", "2", "0", "3"), ("1", "1", "2", "0", "3"), ("2", "0", "1", "1", "3")]
    assert sorted(text.splitlines()) == ["[0] hello", "[1] hello", "[2] hello"]


def test_a_killed_worker_is_a_loss_and_all_start_again(tmp_path: Path) -> None:
    outcome, results, text = run(killed_once, str(tmp_path))
    assert (outcome.exit_code, results) == (0, ["1", "1", "1"])
    assert "rank 2 of 3" in text and "restarting all workers; 3 restarts were left" in text


def test_restarts_are_bounded() -> None:
    outcome, _, text = run(killed_always, max_restarts=1)
    assert outcome.exit_code == 128 + signal.SIGKILL
    assert text.count("restarting all workers") == 1


def test_a_failing_script_is_not_a_loss() -> None:
    began = time.monotonic()
    outcome, _, text = run(raises_late)
    assert time.monotonic() - began < 50, "the others were stopped"
    assert outcome.exit_code == 1 and outcome.failure is not None
    assert outcome.failure.rank == 1 and outcome.failure.error_line == "ValueError: the cause"
    assert "restarting" not in text


def test_a_folder_that_is_not_there_is_refused() -> None:
    supervisor = Supervisor()
    try:
        with pytest.raises(ConfigError, match="rank 0: folder /no/such is not on host"):
            supervisor.start(StartCommand(0, 0, ("-c", ""), True, {}, "/no/such", None))
        with pytest.raises(ConfigError, match="cannot start 'no-such-program'"):
            supervisor.start(StartCommand(0, 0, ("no-such-program",), False, {}, None, None))
    finally:
        supervisor.close()


@pytest.mark.parametrize("secret", [b"right" * 8, b"wrong" * 8])
def test_the_wire_lets_in_only_who_knows_the_secret(secret: bytes) -> None:
    refused = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            sock, _ = server.accept()
            try:
                guard = wire.acceptor(b"right" * 8)
                authenticate(sock, guard, timeout_s=10)
                link = wire.Wire(sock)
                header, blob = link.receive()
                link.send({**header, "index": guard.peer}, blob * 2)
            except (ProtocolError, OSError) as error:
                refused.append(error)
                sock.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        port = server.getsockname()[1]
        if secret.startswith(b"right"):
            link = wire.connect("127.0.0.1", port, secret, 5)
            link.send({"a": "ü"}, b"blob")
            assert link.receive() == ({"a": "ü", "index": 5}, b"blobblob")
            link.close()
        else:
            with pytest.raises((ProtocolError, CommError)):
                wire.connect("127.0.0.1", port, secret, 5)
        thread.join(20)
    assert bool(refused) == secret.startswith(b"wrong")


def leaves_progress(folder: str) -> str:
    from paceline.launchers.function_call import keep_progress, progress

    found = progress()
    if found is None and os.environ["RANK"] == "0":
        keep_progress(b"half way")
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    elif found is None:
        time.sleep(60)
    return (found or b"").decode()


def test_progress_reaches_every_worker_of_the_next_attempt(tmp_path: Path) -> None:
    assert run(leaves_progress, str(tmp_path))[1] == ["half way"] * 3


def test_a_late_stop_does_not_end_the_next_attempt() -> None:
    supervisor = Supervisor()
    try:
        supervisor.start(StartCommand(0, 1, ("-c", "import time; time.sleep(1)"), True, {}, None, None))
        supervisor.stop(0.0, attempt=0)
        ended = []
        deadline = time.monotonic() + 30
        while not ended and time.monotonic() < deadline:
            ended = [e.reason for e in supervisor.events(0.5) if isinstance(e, ExitEvent)]
        assert [e.exit_code for e in ended] == [0]
    finally:
        supervisor.close()
