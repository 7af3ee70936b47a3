"""LARC's rule, and what `apex.parallel` does between ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paceline.compat.apex.parallel import LARC


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_larc_is_the_published_rule(clip: bool, decay: float) -> None:
    torch.manual_seed(0)
    start = [torch.randn(3, 4), torch.randn(5) * 100, torch.zeros(2), torch.randn(2)]
    ours = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = LARC(torch.optim.SGD(ours, lr=0.5, weight_decay=decay), trust_coefficient=0.1, clip=clip)
    theirs = [p.clone() for p in start]
    for _ in range(3):
        for i, p in enumerate(ours[:3]):
            p.grad = torch.randn_like(p)
            g, q = p.grad.clone(), theirs[i]
            if q.norm() > 0:
                rate = 0.1 * q.norm() / (g.norm() + decay * q.norm() + 1e-8)
                rate = min(rate / 0.5, torch.tensor(1.0)) if clip else rate
                g = rate * (g + decay * q)
            theirs[i] = q - 0.5 * g
        optimizer.step()
        assert optimizer.param_groups[0]["weight_decay"] == decay
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.detach(), q)
    optimizer.zero_grad()
    assert ours[0].grad is None
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    assert len(optimizer.param_groups) == len(optimizer.optim.param_groups) == 2
    assert "SGD" in repr(optimizer)


def test_larc_gives_the_weight_decay_back_after_an_error() -> None:
    class Fails(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            assert self.param_groups[0]["weight_decay"] == 0
            raise ZeroDivisionError

    optimizer = LARC(Fails([torch.nn.Parameter(torch.ones(1))], lr=1.0, weight_decay=0.5))
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


SCRIPT = """
import torch, torch.distributed as dist
from apex.parallel import Reducer, create_syncbn_process_group, convert_syncbn_model
from apex.parallel.LARC import LARC
from apex.optimizers import FusedAdam
from apex import amp

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(rank)
model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1).bfloat16())
reducer = Reducer(model)
weights = [None] * size
dist.all_gather_object(weights, [p.tolist() for p in model.parameters()])
assert all(w == weights[0] for w in weights)
for i, p in enumerate(model.parameters()):
    p.grad = None if i == 1 else torch.full_like(p, float(rank + i))
reducer.reduce()
for i, p in enumerate(model.parameters()):
    assert p.grad is None if i == 1 else (p.grad == (size - 1) / 2 + i).all(), (i, p.grad)
several = [torch.full((2,), float(rank)), (torch.full((1,), 2.0 * rank), [torch.full((3,), 1.0)])]
Reducer(several).reduce()
assert several[0].tolist() == [(size - 1) / 2] * 2 and several[1][0].item() == size - 1
assert several[1][1][0].tolist() == [1.0] * 3

assert create_syncbn_process_group(0) is None
pair = create_syncbn_process_group(2)
assert dist.get_process_group_ranks(pair) == [rank // 2 * 2, rank // 2 * 2 + 1]
alone = create_syncbn_process_group(1)
assert dist.get_process_group_ranks(alone) == [rank]
try:
    create_syncbn_process_group(3)
    raise SystemExit("a size that does not divide was not noticed")
except ValueError as error:
    assert "divisor" in str(error)
converted = convert_syncbn_model(torch.nn.Sequential(torch.nn.BatchNorm1d(2)), process_group=pair)
assert isinstance(converted[0], torch.nn.SyncBatchNorm) and converted[0].process_group is pair

model = torch.nn.Linear(3, 1)
reducer = Reducer(model)
model, optimizer = amp.initialize(model, FusedAdam(model.parameters(), lr=0.1), opt_level="O1")
optimizer = LARC(optimizer)
for _ in range(3):
    optimizer.zero_grad()
    with amp.scale_loss(model(torch.randn(4, 3)).square().mean(), optimizer) as scaled:
        scaled.backward()
    reducer.reduce()
    optimizer.step()
dist.all_gather_object(weights, [p.tolist() for p in model.parameters()])
assert all(w == weights[0] for w in weights)
del pair, alone, converted  # groups that outlive destroy_process_group end with the interpreter
dist.barrier()
dist.destroy_process_group()
print("all good")
"""


@pytest.mark.distributed
@pytest.mark.xdist_group("processes")
def test_ranks_reduce_by_hand_and_form_groups(tmp_path: Path) -> None:
    script = tmp_path / "apex_script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "paceline.cli.main", "run", "-n", "4", "--as-apex", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    assert result.stdout.count("all good") == 4
