"""Distributions of the compute time of a simulated minibatch; drawn once per step and worker.

constant(mean_s=0.01)            always the same
normal(mean_s=0.01, std_s=0.002) never below a tenth of the mean
exponential(mean_s=0.01)         memoryless
shifted_exponential(shift_s=0.005, mean_s=0.01)   a floor plus a tail; mean_s includes the floor
pareto(shape=3, minimum_s=0.01)  heavy tail: P(T > t) = (minimum_s / t)^shape
empirical(samples="0.01 0.012 0.3")   or empirical(file="seconds.txt"): drawn with replacement
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from paceline import spec as specs
from paceline import user_input
from paceline.errors import ConfigError
from paceline.registry import unknown

Draw = Callable[[np.random.Generator], float]


def parse(text: str) -> Draw:
    """Return the distribution that `text` names: a function from a random generator to seconds."""
    spec = specs.parse(text)
    if spec.name not in _DISTRIBUTIONS:
        raise ConfigError(unknown("compute-time distribution", spec.name, _DISTRIBUTIONS))
    draw: Draw = specs.call(_DISTRIBUTIONS[spec.name], spec, kind="compute-time distribution")
    return draw


def _constant(*, mean_s: float = 0.01) -> Draw:
    _positive(mean_s=mean_s)
    return lambda rng: mean_s


def _normal(*, mean_s: float = 0.01, std_s: float | None = None) -> Draw:
    _positive(mean_s=mean_s)
    spread_s = 0.2 * mean_s if std_s is None else std_s
    if spread_s != 0:
        _positive(std_s=spread_s)
    return lambda rng: max(0.1 * mean_s, float(rng.normal(mean_s, spread_s)))


def _exponential(*, mean_s: float = 0.01) -> Draw:
    _positive(mean_s=mean_s)
    return lambda rng: float(rng.exponential(mean_s))


def _shifted_exponential(*, shift_s: float = 0.005, mean_s: float = 0.01) -> Draw:
    _positive(mean_s=mean_s)
    if shift_s != 0:
        _positive(shift_s=shift_s)
    if not shift_s < mean_s:
        raise ConfigError(f"0 <= shift_s < mean_s expected, got shift_s={shift_s}, mean_s={mean_s}")
    return lambda rng: shift_s + float(rng.exponential(mean_s - shift_s))


def _pareto(*, shape: float = 3.0, minimum_s: float = 0.01) -> Draw:
    _positive(minimum_s=minimum_s, shape=shape)
    if shape <= 1:
        raise ConfigError(f"pareto shape {shape}: above 1 expected, the mean is infinite otherwise")
    return lambda rng: minimum_s * float(1.0 + rng.pareto(shape))


def _empirical(*, samples: str = "", file: str = "") -> Draw:
    if bool(samples) == bool(file):
        raise ConfigError("give either samples or file")
    try:
        text = str(samples) or user_input.read_text(str(file), what="compute times")
        values = np.array([float(v) for v in text.replace(",", " ").split()])
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"empirical compute times: {error}; seconds separated by blanks expected") from None
    if not len(values) or not np.isfinite(values).all() or (values <= 0).any():
        raise ConfigError("empirical compute times: at least one expected, all finite and above 0 seconds")
    return lambda rng: float(values[rng.integers(len(values))])


_DISTRIBUTIONS: dict[str, Callable[..., Draw]] = {
    "constant": _constant,
    "normal": _normal,
    "exponential": _exponential,
    "shifted_exponential": _shifted_exponential,
    "pareto": _pareto,
    "empirical": _empirical,
}


def _positive(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ConfigError(f"compute time: {name}={value}: a finite number above 0 expected")
