"""A sample of PyTorch's own distributed tests; `make pytorch-suite` runs all of them beside gloo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "pytorch_suite.py"
SAMPLE = (
    "test_all_gather_coalesced_simple test_all_gather_complex test_all_gather_object_default_pg"
    " test_all_reduce_coalesced_sum test_all_reduce_complex_unsupported_ops"
    " test_all_reduce_full_group_max test_batch_isend_irecv_gloo_tags test_get_future"
    " test_destroy_group test_barrier_timeout_full_group test_DistributedDataParallelCPU_grad_is_view"
    " test_accumulate_gradients_no_sync_allreduce_hook test_monitored_barrier_gloo"
    " test_reduce_product test_scatter_object_list test_send_recv_any_source test_send_recv_with_tag"
    " test_sparse_all_reduce_sum"
).split()


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.xdist_group("processes")
def test_sample_passes(tmp_path: Path) -> None:
    pytest.importorskip("expecttest", reason="torch.testing needs it")
    out = tmp_path / "out.json"
    command = [sys.executable, str(SCRIPT), "run", "--backend", "paceline", "--json", str(out), "--only"]
    done = subprocess.run([*command, *SAMPLE], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(out.read_text())
    assert set(results) == set(SAMPLE)
    assert not {n: r["why"] for n, r in results.items() if r["state"] == "failed"}
    assert sum(r["state"] == "passed" for r in results.values()) >= 17
