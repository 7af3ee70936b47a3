"""Jobs on a real Spark standalone cluster: the same results as here, losses survived, nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import engine_bodies as bodies
import pytest
from engine_bodies import EPOCHS, SPARK_SETTINGS

import paceline

pytestmark = [pytest.mark.engines, pytest.mark.xdist_group("engines")]

pytest.importorskip("pyspark", reason="the extra paceline[spark] is not installed")

PACELINE = (sys.executable, "-m", "paceline.cli.main")


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Any:
    """After each test: no job of the session is running."""
    yield
    if "spark" in request.fixturenames:
        tracker = request.getfixturevalue("spark").sparkContext.statusTracker()
        deadline = time.monotonic() + 20
        while tracker.getActiveJobsIds() or tracker.getActiveStageIds():
            assert time.monotonic() < deadline, "a stage is still running"
            time.sleep(0.2)


def launch(fn: Any, *args: Any, **keywords: Any) -> list[Any]:
    return paceline.launch(fn, num_workers=2, args=args, on="spark", **keywords)


def test_digits_train_as_on_this_host(spark: Any, local: list[dict[str, Any]]) -> None:
    remote = launch(bodies.all_strategies, EPOCHS)
    assert [r["all_reduce"]["rank"] for r in remote] == [0, 1]
    for strategy in bodies.STRATEGIES:
        here, there = local[0][strategy], remote[0][strategy]
        assert there["tested"] >= 0.95
        assert abs(here["accuracy"] - there["accuracy"]) <= 0.005, strategy
        assert remote[1][strategy]["digest"] == there["digest"], "replicas agree"
    assert local[0]["all_reduce"]["digest"] == remote[0]["all_reduce"]["digest"], "bit for bit"


@pytest.mark.parametrize(
    "victim",
    [pytest.param(0, marks=pytest.mark.exhaustive), 3],
    ids=["worker", "executor"],
)
def test_a_killed_executor_makes_spark_run_the_stage_again(
    spark: Any, undisturbed: dict[str, Any], tmp_path: Path, victim: int
) -> None:
    marker = tmp_path / "killed"
    results = launch(bodies.with_a_kill, 5, victim, str(marker), checkpoint=str(tmp_path / "checkpoint"))
    assert marker.exists()
    assert [r["restarts"] for r in results] == [1, 1]
    assert results[0]["digest"] == undisturbed["digest"], "as if nothing had happened"
    assert not Path(f"/proc/{marker.read_text()}").exists(), "the worker ends with its executor"


def test_an_error_names_the_rank_and_ends_the_stage(spark: Any) -> None:
    with pytest.raises(paceline.WorkerFailed, match=r"(?s)rank 1 of 2.*KeyError: 'boom'") as caught:
        launch(bodies.raise_on_rank_1)
    assert isinstance(caught.value.__cause__, KeyError)


def test_too_few_slots_are_explained(spark: Any) -> None:
    with pytest.raises(paceline.PacelineError, match="barrier stage needs 3 free slots"):
        paceline.launch(bodies.environment, num_workers=3, on="spark", engine_options={"wait": "3"})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"master": "spark://127.0.0.1:9"}, "no Spark master answers at spark://127.0.0.1:9: .*refused"),
        ({"master": "spark://127.0.0.1"}, "spark://HOST:PORT expected"),
        ({"master": "sparc"}, "Spark did not start: Master must"),
        (
            {"master": "local[2]", "spark.executor.memory": "much"},
            "Executor memory must be a positive number",
        ),
        ({"wait": "nan"}, "option wait=nan: seconds from 0 up expected"),
        ({"memory": "1g"}, "option memory: master, wait or spark"),
    ],
)
def test_what_spark_refuses_is_said_in_a_line(tmp_path: Path, options: dict[str, str], said: str) -> None:
    (tmp_path / "script.py").write_text("")
    words = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    done = subprocess.run(
        [*PACELINE, "run", "--on", "spark", "-n", "2", *words, "script.py"],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert re.search(said, line), line


def test_command_line_ships_code_and_ctrl_c_stops_everything(spark_master: str, tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "lesson.py").write_text("word = 'shipped'\n")
    (code / "script.py").write_text(
        "import os, time, lesson\n"
        "print(lesson.word, os.environ['COLOUR'], os.getpid(), flush=True)\n"
        "time.sleep(300)\n"
    )
    options = [f"master={spark_master}", *(f"{n}={v}" for n, v in SPARK_SETTINGS.items())]
    with subprocess.Popen(
        [
            *(*PACELINE, "run", "--on", "spark", "-n", "2", "--env", "COLOUR=red", "--ship", str(code)),
            *[part for option in options for part in ("-o", option)],
            "script.py",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        lines = [process.stdout.readline().split() for _ in range(2)]
        assert sorted(line[:3] for line in lines) == [[f"[{r}]", "shipped", "red"] for r in (0, 1)]
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(90) == 130
        assert "Traceback" not in process.stderr.read()
    assert not [line[3] for line in lines if Path(f"/proc/{line[3]}").exists()]
