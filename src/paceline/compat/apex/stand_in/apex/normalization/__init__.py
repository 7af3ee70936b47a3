"""`from apex.normalization import FusedLayerNorm` means `paceline.compat.apex.normalization`."""

from paceline.compat.apex.normalization import (  # noqa: F401
    FusedLayerNorm,
    FusedRMSNorm,
    MixedFusedLayerNorm,
    MixedFusedRMSNorm,
)
