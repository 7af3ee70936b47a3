"""Where libraries import the functions of normalisation from."""

from paceline.compat.apex.normalization import *  # noqa: F403
