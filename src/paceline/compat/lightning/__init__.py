"""Lightning's Trainer and Fabric with Paceline's strategies; needs the extra `paceline[lightning]`.

    from paceline.compat.lightning import PacelineStrategy
    trainer = lightning.Trainer(strategy=PacelineStrategy("local_sgd(period=8)"), max_epochs=5)

The script runs under `paceline run`, torchrun, mpirun, srun, or alone; Trainer's `devices` stays out.
"""

try:
    import lightning as _lightning  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "lightning":
        raise
    raise ModuleNotFoundError(
        "paceline.compat.lightning needs lightning: pip install 'paceline[lightning]'", name="lightning"
    ) from None

from paceline.compat.lightning.strategy import PacelineStrategy

__all__ = ["PacelineStrategy"]
