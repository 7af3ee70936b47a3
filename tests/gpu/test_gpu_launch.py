"""A script as users write it, started by torchrun: two ranks that share a GPU find that out by themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SCRIPT = """
import torch, paceline
from paceline.tasks.builtin import digits
from paceline.tasks.task import accuracy
job = paceline.init(seed=1, progress=False)
task = digits.build()
model = task.model.cuda()
loader = torch.utils.data.DataLoader(task.train_set, 16, shuffle=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
model, optimizer, loader = job.prepare(model, optimizer, loader, strategy="gossip")
for _ in job.epochs(4):
    for x, y in loader:
        torch.nn.functional.cross_entropy(model(x.cuda()), y.cuda()).backward()
        optimizer.step()
        optimizer.zero_grad()
score = job.evaluate(model, task.test_set, {"accuracy": accuracy})["accuracy"]
print(f"rank {job.rank}: {torch.distributed.get_backend()} {score > 0.9}", flush=True)
job.close()
"""


def test_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=80, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(line for line in result.stdout.splitlines() if line.startswith("rank")) == [
        "rank 0: gloo True",
        "rank 1: gloo True",
    ]
