"""`paceline.compat.spark.fit` on a real cluster: both kinds of averaging, losses, bad input."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import paceline
from paceline.compat.spark import fit
from paceline.tasks.load import load
from paceline.tasks.task import Task

pytestmark = [pytest.mark.engines, pytest.mark.xdist_group("engines")]

pytest.importorskip("pyspark", reason="the extra paceline[spark] is not installed")

ROOT = Path(__file__).resolve().parents[2]
MNIST = Path(os.environ.get("PACELINE_SHARED", ROOT.parent / "shared")) / "data" / "mnist.npz"


def frame_of(spark: Any, images: Any, labels: Any, partitions: int = 2) -> Any:
    """Rows of (image bytes or list, label) in `partitions` partitions, made on the driver without pandas."""
    import pyarrow as pa

    array = pa.array([i.tobytes() for i in images] if images.dtype == np.uint8 else list(images))
    table = pa.table({"features": array, "label": pa.array(labels)})
    return spark.createDataFrame(table).repartition(partitions).cache()


@pytest.fixture(scope="module")
def digits(spark: Any) -> Any:
    task = load("digits")
    x, y = task.train_set.tensors
    frame = frame_of(spark, x.numpy(), y.numpy())
    assert frame.count() == 1437
    return frame


def parameters(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_the_driver_averages_as_the_collectives_do(digits: Any) -> None:
    strategy = "local_sgd(period=8, average_optimizer=true)"
    by_collective = fit(digits, "digits", strategy=strategy, epochs=3)
    by_driver = fit(digits, "digits", strategy=strategy, epochs=3, averaging="driver", depth=2)
    torch.testing.assert_close(
        parameters(by_driver.model), parameters(by_collective.model), rtol=1e-4, atol=1e-5
    )
    epochs = [[row["epoch"] for row in fitted.history] for fitted in (by_collective, by_driver)]
    assert epochs == [[1, 2, 3], [1, 2, 3]]
    assert by_collective.history[-1]["accuracy"] >= 0.93


@pytest.mark.exhaustive
def test_more_partitions_than_executors_need_a_tree(digits: Any) -> None:
    """Six tasks on two slots: no barrier, so for the driver only; depth changes nothing but the route."""
    flat, tree = (
        parameters(
            fit(
                digits,
                "digits",
                strategy="local_sgd(period=8)",
                workers=6,
                epochs=1,
                averaging="driver",
                depth=depth,
            ).model
        )
        for depth in (1, 2)
    )
    torch.testing.assert_close(flat, tree, rtol=1e-5, atol=1e-6)


def build_slowly(folder: str) -> Task:
    """The digits task, whose loss kills the executor once, in the third epoch."""
    task = load("digits")
    plain, marker, calls = task.loss, Path(folder) / "killed", [0]

    def loss(outputs: Any, targets: Any) -> Any:
        calls[0] += 1
        if calls[0] == 100 and os.environ["RANK"] == "1" and not marker.exists():
            marker.write_text("")
            pid = os.getpid()
            for _ in range(3):
                pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            os.kill(pid, signal.SIGKILL)
            time.sleep(60)
        return plain(outputs, targets)

    task.loss = loss
    return task


@pytest.mark.parametrize(
    "with_checkpoint",
    [pytest.param(True, marks=pytest.mark.exhaustive), False],
    ids=["checkpoint", "driver keeps it"],
)
def test_a_killed_executor_continues_at_the_last_average(
    digits: Any, tmp_path: Path, with_checkpoint: bool
) -> None:
    checkpoint = tmp_path / "checkpoint" if with_checkpoint else None
    task = build_slowly(str(tmp_path))
    _, history = fit(digits, task, strategy="local_sgd(period=8)", epochs=5, checkpoint=checkpoint)
    assert (tmp_path / "killed").exists()
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5], "no epoch twice, none left out"
    assert history[2]["train_loss"] < history[1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["accuracy"] >= 0.93


@pytest.mark.skipif(not MNIST.exists(), reason=f"{MNIST} is not there; set PACELINE_SHARED")
def test_mnist_reaches_97_percent(spark: Any) -> None:
    with np.load(MNIST) as file:
        frame = frame_of(spark, file["x_train"], file["y_train"].astype(np.int64))
    model, history = fit(frame, "mnist", data=MNIST, strategy="local_sgd(period=16)", epochs=1, batch_size=64)
    frame.unpersist()
    assert history[-1]["accuracy"] >= 0.97
    assert isinstance(model, torch.nn.Module)


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"label": "colour"}, "no column 'colour'; it has features, label"),
        ({"averaging": "driver"}, "local_sgd"),
        ({"averaging": "tree"}, "'collective' or 'driver' expected"),
        (
            {"averaging": "driver", "strategy": "local_sgd", "checkpoint": "/tmp/x"},
            "checkpoint= is for",
        ),
        ({"strategy": "locl_sgd"}, "Did you mean 'local_sgd'"),
        ({"workers": 0}, "workers=0"),
        ({"batch_size": 1}, "at least one sample per worker"),
        ({"task": 7}, "a paceline.Task or a task's name"),
    ],
)
def test_bad_calls_are_refused_before_any_work(digits: Any, keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(paceline.ConfigError, match=said):
        fit(digits, **{"task": "digits", **keywords})


def test_rows_that_do_not_fit_name_the_column(spark: Any) -> None:
    frame = frame_of(spark, np.zeros((8, 5), np.float32), np.zeros(8, np.int64))
    with pytest.raises(paceline.ConfigError, match=r"column features: rows of 5 values.*shape \[64\]"):
        fit(frame, "digits")


@pytest.mark.parametrize("averaging", ["collective", "driver"])
def test_a_worker_without_rows_is_explained(spark: Any, averaging: str) -> None:
    frame = frame_of(spark, np.zeros((1, 64), np.float32), np.zeros(1, np.int64))
    with pytest.raises(paceline.PacelineError, match="a worker got no rows"):
        fit(frame, "digits", strategy="local_sgd", averaging=averaging)
