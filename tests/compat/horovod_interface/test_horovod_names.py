"""Every public name of Horovod's torch module exists, under the names that scripts import."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import paceline.compat.horovod as hvd
from paceline.errors import ConfigError

# Written from Horovod's API documentation of horovod.torch and horovod.torch.elastic.
NAMES = """
init shutdown is_initialized size local_size cross_size rank local_rank cross_rank is_homogeneous
mpi_threads_supported mpi_enabled mpi_built gloo_enabled gloo_built nccl_built ddl_built ccl_built cuda_built
rocm_built start_timeline stop_timeline
allreduce allreduce_async allreduce_ allreduce_async_
grouped_allreduce grouped_allreduce_async grouped_allreduce_ grouped_allreduce_async_ sparse_allreduce_async
allgather allgather_async grouped_allgather grouped_allgather_async
broadcast broadcast_async broadcast_ broadcast_async_
alltoall alltoall_async reducescatter reducescatter_async grouped_reducescatter grouped_reducescatter_async
join barrier poll synchronize
ProcessSet global_process_set add_process_set remove_process_set
Average Sum Adasum Min Max Product
DistributedOptimizer broadcast_parameters broadcast_optimizer_state broadcast_object allgather_object
Compression SyncBatchNorm elastic
""".split()
ELASTIC = "run State ObjectState TorchState ElasticSampler".split()
ARGUMENTS = {
    "allreduce": "tensor average name compression op prescale_factor postscale_factor process_set",
    "allreduce_async_": "tensor average name op prescale_factor postscale_factor process_set",
    "grouped_allreduce": "tensors average name compression op prescale_factor postscale_factor process_set",
    "allgather": "tensor name process_set",
    "broadcast": "tensor root_rank name process_set",
    "alltoall": "tensor splits name process_set",
    "reducescatter": "tensor name compression op process_set prescale_factor postscale_factor",
    "broadcast_parameters": "params root_rank process_set",
    "DistributedOptimizer": "optimizer named_parameters compression backward_passes_per_step op"
    " gradient_predivide_factor num_groups groups sparse_as_dense process_set",
}


@pytest.mark.parametrize("name", NAMES)
def test_public_name_exists(name: str) -> None:
    assert hasattr(hvd, name)
    assert name in hvd.__all__


@pytest.mark.parametrize("name", ELASTIC)
def test_elastic_name_exists(name: str) -> None:
    assert hasattr(hvd.elastic, name)


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_arguments_are_those_documented(name: str) -> None:
    assert list(inspect.signature(getattr(hvd, name)).parameters) == ARGUMENTS[name].split()


@pytest.mark.parametrize("call", [lambda: hvd.start_timeline("x"), hvd.stop_timeline, hvd.rank])
def test_using_it_before_init_is_a_clear_error(call) -> None:
    with pytest.raises(ValueError, match=r"hvd\.init"):
        call()


IMPORTS = """
from horovod.torch.mpi_ops import allreduce_async_, synchronize, Average, rank, size, ProcessSet
from horovod.torch.functions import broadcast_parameters, broadcast_optimizer_state, allgather_object
from horovod.torch.optimizer import DistributedOptimizer
from horovod.torch.sync_batch_norm import SyncBatchNorm
from horovod.torch.compression import Compression
from horovod.torch.elastic.state import TorchState
from horovod.torch.elastic.sampler import ElasticSampler
from horovod.common.elastic import ObjectState, State
from horovod.common.basics import HorovodBasics
from horovod.common.util import env, split_list, num_rank_is_power_2, gpu_available, gloo_built
from horovod.common.process_sets import add_process_set, remove_process_set
from horovod.runner import run
from horovod import run
"""


@pytest.mark.parametrize("line", IMPORTS.strip().splitlines())
def test_modules_that_scripts_import_from(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(hvd.__file__).parent / "stand_in"))
    for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"):
        monkeypatch.setenv(f"HOROVOD_{name}", "0")
    exec(line, {})


def test_a_sampler_counts_what_was_processed() -> None:
    sampler = hvd.elastic.ElasticSampler(range(10), shuffle=False)
    sampler.record_batch(0, 3)
    assert sampler.processed_num == 3


def triple(x: int, plus: int = 0) -> int:
    return 3 * x + plus


@pytest.mark.distributed
@pytest.mark.xdist_group("processes")
def test_run_returns_the_results_of_all_processes() -> None:
    from paceline.compat.horovod.common.launch import run

    assert run(triple, (5,), {"plus": 1}, np=2) == [16, 16]
    with pytest.raises(ValueError, match="this host only"):
        run(triple, (5,), hosts="elsewhere:2")


def ring_of_sums(start: float, *, scale: float) -> tuple[int, float]:
    import horovod.torch as from_stand_in
    import torch

    from_stand_in.init()
    total = from_stand_in.allreduce(torch.tensor([start + from_stand_in.rank()]), op=from_stand_in.Sum)
    assert os.environ["HOROVOD_SIZE"] == str(from_stand_in.size())
    return from_stand_in.rank(), scale * total.item()


@pytest.mark.distributed
@pytest.mark.xdist_group("processes")
def test_a_function_that_imports_horovod_runs_on_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from paceline.compat.horovod.common.launch import run

    monkeypatch.setenv("HOROVOD_SIZE", "7")  # as in a script that is a worker itself
    given = {"hosts": "localhost:2", "verbose": 1, "use_gloo": True, "ssh_port": 22, "min_np": 2}
    assert run(ring_of_sums, (1.0,), {"scale": 2.0}, np=2, **given) == [(0, 6.0), (1, 6.0)]


REFUSED = {
    "hostfile": ("hosts.txt", "--nodes"),
    "host_discovery_script": ("./discover.sh", "--max-restarts"),
    "cooldown_range": ((1, 2), "--max-restarts"),
    "mpi_args": ("--oversubscribe", "--on mpi"),
    "output_filename": ("out", "redirect"),
    "executable": ("/usr/bin/python2", "start the script"),
    "nonsense": (1, "no such option"),
    "max_np": (3, "give num_proc alone"),
    "min_num_proc": (1, "give num_proc alone"),
    "slots": (1, "do not fit into 1 slots"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_of_run_without_counterpart_is_refused_by_name(name: str) -> None:
    from paceline.compat.horovod.common.launch import run

    value, advice = REFUSED[name]
    with pytest.raises(ConfigError, match=advice) as error:
        run(triple, (5,), np=2, **{name: value})
    assert name.replace("max_np", "max_num_proc") in str(error.value)


@pytest.mark.parametrize("hosts", ["localhost:2,elsewhere:2", "localhost:1", "localhost:two"])
def test_hosts_that_cannot_be_had_are_refused(hosts: str) -> None:
    from paceline.compat.horovod.common.launch import run

    with pytest.raises(ConfigError):
        run(triple, (5,), np=2, hosts=hosts)


@pytest.mark.parametrize("count", [0, -1, True, "2"])
def test_a_number_of_processes_that_is_none_is_refused(count: object) -> None:
    from paceline.compat.horovod.common.launch import run

    with pytest.raises(ConfigError, match="num_proc"):
        run(triple, (5,), num_proc=count)


def test_small_functions() -> None:
    from paceline.compat.horovod.common import util

    assert util.split_list([1, 2, 3, 4, 5], 2) == [[1, 2, 3], [4, 5]]
    assert [n for n in range(9) if util.num_rank_is_power_2(n)] == [1, 2, 4, 8]
    with util.env(PACELINE_TEST_ONLY="1"):
        assert os.environ["PACELINE_TEST_ONLY"] == "1"
    assert "PACELINE_TEST_ONLY" not in os.environ


def test_stand_in_answers_to_the_name_of_horovod() -> None:
    folder = Path(hvd.__file__).parent / "stand_in"
    code = (
        "import horovod.torch as hvd, horovod.torch.elastic, horovod\n"
        "from horovod.torch.elastic.sampler import ElasticSampler\n"
        "from horovod.common.exceptions import HorovodInternalError\n"
        "import paceline.compat.horovod as ours\n"
        "assert hvd.allreduce is ours.allreduce and hvd.elastic.run is ours.elastic.run\n"
        "assert HorovodInternalError is ours.HorovodInternalError and horovod.__version__"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)
