"""ResNet18 for small images, as the distillation literature evaluates on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from distillens.nets._resnet import ResNet


@dataclass(frozen=True)
class ResNet18(ResNet):
    """Residual network with a 3 x 3 stem and 2, 2, 2, 2 basic blocks in its four stages.

    At 32 px and 10 classes with norm ``batch``: 11,173,962 parameters. The base class says what a block is and how images
    below 32 px are taken.

    Source: He et al. 2016; Zhao et al. 2021 (``networks.py``: ResNet18, ResNet18_AP and their BN variants). PyTorch's
    default initialisation.
    """

    blocks: ClassVar[tuple[int, int, int, int]] = (2, 2, 2, 2)
