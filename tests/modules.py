"""Modules as other people write them, for ``nets.from_module``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Plain(nn.Module):
    """A convolution, instance and layer norm, attention; the last layer is registered first."""

    def __init__(self, channels: int, classes: int, width: int = 4) -> None:
        super().__init__()
        self.fc = nn.Linear(width, classes)
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=2, padding=1),
            nn.InstanceNorm2d(width, affine=True),
            nn.ReLU(True),
        )
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(self.stem(x).flatten(2).mT)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        out: torch.Tensor = self.fc(tokens.mean(1))
        return out


class Normed(nn.Module):
    """Batch norm of maps and of features, with a shortcut added in place."""

    def __init__(self, channels: int, classes: int, width: int = 4, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width, momentum=momentum)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.BatchNorm1d(width, affine=False, eps=1e-3)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn(self.first(x)))
        inner = self.second(x)
        inner += x
        out: torch.Tensor = self.fc(self.last(self.relu(inner).mean((2, 3))))
        return out


def sequence(kind: str, channels: int, height: int, width: int, classes: int) -> Any:
    """Modules that cannot be used, and why they cannot, by name."""
    pixels = channels * height * width
    parts: dict[str, list[nn.Module]] = {
        "dropout": [nn.Linear(pixels, 4), nn.Dropout(0.5), nn.Linear(4, classes)],
        "noise": [_Noise(), nn.Linear(pixels, classes)],
        "softmax": [nn.Linear(pixels, classes), nn.Softmax(1)],
        "no head": [nn.Linear(pixels, classes + 1)],
        "tracking": [nn.BatchNorm1d(pixels, track_running_stats=False), nn.Linear(pixels, classes)],
        "momentum": [nn.BatchNorm1d(pixels, momentum=None), nn.Linear(pixels, classes)],
        "own norm": [_OwnNorm(pixels), nn.Linear(pixels, classes)],
        "in place": [_Doubling(), nn.Linear(pixels, classes)],
        "narrow": [nn.Linear(pixels + 1, classes)],
    }
    if kind == "nothing":
        return None
    start = [] if kind == "in place" else [nn.Flatten()]
    return nn.Sequential(*start, *parts[kind])


class _Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x) if self.training else x


class _OwnNorm(nn.LayerNorm):
    pass


class _Doubling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x *= 2
        return x.flatten(1)


NUMBER = 3
