"""Values of all ranks in the order of one process, and passes that begin at a later batch."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import assert_equal, on, same_as_one_process, state
from small import data, model, step
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

from paceline.errors import ConfigError, Mismatch
from paceline.train.job import Job

Pair = namedtuple("Pair", ["x", "label"])


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(data(37))


class Ready(IterableDataset):
    """Ready-made batches of different sizes."""

    def __iter__(self) -> Any:
        x, y = data(37).tensors
        sizes = [5, 1, 9, 2, 12, 8]
        return iter(list(zip(torch.split(x, sizes), torch.split(y, sizes), strict=True)))


LOADERS: dict[str, Any] = {
    "sequential": lambda: DataLoader(data(37), 5),
    "one short of a batch": lambda: DataLoader(data(36), 5),
    "fewer than ranks": lambda: DataLoader(data(7), 3),
    "one sample": lambda: DataLoader(data(1), 3),
    "shuffled": lambda: DataLoader(data(37), 4, shuffle=True),
    "drop_last": lambda: DataLoader(data(37), 5, drop_last=True),
    "batches": lambda: DataLoader(data(37), batch_sampler=BatchSampler(RandomSampler(data(37)), 4, False)),
    "stream": lambda: DataLoader(Stream(), 5),
    "stream with workers": lambda: DataLoader(Stream(), 5, num_workers=1),
}


def measured(job: Job, net: Any, batch: Any) -> Any:
    x, y = batch
    logits = net(x)
    return {
        "pair": Pair(logits, y.numpy()),
        "names": [f"sample {float(v):.3f}" for v in x[:, 0]],
        "boxes": [{"box": v[:2].clone(), "label": int(n)} for v, n in zip(x, y, strict=True)],
        "parts": [logits[:, 1], (x[:, :0], y.to(torch.bfloat16))],
    }


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("batch", ["global", "per_worker"])
def test_every_sample_is_gathered_once_in_order(kind: str, batch: str) -> None:
    def loop(job: Job) -> Any:
        net, loader = job.prepare(model(), LOADERS[kind](), batch=batch)
        net.eval()
        found: dict[str, list[Any]] = {"logits": [], "names": [], "labels": [], "boxes": [], "parts": []}
        for one in loader:
            got = job.gather_for_metrics(measured(job, net, one))
            assert isinstance(got["pair"], Pair) and isinstance(got["pair"].label, np.ndarray)
            found["logits"].append(got["pair"].x)
            found["names"] += got["names"]
            found["labels"] += got["pair"].label.tolist()
            found["boxes"] += got["boxes"]
            found["parts"].append(got["parts"][1][1])
            assert not got["pair"].x.requires_grad and len(got["parts"][0]) == len(got["names"])
        same = {**found, "logits": torch.cat(found["logits"]), "parts": torch.cat(found["parts"])}
        return same, job.samples

    if batch == "per_worker" and kind in ("drop_last", "batches"):
        return  # other minibatches than one process has
    same_as_one_process(loop)


def test_ready_made_batches_and_data_of_each_rank() -> None:
    def ready(job: Job) -> Any:
        net, loader = job.prepare(model(), DataLoader(Ready(), batch_size=None))
        net.eval()
        return torch.cat([job.gather_for_metrics(x) for x, _ in loader])

    same_as_one_process(ready)

    def own(job: Job) -> Any:
        x, y = data(37).tensors
        part = torch.utils.data.TensorDataset(*(t[: 3 + 7 * job.rank] for t in (x, y)))
        net, loader = job.prepare(model(), DataLoader(part, 4), shard=False)
        net.eval()
        return [v for x, _ in loader for v in job.gather_for_metrics([float(v) for v in x[:, 0]])]

    first = data(37).tensors[0][:, 0].tolist()
    for ours in on(3, own):
        assert sorted(ours) == sorted(first[:3] + first[:10] + first[:17])


def test_the_batch_in_hand_is_that_of_the_innermost_pass() -> None:
    """An evaluation in the middle of a pass; afterwards the outer batch is in hand again."""

    def loop(job: Job) -> Any:
        net: Any = model()
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
        net, optimizer, loader, other = job.prepare(
            net, optimizer, DataLoader(data(13), 4), DataLoader(data(5), 2), batch="global"
        )
        seen = []
        for _ in job.epochs(1):
            for batch in loader:
                step(net, optimizer, batch)
                net.eval()
                seen.append([job.gather_for_metrics(y) for _, y in other])
                net.train()
                seen.append(job.gather_for_metrics(batch[0][:, 0]))
        return seen, job.step, job.samples

    same_as_one_process(loop)


def test_numbers_give_one_entry_for_each_rank_with_samples() -> None:
    def loop(job: Job) -> Any:
        net, loader = job.prepare(model(), DataLoader(data(8), 3), batch="global")
        net.eval()
        return [job.gather_for_metrics((job.rank, torch.tensor(float(job.rank)), "a")) for _ in loader]

    full = ([0, 1, 2], torch.tensor([0.0, 1.0, 2.0]), ["a"] * 3)
    assert_equal(on(3, loop)[2], [full, full, ([0], torch.tensor([0.0]), ["a"])])


def test_what_cannot_be_gathered_is_refused() -> None:
    def outside(job: Job) -> None:
        job.prepare(model(), DataLoader(data(), 4))
        job.gather_for_metrics(torch.zeros(3))

    def different(job: Job) -> None:
        _, loader = job.prepare(model(), DataLoader(data(), 4))
        for x, _ in loader:
            job.gather_for_metrics(x[:, : 2 + job.rank])

    def foreign(job: Job) -> None:
        _, loader = job.prepare(model(), DataLoader(data(), 4))
        for _ in loader:
            job.gather_for_metrics([object()])

    with pytest.raises(ConfigError, match=r"outside a pass .*job.gather_objects\(value\)"):
        on(2, outside)
    with pytest.raises(Mismatch, match=r"ranks \[0, 1\] give different values"):
        on(2, different)
    with pytest.raises(ConfigError, match="numbers, strings, lists, dicts and tensors"):
        on(2, foreign)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (list, r'\[\{"x": tensor\} for tensor in tensors\]'),
        (lambda x: {"boxes": [x[0], *x[1:]]}, "a tensor for each sample"),
        (lambda x: np.array([str(v) for v in x[:, 0]]), r"\.tolist\(\) makes a list"),
        (lambda x: x.to_sparse(), r"\.to_dense\(\)"),
    ],
    ids=["list", "nested", "strings", "sparse"],
)
def test_values_without_rows_are_refused_by_any_number_of_ranks(values: Any, said: str) -> None:
    """Else they would be another structure for each number of ranks."""

    def loop(job: Job) -> None:
        _, loader = job.prepare(model(), DataLoader(data(), 9), batch="global")
        for x, _ in loader:
            job.gather_for_metrics(values(x))

    for size in (1, 2):
        with pytest.raises(ConfigError, match=said):
            on(size, loop)


SKIPPED: dict[str, Any] = {
    "sequential": lambda: DataLoader(data(37), 5),
    "shuffled": lambda: DataLoader(data(37), 5, shuffle=True),
    "stream": lambda: DataLoader(Stream(), 5),
}


@pytest.mark.parametrize("kind", SKIPPED)
@pytest.mark.parametrize("count", [0, 3, 7, 8, 20])
def test_a_pass_without_its_first_batches(kind: str, count: int, tmp_path: Path) -> None:
    """What it trains, what it counts, and where a checkpoint that was saved in it goes on."""

    def run(job: Job, folder: Path | None, resumes: bool) -> Any:
        net: Any = model()
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
        net, optimizer, loader = job.prepare(net, optimizer, SKIPPED[kind](), batch="global")
        if resumes:
            job.load(tmp_path)
        for epoch in job.epochs(3):
            if epoch == 1 and not resumes:
                assert job.skip_first_batches(loader, count) is loader
            for i, batch in enumerate(loader):
                step(net, optimizer, batch)
                if folder is not None and epoch == 1 and i == 2:
                    job.save(folder)
        return state(net, optimizer), [job.step, job.samples, len(loader) if kind != "stream" else 8]

    trained = max(0, 8 - count)
    same_as_one_process(lambda job: run(job, None, False))
    whole = on(3, lambda job: run(job, tmp_path if trained > 3 else None, False))
    assert whole[0][1][:2] == [16 + trained, 74 + max(0, 37 - 5 * count)]
    if trained > 3:
        for size in (3, 2):
            assert_equal(on(size, lambda job: run(job, None, True))[0], whole[0])


def test_data_of_each_rank_without_its_first_batches() -> None:
    """Passes that begin later draw random numbers of their own; a rank that has run out repeats its last."""

    class Noise(torch.utils.data.Dataset):
        def __init__(self, count: int) -> None:
            self.count = count

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, i: int) -> Any:
            return torch.tensor([float(i), float(torch.rand(()))])

    def loop(job: Job) -> Any:
        _, loader = job.prepare(model(), DataLoader(Noise(4 + 6 * job.rank), 2), shard=False)
        first = list(loader)
        second = list(job.skip_first_batches(loader, 3))
        return [b[:, 0].tolist() for b in second], [b[:, 1].tolist() for b in first + second]

    ranks = on(2, loop)
    assert ranks[0][0] == [[2.0, 3.0]] * 2 and ranks[1][0] == [[6.0, 7.0], [8.0, 9.0]]
    drawn = [v for batch in ranks[1][1] for v in batch]
    assert len(set(drawn)) == len(drawn)


def test_passes_that_cannot_begin_later_are_refused(tmp_path: Path) -> None:
    def unknown(job: Job) -> None:
        plain: Any = DataLoader(data(), 4)
        job.skip_first_batches(plain, 2)

    def is_open(job: Job) -> None:
        _, loader = job.prepare(model(), DataLoader(data(), 4))
        for _ in loader:
            job.skip_first_batches(loader, 2)

    def loaded(job: Job) -> None:
        net: Any = model()
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
        net, optimizer, loader = job.prepare(net, optimizer, DataLoader(data(), 4))
        for i, batch in enumerate(loader):
            step(net, optimizer, batch)
            if i == 1:
                job.save(tmp_path)
                break
        job.load(tmp_path)
        job.skip_first_batches(loader, 2)  # what the checkpoint says
        job.skip_first_batches(loader, 3)

    with pytest.raises(ConfigError, match=r"job.prepare\(loader\) first"):
        on(2, unknown)
    with pytest.raises(ConfigError, match="an iterator over this loader is open"):
        on(2, is_open)
    with pytest.raises(ConfigError, match="begins after 2 batches already"):
        on(2, loaded)


def sampled(*, is_batched: bool) -> DataLoader[Any]:
    rows = data(22)
    sampler = RandomSampler(rows, replacement=True, generator=torch.Generator().manual_seed(3))
    if is_batched:
        return DataLoader(rows, batch_sampler=BatchSampler(sampler, 4, drop_last=False))
    return DataLoader(rows, 4, sampler=sampler)


@pytest.mark.parametrize("is_batched", [False, True])
def test_a_pass_without_its_first_batches_draws_an_order_of_its_own(is_batched: bool) -> None:
    skipped = (0, 2, 0)
    source = sampled(is_batched=is_batched)
    plain = [[x[:, 0].tolist() for x, _ in source][n:] for n in skipped]

    def loop(job: Job) -> list[Any]:
        loader = job.prepare(sampled(is_batched=is_batched), batch="global")
        passes = []
        for n in skipped:
            rest = job.skip_first_batches(loader, n)
            passes.append([job.gather_for_metrics(x[:, 0]).tolist() for x, _ in rest])
        return passes

    for size in (1, 2, 3):
        assert on(size, loop) == [plain] * size


@pytest.mark.parametrize("count", [37, 13, 2])
def test_validation_loops_that_gather_get_every_batch_on_every_rank(count: int) -> None:
    """Under torch.no_grad() too, where ranks without samples get no batch in loops that do not gather."""

    def loop(job: Job) -> Any:
        net, loader = job.prepare(model(), DataLoader(data(count), 6), batch="global")
        net.eval()
        loader.is_gathered = count == 2
        rows = []
        with torch.no_grad():
            for _ in range(2):
                for x, y in loader:
                    logits, targets = job.gather_for_metrics((net(x), y))
                    rows.append((logits, targets))
        return rows

    same_as_one_process(loop, sizes=(2, 3, 4))


def test_a_first_batch_that_ranks_lack_is_not_gathered_unless_said() -> None:
    def loop(job: Job) -> None:
        net, loader = job.prepare(model(), DataLoader(data(2), 6), batch="global")
        net.eval()
        with torch.no_grad():
            for x, _ in loader:
                job.gather_for_metrics(net(x))

    with pytest.raises(ConfigError, match=r"loader\.is_gathered = True"):
        on(3, loop)
