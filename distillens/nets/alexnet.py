"""AlexNet for small images, as the distillation literature evaluates on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from distillens.core.contracts import Like
from distillens.nets._stack import Stacked, Stage


@dataclass(frozen=True)
class AlexNet(Stacked):
    """Five convolutions, max pooling after the first, second and fifth, then one linear layer.

    ``width`` 128 is the field's: 128, 192, 256, 192, 192 channels; another width scales them all. 28 px images are
    padded to 32 by the first convolution. Below 8 px the first poolings are left out.

    Source: Krizhevsky et al. 2012; Zhao et al. 2021 (``networks.py``), without norm there. PyTorch's default
    initialisation.
    """

    width: int = 128
    norm: Literal["group", "batch", "none"] = "none"

    @classmethod
    def defaults(cls, like: Like) -> AlexNet:
        """Width 128; 32 below 16 px."""
        return cls(width=32 if min(like.shape[1:]) < 16 else 128)

    def _stages(self, side: int) -> tuple[Stage, ...]:
        narrow, middle, wide = self.width, math.ceil(1.5 * self.width), 2 * self.width
        return (
            Stage(narrow, 5, 4 if side == 28 else 2, True),
            Stage(middle, 5, 2, True),
            Stage(wide, 3, 1, False),
            Stage(middle, 3, 1, False),
            Stage(middle, 3, 1, True),
        )
