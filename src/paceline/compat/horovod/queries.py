"""What was built and what is enabled, in Horovod's terms; Paceline's own fabrics answer for Gloo."""

from __future__ import annotations

import torch


def mpi_threads_supported() -> bool:
    """False: no MPI inside."""
    return False


def mpi_enabled() -> bool:
    """False: no MPI inside (ranks that mpirun starts are recognised all the same)."""
    return False


def mpi_built() -> bool:
    """False: no MPI inside."""
    return False


def gloo_enabled() -> bool:
    """True: the CPU fabric stands where Gloo stood."""
    return True


def gloo_built() -> bool:
    """True: the CPU fabric stands where Gloo stood."""
    return True


def nccl_built() -> int:
    """Return NCCL's version as torch was built with it, 0 without."""
    if not torch.cuda.is_available():
        return 0
    major, minor, patch = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return int(major * 10000 + minor * 100 + patch)


def ddl_built() -> bool:
    """False: IBM's DDL does not exist here."""
    return False


def ccl_built() -> bool:
    """False: oneCCL does not exist here."""
    return False


def cuda_built() -> bool:
    """Whether torch has CUDA."""
    return torch.version.cuda is not None


def rocm_built() -> bool:
    """Whether torch has ROCm."""
    return torch.version.hip is not None
