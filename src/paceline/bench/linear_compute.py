"""Compute times that grow with the number of samples, and how `--compute` writes them. Without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from paceline import spec
from paceline.errors import ConfigError

MEASURED = "measured"
"""What `--compute` says for: time the task here, and write down the `linear(...)` that was found."""
_LINEAR = "linear"


@dataclass(frozen=True)
class LinearCompute:
    """Seconds of a minibatch of n samples: step_s + sample_s · n.

    Args:
        step_s: Seconds that every minibatch takes, whatever its size; 0 or more.
        sample_s: Seconds that each sample adds; 0 or more, and not both 0.
    """

    step_s: float
    sample_s: float

    def __str__(self) -> str:
        return f"{_LINEAR}(step_s={self.step_s:g}, sample_s={self.sample_s:g})"

    def seconds(self, samples: int) -> float:
        """Seconds of a minibatch with this number of samples."""
        return self.step_s + self.sample_s * samples


def parse(text: str) -> LinearCompute | None:
    """The costs that `linear(step_s=…, sample_s=…)` names; None for other names. Raises ConfigError."""
    parsed = spec.parse(text)
    if parsed.name != _LINEAR:
        return None
    return spec.call(_linear, parsed, kind="compute-time distribution")  # type: ignore[no-any-return]


def _linear(*, step_s: float, sample_s: float) -> LinearCompute:
    values = (step_s, sample_s)
    if not all(isinstance(v, int | float) and 0 <= v < math.inf for v in values) or not any(values):
        raise ConfigError(
            f"linear: step_s={step_s}, sample_s={sample_s}: two numbers of seconds, not both 0, expected"
        )
    return LinearCompute(float(step_s), float(sample_s))
