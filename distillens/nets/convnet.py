"""The ConvNet of the distillation literature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from distillens.core.checks import UserError, at_least, one_of
from distillens.core.contracts import Buffers, Like, Mode, Params
from distillens.core.rng import Key
from distillens.kernels import block, convolutions, entering
from distillens.kernels.conv_block import average_pool
from distillens.nets._layers import Norm, Pass, fresh_norm, uniform


@dataclass(frozen=True)
class ConvNet:
    """``depth`` blocks of {3 x 3 convolution, norm, ReLU, pooling by 2}, then one linear layer.

    With depth 3, width 128, 32 px, 10 classes: 320,010 parameters. The norm ``group`` is GroupNorm with one channel
    a group, which is affine instance norm: the same function, with right derivatives of every order. ``batch`` is batch
    norm, ``layer`` GroupNorm with one group. 28 px images are padded to 32 by the first convolution, as the field does.

    Source: Gidaris & Komodakis 2018; Zhao et al. 2021 (``networks.py``). PyTorch's default initialisation. Where we
    differ: ``layer`` has a scale and a shift a channel, the authors' LayerNorm one a pixel.
    """

    depth: int = 3
    width: int = 128
    norm: Norm = "group"
    pooling: Literal["average", "max", "none"] = "average"

    def __post_init__(self) -> None:
        at_least(1, "convnet", depth=self.depth, width=self.width)
        one_of("norm", self.norm, ("group", "batch", "layer", "none"))
        one_of("pooling", self.pooling, ("average", "max", "none"))

    @classmethod
    def defaults(cls, like: Like) -> ConvNet:
        """Depth 3 at 28 and 32 px, 4 at 64, 5 at 128 (width 128); depth 2, width 32 below 16 px."""
        side = min(like.shape[1:])
        if side < 16:
            return cls(depth=2, width=32)
        return cls(depth=max(3, round(math.log2(side)) - 2))

    @property
    def mixes_examples(self) -> bool:
        """Whether training mode lets one image change another's output: by batch norm."""
        return self.norm == "batch"

    def _padding(self, side: int) -> int:
        return 3 if side == 28 else 1

    def _final(self, like: Like) -> tuple[int, int]:
        h, w = like.shape[1:]
        pad = 2 * self._padding(min(h, w)) - 2
        h, w = h + pad, w + pad
        if self.pooling != "none":
            h, w = h >> self.depth, w >> self.depth
        if min(h, w) < 1:
            raise UserError(
                f"images of {like.shape[1]} x {like.shape[2]} are too small for a ConvNet of depth {self.depth}",
                expected=f"at least {2**self.depth} pixels a side",
                fix="choose a smaller net.depth",
            )
        return h, w

    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        """Fresh parameters: uniform in +-1/sqrt(fan-in), norms 1 and 0; running statistics with batch norm."""
        h, w = self._final(like)
        params: Params = {}
        buffers: Buffers = {}
        channels = like.shape[0]
        for place in range(self.depth):
            name = f"conv{place}"
            scale, remembered = fresh_norm(f"norm{place}", self.width, self.norm)
            params |= uniform(name, (self.width, channels, 3, 3), key.fold(name)) | scale
            buffers |= remembered
            channels = self.width
        return params | uniform("linear", (like.k, channels * h * w), key.fold("linear")), buffers

    def features(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        """The flattened last block, [n, width * h' * w']."""
        passing = Pass(params, buffers, mode, self.norm)
        return self._hidden(x, passing, 1).flatten(1), passing.after()

    def logits(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        """Logits [n, k]."""
        features, buffers = self.features(params, buffers, x, mode)
        return F.linear(features, params["linear.weight"], params["linear.bias"]), buffers

    def many(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        """Logits [m, n, k] of m networks: their channels stand side by side, one convolution serves all.

        Images that all see are convolved once, by the first layers of all models as one.
        """
        m = len(params["linear.bias"])
        shared = x.ndim == 4
        passing = Pass(_side_by_side(params), _side_by_side(buffers), mode, self.norm, m)
        x = self._hidden(x if shared else x.transpose(0, 1).flatten(1, 2), passing, 1 if shared else m)
        features = x.reshape(len(x), m, -1).transpose(0, 1)
        logits = torch.baddbmm(params["linear.bias"][:, None], features, params["linear.weight"].mT)
        return logits, {name: value.view(m, -1) for name, value in passing.after().items()}

    def same_in_company(self, like: Like, kernels: str) -> bool:
        """Where all blocks are by our own kernels, which take each group of channels for itself."""
        if kernels != "winograd" or self.norm != "group" or self.pooling != "average":
            return False
        inputs, h, w = like.shape
        for place in range(self.depth):
            padding = self._padding(min(h, w)) if place == 0 else 1
            if not convolutions.take(inputs, self.width, h, w, padding):
                return False
            inputs, h, w = self.width, (h + 2 * padding - 2) // 2, (w + 2 * padding - 2) // 2
        return True

    def _hidden(self, x: torch.Tensor, passing: Pass, first: int) -> torch.Tensor:
        """The last block [n, models * width, h', w'], in the precision of the parameters.

        The first convolution has ``first`` groups: one where all models see the same images.
        """
        if self.norm == "group" and self.pooling == "average":
            x = entering(
                x
            )  # the one network that is shown to train as well in a lower precision (docs/engine.md)
        for place in range(self.depth):
            conv, norm = f"conv{place}", f"norm{place}"
            padding = self._padding(min(x.shape[-2:])) if place == 0 else 1
            groups = first if place == 0 else passing.models
            if self.norm == "group" and self.pooling == "average":
                weight, bias = passing.params[f"{conv}.weight"], passing.params[f"{conv}.bias"]
                gamma, beta = passing.params[f"{norm}.weight"], passing.params[f"{norm}.bias"]
                x = block(x, weight, bias, gamma, beta, padding, groups)
                continue
            x = F.relu(passing.norm(passing.conv(x, conv, padding=padding, groups=groups), norm))
            if self.pooling == "average":
                x = average_pool(x)
            elif self.pooling == "max":
                x = F.max_pool2d(x, 2)
        return x.to(passing.params["linear.weight"].dtype)


def _side_by_side(values: Params | Buffers) -> Params | Buffers:
    """What m networks have, [m, c, ...], as one network's, [m * c, ...]."""
    return {name: value.flatten(0, 1) for name, value in values.items()}
