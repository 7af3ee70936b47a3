"""Every public name of Horovod's torch module exists, under the names that scripts import."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import paceline.compat.horovod as hvd

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


@pytest.mark.parametrize("call", [lambda: hvd.start_timeline("x"), hvd.stop_timeline])
def test_what_is_not_supported_says_what_to_use(call) -> None:
    with pytest.raises(NotImplementedError, match=r"torch\.profiler"):
        call()


def test_using_it_before_init_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match=r"hvd\.init"):
        hvd.rank()


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
