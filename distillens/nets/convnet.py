"""The ConvNet of the distillation literature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from distillens.core.checks import UserError, at_least, one_of
from distillens.core.contracts import Buffers, Like, Mode, Params
from distillens.core.rng import Key
from distillens.kernels import block, entering
from distillens.kernels.conv_block import average_pool


@dataclass(frozen=True)
class ConvNet:
    """``depth`` blocks of {3 x 3 convolution, norm, ReLU, pooling by 2}, then one linear layer.

    With depth 3, width 128, 32 px, 10 classes: 320,010 parameters. The norm is GroupNorm with one channel
    a group, which is affine instance norm: the same function, with right derivatives of every order.
    28 px images are padded to 32 by the first convolution, as the field does.

    Source: Gidaris & Komodakis 2018; Zhao et al. 2021 (``networks.py``). PyTorch's default initialisation.
    """

    mixes_examples: ClassVar[bool] = False

    depth: int = 3
    width: int = 128
    norm: Literal["group", "none"] = "group"
    pooling: Literal["average", "max", "none"] = "average"

    def __post_init__(self) -> None:
        at_least(1, "convnet", depth=self.depth, width=self.width)
        one_of("norm", self.norm, ("group", "none"))
        one_of("pooling", self.pooling, ("average", "max", "none"))

    @classmethod
    def defaults(cls, like: Like) -> ConvNet:
        """Depth 3 at 28 and 32 px, 4 at 64, 5 at 128 (width 128); depth 2, width 32 below 16 px."""
        side = min(like.shape[1:])
        if side < 16:
            return cls(depth=2, width=32)
        return cls(depth=max(3, round(math.log2(side)) - 2))

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
        """Fresh parameters: uniform in +-1/sqrt(fan-in), norms 1 and 0. No buffers."""
        h, w = self._final(like)
        params: Params = {}
        channels = like.shape[0]
        for place in range(self.depth):
            params |= _uniform(f"conv{place}", (self.width, channels, 3, 3), channels * 9, key)
            if self.norm == "group":
                params[f"norm{place}.weight"] = torch.ones(self.width)
                params[f"norm{place}.bias"] = torch.zeros(self.width)
            channels = self.width
        return params | _uniform("linear", (like.k, channels * h * w), channels * h * w, key), {}

    def features(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        """The flattened last block, [n, width * h' * w']."""
        return self._hidden(params, x, 1, 1).flatten(1), buffers

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
        side_by_side = {name: value.flatten(0, 1) for name, value in params.items()}
        x = self._hidden(
            side_by_side, x if shared else x.transpose(0, 1).flatten(1, 2), 1 if shared else m, m
        )
        features = x.reshape(len(x), m, -1).transpose(0, 1)
        return torch.baddbmm(params["linear.bias"][:, None], features, params["linear.weight"].mT), buffers

    def _hidden(self, params: Params, x: torch.Tensor, first: int, groups: int) -> torch.Tensor:
        """The last block [n, groups * width, h', w'], in the precision of the parameters."""
        x = entering(x)
        for place in range(self.depth):
            padding = self._padding(min(x.shape[-2:])) if place == 0 else 1
            within = first if place == 0 else groups
            weight, bias = params[f"conv{place}.weight"], params[f"conv{place}.bias"]
            if self.norm == "group" and self.pooling == "average":
                gamma, beta = params[f"norm{place}.weight"], params[f"norm{place}.bias"]
                x = block(x, weight, bias, gamma, beta, padding, within)
                continue
            x = F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=padding, groups=within)
            if self.norm == "group":
                gamma, beta = params[f"norm{place}.weight"], params[f"norm{place}.bias"]
                x = F.group_norm(x.to(gamma.dtype), len(gamma), gamma, beta).to(x.dtype)
            x = F.relu(x)
            if self.pooling == "average":
                x = average_pool(x)
            elif self.pooling == "max":
                x = F.max_pool2d(x, 2)
        return x.to(params["linear.weight"].dtype)


def _uniform(name: str, shape: tuple[int, ...], fan_in: int, key: Key) -> Params:
    bound = 1 / math.sqrt(fan_in)
    return {
        f"{name}.weight": key.fold(name, "weight").uniform(*shape, low=-bound, high=bound),
        f"{name}.bias": key.fold(name, "bias").uniform(shape[0], low=-bound, high=bound),
    }
