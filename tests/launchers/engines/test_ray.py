"""Jobs on a real Ray cluster: the same results as on this host, losses survived, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import engine_bodies as bodies
import pytest
from engine_bodies import EPOCHS

import paceline

pytestmark = [pytest.mark.engines, pytest.mark.xdist_group("engines")]

ray = pytest.importorskip("ray", reason="the extra paceline[ray] is not installed")

PACELINE = (sys.executable, "-m", "paceline.cli.main")


@pytest.fixture(autouse=True)
def nothing_is_left(ray_address: str) -> Any:
    """After each test: no living actor, no placement group, all CPUs free, no connection."""
    yield
    assert not ray.is_initialized()
    ray.init(address=ray_address, log_to_driver=False, logging_level="ERROR")
    try:
        deadline = time.monotonic() + 20
        while left := _left():
            assert time.monotonic() < deadline, left
            time.sleep(0.2)
    finally:
        ray.shutdown()


def _left() -> dict[str, Any]:
    from ray._private.state import actors

    own = "AutoscalingCoordinator"  # Ray Train starts it, once per cluster
    alive = [a["Name"] for a in actors().values() if a["State"] != "DEAD" and a["Name"] != own]
    groups = [g["name"] for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
    free = ray.available_resources().get("CPU", 0)
    return {} if not alive and not groups and free == 2 else {"actors": alive, "groups": groups, "CPU": free}


def launch(address: str, fn: Any, *args: Any, **keywords: Any) -> list[Any]:
    return paceline.launch(
        fn, num_workers=2, args=args, on="ray", engine_options={"address": address}, **keywords
    )


def test_digits_train_as_on_this_host(ray_address: str, local: list[dict[str, Any]]) -> None:
    remote = launch(ray_address, bodies.all_strategies, EPOCHS)
    assert [r["all_reduce"]["rank"] for r in remote] == [0, 1]
    for strategy in bodies.STRATEGIES:
        here, there = local[0][strategy], remote[0][strategy]
        assert there["tested"] >= 0.95
        assert abs(here["accuracy"] - there["accuracy"]) <= 0.005, strategy
        assert remote[1][strategy]["digest"] == there["digest"], "replicas agree"
    assert local[0]["all_reduce"]["digest"] == remote[0]["all_reduce"]["digest"], "bit for bit"


@pytest.mark.parametrize("victim", [0, 1], ids=["worker", "actor"])
def test_a_killed_actor_is_restarted_at_the_last_checkpoint(
    ray_address: str, undisturbed: dict[str, Any], tmp_path: Path, victim: int
) -> None:
    marker = tmp_path / "killed"
    results = launch(
        ray_address, bodies.with_a_kill, 5, victim, str(marker), checkpoint=str(tmp_path / "checkpoint")
    )
    assert marker.exists()
    assert [r["restarts"] for r in results] == [1, 1]
    assert results[0]["digest"] == undisturbed["digest"], "as if nothing had happened"
    assert not Path(f"/proc/{marker.read_text()}").exists(), "the worker ends with its actor"


def test_an_error_names_the_rank_and_ends_the_job(ray_address: str) -> None:
    with pytest.raises(paceline.WorkerFailed, match=r"(?s)rank 1 of 2.*KeyError: 'boom'") as caught:
        launch(ray_address, bodies.raise_on_rank_1)
    assert isinstance(caught.value.__cause__, KeyError)


def test_closures_travel_and_the_callers_connection_stays(ray_address: str) -> None:
    factor = 7
    ray.init(address=ray_address, log_to_driver=False, logging_level="ERROR")
    try:
        assert paceline.launch(lambda rank: rank * factor, num_workers=2, on="ray") == [0, 7]
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def test_command_line(ray_address: str, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "lesson.py").write_text("word = 'shipped'\n")
    (tmp_path / "code" / "script.py").write_text(
        "import os, sys, lesson\n"
        "env = os.environ\n"
        "print(lesson.word, env['RANK'], env['COLOUR'], env['OMP_NUM_THREADS'], sys.argv[1])\n"
        "sys.exit(3 if os.environ['RANK'] == '1' else 0)\n"
    )
    done = run(
        ray_address,
        "--ship",
        str(tmp_path / "code"),
        "--env",
        "COLOUR=red",
        "--threads",
        "2",
        "script.py",
        "x",
    )
    assert done.returncode == 3, done.stderr
    for rank in (0, 1):
        assert f"[{rank}] shipped {rank} red 2 x\n" in done.stdout
    assert "rank 1 of 2" in done.stderr and "exit code 3" in done.stderr


def test_no_room_is_explained(ray_address: str) -> None:
    with pytest.raises(paceline.ConfigError, match=r"no room for 2 workers of .*'CPU': 3"):
        paceline.launch(
            bodies.environment,
            num_workers=2,
            on="ray",
            resources=paceline.launchers.job.Resources(cpus=3),
            engine_options={"address": ray_address, "wait": "2"},
        )
    with pytest.raises(paceline.ConfigError, match=r"no Ray cluster answers at 127\.0\.0\.1:9"):
        launch("127.0.0.1:9", bodies.environment)


def test_fewer_workers_within_the_bounds(ray_address: str) -> None:
    found = paceline.launch(
        bodies.environment,
        num_workers=4,
        on="ray",
        min_workers=1,
        environment={"COLOUR": "blue"},
        engine_options={"address": ray_address, "wait": "3"},
    )
    assert [f[1:] for f in found] == [("blue", "1")] * 2, "two of four fit"


def test_ctrl_c_stops_everything(ray_address: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, time\nprint('up', os.getpid(), flush=True)\ntime.sleep(300)\n")
    with subprocess.Popen(
        [*PACELINE, "run", "--on", "ray", "-o", f"address={ray_address}", "-n", "2", str(script)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        pids = [int(process.stdout.readline().split()[-1]) for _ in range(2)]
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_inside_ray_train(ray_address: str, local: list[dict[str, Any]], tmp_path: Path) -> None:
    """`paceline.init` in a `train_loop_per_worker` finds the ranks that Ray Train made."""
    import ray.train
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    def loop(config: dict[str, Any]) -> None:
        job = paceline.init(seed=0)
        result = bodies.train_digits(job, "all_reduce", config["epochs"])
        ray.train.report({"accuracy": result["accuracy"]})
        if job.is_main:
            (tmp_path / "result.json").write_text(json.dumps({**result, "size": job.size}))

    ray.init(address=ray_address, log_to_driver=False, logging_level="ERROR")
    try:
        trainer = TorchTrainer(
            loop,
            train_loop_config={"epochs": EPOCHS},
            scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(storage_path=str(tmp_path), name="digits"),
        )
        trainer.fit()
    finally:
        ray.shutdown()
    metrics = json.loads((tmp_path / "result.json").read_text())
    assert metrics["size"] == 2
    assert metrics["digest"] == local[0]["all_reduce"]["digest"]


def run(address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*PACELINE, "run", "--on", "ray", "-o", f"address={address}", "-n", "2", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
