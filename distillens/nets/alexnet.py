"""AlexNet for small images, as the distillation literature evaluates on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from distillens.core.checks import at_least, one_of
from distillens.core.contracts import Buffers, Like, Mode, Params
from distillens.core.rng import Key
from distillens.nets._layers import Pass, check_sides, uniform
from distillens.nets._stack import Stage, fresh_stack, through_stack


@dataclass(frozen=True)
class AlexNet:
    """Five convolutions, max pooling after the first, second and fifth, then one linear layer.

    ``width`` 128 is the field's: 128, 192, 256, 192, 192 channels; another width scales them all. 28 px images are
    padded to 32 by the first convolution. Below 8 px the first poolings are left out.

    Source: Krizhevsky et al. 2012; Zhao et al. 2021 (``networks.py``), without norm there. PyTorch's default
    initialisation.
    """

    width: int = 128
    norm: Literal["group", "batch", "none"] = "none"

    def __post_init__(self) -> None:
        at_least(1, "alexnet", width=self.width)
        one_of("norm", self.norm, ("group", "batch", "none"))

    @classmethod
    def defaults(cls, like: Like) -> AlexNet:
        """Width 128; 32 below 16 px."""
        return cls(width=32 if min(like.shape[1:]) < 16 else 128)

    @property
    def mixes_examples(self) -> bool:
        """Whether training mode lets one image change another's output: by batch norm."""
        return self.norm == "batch"

    def _stages(self, side: int) -> tuple[Stage, ...]:
        narrow, middle, wide = self.width, math.ceil(1.5 * self.width), 2 * self.width
        return (
            Stage(narrow, 5, 4 if side == 28 else 2, True),
            Stage(middle, 5, 2, True),
            Stage(wide, 3, 1, False),
            Stage(middle, 3, 1, False),
            Stage(middle, 3, 1, True),
        )

    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        """Fresh parameters; running statistics where the norm is batch norm."""
        check_sides("AlexNet", like)
        params, buffers, left = fresh_stack(like, self._stages(min(like.shape[1:])), self.norm, key)
        return params | uniform("linear", (like.k, math.prod(left)), key.fold("linear")), buffers

    def features(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        """The flattened last stage, [n, 1.5 * width * h' * w']."""
        passing = Pass(params, buffers, mode, self.norm)
        return through_stack(x, self._stages(min(x.shape[-2:])), passing), passing.after()

    def logits(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        """Logits [n, k]."""
        features, buffers = self.features(params, buffers, x, mode)
        return F.linear(features, params["linear.weight"], params["linear.bias"]), buffers
