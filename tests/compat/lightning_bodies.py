"""What ranks do in the Lightning tests; importable by name for `paceline.launch`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from paceline.compat.lightning import PacelineStrategy

warnings.filterwarnings("ignore")
torch.set_num_threads(1)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, 6, generator=generator)
    return TensorDataset(x, (x[:, :2] * x[:, 2:4]).sum(1, keepdim=True))


class Net(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        self.validated: list[float] = []

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.validated.append(float(sum(p.detach().sum() for p in self.parameters())))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


def fit(strategy: Any, epochs: int, folder: str | None = None, **options: Any) -> tuple[Net, Any]:
    lightning.seed_everything(3)
    module = Net()
    resume = options.pop("ckpt_path", None)
    validates = options.pop("validates", False)
    logger = CSVLogger(folder, name="", version="log") if folder else False
    trainer = lightning.Trainer(
        accelerator="cpu",
        strategy=strategy,
        max_epochs=epochs,
        logger=logger,
        callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)] if folder else [],
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=2,
        **options,
    )
    loader = DataLoader(data(), batch_size=8, shuffle=True)
    trainer.fit(module, loader, DataLoader(data(), batch_size=48) if validates else None, ckpt_path=resume)
    return module, trainer


def flat(module: torch.nn.Module) -> list[float]:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]).tolist()


def everything(folder: str, spec: str) -> dict[str, Any]:
    """Train through, and again with an interruption; both on this rank."""
    whole, trainer = fit(PacelineStrategy(spec), 4, f"{folder}/whole", validates=True)
    fit(PacelineStrategy(spec), 2, f"{folder}/half")
    path = next(Path(f"{folder}/half").glob("epoch=1*.ckpt"))
    resumed, _ = fit(PacelineStrategy(spec), 4, f"{folder}/resumed", ckpt_path=str(path))
    checkpoint = torch.load(next(Path(f"{folder}/whole").glob("epoch=3*.ckpt")), weights_only=False)
    plain = Net()
    plain.load_state_dict(checkpoint["state_dict"])
    return {
        "whole": flat(whole),
        "resumed": flat(resumed),
        "saved": flat(plain),
        "validated": whole.validated,
        "stats": {k: v for k, v in trainer.strategy.job.stats().items() if not isinstance(v, dict)},
    }


def beside_ddp(_: str, accumulate: int) -> dict[str, Any]:
    ours, _trainer = fit(
        PacelineStrategy("all_reduce"), 2, accumulate_grad_batches=accumulate, gradient_clip_val=0.5
    )
    theirs, _trainer = fit("ddp", 2, devices=2, accumulate_grad_batches=accumulate, gradient_clip_val=0.5)
    return {"ours": flat(ours), "theirs": flat(theirs)}


def with_fabric(folder: str, spec: str) -> dict[str, Any]:
    """The same loop with Fabric, with a checkpoint in the middle of a period."""

    def loop(fabric: Any, model: Any, optimizer: Any, steps: range) -> None:
        x, y = data().tensors
        for step in steps:
            mine = slice(step * 16 + fabric.global_rank * 8, step * 16 + fabric.global_rank * 8 + 8)
            fabric.backward(functional.mse_loss(model(x[mine]), y[mine]))
            optimizer.step()
            optimizer.zero_grad()

    def begin() -> tuple[Any, Any, Any]:
        fabric = lightning.Fabric(accelerator="cpu", strategy=PacelineStrategy(spec))
        fabric.launch()
        torch.manual_seed(5)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        return fabric, *fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))

    fabric, model, optimizer = begin()
    loop(fabric, model, optimizer, range(3))
    fabric.save(f"{folder}/fabric.ckpt", {"model": model, "optimizer": optimizer})
    loop(fabric, model, optimizer, range(3, 6))
    fabric.strategy.job.synchronize()
    again, other, stepper = begin()
    again.load(f"{folder}/fabric.ckpt", {"model": other, "optimizer": stepper})
    loop(again, other, stepper, range(3, 6))
    again.strategy.job.synchronize()
    return {"whole": flat(model), "resumed": flat(other)}
