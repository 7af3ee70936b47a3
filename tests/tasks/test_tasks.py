"""The built-in tasks, and what is said about tasks and data that are wrong."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from paceline.errors import ConfigError
from paceline.tasks.load import load
from paceline.tasks.task import Task, accuracy, summed_cross_entropy

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("PACELINE_SHARED", ROOT.parent / "shared")) / "data"

GOOD = """
import torch, paceline
def build():
    model = torch.nn.Linear(2, 2)
    data = torch.utils.data.TensorDataset(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))
    return paceline.Task(model, torch.optim.SGD(model.parameters(), lr=0.1), data, data,
                         torch.nn.functional.cross_entropy, {"accuracy": lambda o, t: (0.0, 1)})
"""


def task_file(folder: Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text(text)
    return str(path)


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not there; set PACELINE_SHARED to the folder that has data/{name}")
    return path


def test_digits_split_and_shapes() -> None:
    task = load("digits")
    assert (len(task.train_set), len(task.test_set)) == (1437, 360)
    x, y = task.train_set[0]
    assert x.shape == (64,) and y.dtype == torch.int64
    both = torch.cat([task.train_set.tensors[0], task.test_set.tensors[0]])
    assert len(both) == 1797, "every image is in one of the two sets"


def test_mnist_reads_its_file() -> None:
    task = load("mnist", data=shared("mnist.npz"))
    assert (len(task.train_set), len(task.test_set)) == (60000, 10000)
    inputs = torch.stack([task.train_set[i][0] for i in range(3)])
    assert task.model(inputs).shape == (3, 10)


def test_shakespeare_predicts_the_next_character() -> None:
    task = load("shakespeare", data=shared("tinyshakespeare.txt"))
    x, y = task.train_set[5]
    assert torch.equal(x[1:], y[:-1]) and x.shape == (64,)
    assert len(task.train_set) > 8 * len(task.test_set)
    logits = task.model(x.unsqueeze(0))
    right, count = task.metrics["accuracy"](logits, y.unsqueeze(0))
    assert count == 64 and 0 <= int(right) <= 64


def test_metrics_are_sums_and_counts() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    targets = torch.tensor([0, 1, 1])
    assert [int(v) for v in accuracy(logits, targets)] == [2, 3]
    total, count = summed_cross_entropy(logits, targets)
    assert count == 3
    assert float(total) == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)) * 3)


def test_a_users_file(tmp_path: Path) -> None:
    task = load(task_file(tmp_path, GOOD))
    assert isinstance(task, Task)
    assert len(task.train_set) == 4
    with pytest.raises(ConfigError, match="takes no data"):
        load(task_file(tmp_path, GOOD), data=tmp_path)


def test_a_users_file_with_data_and_imports_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("LR = 0.1\n")
    text = "import beside\n" + GOOD.replace("build()", "build(path)").replace("lr=0.1", "lr=beside.LR")
    assert isinstance(load(task_file(tmp_path, text), data=tmp_path), Task)
    with pytest.raises(ConfigError, match="--data PATH"):
        load(task_file(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", r"defines no function build\(\)"),
        ("build = 3", r"defines no function build\(\)"),
        ("def build():\n    return 1 / 0", "ZeroDivisionError"),
        ("raise RuntimeError('at import')", "RuntimeError: at import"),
        ("def build(:", "SyntaxError"),
        ("def build():\n    return 5", "must return a paceline.Task.*got int"),
        (GOOD.replace("(model, torch", "('model', torch"), "Task.model: a torch.nn.Module expected, got str"),
        (GOOD.replace("torch.optim.SGD(model.parameters(), lr=0.1)", "None"), "Task.optimizer.*NoneType"),
        (GOOD.replace("SGD(model.parameters()", "SGD([torch.zeros(1)]"), "none of the model's parameters"),
        (GOOD.replace("data, data,", "data, [],"), "Task.test_set: it has no samples"),
        (GOOD.replace("data, data,", "iter(data), data,"), "Task.train_set.*__len__"),
        (GOOD.replace("data, data,", "[1, 2], data,"), "a pair .* expected, got int"),
        (GOOD.replace('"accuracy"', '"precision"'), '"accuracy" is missing .got .precision'),
        (GOOD.replace("torch.nn.functional.cross_entropy", "7"), "Task.loss: a callable"),
    ],
)
def test_mistakes_in_a_users_file(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load(task_file(tmp_path, text))
    assert "mine.py" in str(caught.value)
    assert "load.py" not in str(caught.value), "only the user's own frames are shown"


def test_wrong_names_and_paths(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'digits'.*digits, mnist, shakespeare"):
        load("digit")
    with pytest.raises(ConfigError, match="does not exist"):
        load("nowhere/file.py")
    with pytest.raises(ConfigError, match="mnist needs its data: give --data PATH"):
        load("mnist")
    with pytest.raises(ConfigError, match="digits takes no data"):
        load("digits", data=tmp_path)
    with pytest.raises(ConfigError, match=r"missing\.npz does not exist"):
        load("mnist", data=tmp_path / "missing.npz")


def test_wrong_data(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text("short")
    with pytest.raises(ConfigError, match=r"not an .npz file"):
        load("mnist", data=path)
    with pytest.raises(ConfigError, match="at least 3250 characters expected, got 5"):
        load("shakespeare", data=path)
    path.write_bytes(b"\xff" * 5000)
    with pytest.raises(ConfigError, match="UTF-8"):
        load("shakespeare", data=path)
    np.savez(tmp_path / "a.npz", x_train=np.zeros((2, 28, 28), np.uint8))
    with pytest.raises(ConfigError, match="y_train, x_test, y_test missing"):
        load("mnist", data=tmp_path / "a.npz")
    small, labels = np.zeros((2, 8, 8), np.uint8), np.zeros(2, np.int64)
    np.savez(tmp_path / "b.npz", x_train=small, y_train=labels, x_test=small, y_test=labels)
    with pytest.raises(ConfigError, match=r"shape \[N, 28, 28\].*got \[2, 8, 8\]"):
        load("mnist", data=tmp_path / "b.npz")
