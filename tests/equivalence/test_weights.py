"""What each backward pass counts: uneven batches, accumulation, tokens, sums, several losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from runs import on, same_as_one_process, state
from small import data, model
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from paceline.errors import ConfigError
from paceline.train.job import Job

LENGTH = 5


def prepared(job: Job, dataset: TensorDataset, batch_size: int, **settings: Any) -> Any:
    net: Any = model()
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    loader: Any = DataLoader(dataset, batch_size, shuffle=True)
    return job.prepare(net, optimizer, loader, batch="global", **settings)


@pytest.mark.parametrize("by", ["accumulation_steps", "no_sync"])
@pytest.mark.parametrize(("count", "batch_size", "window"), [(37, 7, 2), (37, 2, 3), (26, 5, 4)])
def test_micro_batches_of_uneven_sizes(by: str, count: int, batch_size: int, window: int) -> None:
    """Ranks have different parts of each micro-batch, some have none; the last window is short."""

    def loop(job: Job) -> Any:
        steps = window if by == "accumulation_steps" else 1
        net, optimizer, loader = prepared(job, data(count), batch_size, accumulation_steps=steps)
        for _ in job.epochs(2):
            for i, (x, y) in enumerate(loader):
                is_last = (i + 1) % window == 0 or i + 1 == len(loader)
                if by == "no_sync" and not is_last:
                    with job.no_sync():
                        (functional.cross_entropy(net(x), y) / window).backward()
                else:
                    (functional.cross_entropy(net(x), y) / window).backward()
                if is_last:
                    nn.utils.clip_grad_norm_(net.parameters(), 0.1)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=False)
        return state(net, optimizer)

    same_as_one_process(loop)


def tokens(count: int = 23) -> TensorDataset:
    """Sequences with between none and all of their targets; the rest is -100."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, LENGTH, 6, generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, LENGTH + 1, (count,), generator=generator)
    lengths[:9] = torch.tensor([0, 0, 5, 0, 1, 0, 0, 0, 2])
    y = (x.sum(2) > 0).long()
    return TensorDataset(x, torch.where(torch.arange(LENGTH) < lengths[:, None], y, -100))


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("batch_size", [6, 7])
def test_losses_that_are_means_over_tokens(window: int, batch_size: int) -> None:
    def loop(job: Job) -> Any:
        net, optimizer, loader = prepared(job, tokens(), batch_size, accumulation_steps=window)
        for _ in job.epochs(2):
            for i, (x, y) in enumerate(loader):
                job.weight((y != -100).sum())
                loss = functional.cross_entropy(net(x).flatten(0, 1), y.flatten(), ignore_index=-100)
                (loss / window).backward()
                if (i + 1) % window == 0 or i + 1 == len(loader):
                    optimizer.step()
                    optimizer.zero_grad()
        return state(net, optimizer)

    same_as_one_process(loop, sizes=(2, 3, 4))


def test_without_tokens_anywhere_the_gradient_is_zero() -> None:
    def loop(job: Job) -> Any:
        net, _, loader = prepared(job, tokens(), 6)
        x, y = next(iter(loader))
        job.weight(0)
        functional.cross_entropy(net(x).flatten(0, 1), torch.full_like(y, -100).flatten()).backward()
        return [p.grad.clone() for p in net.parameters()]

    same_as_one_process(loop)
    assert not any(g.any() for g in on(3, loop)[0])


def test_parameters_that_only_batches_without_tokens_use_have_a_gradient_of_zero() -> None:
    def loop(job: Job) -> Any:
        net, optimizer, loader = prepared(job, tokens(), 2)
        optimizer.param_groups[0]["weight_decay"] = 0.5
        for x, _ in loader:
            for p in net.parameters():
                p.grad = None
            job.weight(0)
            net(x).mean().backward()
            optimizer.step()
        return state(net, optimizer)

    same_as_one_process(loop)


@pytest.mark.parametrize("window", [1, 3])
def test_losses_that_are_sums(window: int) -> None:
    def loop(job: Job) -> Any:
        net, optimizer, loader = prepared(job, data(), 4, accumulation_steps=window, loss_reduction="sum")
        for _ in job.epochs(2):
            for i, (x, y) in enumerate(loader):
                (functional.cross_entropy(net(x), y, reduction="sum") / 20).backward()
                if (i + 1) % window == 0 or i + 1 == len(loader):
                    optimizer.step()
                    optimizer.zero_grad()
        return state(net, optimizer)

    same_as_one_process(loop)


@pytest.mark.parametrize("reduction", ["mean", "sum", "weighted"])
def test_two_losses_with_two_backward_passes(reduction: str) -> None:
    """The second pass adds to gradients that are reduced already."""

    def loop(job: Job) -> Any:
        settings = {"loss_reduction": "sum"} if reduction == "sum" else {}
        net, optimizer, loader = prepared(job, data(), 7, **settings)
        for _ in job.epochs(2):
            for x, y in loader:
                optimizer.zero_grad()
                outputs, scale = net(x), 0.05 if reduction == "sum" else 1.0
                if reduction == "weighted":
                    job.weight(y.sum())
                    first = (outputs.square().sum(1) * y).sum() / y.sum()
                else:
                    first = getattr(outputs.square().sum(1), reduction)() * scale
                first.backward(retain_graph=True)
                if reduction == "weighted":
                    job.weight(len(y))
                functional.cross_entropy(outputs, y, reduction="sum").mul(
                    scale if reduction == "sum" else 1 / len(y)
                ).backward()
                optimizer.step()
        return state(net, optimizer)

    same_as_one_process(loop)


def test_a_loop_without_a_loader_weighs_its_own_tokens() -> None:
    def loop(job: Job) -> Any:
        net: Any = model()
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
        net, optimizer = job.prepare(net, optimizer)
        x, y = data(36).tensors
        cuts = [0, *(10 * (r + 1) for r in range(job.size - 1)), 36]  # parts of different sizes
        for _ in range(4):
            part = slice(cuts[job.rank], cuts[job.rank + 1])
            job.weight(len(y[part]))
            functional.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
            optimizer.zero_grad()
        return state(net, optimizer)

    same_as_one_process(loop)


def test_a_short_window_without_a_loader_is_reduced_before_it_is_clipped() -> None:
    def loop(job: Job) -> Any:
        net: Any = model()
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        net, optimizer = job.prepare(net, optimizer, accumulation_steps=3)
        x, y = data(36).tensors
        x, y = x[job.rank :: job.size], y[job.rank :: job.size]
        norms = []
        for passes in (3, 2, 1, 3):
            for _ in range(passes):
                (functional.cross_entropy(net(x), y) / 3).backward()
            norms.append(float(job.clip_grad_norm_(net.parameters(), 0.05)))
            optimizer.step()
            optimizer.zero_grad()
        return norms, state(net, optimizer)

    same_as_one_process(loop)


@pytest.mark.parametrize("strategy", ["local_sgd(period=2)", "parameter_server", "gossip"])
def test_without_a_sum_of_gradients_an_empty_batch_does_no_harm(strategy: str) -> None:
    def loop(job: Job) -> Any:
        net, optimizer, loader = prepared(job, tokens(), 6, strategy=strategy)
        for _ in job.epochs(1):
            for x, y in loader:
                job.weight((y != -100).sum())
                loss = functional.cross_entropy(net(x).flatten(0, 1), y.flatten(), ignore_index=-100)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return all(bool(p.isfinite().all()) for p in net.parameters())

    assert all(on(3, loop))


def test_what_cannot_be_a_weight_is_refused() -> None:
    def negative(job: Job) -> None:
        prepared(job, data(), 6)
        job.weight(-1)

    def summed(job: Job) -> None:
        prepared(job, data(), 6, loss_reduction="sum")
        job.weight(3)

    with pytest.raises(ConfigError, match="at least 0 expected"):
        on(2, negative)
    with pytest.raises(ConfigError, match="leave out one of the two"):
        on(2, summed)
    with pytest.raises(ConfigError, match="'mean' or 'sum' expected"):
        on(2, lambda job: prepared(job, data(), 6, loss_reduction="avg"))


def numbers() -> TensorDataset:
    x = torch.arange(24, dtype=torch.float64)
    return TensorDataset(torch.stack([x, (x % 5) / 5], 1), (x % 3).long())


def prepared_numbers(job: Job, loader: Any, **options: Any) -> Any:
    torch.manual_seed(2)
    net: Any = nn.Linear(2, 3, dtype=torch.float64)
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.001)
    return job.prepare(net, optimizer, loader, **{"batch": "global", **options})


BAD = (3, 8, 14, 22)


def without_bad(samples: Any) -> Any:
    return default_collate([one for one in samples if int(one[0][0]) not in BAD])


def trained(job: Job, told: bool, source: Any, **options: Any) -> Any:
    model, optimizer, loader = prepared_numbers(job, source, **options)
    for x, y in loader:
        optimizer.zero_grad()
        if told:
            job.weight(len(y))
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return state(model)


class Numbered(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(numbers())


LEAVING_OUT: dict[str, Callable[[], Any]] = {
    "numbers": lambda: DataLoader(numbers(), 6, collate_fn=without_bad),
    "workers": lambda: DataLoader(numbers(), 6, collate_fn=without_bad, num_workers=1),
    "stream": lambda: DataLoader(Numbered(), 6, collate_fn=without_bad),
    "own order": lambda: DataLoader(numbers(), 6, sampler=range(24), collate_fn=without_bad),
}


@pytest.mark.parametrize("kind", LEAVING_OUT)
def test_samples_that_a_collate_function_leaves_out_are_told_or_refused(kind: str) -> None:
    same_as_one_process(lambda job: trained(job, True, LEAVING_OUT[kind]()))
    expected = r"rank \d: this backward pass .* of 2 samples, and 3 of 6 were chosen.*job\.weight\("
    with pytest.raises(ConfigError, match=expected):
        on(2, lambda job: trained(job, False, LEAVING_OUT[kind]()))
    with pytest.raises(ConfigError, match=expected):
        on(2, lambda job: trained(job, False, LEAVING_OUT[kind](), batch_size_of=lambda batch: len(batch[1])))
    on(2, lambda job: trained(job, False, LEAVING_OUT[kind](), loss_reduction="sum"))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("empty", ["error", "none", "tensors"])
def test_a_share_of_which_nothing_is_left_is_refused(empty: str, workers: int) -> None:
    def collate(samples: Any) -> Any:
        good = [one for one in samples if int(one[0][0]) not in BAD]
        if good or empty == "error":
            return default_collate(good)
        return None if empty == "none" else (torch.zeros(0, 2, dtype=torch.float64), torch.zeros(0).long())

    def loop(job: Job) -> Any:
        source: Any = DataLoader(numbers(), 3, collate_fn=collate, num_workers=workers)
        return trained(job, True, source)

    on(1, loop)
    with pytest.raises(ConfigError, match=r"rank \d: .*collate_fn.*keep at least one sample.*job\.weight"):
        on(3, loop)


def views(samples: Any) -> Any:
    return [torch.cat([part, part]) for part in default_collate(samples)]


def time_first(samples: Any) -> Any:
    return [torch.stack([one[0]] * 5, 1).movedim(2, 0) for one in [default_collate(samples)] * 2]


def test_batches_of_which_the_number_of_samples_is_not_clear_are_taken_as_they_are() -> None:
    def count(job: Job, collate: Callable[[Any], Any]) -> Any:
        model, _, loader = prepared_numbers(job, DataLoader(numbers(), 6, collate_fn=collate))
        for batch in loader:
            model(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
            assert loader.newest.counted is None, batch
        return job.step

    ordinary: list[Callable[[Any], Any]] = [
        default_collate,
        views,
        time_first,
        lambda samples: samples,
        lambda samples: [torch.zeros(3, 8, 8) for _ in samples],  # images
        lambda samples: [torch.zeros(1 + i, 2) for i, _ in enumerate(samples)],
        lambda samples: {"x": [torch.zeros(4) for _ in samples], "y": torch.zeros(len(samples))},
        lambda samples: {"text": ["a"] * len(samples), "temperature": torch.tensor(2.0)},
        lambda samples: default_collate(samples)[0],
        lambda samples: (default_collate(samples)[0], torch.zeros(7)),
        lambda samples: object(),
    ]
    for collate in ordinary:
        on(2, lambda job, collate=collate: count(job, collate))
