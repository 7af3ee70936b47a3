"""`apex.fp16_utils`: models in float16, float32 master parameters, and loss scaling by hand."""

from __future__ import annotations

from torch.nn.utils import clip_grad_norm_ as clip_grad_norm

from paceline.compat.apex.fp16_utils.loss_scaler import DynamicLossScaler, LossScaler
from paceline.compat.apex.fp16_utils.masters import (
    master_params_to_model_params,
    model_grads_to_master_grads,
    prep_param_lists,
    to_python_float,
)
from paceline.compat.apex.fp16_utils.networks import (
    BN_convert_float,
    FP16Model,
    convert_module,
    convert_network,
    network_to_half,
    tofp16,
)
from paceline.compat.apex.fp16_utils.optimizer import FP16_Optimizer

__all__ = [
    "BN_convert_float",
    "DynamicLossScaler",
    "FP16Model",
    "FP16_Optimizer",
    "LossScaler",
    "clip_grad_norm",
    "convert_module",
    "convert_network",
    "master_params_to_model_params",
    "model_grads_to_master_grads",
    "network_to_half",
    "prep_param_lists",
    "to_python_float",
    "tofp16",
]
