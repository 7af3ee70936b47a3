"""Handwritten digits with Lightning's Trainer; the loop is Lightning's, the method Paceline's.

python examples/lightning_digits.py
paceline run -n 2 examples/lightning_digits.py --strategy 'local_sgd(period=4)'
"""

import argparse

import lightning
import torch
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from paceline.compat.lightning import PacelineStrategy


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        x, y = batch
        loss = functional.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> None:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--strategy", default="all_reduce")
    parser.add_argument("--folder", default="runs/lightning_digits")
    parser.add_argument("--resume", help="a checkpoint to go on from")
    arguments = parser.parse_args()

    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]

    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        strategy=PacelineStrategy(arguments.strategy),
        max_epochs=arguments.epochs,
        default_root_dir=arguments.folder,
        logger=lightning.pytorch.loggers.CSVLogger(arguments.folder, name=""),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    trainer.fit(
        Digits(),
        DataLoader(TensorDataset(images[train], labels[train]), batch_size=24, shuffle=True),
        DataLoader(TensorDataset(images[test], labels[test]), batch_size=180),
        ckpt_path=arguments.resume,
    )
    if trainer.is_global_zero:
        print(f"accuracy {float(trainer.callback_metrics['accuracy']):.4f}")


if __name__ == "__main__":
    main()
