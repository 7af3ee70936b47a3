"""Habits of other libraries' users: one prepare for all, rank 0 first, seeds, a model as one file."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import make
from runs import assert_equal, on, same_as_one_process, state
from small import data, model, step
from torch import nn
from torch.utils.data import DataLoader

from paceline.compat.embedding import consensus_model
from paceline.errors import CheckpointError, ConfigError, Mismatch, PacelineError
from paceline.train.job import Job


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6))

    def forward(self, z: Any) -> Any:
        return self.net(z)


def gan(job: Job, order: str) -> Any:
    torch.manual_seed(3)
    g: Any = Generator().double()
    d: Any = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    opt_g: Any = torch.optim.Adam(g.parameters(), lr=0.01, eps=1e-3)
    opt_d: Any = torch.optim.Adam(d.parameters(), lr=0.01, eps=1e-3)
    fade: Any = torch.optim.lr_scheduler.StepLR(opt_g, 3, 0.5)
    things: dict[str, Any] = {
        "g": g, "d": d, "opt_g": opt_g, "opt_d": opt_d, "loader": DataLoader(data(31), 4), "fade": fade,
    }  # fmt: skip
    names = order.split()
    made = dict(zip(names, job.prepare(*(things[n] for n in names), batch="global"), strict=True))
    assert all(made[n] is things[n] for n in names if n != "loader") and made["loader"] in list(job.loaders)
    criterion = nn.BCEWithLogitsLoss()
    for _ in job.epochs(2):
        for x, _ in made["loader"]:
            real, fake = torch.ones(len(x), 1).double(), torch.zeros(len(x), 1).double()
            opt_d.zero_grad()
            made_up = g(x[:, :3])
            job.backward(criterion(d(x), real) + criterion(d(made_up.detach()), fake))
            opt_d.step()
            opt_g.zero_grad()
            job.backward(criterion(d(made_up), real))
            opt_g.step()
            fade.step()
    return state(g, d, opt_g, opt_d), fade.last_epoch, fade.get_last_lr(), job.step


@pytest.mark.parametrize("order", ["g d opt_g opt_d loader fade", "fade loader opt_d g opt_g d"])
def test_a_gan_in_one_call_of_prepare(order: str) -> None:
    """The generator's loss flows through the discriminator, whose optimizer does not step for it."""
    same_as_one_process(lambda job: gan(job, order))


def test_a_scheduler_comes_back_in_its_place_and_is_in_checkpoints(tmp_path: Path) -> None:
    def loop(job: Job, *, resumes: bool) -> Any:
        net: Any = model()
        optimizer: Any = torch.optim.AdamW(net.parameters(), lr=0.01)
        plateau: Any = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        warm: Any = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=20)
        net, optimizer, loader, back, also = job.prepare(
            net, optimizer, DataLoader(data(), 6), warm, plateau, batch="global"
        )
        assert back is warm and also is plateau
        if resumes:
            job.load(tmp_path)
        for epoch in job.epochs(2):
            for batch in loader:
                step(net, optimizer, batch)
                warm.step()
            plateau.step(1.0 + epoch)
            if epoch == 0 and not resumes:
                job.save(tmp_path)
        return state(net, optimizer), warm.last_epoch, optimizer.param_groups[0]["lr"]

    whole = on(2, lambda job: loop(job, resumes=False))
    assert_equal(on(2, lambda job: loop(job, resumes=True)), whole, tolerance=0.0)
    assert_equal(whole[0], on(1, lambda job: loop(job, resumes=False))[0])


def test_what_only_rank_0_runs() -> None:
    def loop(job: Job) -> Any:
        seen = []

        @job.on_main
        def note(value: int, *, twice: bool = False) -> int:
            """Keep it."""
            seen.append(value)
            return 2 * value if twice else value

        assert note.__name__ == "note" and note.__doc__ == "Keep it."
        return note(3, twice=True), seen

    assert on(3, loop) == [(6, [3]), (None, []), (None, [])]


@pytest.mark.parametrize("local", [False, True])
def test_rank_0_goes_first(local: bool, tmp_path: Path) -> None:
    def loop(job: Job) -> Any:
        file = tmp_path / f"{local} {job.size}"
        with job.main_first(local=local):
            found = file.exists()
            if job.rank == 0:
                time.sleep(0.02)
                file.touch()
        return found

    assert on(1, loop) == [False]
    firsts = [False, False, False] if local else [False, True, True]  # each simulated rank is a host
    found = on(3, loop)
    assert found[0] is False and (local or found == firsts)


def test_an_exception_of_rank_0_reaches_all() -> None:
    def loop(job: Job) -> Any:
        try:
            with job.main_first():
                if job.rank == 0:
                    raise OSError("no room")
                raise AssertionError("must not run")
        except OSError as error:
            return str(error)
        except PacelineError as error:
            return str(error)

    first, *others = on(3, loop)
    assert first == "no room"
    for rank, text in enumerate(others, 1):
        assert text.startswith(f"rank {rank}: the block of job.main_first failed on rank 0")
        assert "OSError: no room" in text


def test_a_common_call_inside_main_first_is_refused() -> None:
    def body(job: Job) -> None:
        with job.main_first():
            if job.is_main:
                job.gather_objects("only rank 0 is here")

    with pytest.raises(Mismatch, match="take it out of the block"):
        on(2, body)


def test_only_plain_functions_run_on_rank_0_alone() -> None:
    def body(job: Job) -> None:
        @job.on_main
        def numbers() -> Any:
            yield 1

    with pytest.raises(ConfigError, match=r"a plain function expected"):
        on(1, body)


def test_numbers_of_numpy_are_numbers() -> None:
    def body(job: Job) -> Any:
        job.set_seed(np.int64(3))  # type: ignore[arg-type]
        return job.gather_objects({"loss": np.float64(2.0), "of": [np.int32(1)]})

    assert on(2, body) == [[{"loss": 2.0, "of": [1]}] * 2] * 2
    with pytest.raises(ConfigError, match=r"torch\.from_numpy"):
        on(1, lambda job: job.gather_objects(np.ones(3)))
    with pytest.raises(ConfigError, match="plain values for objects"):
        on(2, lambda job: job.gather_objects(lambda: None))


def test_after_the_end_of_a_job_nothing_is_accumulated_or_logged() -> None:
    def body(job: Job, call: Any) -> None:
        net, optimizer = nn.Linear(2, 1), None
        job.prepare(net, optimizer)
        job.close()
        call(job, net)

    def accumulates(job: Job, net: Any) -> None:
        with job.accumulate(net):
            pass

    calls = (
        accumulates,
        lambda job, net: job.backward(net(torch.ones(2)).sum()),
        lambda job, net: job.log(loss=1.0),
    )
    for call in calls:
        with pytest.raises(ConfigError, match="job is closed"):
            on(1, lambda job, call=call: body(job, call))  # type: ignore[misc]


def test_an_exception_of_another_rank_stays_there() -> None:
    def loop(job: Job) -> Any:
        try:
            with job.main_first():
                if job.rank == 1:
                    raise OSError("mine")
        except OSError:
            return "raised"
        return "fine"

    assert on(3, loop) == ["fine", "raised", "fine"]


def test_a_seed_is_common_before_prepare_and_each_ranks_own_after_it() -> None:
    def draws() -> list[float]:
        return [float(torch.rand(())), float(np.random.rand()), random.random()]

    def loop(job: Job, seed: int = 7) -> Any:
        job.set_seed(seed)
        early = draws()
        net, loader = job.prepare(model(), DataLoader(data(), 6, shuffle=True), batch="global")
        after = draws()
        job.set_seed(seed)
        again = draws()
        net.eval()
        order = torch.cat([job.gather_for_metrics(x[:, 0]) for x, _ in loader])
        return early, after, again, order

    (one,) = on(1, loop, seed=0)
    ranks = on(3, loop, seed=1)
    assert all(r[0] == one[0] for r in ranks)
    assert ranks[0][2] == one[0] and len({str(r[2]) for r in ranks}) == 3
    assert len({str(r[1]) for r in ranks}) == 3
    assert all(torch.equal(r[3], one[3]) for r in ranks)
    assert not torch.equal(one[3], on(1, lambda job: loop(job, 8), seed=0)[0][3])
    with pytest.raises(ConfigError, match=r"job.set_seed: seed=-1: a whole number >= 0"):
        on(1, lambda job: job.set_seed(-1))


def trained(job: Job, strategy: str, kind: str = "buffers") -> Any:
    net: Any = make(kind, 0)
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
    x = torch.randn(23, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loader: Any = DataLoader(torch.utils.data.TensorDataset(x, x.flip(1)), 6, shuffle=True)
    net, optimizer, loader = job.prepare(net, optimizer, loader, batch="global", strategy=strategy)
    for i, (x, y) in enumerate(loader):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
        if i == 2:
            break
    return net


@pytest.mark.parametrize("strategy", ["all_reduce", "local_sgd(period=100)", "diloco(period=100)"])
@pytest.mark.parametrize("name", ["model.pt", "deep/model.safetensors", "folder"])
def test_a_saved_model_is_the_consensus_model(strategy: str, name: str, tmp_path: Path) -> None:
    if not name.endswith(".pt"):
        pytest.importorskip("safetensors")

    def loop(job: Job) -> Any:
        net = trained(job, strategy)
        if strategy != "all_reduce":
            net.table.add_(job.rank)  # as statistics of each rank's own samples
        before = state(net)
        job.save_model(net, tmp_path / name)
        assert_equal(state(net), before, tolerance=0.0)
        with consensus_model(job):
            return state(net)

    agreed = on(3, loop)[0]
    fresh = make("buffers", 1)
    if name.endswith(".pt"):
        fresh.load_state_dict(torch.load(tmp_path / name, weights_only=True))
    else:
        from safetensors.torch import load_model

        file = tmp_path / name
        load_model(fresh, file if file.is_file() else file / "model.safetensors")
    assert_equal(state(fresh), agreed)
    if strategy == "all_reduce":
        assert_equal(on(1, lambda job: state(trained(job, strategy)))[0], agreed)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize("kind", ["tied", "shared", "empty", "complex", "scalar"])
def test_tied_and_odd_weights_are_saved(kind: str, name: str, tmp_path: Path) -> None:
    if not name.endswith(".pt"):
        pytest.importorskip("safetensors")
    path = tmp_path / name

    def loop(job: Job) -> Any:
        net = trained(job, "all_reduce", kind)
        if kind == "complex" and not name.endswith(".pt"):
            with pytest.raises(ConfigError, match=r"phase is torch.complex128, .* ending in \.pt"):
                job.save_model(net, path)
            return None
        job.save_model(torch.compile(net, backend="eager"), path)
        return state(net)

    ranks = on(2, loop)
    if ranks[0] is None:
        return
    fresh = make(kind, 1)
    if name.endswith(".pt"):
        loaded = torch.load(path, weights_only=True)
        fresh.load_state_dict(loaded)
        if kind == "tied":
            assert loaded["first.weight"].data_ptr() == loaded["last.weight"].data_ptr()
    else:
        from safetensors.torch import load_model

        load_model(fresh, path)
    assert_equal(state(fresh), ranks[0], tolerance=0.0)
    size = sum(t.numel() * t.element_size() for t in {id(p): p for p in fresh.parameters()}.values())
    assert path.stat().st_size < size + 6000


def test_a_model_that_cannot_be_saved_is_said_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def texts(path: str | Path, kind: type[Exception]) -> list[str]:
        def loop(job: Job) -> Any:
            net, other = job.prepare(model()), model()
            with torch.no_grad():
                other[0].weight.add_(job.rank)
            with pytest.raises(kind) as raised:
                job.save_model(other if kind is Mismatch else net, path)
            return str(raised.value)

        return on(2, loop)

    (tmp_path / "file").touch()
    for text in texts(tmp_path / "file" / "model.pt", CheckpointError):
        assert "was not written by rank 0: " in text and "Is there room on the disk" in text
    assert all("got '.onnx'" in text for text in texts("model.onnx", ConfigError))
    nothing: Any = None
    assert all("a path expected" in text for text in texts(nothing, ConfigError) + texts("", ConfigError))
    assert all("save_model: Sequential, which is no prepared" in t for t in texts("model.pt", Mismatch))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for text in texts("model.safetensors", ConfigError):
        assert "pip install safetensors, or save to a path that ends in .pt" in text
