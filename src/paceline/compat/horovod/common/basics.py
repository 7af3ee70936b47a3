"""Ranks, sizes and what was built as methods of one object, as `horovod.common.basics` has them."""

from __future__ import annotations

from paceline.compat.horovod import constants, queries, world


class HorovodBasics:
    """What `horovod.torch` offers beside its collectives.

    Args:
        arguments: Where Horovod's library lies; not needed here.
    """

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    Average, Sum, Adasum = constants.Average, constants.Sum, constants.Adasum
    Min, Max, Product = constants.Min, constants.Max, constants.Product
    init, shutdown = staticmethod(world.init), staticmethod(world.shutdown)
    is_initialized, is_homogeneous = staticmethod(world.is_initialized), staticmethod(world.is_homogeneous)
    rank, size = staticmethod(world.rank), staticmethod(world.size)
    local_rank, local_size = staticmethod(world.local_rank), staticmethod(world.local_size)
    cross_rank, cross_size = staticmethod(world.cross_rank), staticmethod(world.cross_size)
    mpi_threads_supported = staticmethod(queries.mpi_threads_supported)
    mpi_enabled, mpi_built = staticmethod(queries.mpi_enabled), staticmethod(queries.mpi_built)
    gloo_enabled, gloo_built = staticmethod(queries.gloo_enabled), staticmethod(queries.gloo_built)
    nccl_built, ddl_built = staticmethod(queries.nccl_built), staticmethod(queries.ddl_built)
    ccl_built, cuda_built = staticmethod(queries.ccl_built), staticmethod(queries.cuda_built)
    rocm_built = staticmethod(queries.rocm_built)
    start_timeline = staticmethod(world.start_timeline)
    stop_timeline = staticmethod(world.stop_timeline)
