"""Where scripts import `LARC` from."""

from paceline.compat.apex.larc import LARC

__all__ = ["LARC"]
