"""Ways in which a Python process group crashes, hangs or aborts, each seen once: none of them here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from c10d_ranks import run

import paceline

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("processes"), pytest.mark.timeout(200)]


def small_ddp(**options: object) -> torch.nn.parallel.DistributedDataParallel:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    return torch.nn.parallel.DistributedDataParallel(model, **options)


def step(model: torch.nn.Module, rank: int) -> None:
    model(torch.full((4, 8), rank + 1.0)).sum().backward()


def lost_peer_in_backward(rank: int, size: int) -> str:
    model = small_ddp()
    step(model, rank)
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        for _ in range(3):
            step(model, rank)
    assert time.monotonic() - start < 20
    return str(caught.value)


def test_failed_future_is_an_error_and_not_a_segmentation_fault() -> None:
    message, _ = run(2, lost_peer_in_backward, may_die=(1,), timeout_s=30)
    assert "rank 1" in message


def values_of_futures(rank: int, size: int) -> None:
    group = dist.group.WORLD
    t = [torch.ones(3)]
    works = [
        group.allreduce(t),
        group.broadcast(t),
        group.barrier(),
        group.allgather([[torch.empty(3) for _ in range(size)]], t),
        group.reduce_scatter_single(torch.empty(3), torch.ones(3 * size)),
        group.allreduce_coalesced([torch.ones(2), torch.ones(3)]),
        group.allreduce_coalesced([]),
    ]
    for work in works:
        assert isinstance(work, dist.Work)
        value = work.get_future().wait()
        assert isinstance(value, list) and all(isinstance(v, torch.Tensor) for v in value)


def test_futures_hold_lists_of_tensors_and_methods_return_works() -> None:
    run(2, values_of_futures)


def nested_waits(rank: int, size: int) -> None:
    def square_norm(future: torch.futures.Future) -> torch.Tensor:
        norm = future.value()[0].square().sum().reshape(1)
        dist.all_reduce(norm)  # waits inside the callback
        return norm

    for _ in range(3):
        works = [dist.all_reduce(torch.ones(600_000), async_op=True) for _ in range(6)]
        futures = [w.get_future().then(square_norm) for w in works]
        assert [f.wait().item() for f in futures] == [600_000.0 * size**3] * 6


def test_callbacks_may_wait_for_other_operations() -> None:
    run(2, nested_waits, limit_s=60)


def power_sgd(rank: int, size: int) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    model = small_ddp()
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    for _ in range(6):
        step(model, rank)


def test_power_sgd_waits_inside_a_callback() -> None:
    run(2, power_sgd, limit_s=60)


def names(rank: int, size: int) -> None:
    group = dist.new_group([0, 1], group_desc="a pair")
    assert group.group_name == group.getGroupName() == dist.distributed_c10d._world.pg_names[group]
    assert group.group_desc == "a pair"
    resolved = torch._C._distributed_c10d._resolve_process_group(group.group_name)
    assert resolved.size() == 2 and resolved.rank() == rank
    assert group._get_backend(torch.device("cpu")) is group
    with pytest.raises(RuntimeError, match="cuda"):
        group._get_backend(torch.device("cuda"))


def test_names_without_a_backend_in_cpp() -> None:
    run(2, names)


def compiled(rank: int, size: int) -> list[float]:
    import torch._dynamo

    model = small_ddp()
    fast = torch.compile(model, backend="aot_eager")
    losses = []
    for _ in range(3):
        loss = fast(torch.full((4, 8), rank + 1.0)).square().mean()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.01 * p.grad
                p.grad = None
        losses.append(loss.item())
    everyone = [torch.empty(1) for _ in range(size)]
    dist.all_gather(everyone, next(iter(model.parameters())).detach().sum().reshape(1))
    assert everyone[0] == everyone[1]
    return losses


def test_dynamo_does_not_trace_the_backend() -> None:
    losses = run(2, compiled, limit_s=150)
    assert losses[0][-1] < losses[0][0]


SCRIPT = """
import os, sys, torch, torch.distributed as dist
from datetime import timedelta
rank = int(sys.argv[1])
dist.init_process_group("paceline", init_method="file://" + sys.argv[2], rank=rank, world_size=2,
                        timeout=timedelta(seconds=60))
works = [dist.all_reduce(torch.ones(300_000), async_op=True) for _ in range(3)]
futures = [w.get_future() for w in works]
futures[-1].wait()
if sys.argv[3] == "destroy":
    dist.destroy_process_group()
if sys.argv[3] == "pending" and rank == 0:
    dist.all_reduce(torch.ones(300_000), async_op=True).get_future()
"""


@pytest.mark.parametrize("how", ["leave", pytest.param("destroy", marks=pytest.mark.slow), "pending"])
def test_interpreter_exits_clean(how: str, tmp_path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(r), str(tmp_path / "store"), how],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    for p in processes:
        _, errors = p.communicate(timeout=60)
        assert p.returncode == 0, errors
        assert "terminate called" not in errors


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_exits_again_and_again() -> None:
    script = Path(__file__).resolve().parents[2] / "tools" / "exit_script.py"
    subprocess.run([sys.executable, str(script), "--times", "8"], check=True, timeout=500)


def average_of_integers(rank: int, size: int) -> None:
    t = torch.tensor([rank * 2, 10])
    dist.all_reduce(t, op=dist.ReduceOp.AVG)
    assert t.tolist() == [1, 10]


def test_average_of_int64_as_lightning_asks_for_it() -> None:
    run(2, average_of_integers)


def queue_without_the_gil(rank: int, size: int) -> None:
    tensors = [torch.ones(262_144) for _ in range(20)]
    works = [dist.all_reduce(t, async_op=True) for t in tensors]
    end = time.monotonic() + 20
    x = 0
    while not works[-1].is_completed() and time.monotonic() < end:
        x += sum(range(1000))  # holds the GIL: the queue must move by itself
    assert works[-1].is_completed()
    assert all(t[0] == size for t in tensors)
    assert threading.active_count() <= 2  # no Python thread drives it


def test_queue_of_collectives_runs_in_the_core() -> None:
    run(2, queue_without_the_gil)


def messages_beside_collectives(rank: int, size: int) -> None:
    box = torch.empty(3)
    if rank == 0:
        work = dist.all_reduce(torch.ones(300_000), async_op=True)  # waits for rank 1
        dist.send(torch.full((3,), 5.0), 1)
        work.wait()
    else:
        dist.recv(box, 0)  # before it joins the all_reduce
        assert box[0] == 5
        dist.all_reduce(torch.ones(300_000))


def test_point_to_point_does_not_queue_behind_collectives() -> None:
    run(2, messages_beside_collectives, limit_s=60)


def test_registered_by_a_bare_import_of_torch() -> None:
    code = "import torch, sys; assert 'paceline' in torch.distributed.Backend.backend_list; "
    code += "assert 'paceline._core' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_registered_by_importing_us_without_the_entry_point() -> None:
    code = textwrap.dedent("""
        import torch
        assert "paceline" not in torch.distributed.Backend.backend_list
        import paceline, sys
        assert "paceline" in torch.distributed.Backend.backend_list
        assert "paceline._core" not in sys.modules
    """)
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment)


def timed_out(rank: int, size: int) -> str:
    if rank == 1:
        time.sleep(4)
        return ""
    with pytest.raises(paceline.Timeout) as caught:
        dist.all_reduce(torch.ones(3))
    with pytest.raises(RuntimeError):
        dist.all_reduce(torch.ones(3))
    return str(caught.value)


def test_timeout_names_the_rank() -> None:
    message, _ = run(2, timed_out, timeout_s=2)
    assert "rank 1" in message and "all_reduce" in message


def mismatched(rank: int, size: int) -> str:
    with pytest.raises(paceline.CommError) as caught:
        dist.all_reduce(torch.ones(3 + rank))
    return str(caught.value)


def test_different_calls_are_named() -> None:
    for message in run(2, mismatched, timeout_s=20):
        assert "rank" in message and "all_reduce" in message


def aborted(rank: int, size: int) -> str:
    group = dist.new_group([0, 1])
    dist.all_reduce(torch.ones(1), group=group)
    if rank == 1:
        time.sleep(1)
        group.abort()
        return ""
    with pytest.raises(RuntimeError) as caught:
        dist.all_reduce(torch.ones(1), group=group)
    return str(caught.value)


def test_abort_ends_the_operation_on_the_other_side() -> None:
    message, _ = run(2, aborted, timeout_s=60, limit_s=40)
    assert "rank 1" in message


def summed(rank: int, size: int) -> None:
    t = torch.ones(4)
    dist.all_reduce(t)
    assert t.tolist() == [size] * 4
    assert "paceline" in dist.get_backend_config()


@pytest.mark.parametrize("name", ["cpu:paceline", "cpu:paceline,cuda:nccl", "PACELINE"])
def test_every_spelling_of_the_name(name: str) -> None:
    run(2, summed, backend=name)


def made_again(rank: int, size: int) -> None:
    store = dist.distributed_c10d._get_default_store()
    for _ in range(3):
        dist.destroy_process_group()
        dist.init_process_group("paceline", store=store, rank=rank, world_size=size)
        summed(rank, size)


def test_a_group_can_be_made_again_on_the_same_store() -> None:
    run(2, made_again)
