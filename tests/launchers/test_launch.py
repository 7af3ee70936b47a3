"""`paceline.launch`: a function on several processes, its results and its errors."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import paceline
from paceline.launchers.function_call import FunctionCall

pytestmark = pytest.mark.xdist_group("processes")


def rank() -> int:
    return int(os.environ["RANK"])


def total(offset: int) -> tuple[int, float]:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    value = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(value)
    dist.destroy_process_group()
    return rank(), value.item()


def multiply(own_rank: int, factor: int) -> int:
    return own_rank * factor


def fail(kind: str) -> None:
    if rank() == 1:
        if kind == "dies":
            os._exit(9)
        raise {"key": KeyError, "config": paceline.ConfigError}[kind]("boom")
    time.sleep(300)


def unpicklable() -> Any:
    return threading.Lock()


def test_results_in_order_of_rank() -> None:
    assert paceline.launch(total, num_workers=3, args=(10,)) == [(0, 33.0), (1, 33.0), (2, 33.0)]


def leave(rank: int, how: str) -> int:
    if rank == 0:
        sys.exit(0) if how == "sys.exit" else os._exit(0)
    return 10 * rank


def test_a_worker_that_leaves_keeps_its_place_in_the_results() -> None:
    assert paceline.launch(leave, num_workers=3, args=("sys.exit",)) == [None, 10, 20]
    with pytest.raises(paceline.WorkerFailed, match="rank 0 ended with exit code 0 and left no result"):
        paceline.launch(leave, num_workers=3, args=("os._exit",))


def test_rank_is_passed_to_a_function_that_takes_one_more() -> None:
    assert paceline.launch(multiply, num_workers=2, args=(7,)) == [0, 7]


@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        ("key", paceline.WorkerFailed, "KeyError: 'boom'"),
        ("config", paceline.ConfigError, "boom"),
        ("dies", paceline.WorkerFailed, "exit code 9"),
    ],
)
def test_errors_name_the_rank_and_carry_the_traceback(kind: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match="rank 1 of 2") as caught:
        paceline.launch(fail, num_workers=2, args=(kind,))
    assert said in str(caught.value)
    if kind != "dies":
        assert "in fail" in str(caught.value), "the worker's traceback is part of the message"
        assert type(caught.value.__cause__) is {"key": KeyError, "config": paceline.ConfigError}[kind]


def test_result_that_cannot_travel() -> None:
    with pytest.raises(paceline.WorkerFailed, match="of type lock, cannot be pickled"):
        paceline.launch(unpicklable, num_workers=1)


@pytest.mark.parametrize(
    ("fn", "args", "said"),
    [
        (lambda: 1, (), "top level of a module"),
        (multiply, (1, 2, 3), "args has 3 values"),
        (multiply, "no tuple", "args must be a tuple"),
        (3, (), "a function expected"),
    ],
)
def test_bad_calls(fn: Any, args: Any, said: str) -> None:
    with pytest.raises(paceline.ConfigError, match=said):
        FunctionCall(fn, args)
    with pytest.raises(paceline.ConfigError, match="at least 1"):
        paceline.launch(rank, num_workers=0)


def test_works_from_a_thread() -> None:
    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.append(paceline.launch(multiply, num_workers=2, args=(2,)))
    )
    thread.start()
    thread.join(60)
    assert results == [[0, 2]]


def test_script_without_main_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import paceline\ndef f():\n    return 1\npaceline.launch(f, num_workers=2)\n")
    done = subprocess.run(
        [sys.executable, str(script)], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert "if __name__ == '__main__'" in done.stderr


WITHOUT_A_FILE = "import paceline\ndef f():\n    return 1\nprint(paceline.launch(f, num_workers=2))\n"


@pytest.mark.parametrize("how", ["-c", "standard input"])
def test_functions_that_no_file_has_are_refused(how: str) -> None:
    given = ["-c", WITHOUT_A_FILE] if how == "-c" else ["-"]
    done = subprocess.run(
        [sys.executable, *given],
        input=WITHOUT_A_FILE,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "ConfigError: launch(f): it is defined where new processes cannot import it" in last, done.stderr
    assert done.stdout == "", "no worker was started"


def test_a_main_script_without_a_file_may_launch_what_a_module_has(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("def f(x):\n    return 2 * x\n")
    done = subprocess.run(
        [sys.executable, "-"],
        input="import beside, paceline\nprint(paceline.launch(beside.f, num_workers=2, args=(3,)))\n",
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "[6, 6]\n", done.stderr


def test_functions_of_the_main_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, paceline\nVALUE = 3\ndef f(x):\n    print('hello')\n    return VALUE * x\n"
        "if __name__ == '__main__':\n    print(paceline.launch(f, num_workers=2, args=(2,)))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], check=False, capture_output=True, text=True, timeout=60
    )
    assert sorted(done.stdout.splitlines()) == ["[0] hello", "[1] hello", "[6, 6]"], done.stderr
