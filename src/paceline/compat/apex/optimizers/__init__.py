"""Apex's fused optimizers: the same arguments and update rules, in torch's operations, on any device."""

from __future__ import annotations

from paceline.compat.apex.optimizers.adagrad import FusedAdagrad
from paceline.compat.apex.optimizers.adam import FusedAdam
from paceline.compat.apex.optimizers.lamb import FusedLAMB, FusedMixedPrecisionLamb
from paceline.compat.apex.optimizers.novograd import FusedNovoGrad
from paceline.compat.apex.optimizers.sgd import FusedSGD

__all__ = [
    "FusedAdagrad",
    "FusedAdam",
    "FusedLAMB",
    "FusedMixedPrecisionLamb",
    "FusedNovoGrad",
    "FusedSGD",
]
