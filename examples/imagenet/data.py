"""Pictures: an ImageFolder tree (train/CLASS/*.jpg, val/CLASS/*.jpg) or synthetic ones.

Training pictures are split over the ranks again each epoch; validation pictures are dealt out once, without
padding, so that sums over ranks are sums over the set.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class Folder(Dataset):
    """`root/CLASS/picture`, decoded by Pillow; random crop and flip for training, centre crop otherwise."""

    def __init__(self, root: Path, size: int, *, train: bool) -> None:
        if not root.is_dir():
            raise SystemExit(
                f"{root} is not a folder: expected DATA/train/CLASS/*.jpg and DATA/val/CLASS/*.jpg"
            )
        self.classes = sorted(p.name for p in root.iterdir() if p.is_dir())
        self.samples = [
            (path, label)
            for label, name in enumerate(self.classes)
            for path in sorted((root / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
        if not self.samples:
            raise SystemExit(f"{root} holds no pictures ({', '.join(sorted(SUFFIXES))}) in class folders")
        self.size, self.train = size, train

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        path, label = self.samples[index]
        with Image.open(path) as file:
            image = file.convert("RGB")
        image = image.resize((self.size, self.size), box=self._box(*image.size))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        x = pixels.view(self.size, self.size, 3).permute(2, 0, 1).float() / 255
        if self.train and torch.rand(()) < 0.5:
            x = x.flip(-1)
        return (x - MEAN) / STD, label

    def _box(self, width: int, height: int) -> tuple[float, float, float, float]:
        if not self.train:
            side = 0.875 * min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            return left, top, left + side, top + side
        area = width * height * float(torch.empty(()).uniform_(0.08, 1.0))
        ratio = math.exp(float(torch.empty(()).uniform_(math.log(3 / 4), math.log(4 / 3))))
        w, h = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
        left, top = float(torch.rand(())) * (width - w), float(torch.rand(())) * (height - h)
        return left, top, left + w, top + h


class Synthetic(Dataset):
    """Class-dependent colour patterns under noise: learnable, the same on every machine, no files."""

    def __init__(self, count: int, size: int, num_classes: int, seed: int) -> None:
        self.classes = [str(i) for i in range(num_classes)]
        self.count, self.seed = count, seed
        # The pattern belongs to the class, so it must not depend on the split's seed.
        patterns = torch.randn(num_classes, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        self.patterns = torch.nn.functional.interpolate(patterns, size=(size, size), mode="bilinear")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        label = index % len(self.classes)
        noise = torch.randn(self.patterns[label].shape, generator=generator)
        return self.patterns[label] + noise, label


class Shard(Sampler[int]):
    """Every sample exactly once per epoch over all ranks: no padding, no repeats."""

    def __init__(
        self, count: int, rank: int, size: int, *, shuffle: bool, seed: int, drop_last: bool
    ) -> None:
        self.count, self.rank, self.size = count, rank, size
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0
        # Methods that meet at every step need equally many samples on every rank.
        self.length = count // size if drop_last else len(range(rank, count, size))

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        order = torch.arange(self.count)
        if self.shuffle:
            order = torch.randperm(
                self.count, generator=torch.Generator().manual_seed(self.seed + self.epoch)
            )
        return iter(order[self.rank :: self.size][: self.length].tolist())

    def set_epoch(self, epoch: int) -> None:
        """Shuffle differently in every epoch, alike on all ranks."""
        self.epoch = epoch


def sets(args) -> tuple[Dataset, Dataset]:
    """The training and the validation set."""
    if args.synthetic:
        train = Synthetic(args.train_samples, args.image_size, args.classes, seed=1)
        return train, Synthetic(args.val_samples, args.image_size, args.classes, seed=2)
    if args.data is None:
        raise SystemExit("give a folder with train/ and val/, or --synthetic")
    root = Path(args.data)
    train = Folder(root / "train", args.image_size, train=True)
    val = Folder(root / "val", args.image_size, train=False)
    if train.classes != val.classes:
        raise SystemExit(f"{root}: train/ and val/ do not hold the same class folders")
    return train, val


def loader(dataset: Dataset, args, sampler: Sampler[int]) -> DataLoader:
    """Batches of `args.batch_size` per worker process."""
    return DataLoader(
        dataset,
        batch_size=args.batch_size,
        sampler=sampler,
        num_workers=args.loader_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=args.loader_workers > 0,
        drop_last=False,
    )
