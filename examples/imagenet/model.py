"""ResNets in plain torch (He et al., 2016); timm's by name where timm is installed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DEPTHS = {
    "resnet10": ("basic", (1, 1, 1, 1), 64),
    "resnet18": ("basic", (2, 2, 2, 2), 64),
    "resnet34": ("basic", (3, 4, 6, 3), 64),
    "resnet50": ("bottleneck", (3, 4, 6, 3), 64),
    "resnet101": ("bottleneck", (3, 4, 23, 3), 64),
    # An eighth of the width: a few hundred thousand parameters, for a CPU and small pictures.
    "resnet10_narrow": ("basic", (1, 1, 1, 1), 8),
}


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, then batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(outputs)
    )


class Residual(nn.Module):
    """Two 3×3 convolutions ("basic") or 1×1, 3×3, 1×1 ("bottleneck"), plus the input."""

    def __init__(self, kind: str, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        relu = nn.ReLU(inplace=True)
        outputs = width if kind == "basic" else 4 * width
        if kind == "basic":
            self.body = nn.Sequential(conv(inputs, width, 3, stride), relu, conv(width, width, 3))
        else:
            self.body = nn.Sequential(
                conv(inputs, width, 1), relu, conv(width, width, 3, stride), relu, conv(width, outputs, 1)
            )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv(inputs, outputs, 1, stride)
        self.relu = relu
        # Starting as the identity makes large batches train (Goyal et al., 2017).
        nn.init.zeros_(self.body[-1][1].weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images in, images out: [N, C, H, W]."""
        return self.relu(self.body(x) + self.shortcut(x))


def resnet(kind: str, depths: tuple[int, ...], width: int, num_classes: int) -> nn.Sequential:
    """Stem, four stages, global mean, linear classifier."""
    layers: list[nn.Module] = [conv(3, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    inputs = width
    for stage, depth in enumerate(depths):
        for block in range(depth):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(Residual(kind, inputs, width << stage, stride))
            inputs = (width << stage) * (1 if kind == "basic" else 4)
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes)]
    return nn.Sequential(*layers)


def build(arch: str, num_classes: int, seed: int) -> nn.Module:
    """The model with the same initial weights on every worker."""
    torch.manual_seed(seed)
    if arch in DEPTHS:
        return resnet(*DEPTHS[arch], num_classes)
    try:
        import timm
    except ImportError:
        raise SystemExit(
            f"--arch {arch}: not one of {', '.join(DEPTHS)}, and timm is not installed"
        ) from None
    return timm.create_model(arch, num_classes=num_classes)
