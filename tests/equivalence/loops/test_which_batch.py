"""Whose weight a backward pass has: of several loaders side by side, validated between, batches used again.

The last batches of both loaders are short, so that ranks have unequal shares, and of three one has none.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from runs import assert_equal, on
from two_loaders import Loop, Training, held_against_one_process, network, plain, samples

from paceline.errors import ConfigError
from paceline.train.job import Job


def validates_before_forward(t: Training) -> None:
    for batch in t.first:
        t.validate()
        t.step(batch)


def validates_between_forward_and_backward(t: Training) -> None:
    for batch in t.first:
        loss = t.loss(batch)
        t.validate()
        t.end(loss)


def validates_before_a_copy(t: Training) -> None:
    for x, y in t.first:
        t.validate()
        t.step((x * 1.0, y))


def validates_carelessly_before_forward(t: Training) -> None:
    for batch in t.first:
        t.validate_carelessly()
        t.step(batch)


def validates_carelessly_after_the_step(t: Training) -> None:
    for x, y in t.first:
        t.step((x * 1.0, y))
        t.validate_carelessly()


def looks_at_a_batch_of_the_other_loader(t: Training) -> None:
    for batch in t.first:
        loss = t.loss(batch)
        with torch.no_grad():
            t.net(list(t.second)[-1][0])
        t.end(loss)


def inner_passes(t: Training) -> None:
    for batch in t.first:
        for inner in itertools.islice(t.second, 2):
            t.step(inner)
        t.step(batch)
        for inner in t.second:
            t.step(inner)
        t.step(batch)


def alternates(t: Training) -> None:
    for one, other in zip(t.first, t.second, strict=False):
        t.step(one)
        t.step(other)


def alternates_as_long_as_there_is_any(t: Training) -> None:
    for one, other in itertools.zip_longest(t.first, t.second):
        for batch in (one, other):
            if batch is not None:
                t.step(batch)


def two_backwards(t: Training) -> None:
    for one, other in zip(t.first, t.second, strict=False):
        t.end(t.loss(one), t.loss(other))


def two_forwards_then_two_backwards_the_other_way_round(t: Training) -> None:
    for one, other in zip(t.first, t.second, strict=False):
        losses = [t.loss(one), t.loss(other)]
        t.end(*reversed(losses))


def an_open_iterator_on_the_side(t: Training) -> None:
    side = iter(t.second)
    for i, batch in enumerate(t.first):
        t.step(batch)
        if i % 2:
            t.step(next(side))


def throws_losses_away(t: Training) -> None:
    for i, batch in enumerate(t.first):
        loss = t.loss(batch)
        if i % 2 == 0:  # a filter, for instance
            continue
        t.end(loss)


def backward_after_the_next_fetch(t: Training) -> None:
    before: Any = None
    for batch in t.first:
        if before is not None:
            t.end(before)
        before = t.loss(batch)
    t.end(before)


def a_list_of_batches_twice(t: Training) -> None:
    batches = list(t.first)
    for _ in range(2):
        for batch in batches:
            t.step(batch)


def a_cycle_of_batches(t: Training) -> None:
    for batch in itertools.islice(itertools.cycle(t.first), 10):
        t.step(batch)


def a_batch_again_and_again(t: Training) -> None:
    kept = list(t.first)[-1]
    for batch in t.first:
        t.step(batch)
        t.step(kept)


def a_look_at_the_neighbour_without_gradients(t: Training) -> None:
    batches = list(t.first)
    for i, batch in enumerate(batches):
        loss = t.loss(batch)
        with torch.no_grad():
            t.net(batches[(i + 1) % len(batches)][0])
        t.end(loss)


def gradients_of_inputs_of_another_batch(t: Training) -> None:
    for batch in t.first:
        x, _ = list(t.second)[-1]
        torch.autograd.grad(t.net(x.requires_grad_()).sum(), x)
        t.step(batch)


def the_loop_says_what_a_joint_loss_stands_for(t: Training) -> None:
    for one, other in zip(t.first, t.second, strict=False):
        t.weight(getattr(t.first, "own_samples", 0) + getattr(t.second, "own_samples", 0))
        x, y = (torch.cat(both) for both in zip(one, other, strict=True))
        own = [getattr(loader, "own_samples", len(b[1])) for loader, b in ((t.first, one), (t.second, other))]
        keep = torch.cat([torch.arange(len(b[1])) < n for n, b in zip(own, (one, other), strict=True)])
        if not keep.any():
            keep[0] = True  # counts nothing
        t.step((x[keep], y[keep]))


def the_loop_says_what_each_loss_stands_for(t: Training) -> None:
    for one, other in zip(t.first, t.second, strict=False):
        for loader, (x, y) in ((t.first, one), (t.second, other)):
            t.weight(getattr(loader, "own_samples", 0))
            t.loss((x * 1.0, y)).backward()
        t.optimizer.step()
        t.optimizer.zero_grad()


EQUAL: list[Loop] = [
    validates_before_forward,
    validates_between_forward_and_backward,
    validates_before_a_copy,
    validates_carelessly_before_forward,
    validates_carelessly_after_the_step,
    looks_at_a_batch_of_the_other_loader,
    inner_passes,
    alternates,
    alternates_as_long_as_there_is_any,
    two_backwards,
    two_forwards_then_two_backwards_the_other_way_round,
    an_open_iterator_on_the_side,
    throws_losses_away,
    backward_after_the_next_fetch,
    a_list_of_batches_twice,
    a_cycle_of_batches,
    a_batch_again_and_again,
    a_look_at_the_neighbour_without_gradients,
    gradients_of_inputs_of_another_batch,
    the_loop_says_what_a_joint_loss_stands_for,
    the_loop_says_what_each_loss_stands_for,
]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("loop", EQUAL, ids=lambda loop: loop.__name__)
def test_a_backward_pass_has_the_weight_of_the_batch_that_it_goes_through(loop: Loop, size: int) -> None:
    held_against_one_process(loop, size)


def two_losses_in_one_backward(t: Training) -> None:
    for one, other in zip(t.first, t.second, strict=False):
        t.end(t.loss(one) + t.loss(other))


def one_loss_over_both(t: Training) -> None:
    for one, other in zip(t.first, t.second, strict=False):
        t.step(tuple(torch.cat(both) for both in zip(one, other, strict=True)))


def one_backward_for_a_pass(t: Training) -> None:
    t.end(sum(t.loss(batch) for batch in t.first))


def an_earlier_batch_with_the_present_one(t: Training) -> None:
    before: Any = None
    for batch in t.first:
        t.end(t.loss(batch) + (t.loss(before) if before is not None else 0.0))
        before = batch


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "loop",
    [
        two_losses_in_one_backward,
        one_loss_over_both,
        one_backward_for_a_pass,
        an_earlier_batch_with_the_present_one,
    ],
    ids=lambda loop: loop.__name__,
)
def test_one_backward_pass_over_batches_that_count_differently_is_refused(loop: Loop, size: int) -> None:
    with pytest.raises(ConfigError, match=r"they count differently.*job\.weight\(loader\.own_samples\)"):
        held_against_one_process(loop, size)


def test_sums_need_no_weights() -> None:
    def sums(t: Training) -> None:
        for one, other in zip(t.first, t.second, strict=False):
            both = [functional.cross_entropy(t.net(x), y, reduction="sum") for x, y in (one, other)]
            t.end((both[0] + both[1]) / 40)

    for size in (1, 2):  # of three ranks one has none in a batch, which counts nothing
        held_against_one_process(sums, size, loss_reduction="sum")


def test_models_side_by_side_have_each_their_own_batch() -> None:
    def train(nets: Any, optimizers: Any, first: Any, second: Any) -> Any:
        for one, other in zip(first, second, strict=False):
            for net, (x, y) in zip(nets, (one, other), strict=True):
                functional.cross_entropy(net(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return [p.detach() for net in nets for p in net.parameters()]

    def things() -> Any:
        nets = [network(), network()]
        optimizers = [torch.optim.SGD(net.parameters(), lr=0.3) for net in nets]
        return *nets, *optimizers, DataLoader(samples(23, 1), 6), DataLoader(samples(17, 2), 4)

    def body(job: Job) -> Any:
        a, b, c, d, first, second = job.prepare(*things(), batch="global")
        return train((a, b), (c, d), first, second)

    a, b, c, d, first, second = things()
    expected = train((a, b), (c, d), first, second)
    for size in (2, 3):
        for parameters in on(size, body):
            assert_equal(parameters, expected, tolerance=1e-9)


def fetches_the_next_before_the_step(t: Training) -> None:
    batches = iter(t.first)
    batch = next(batches, None)
    while batch is not None:
        t.loss(batch).backward()
        batch = next(batches, None)
        t.optimizer.step()
        t.optimizer.zero_grad()


def fetches_the_other_between_two_backwards(t: Training) -> None:
    others = iter(t.second)
    for batch in t.first:
        t.loss(batch).backward()
        t.loss(next(others)).backward()
        t.optimizer.step()
        t.optimizer.zero_grad(set_to_none=False)


def validates_between_backward_and_step(t: Training) -> None:
    for batch in t.first:
        t.loss(batch).backward()
        t.validate()
        t.optimizer.step()
        t.optimizer.zero_grad()


def leaves_some_steps_out(t: Training) -> None:
    for i, batch in enumerate(t.first):
        t.optimizer.zero_grad()
        t.loss(batch).backward()
        if i != 1:  # as a GradScaler does
            t.optimizer.step()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "loop",
    [
        fetches_the_next_before_the_step,
        fetches_the_other_between_two_backwards,
        validates_between_backward_and_step,
        leaves_some_steps_out,
    ],
    ids=lambda loop: loop.__name__,
)
def test_a_minibatch_is_one_whatever_is_fetched_before_its_step(loop: Loop, size: int) -> None:
    held_against_one_process(loop, size)

    def counted(job: Job) -> int:
        mine = plain()
        training = Training(*job.prepare(mine.net, mine.optimizer, mine.first, mine.second, batch="global"))
        loop(training)
        job.synchronize()
        (attachment,) = job.attachments
        return attachment.minibatches

    assert on(size, counted) == [4] * size


@pytest.mark.parametrize("when", ["after", "amid", "before"])
def test_what_comes_from_no_loader_counts_alike_on_all_ranks(when: str) -> None:
    """After a pass, and of a model with a loader of its own in a pass of another's; every batch is 3 + 2."""

    def noise(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        return samples(4, 50 + rank).tensors  # type: ignore[return-value]

    def make() -> Any:
        nets = [network(), network()]
        return nets, [torch.optim.SGD(net.parameters(), lr=0.3) for net in nets]

    def step(net: Any, optimizer: Any, batches: Any) -> None:
        for x, y in batches:
            (functional.cross_entropy(net(x), y) / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()

    def train(nets: Any, optimizers: Any, loaders: Any, noises: Any) -> Any:
        if when == "before":
            step(nets[1], optimizers[1], noises)
        for _ in range(2):
            for batch in loaders[0]:
                step(nets[0], optimizers[0], [batch])
                if when == "amid":
                    step(nets[1], optimizers[1], noises)
            for batch in loaders[1]:
                step(nets[1], optimizers[1], [batch])
            if when == "after":
                step(nets[1], optimizers[1], noises)
        return [p.detach() for net in nets for p in net.parameters()]

    def body(job: Job) -> Any:
        nets, optimizers = make()
        prepared = [
            job.prepare(net, optimizer, DataLoader(samples(15, 1), 5), batch="global")
            for net, optimizer in zip(nets, optimizers, strict=True)
        ]
        parts: Any = zip(*prepared, strict=True)
        return train(*parts, [noise(job.rank)])

    nets, optimizers = make()
    plain_loaders = [DataLoader(samples(15, 1), 5), DataLoader(samples(15, 1), 5)]
    expected = train(nets, optimizers, plain_loaders, [noise(0), noise(1)])
    for parameters in on(2, body):
        assert_equal(parameters, expected, tolerance=1e-9)


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_loader_prepared_later_and_alone_is_followed_too(size: int, copies: bool) -> None:
    """Curricula swap their data: other batch sizes, and the last batches short."""

    def train(net: Any, optimizer: Any, loader: Any) -> None:
        for x, y in loader:
            functional.cross_entropy(net(x.clone() if copies else x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    def body(job: Job) -> Any:
        mine = plain()
        net, optimizer, first = job.prepare(mine.net, mine.optimizer, mine.first, batch="global")
        train(net, optimizer, first)
        later = job.prepare(DataLoader(samples(17, 3), 5), batch="global")
        train(net, optimizer, later)
        train(net, optimizer, first)
        (attachment,) = job.attachments
        return [p.detach() for p in net.parameters()], (job.step, job.samples, attachment.minibatches)

    one = plain()
    for loader in (one.first, DataLoader(samples(17, 3), 5), one.first):
        train(one.net, one.optimizer, loader)
    for parameters, counts in on(size, body):
        assert_equal(parameters, [p.detach() for p in one.net.parameters()], tolerance=1e-9)
        assert counts == (12, 63, 12)
