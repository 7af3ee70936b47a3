"""Apex's public names, under the modules that scripts import them from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import paceline.compat.apex as apex

# Written from Apex's documentation and the heads of its packages.
IMPORTS = """
import apex; apex.amp, apex.parallel, apex.optimizers, apex.normalization, apex.fp16_utils
from apex import amp, fp16_utils, normalization, optimizers, parallel
from apex.optimizers import FusedAdam, FusedSGD, FusedLAMB, FusedNovoGrad
from apex.optimizers import FusedAdagrad, FusedMixedPrecisionLamb
from apex.normalization import FusedLayerNorm, FusedRMSNorm, MixedFusedLayerNorm, MixedFusedRMSNorm
from apex.normalization.fused_layer_norm import fused_layer_norm_affine, fused_rms_norm, MixedFusedLayerNorm
from apex.fp16_utils import network_to_half, convert_network, convert_module, BN_convert_float
from apex.fp16_utils import tofp16, FP16Model
from apex.fp16_utils import prep_param_lists, master_params_to_model_params, model_grads_to_master_grads
from apex.fp16_utils import to_python_float, clip_grad_norm, FP16_Optimizer, LossScaler, DynamicLossScaler
from apex.parallel import DistributedDataParallel, Reducer, SyncBatchNorm, convert_syncbn_model
from apex.parallel import create_syncbn_process_group
from apex.parallel.LARC import LARC; assert isinstance(LARC, type)
import apex.parallel.LARC; from apex.parallel import LARC; assert isinstance(LARC, type)
from apex.amp import initialize, scale_loss, master_params, state_dict, load_state_dict, disable_casts
from apex.amp import half_function, float_function, promote_function
from apex.amp import register_half_function, register_float_function, register_promote_function
"""


def test_modules_that_scripts_import_from() -> None:
    folder = Path(apex.__file__).parent / "stand_in"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    for order in (1, -1):
        code = "\n".join(IMPORTS.strip().splitlines()[::order])
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


@pytest.mark.parametrize("package", apex.__all__)
def test_a_star_import_gives_what_the_package_is_about(package: str) -> None:
    module = getattr(apex, package)
    assert module.__all__ == sorted(module.__all__) or package in ("parallel", "fp16_utils")
    assert all(hasattr(module, name) for name in module.__all__)
