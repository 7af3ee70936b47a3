"""What `save` takes: all that `load` gives back, and nothing else."""

from __future__ import annotations

import enum
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import paceline
from paceline.comm.simulated.simulate import simulate
from paceline.errors import CheckpointError
from paceline.train.saving.storable import storable


class Colour(enum.Enum):
    RED = 1


Row = namedtuple("Row", ["loss"])


class Registered:
    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state["state"]


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True, "x", b"y", 1j], 3: (torch.ones(2), torch.float16, torch.device("cpu"))},
        OrderedDict(weight=nn.Parameter(torch.ones(1))),
        {"seen": {1, 2}, "shape": torch.Size([2, 3])},
    ],
)
def test_plain_values_stay_the_same_objects(value: Any) -> None:
    assert storable(value, "extra") is value


def test_scalars_of_numpy_become_plain() -> None:
    found = storable({"lr": np.float64(0.1), "best": [np.int64(3), (np.bool_(True),)]}, "extra")
    assert found == {"lr": 0.1, "best": [3, (True,)]}
    assert type(found["lr"]) is float and type(found["best"][0]) is int and found["best"][1][0] is True


@pytest.mark.parametrize("held", ["extra", "registered"])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.ones(2), r"\['x'\]\[1\] is a numpy.ndarray.*from_numpy"),
        (Path("a"), r"\['x'\]\[1\] is a pathlib.PosixPath.*plain values"),
        (Colour.RED, r"\['x'\]\[1\] is a .*Colour"),
        (Row(0.5), r"\['x'\]\[1\] is a .*Row"),
        (len, r"\['x'\]\[1\] is a builtins"),
        (lambda: 3, r"\['x'\]\[1\] is a builtins.function"),
    ],
)
def test_what_could_not_be_read_back_is_refused_and_the_old_checkpoint_stays(
    value: Any, said: str, held: str, tmp_path: Path
) -> None:
    """On one rank only: all ranks are told."""

    def body() -> list[str]:
        job = paceline.init()
        job.prepare(nn.Linear(2, 2))
        thing = Registered({"x": [0, 1]})
        job.register(thing=thing)
        job.save(tmp_path, extra={"good": True})
        bad = {"x": [0, value if job.rank else 1]}
        thing.state = bad if held == "registered" else thing.state
        with pytest.raises(CheckpointError, match=said if job.rank else "failed on rank 1") as caught:
            job.save(tmp_path, extra=bad if held == "extra" else {})
        thing.state = None
        assert job.load(tmp_path) == {"good": True}
        assert thing.state == {"x": [0, 1]}
        return str(caught.value)

    simulate(body, num_workers=2)


def test_numpy_learning_rates_are_saved_and_resumed(tmp_path: Path) -> None:
    def body() -> float:
        job = paceline.init()
        model: Any = nn.Linear(2, 2)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=np.float64(0.3))
        job.prepare(model, optimizer)
        job.save(tmp_path)
        optimizer.param_groups[0]["lr"] = 1.0
        job.load(tmp_path)
        return float(optimizer.param_groups[0]["lr"])

    assert list(simulate(body, num_workers=2)) == [0.3, 0.3]


class Expanded(nn.Module):
    """A buffer whose elements share memory, as masks of libraries are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("mask", torch.zeros(1, 3).expand(4, 3))

    def forward(self, x: Any) -> Any:
        return self.layer(x)


def test_expanded_buffers_are_saved_resumed_and_left_as_evaluation_found_them(tmp_path: Path) -> None:
    def body() -> Any:
        job = paceline.init()
        model: Any = Expanded()
        job.prepare(model)
        model.mask[0, 1] = 5.0
        job.save(tmp_path)
        model.mask[0, 1] = 6.0
        data = torch.utils.data.TensorDataset(torch.ones(5, 3), torch.ones(5))
        job.evaluate(model, data, {"n": lambda out, y: (0.0, len(y))})
        assert model.mask[3, 1] == 6.0
        job.load(tmp_path)
        return model.mask.tolist(), model.mask.stride()

    assert list(simulate(body, num_workers=2)) == 2 * [([[0.0, 5.0, 0.0]] * 4, (0, 1))]
