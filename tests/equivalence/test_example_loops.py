"""The scripts under examples/loops train on several ranks as on one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from example_loops import module
from runs import assert_equal, on, same_as_one_process, state

from paceline.errors import ConfigError
from paceline.train.job import Job

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "char_transformer": ("char_transformer", {}),
    "resnet_ema": ("resnet_ema", {}),
    "gan": ("gan", {}),
    "lstm_packed": ("lstm_packed", {}),
    "recommender": ("recommender", {"is_sparse": False, "strategy": "all_reduce"}),
    "no_loader": ("no_loader", {}),
    "lbfgs": ("optimizers", {"variant": "lbfgs"}),
    "muon": ("optimizers", {"variant": "muon"}),
    "adapters": ("finetune", {"variant": "adapters"}),
    "unfreeze": ("finetune", {"variant": "unfreeze"}),
    "weighted": ("sampling", {"variant": "weighted"}),
    "by_length": ("sampling", {"variant": "by_length"}),
    "nested_batches": ("nested_batches", {"low": False}),
    "launched": ("launched", {"rate": 0.1}),
    "interrupted": ("interrupted", {"dropout": 0.0}),
}
THREE_RANKS = ("no_loader", "weighted")
TOLERANCE = {"lbfgs": 1e-6}  # its line search decides by differences of losses


@pytest.fixture(autouse=True)
def in_double_precision() -> Iterator[None]:
    """So that a wrong weight of one sample is more than rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def loop_of(case: str) -> Callable[[Job], Any]:
    name, arguments = CASES[case]

    def loop(job: Job) -> Any:
        measured, *models = module(name).train(job, **arguments)
        return measured, job.step, job.samples, state(*models)

    return loop


@pytest.mark.parametrize("case", CASES)
def test_an_example_trains_as_one_process(case: str) -> None:
    sizes = (3,) if case in THREE_RANKS else (2,)
    same_as_one_process(loop_of(case), sizes=sizes, tolerance=TOLERANCE.get(case, 1e-9))


def test_sparse_gradients_need_a_method_that_averages_models() -> None:
    def loop(job: Job, strategy: str) -> Any:
        return state(module("recommender").train(job, is_sparse=True, strategy=strategy)[1])

    with pytest.raises(ConfigError, match=r"module bag makes sparse gradients.*Adam in place of SparseAdam"):
        on(2, lambda job: loop(job, "all_reduce"))
    first, second = on(2, lambda job: loop(job, "local_sgd(period=5)"))
    assert_equal(first, second, tolerance=0.0)


def test_low_precision_stays_near() -> None:
    def loop(job: Job) -> float:
        return float(module("nested_batches").train(job, low=True)[0])

    (one,) = on(1, loop)
    assert abs(on(2, loop)[0] - one) < 1e-2 * one
