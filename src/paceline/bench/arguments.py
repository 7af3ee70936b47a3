"""What can be wrong with the arguments of a comparison, found without torch and before any training."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from paceline import declarations, spec
from paceline.bench import linear_compute
from paceline.errors import ConfigError
from paceline.user_input import shortened

_MOST_WORKERS = 1024


def check_strategies(strategies: Sequence[str], *, record: str, replay: str) -> None:
    """ConfigError for names and arguments that do not exist, and recordings that cannot be.

    Args:
        strategies: Strategy strings.
        record: File for the message order of the one parameter_server among them; "": none. Its folder is
            made.
        replay: File with such an order; "": none.
    """
    if not strategies:
        raise ConfigError("--strategies: at least one expected, e.g. single,all_reduce")
    for strategy in strategies:
        declarations.check("paceline.strategies", strategy)
    if not (record or replay):
        return
    option = "--record" if record else "--replay"
    servers = [s for s in strategies if spec.parse(s).name == "parameter_server"]
    if len(servers) != 1:
        raise ConfigError(
            f"{option} is for one parameter_server among the strategies, got {len(servers)}: "
            "a recording holds the message order of one run"
        )
    if record:
        make_folder(Path(record).parent, "--record")
    if replay and not (_exists(replay) or _has_parts(replay)):
        raise ConfigError(f"--replay {shortened(replay)}: there is no such recording (in {Path.cwd()})")


def scripted(strategy: str, *, record: str, replay: str) -> str:
    """The spec with where to record its message order, or which recording to repeat."""
    parsed = spec.parse(strategy)
    extra = {k: v for k, v in (("record", record), ("replay", replay)) if v}
    if not extra or parsed.name != "parameter_server":
        return strategy
    return str(spec.Spec(parsed.name, {**parsed.arguments, **extra}))


def check_numbers(**values: int | None) -> None:
    """ConfigError for a number below 1, or more workers than a comparison takes; None is not checked."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: at least 1 expected, got {value}")
    if (values["workers"] or 1) > _MOST_WORKERS:
        raise ConfigError(f"--workers: at most {_MOST_WORKERS} expected, got {values['workers']}")


def check_positive(**values: float | None) -> None:
    """ConfigError for a number that is not above 0, or is infinite; None is not checked."""
    for name, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')}: a number above 0 expected, got {value:g}")


def check_share(validation: float) -> None:
    """ConfigError for a --validation that is no share of the training set."""
    if not 0 <= validation < 1:
        raise ConfigError(
            f"--validation: a share of the training set from 0 to below 1 expected, got {validation:g}"
        )


def check_cluster(
    compute: str, network: str, faults: str, trace: str, *, sizes: Sequence[int], seed: int
) -> None:
    """ConfigError for conditions of a simulation that make no sense; see `VirtualCluster`.

    Args:
        compute: Distribution of compute times, or `measured`.
        network: The topology.
        faults: Script of faults; "": none.
        trace: Folder for traces, which is made; "": none.
        sizes: Numbers of workers that the strategies have.
        seed: What drawn faults are drawn from.
    """
    from paceline.comm.simulated import compute_time  # these need NumPy
    from paceline.comm.simulated import faults as fault_scripts
    from paceline.schedule import topologies

    if compute != linear_compute.MEASURED and linear_compute.parse(compute) is None:
        compute_time.parse(compute)
    for size in sorted(set(sizes)):
        topologies.parse(network, num_ranks=size)
    fault_scripts.parse(faults, num_workers=max(sizes), seed=seed)
    if trace:
        make_folder(Path(trace), "--trace")


def check_file(path: str, option: str) -> None:
    """ConfigError if the file that `option` names is not there."""
    if not _exists(path):
        raise ConfigError(f"{option} {shortened(path)}: there is no such file (in {Path.cwd()})")


def _has_parts(recording: str) -> bool:
    """Whether ranks wrote a recording: each has a file of its own, which ends in its rank."""
    path = Path(recording)
    try:
        return any(path.parent.glob(f"{glob.escape(path.name)}.[0-9]*"))
    except (OSError, ValueError):  # no name of a file
        return False


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # no name of a file
        return False


def make_folder(folder: Path, option: str) -> None:
    """Make it if need be; ConfigError if that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option}: folder {folder} cannot be made: {error.strerror}") from None
