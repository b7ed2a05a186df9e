"""The ConvNet of the distillation literature out of PyTorch's own layers."""

from __future__ import annotations

from torch import nn


def convnet(
    channels: int = 3, side: int = 32, *, width: int = 128, depth: int = 3, k: int = 10
) -> nn.Sequential:
    """The last layer is the classifier: ``net[:-1]`` gives the features."""
    layers: list[nn.Module] = []
    for block in range(depth):
        layers += [
            nn.Conv2d(width if block else channels, width, 3, padding=1),
            nn.GroupNorm(width, width),
            nn.ReLU(),
            nn.AvgPool2d(2),
        ]
    cells = (side >> depth) ** 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * cells, k))


def digits_convnet() -> nn.Sequential:
    """For digits of 8 x 8."""
    return convnet(1, 8, width=32, depth=2)
