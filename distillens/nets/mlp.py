"""The multi-layer perceptron of the distillation literature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from distillens.core.checks import at_least
from distillens.core.contracts import Buffers, Like, Mode, Params
from distillens.core.rng import Key
from distillens.nets._layers import uniform


@dataclass(frozen=True)
class MLP:
    """``depth`` hidden layers of ``width`` ReLU units on the flattened image, then one linear layer.

    Without hidden layers it is softmax regression on the pixels.

    Source: Zhao et al. 2021 (``networks.py``: two hidden layers of 128). PyTorch's default initialisation.
    """

    mixes_examples: ClassVar[bool] = False

    depth: int = 2
    width: int = 128

    def __post_init__(self) -> None:
        at_least(0, "mlp", depth=self.depth)
        at_least(1, "mlp", width=self.width)

    @classmethod
    def defaults(cls, like: Like) -> MLP:
        """Two hidden layers of 128 units for any image."""
        return cls()

    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        """Fresh parameters: uniform in +-1/sqrt(fan-in). No buffers."""
        params: Params = {}
        fan_in = math.prod(like.shape)
        for layer in range(self.depth + 1):
            units = self.width if layer < self.depth else like.k
            params |= uniform(f"layer{layer}", (units, fan_in), key.fold("layer", layer))
            fan_in = units
        return params, {}

    def features(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        """The last hidden layer, [n, width]."""
        x = x.flatten(1)
        for layer in range(self.depth):
            x = F.relu(F.linear(x, params[f"layer{layer}.weight"], params[f"layer{layer}.bias"]))
        return x, buffers

    def logits(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        """Logits [n, k]."""
        features, buffers = self.features(params, buffers, x, mode)
        return (
            F.linear(features, params[f"layer{self.depth}.weight"], params[f"layer{self.depth}.bias"]),
            buffers,
        )
