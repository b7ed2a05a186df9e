"""VGG11 for small images, as the distillation literature evaluates on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distillens.core.contracts import Like
from distillens.nets._stack import Stacked, Stage

# Channels in units of the width, and whether max pooling follows.
STAGES = ((1, True), (2, True), (4, False), (4, True), (8, False), (8, True), (8, False), (8, True))


@dataclass(frozen=True)
class VGG11(Stacked):
    """Eight stages {3 x 3 convolution, norm, ReLU}, max pooling after the 1st, 2nd, 4th, 6th, 8th, one linear layer.

    ``width`` 64 is the field's: 64, 128, 256, 256, 512, 512, 512, 512 channels; another width scales them all. 28 px
    images are padded to 32 by the first convolution. Below 32 px the first poolings are left out, so that the last maps
    are those of 32 px.

    Source: Simonyan & Zisserman 2015; Zhao et al. 2021 (``networks.py``). PyTorch's default initialisation. Where we
    differ: above 32 px the last maps are flattened, where the authors' code has no such network.
    """

    width: int = 64
    norm: Literal["group", "batch", "none"] = "group"

    @classmethod
    def defaults(cls, like: Like) -> VGG11:
        """Width 64; 16 below 16 px."""
        return cls(width=16 if min(like.shape[1:]) < 16 else 64)

    def _stages(self, side: int) -> tuple[Stage, ...]:
        return tuple(
            Stage(times * self.width, 3, 3 if place == 0 and side == 28 else 1, pooled)
            for place, (times, pooled) in enumerate(STAGES)
        )
