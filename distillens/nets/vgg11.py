"""VGG11 for small images, as the distillation literature evaluates on it."""

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

# Channels in units of the width, and whether max pooling follows.
STAGES = ((1, True), (2, True), (4, False), (4, True), (8, False), (8, True), (8, False), (8, True))


@dataclass(frozen=True)
class VGG11:
    """Eight stages {3 x 3 convolution, norm, ReLU}, max pooling after the 1st, 2nd, 4th, 6th, 8th, one linear layer.

    ``width`` 64 is the field's: 64, 128, 256, 256, 512, 512, 512, 512 channels; another width scales them all. 28 px
    images are padded to 32 by the first convolution. Below 32 px the first poolings are left out, so that the last maps
    are those of 32 px.

    Source: Simonyan & Zisserman 2015; Zhao et al. 2021 (``networks.py``). PyTorch's default initialisation. Where we
    differ: above 32 px the last maps are flattened, where the authors' code has no such network.
    """

    width: int = 64
    norm: Literal["group", "batch", "none"] = "group"

    def __post_init__(self) -> None:
        at_least(1, "vgg11", width=self.width)
        one_of("norm", self.norm, ("group", "batch", "none"))

    @classmethod
    def defaults(cls, like: Like) -> VGG11:
        """Width 64; 16 below 16 px."""
        return cls(width=16 if min(like.shape[1:]) < 16 else 64)

    @property
    def mixes_examples(self) -> bool:
        """Whether training mode lets one image change another's output: by batch norm."""
        return self.norm == "batch"

    def _stages(self, side: int) -> tuple[Stage, ...]:
        return tuple(
            Stage(times * self.width, 3, 3 if place == 0 and side == 28 else 1, pooled)
            for place, (times, pooled) in enumerate(STAGES)
        )

    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        """Fresh parameters; running statistics where the norm is batch norm."""
        check_sides("VGG11", like)
        params, buffers, left = fresh_stack(like, self._stages(min(like.shape[1:])), self.norm, key)
        return params | uniform("linear", (like.k, math.prod(left)), key.fold("linear")), buffers

    def features(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        """The flattened last stage, [n, 8 * width * h' * w']."""
        passing = Pass(params, buffers, mode, self.norm)
        return through_stack(x, self._stages(min(x.shape[-2:])), passing), passing.after()

    def logits(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        """Logits [n, k]."""
        features, buffers = self.features(params, buffers, x, mode)
        return F.linear(features, params["linear.weight"], params["linear.bias"]), buffers
