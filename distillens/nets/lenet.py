"""LeNet, as the distillation literature evaluates on it."""

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
class LeNet:
    """Two stages {5 x 5 convolution, ReLU, max pooling by 2}, two hidden layers, then one linear layer.

    ``width`` 6 is LeNet-5: 6 and 16 channels, 120 and 84 units; another width scales them all. 28 px images are padded
    to 32 by the first convolution. Smaller ones, which the field has not, are padded so that no convolution shrinks
    them.

    Source: LeCun et al. 1998; Zhao et al. 2021 (``networks.py``), without norm there. PyTorch's default initialisation.
    """

    width: int = 6
    norm: Literal["group", "batch", "none"] = "none"

    def __post_init__(self) -> None:
        at_least(1, "lenet", width=self.width)
        one_of("norm", self.norm, ("group", "batch", "none"))

    @classmethod
    def defaults(cls, like: Like) -> LeNet:
        """LeNet-5 for any image: it is small as it is."""
        return cls()

    @property
    def mixes_examples(self) -> bool:
        """Whether training mode lets one image change another's output: by batch norm."""
        return self.norm == "batch"

    @property
    def _units(self) -> tuple[int, int]:
        return 20 * self.width, 14 * self.width

    def _stages(self, side: int) -> tuple[Stage, Stage]:
        first, second = (0, 0) if side > 28 else (2, 0) if side == 28 else (2, 2)
        return Stage(self.width, 5, first, True), Stage(math.ceil(16 * self.width / 6), 5, second, True)

    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        """Fresh parameters; running statistics where the norm is batch norm."""
        check_sides("LeNet", like)
        params, buffers, left = fresh_stack(like, self._stages(min(like.shape[1:])), self.norm, key)
        inputs = math.prod(left)
        for place, units in enumerate(self._units):
            params |= uniform(f"hidden{place}", (units, inputs), key.fold(f"hidden{place}"))
            inputs = units
        return params | uniform("linear", (like.k, inputs), key.fold("linear")), buffers

    def features(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        """The second hidden layer, [n, 14 * width]."""
        passing = Pass(params, buffers, mode, self.norm)
        x = through_stack(x, self._stages(min(x.shape[-2:])), passing)
        for place in range(len(self._units)):
            x = F.relu(passing.linear(x, f"hidden{place}"))
        return x, passing.after()

    def logits(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        """Logits [n, k]."""
        features, buffers = self.features(params, buffers, x, mode)
        return F.linear(features, params["linear.weight"], params["linear.bias"]), buffers
