"""Leaving a job ends Gloo's threads: alive at interpreter exit, they abort the process now and then."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc, os, torch, paceline
job = paceline.init(fabric="torch")
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
job.prepare(model, optimizer)
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
threads = lambda: [open(f"/proc/self/task/{t}/comm").read().strip() for t in os.listdir("/proc/self/task")]
assert any("gloo" in t for t in threads()), threads()
job.close()
gc.collect()
assert not any("gloo" in t for t in threads()), threads()
"""


def test_no_thread_of_gloo_is_left_after_close() -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
