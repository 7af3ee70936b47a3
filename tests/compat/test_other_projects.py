"""Scripts written for other launchers and for Apex."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("processes")
ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> str:
    line = [sys.executable, "-m", "paceline.cli.main", "run", "-n", "2", *command]
    result = subprocess.run(line, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    return result.stdout


@pytest.mark.parametrize("option", ["--local_rank", "--local-rank"])
def test_scripts_that_expect_their_local_rank_as_an_option(tmp_path: Path, option: str) -> None:
    script = tmp_path / "old.py"
    script.write_text(
        "import argparse\n"
        "p = argparse.ArgumentParser()\n"
        f"p.add_argument({option!r}, type=int, required=True)\n"
        "p.add_argument('rest', nargs='*')\n"
        "a = p.parse_args()\n"
        "print('mine is', a.local_rank, a.rest)\n"
    )
    lines = sorted(run(str(script), "x").splitlines())
    assert lines == ["[0] mine is 0 ['x']", "[1] mine is 1 ['x']"]


def test_an_option_that_the_user_gives_wins(tmp_path: Path) -> None:
    script = tmp_path / "old.py"
    script.write_text(
        "import argparse\np = argparse.ArgumentParser()\n"
        "p.add_argument('--local_rank', type=int)\nprint('mine is', p.parse_args().local_rank)\n"
    )
    assert run(str(script), "--local_rank=7").count("mine is 7") == 2


APEX = """
import copy
import torch
import torch.distributed as dist
from apex import amp
from apex.parallel import DistributedDataParallel, convert_syncbn_model

dist.init_process_group("gloo")
rank = dist.get_rank()
for cast in (torch.bfloat16, torch.float16):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    early = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model, optimizer = amp.initialize(model, optimizer, opt_level="O1", cast_model_type=cast)
    late = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    ddp = DistributedDataParallel(model)
    torch.manual_seed(rank)
    for step in range(4):
        before = copy.deepcopy(model.state_dict())
        loss = ddp(torch.randn(16, 4)).square().mean()
        if cast is torch.float16 and step == 2 and rank == 1:
            loss = loss * 1e38
        optimizer.zero_grad()
        with amp.scale_loss(loss, optimizer) as scaled:
            scaled.backward()
        torch.nn.utils.clip_grad_norm_(amp.master_params(optimizer), 1.0)
        optimizer.step()
        same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert same == (cast is torch.float16 and step == 2), (cast, step)
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    other = weights.clone()
    dist.broadcast(other, 0)
    assert torch.equal(weights, other)
    late.step()
    early.step()
    amp.load_state_dict(amp.state_dict())
    del ddp
dist.barrier()
dist.destroy_process_group()
print("trained")
"""


def test_an_apex_script_runs_unchanged(tmp_path: Path) -> None:
    script = tmp_path / "apex_script.py"
    script.write_text(APEX)
    assert run("--as-apex", str(script)).count("trained") == 2


@pytest.mark.slow
def test_imagenet_example_on_a_folder_of_pictures(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="needs Pillow, as the example does")
    for split, count in (("train", 9), ("val", 5)):
        for label, colour in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                image.new("RGB", (40 + i, 50), colour).save(folder / f"{i}.png")
    script = ROOT / "examples" / "imagenet" / "paceline_style.py"
    options = "--arch resnet10_narrow --image-size 32 --epochs 2 --batch-size 3 --loader-workers 1".split()
    checkpoint = ["--checkpoint", str(tmp_path / "saved.pt")]
    output = run(str(script), str(tmp_path / "data"), *options, *checkpoint)
    assert output.count("top5 1,") == 2  # two classes: among the best five for certain
    options[options.index("--epochs") + 1] = "3"
    assert "epoch 3" in run(str(script), str(tmp_path / "data"), *options, *checkpoint)
