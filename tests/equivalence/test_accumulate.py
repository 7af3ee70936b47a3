"""`job.accumulate` around a whole loop body, and `job.backward`: the updates of one process."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from runs import assert_equal, on, same_as_one_process, state
from small import AVERAGING, SERVERS, data, model
from test_weights import tokens
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

from paceline.errors import ConfigError
from paceline.train.job import Job


def prepared(job: Job, loader: Any, **settings: Any) -> Any:
    net: Any = model()
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scheduler: Any = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    return job.prepare(net, optimizer, loader, scheduler, batch="global", **settings)


def body(job: Job, net: Any, optimizer: Any, scheduler: Any, batch: Any, zeros: str) -> None:
    x, y = batch
    with job.accumulate(net):
        if zeros == "first":
            optimizer.zero_grad()
        job.backward(functional.cross_entropy(net(x), y))
        if job.sync_gradients:
            job.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        scheduler.step()
        if zeros == "last":
            optimizer.zero_grad()
        if zeros == "module" and job.sync_gradients:
            net.zero_grad(set_to_none=False)


def by_hand(count: int, batch_size: int, window: int, epochs: int = 2) -> list[Any]:
    """The same in plain PyTorch."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    loader = DataLoader(data(count), batch_size)
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader):
            (functional.cross_entropy(net(x), y) / window).backward()
            if (i + 1) % window == 0 or i + 1 == len(loader):
                nn.utils.clip_grad_norm_(net.parameters(), 0.1)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return [*state(net, optimizer), scheduler.last_epoch]


@pytest.mark.parametrize("zeros", ["first", "last", "module"])
@pytest.mark.parametrize(("count", "batch_size", "window"), [(37, 7, 2), (37, 2, 3), (26, 5, 4), (24, 6, 1)])
def test_a_loop_body_in_accumulate(count: int, batch_size: int, window: int, zeros: str) -> None:
    """Steps, schedules and zero_grad in every micro-batch; ranks without samples; a short last window."""

    def loop(job: Job) -> Any:
        loader: Any = DataLoader(data(count), batch_size)
        net, optimizer, loader, scheduler = prepared(job, loader, accumulation_steps=window)
        seen = []
        for _ in job.epochs(2):
            for batch in loader:
                body(job, net, optimizer, scheduler, batch, zeros)
                seen.append(job.sync_gradients)
        steps = sum(seen)
        assert job.stats()["minibatches"] == steps
        return [*state(net, optimizer), scheduler.last_epoch], seen, job.step

    (one,) = on(1, loop)
    assert_equal(one[0], by_hand(count, batch_size, window))
    same_as_one_process(loop)


@pytest.mark.parametrize("strategy", [*AVERAGING, *SERVERS])
def test_under_every_method_counters_are_those_of_one_process(strategy: str) -> None:
    def loop(job: Job) -> Any:
        loader: Any = DataLoader(data(37), 7)
        net, optimizer, loader, scheduler = prepared(job, loader, accumulation_steps=2, strategy=strategy)
        for _ in job.epochs(2):
            for batch in loader:
                body(job, net, optimizer, scheduler, batch, "first")
        return state(net), [job.step, job.samples, scheduler.last_epoch, job.stats()["minibatches"]]

    (one,) = on(1, loop)
    ranks = on(3, loop)
    for ours in ranks:
        assert ours[1] == one[1] == [12, 74, 6, 6]
        assert_equal(ours[0], ranks[0][0], tolerance=0.0)


def counted(kind: str) -> Any:
    def loop(job: Job) -> Any:
        is_sum = kind in ("sum", "plain sum")
        reduction = {"loss_reduction": "sum"} if is_sum else {}
        loader: Any = DataLoader(tokens(), 4, shuffle=True)
        net, optimizer, loader, _ = prepared(job, loader, accumulation_steps=3, **reduction)
        for _ in job.epochs(2):
            for x, y in loader:
                with job.accumulate(net):
                    if not is_sum:
                        job.weight((y != -100).sum())
                    outputs = net(x).flatten(0, 1)
                    how = "sum" if is_sum else "mean"
                    loss = functional.cross_entropy(outputs, y.flatten(), ignore_index=-100, reduction=how)
                    if kind == "plain backward":
                        (loss / 3).backward()
                    elif kind == "two backwards":
                        job.backward(loss * 0.3, retain_graph=True)
                        job.backward(loss * 0.7)
                    elif kind == "plain sum":
                        (loss * 0.05).backward()
                    else:
                        job.backward(loss * 0.05 if is_sum else loss)
                    optimizer.step()
                    optimizer.zero_grad()
        return state(net, optimizer), job.stats()["minibatches"]

    return loop


@pytest.mark.parametrize("kind", ["tokens", "sum", "two backwards", "plain backward"])
def test_what_a_micro_batch_counts_in_accumulate(kind: str) -> None:
    """Its own weight; a sum is not divided; every backward pass of a block belongs to its micro-batch."""
    same_as_one_process(counted(kind))
    same = {"two backwards": "tokens", "plain backward": "tokens", "sum": "plain sum"}
    if kind in same:
        assert_equal(on(1, counted(kind)), on(1, counted(same[kind])))


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        info: Any = torch.utils.data.get_worker_info()
        samples = list(data(29))
        return iter(samples if info is None else samples[info.id :: info.num_workers])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_last_batch_of_a_stream_ends_its_window(workers: int) -> None:
    def loop(job: Job) -> Any:
        loader: Any = DataLoader(Stream(), 4, num_workers=workers)
        net, optimizer, loader, scheduler = prepared(job, loader, accumulation_steps=3)
        ends = []
        for _ in job.epochs(2):
            for batch in loader:
                body(job, net, optimizer, scheduler, batch, "last")
                ends.append(job.sync_gradients)
        assert ends[-1]
        return state(net, optimizer), ends

    same_as_one_process(loop, sizes=(2,))


@pytest.mark.parametrize("split", [False, True])
def test_two_models_in_one_block_or_in_two(split: bool) -> None:
    """As GANs are trained: the second loss flows through both models."""

    def loop(job: Job) -> Any:
        torch.manual_seed(4)
        maker: Any = nn.Linear(3, 6, dtype=torch.float64)
        judge: Any = nn.Linear(6, 1, dtype=torch.float64)
        opt_m: Any = torch.optim.Adam(maker.parameters(), lr=0.01, eps=1e-3)
        opt_j: Any = torch.optim.SGD(judge.parameters(), lr=0.1)
        loader: Any = DataLoader(data(31), 4)
        maker, judge, opt_m, opt_j, loader = job.prepare(
            maker, judge, opt_m, opt_j, loader, batch="global", accumulation_steps=2
        )
        for _ in job.epochs(2):
            for x, _ in loader:
                with job.accumulate(*([judge] if split else [judge, maker])):
                    opt_j.zero_grad()
                    made = maker(x[:, :3])
                    job.backward((judge(x).tanh() - 1).square().mean() + judge(made.detach()).square().mean())
                    opt_j.step()
                    if not split:
                        opt_m.zero_grad()
                        job.backward((judge(made) - 1).square().mean())
                        opt_m.step()
                if split:
                    judge.requires_grad_(False)
                    with job.accumulate(maker):
                        opt_m.zero_grad()
                        job.backward((judge(maker(x[:, :3])) - 1).square().mean())
                        opt_m.step()
                    judge.requires_grad_(True)
        return state(maker, judge, opt_m, opt_j)

    same_as_one_process(loop)


def test_a_loop_that_is_left_amid_a_window_continues_it() -> None:
    def loop(job: Job) -> Any:
        net, optimizer, loader, scheduler = prepared(job, DataLoader(data(37), 6), accumulation_steps=2)
        for _ in job.epochs(3):
            for i, batch in enumerate(loader):
                if i == 3:
                    break
                body(job, net, optimizer, scheduler, batch, "last")
        return state(net, optimizer), scheduler.last_epoch

    same_as_one_process(loop)
    assert on(1, loop)[0][1] == 4


def test_scalers_that_prepare_knows_wait_for_the_end_of_the_window() -> None:
    def loop(job: Job) -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        net, optimizer, loader, _ = prepared(
            job, DataLoader(data(37), 6), accumulation_steps=3, scaler=scaler
        )
        for _ in job.epochs(2):
            for x, y in loader:
                with job.accumulate(net):
                    job.backward(scaler.scale(functional.cross_entropy(net(x), y)))
                    scaler.unscale_(optimizer)
                    if job.sync_gradients:
                        job.clip_grad_norm_(net.parameters(), 0.5)
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
        return state(net, optimizer), scaler.get_scale()

    same_as_one_process(loop)
    assert on(1, loop)[0][1] == 64.0 * 2**3  # six updates


def test_resuming_between_two_windows() -> None:
    def run(job: Job, path: str, stop: bool) -> Any:
        net, optimizer, loader, scheduler = prepared(
            job, DataLoader(data(37), 4, shuffle=True), accumulation_steps=2
        )
        if not stop:
            job.load(path)
        for _ in job.epochs(2):
            for i, batch in enumerate(loader):
                body(job, net, optimizer, scheduler, batch, "last")
                if stop and i == 3:
                    job.save(path)
                    stop = False
        return [*state(net, optimizer), scheduler.last_epoch]

    def again(size: int, tmp: str) -> None:
        whole = on(size, lambda job: run(job, tmp, True))
        resumed = on(size, lambda job: run(job, tmp, False))
        assert_equal(resumed[0], whole[0], tolerance=0.0)

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        again(2, folder)


def refused(change: str) -> Any:
    def loop(job: Job) -> None:
        net, optimizer, loader, _ = prepared(job, DataLoader(data(), 6), accumulation_steps=2)
        stranger = nn.Linear(2, 2)
        unknown = torch.optim.SGD([{"params": [p]} for p in net.parameters()], lr=0.1)
        unknown.param_groups[0] = optimizer.param_groups[0]
        for x, y in loader:
            with job.accumulate(stranger if change == "stranger" else net):
                if change == "zero first":
                    net.zero_grad()
                elif change == "zeros first":
                    net.zero_grad(set_to_none=False)
                job.backward(functional.cross_entropy(net(x), y))
                if change == "clip":
                    nn.utils.clip_grad_norm_(net.parameters(), 0.1)
                elif change == "job.clip":
                    job.clip_grad_norm_(net.parameters(), 0.1)
                elif change == "data":
                    for p in net.parameters():
                        if p.grad is not None:
                            p.grad.data.clamp_(-1e-3, 1e-3)
                elif change == "none":
                    for p in net.parameters():
                        p.grad = None
                elif change == "closure":
                    optimizer.step(lambda: 0.0)
                elif change == "unknown":
                    unknown.step()
                elif change == "nested":
                    with job.accumulate():
                        pass

    return loop


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("clip", r"changed in job.accumulate before the end .*`if job.sync_gradients:`"),
        ("zero first", r"changed in job.accumulate before the end .* optimizer.zero_grad\(\)"),
        ("zeros first", r"changed in job.accumulate before the end .* optimizer.zero_grad\(\)"),
        ("data", r"changed in job.accumulate before the end .*`if job.sync_gradients:`"),
        ("none", r"changed in job.accumulate before the end .*`if job.sync_gradients:`"),
        ("job.clip", r"clip_grad_norm_ in the middle of a window .*`if job.sync_gradients:`"),
        ("closure", r"the closure makes backward passes of its own"),
        ("unknown", r"not given .*job.prepare\(model, optimizer, loader\)"),
        ("nested", r"leave out the inner one"),
        ("stranger", r"accumulate\(Linear\): prepared models expected"),
    ],
)
def test_what_a_window_cannot_hold_is_refused(change: str, said: str, size: int) -> None:
    with pytest.raises(ConfigError, match=said):
        on(size, refused(change))


def test_a_scaler_that_prepare_does_not_know_is_refused() -> None:
    """It divides gradients amid a window, which torch does not count as a change."""

    def loop(job: Job) -> None:
        net, optimizer, loader, _ = prepared(job, DataLoader(data(), 6), accumulation_steps=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for x, y in loader:
            with job.accumulate(net):
                job.backward(scaler.scale(functional.cross_entropy(net(x), y)))
                scaler.step(optimizer)
                scaler.update()

    for size in (1, 2):
        with pytest.raises(ConfigError, match=r"clipped, unscaled"):
            on(size, loop)


def test_sync_gradients_is_that_of_the_models_of_the_block() -> None:
    """Another model, which is trained in every third batch, has a window of its own."""

    def loop(job: Job) -> Any:
        first: Any = model()
        second: Any = model()
        optimizers: Any = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (first, second)]
        loader: Any = DataLoader(data(37), 4)
        *_, loader = job.prepare(first, second, optimizers, loader, batch="global", accumulation_steps=2)
        said = []
        for i, (x, y) in enumerate(loader):
            with job.accumulate(first):
                job.backward(functional.cross_entropy(first(x), y))
                said.append(job.sync_gradients)
            if i % 3 == 2:
                with job.accumulate(second):
                    job.backward(functional.cross_entropy(second(x), y))
        return said

    assert on(1, loop) == [[i % 2 == 1 or i == 9 for i in range(10)]]
    same_as_one_process(loop)


def test_a_window_that_a_loop_left_can_be_dropped() -> None:
    """By `zero_grad` before the next pass, as in one process."""

    def loop(job: Job) -> Any:
        net, optimizer, loader, scheduler = prepared(job, DataLoader(data(37), 6), accumulation_steps=2)
        for _ in job.epochs(3):
            optimizer.zero_grad()
            for i, batch in enumerate(loader):
                if i == 3:
                    break
                body(job, net, optimizer, scheduler, batch, "last")
        return state(net, optimizer), scheduler.last_epoch

    same_as_one_process(loop)
    assert on(1, loop)[0][1] == 3


def test_what_is_held_back_is_itself_again_afterwards() -> None:
    """A state that is taken amid a window holds nothing of ours; copies made there are plain."""

    def loop(job: Job) -> Any:
        net, optimizer, loader, scheduler = prepared(job, DataLoader(data(), 6), accumulation_steps=2)
        before = [dict(vars(one)) for one in (net, optimizer, scheduler)]
        for x, y in loader:
            with job.accumulate(net):
                job.backward(functional.cross_entropy(net(x), y))
                assert sorted(scheduler.state_dict()) == sorted(set(before[2]) - {"optimizer"})
                copied = copy.deepcopy(net)
                pickle.loads(pickle.dumps((net, optimizer)))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            now = [set(vars(o)) - {"_opt_called"} for o in (net, optimizer, scheduler)]
            assert now == [set(b) for b in before] and vars(optimizer)["step"] is before[1]["step"]
            assert "zero_grad" not in vars(copied)
        return state(net, optimizer), scheduler.last_epoch

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        same_as_one_process(loop)


def test_models_with_other_windows_are_refused_in_one_block() -> None:
    def loop(job: Job) -> None:
        first, second = model(), model()
        job.prepare(first, accumulation_steps=2)
        job.prepare(second, accumulation_steps=3)
        with job.accumulate(first):
            pass
        with job.accumulate():
            pass

    with pytest.raises(ConfigError, match=r"same accumulation_steps .*got Sequential: 2, Sequential: 3"):
        on(2, loop)
