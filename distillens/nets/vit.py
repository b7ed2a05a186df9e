"""A small vision transformer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from distillens.core.checks import UserError, at_least
from distillens.core.contracts import Buffers, Like, Mode, Params
from distillens.core.rng import Key
from distillens.nets._layers import standardised, uniform

SPREAD = 0.02  # of the position embedding at the start, as in the transformers of the field


@dataclass(frozen=True)
class ViT:
    """A vision transformer: ``depth`` pre-norm blocks on patches of the image, mean pooling, one linear layer.

    Patches of ``patch`` x ``patch`` pixels become ``width`` numbers, a learned position embedding is added, and each
    block adds self-attention of ``heads`` heads, then a GELU perceptron four times as wide, both behind layer norm. The
    tokens are normed and averaged: there is no class token. No dropout. At 32 px with patch 4, depth 6, width 192, 3
    heads and 10 classes: 2,693,194 parameters.

    Attention and layer norm are elementary operations: torch's fused ones lack right second or third derivatives.

    Source: Dosovitskiy et al. 2021, with the head of their mean-pooled variant; the sizes are those of the small
    transformers trained on CIFAR-10. PyTorch's default initialisation of linear layers.
    """

    mixes_examples: ClassVar[bool] = False

    patch: int = 4
    depth: int = 6
    width: int = 192
    heads: int = 3

    def __post_init__(self) -> None:
        at_least(1, "vit", patch=self.patch, depth=self.depth, width=self.width, heads=self.heads)
        if self.width % self.heads:
            raise UserError(
                "vit: the heads must divide the width",
                got=f"{self.heads} heads of {self.width} numbers",
                fix="set net.width and net.heads",
            )

    @classmethod
    def defaults(cls, like: Like) -> ViT:
        """About 64 patches; depth 6, width 192 from 16 px, depth 3, width 48 below."""
        h, w = like.shape[1:]
        most = max(2, round(min(h, w) / 8))
        patch = max(size for size in range(1, most + 1) if h % size == w % size == 0)
        if min(h, w) < 16:
            return cls(patch, depth=3, width=48)
        return cls(patch)

    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        """Fresh parameters: linear layers uniform in +-1/sqrt(fan-in), norms 1 and 0, positions small. No buffers.

        Raises:
            UserError: the patches do not fit the image.
        """
        c, h, w = like.shape
        if h % self.patch or w % self.patch:
            raise UserError(
                f"patches of {self.patch} x {self.patch} do not fit images of {h} x {w}",
                fix="choose a net.patch that divides both sides",
            )
        d = self.width
        params: Params = {}

        def norm(name: str) -> Params:
            return {f"{name}.weight": torch.ones(d), f"{name}.bias": torch.zeros(d)}

        def linear(name: str, units: int, inputs: int) -> Params:
            return uniform(name, (units, inputs), key.fold(name))

        params |= linear("patches", d, c * self.patch**2)
        params["position"] = SPREAD * key.fold("position").normal(h * w // self.patch**2, d)
        for place in range(self.depth):
            block = f"block{place}"
            params |= norm(f"{block}.norm1")
            params |= linear(f"{block}.attention", 3 * d, d)  # queries, keys, values
            params |= linear(f"{block}.mixed", d, d)
            params |= norm(f"{block}.norm2")
            params |= linear(f"{block}.wide", 4 * d, d)
            params |= linear(f"{block}.narrow", d, 4 * d)
        return params | norm("norm") | linear("linear", like.k, d), {}

    def features(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        """The mean of the normed tokens, [n, width]."""

        def linear(x: torch.Tensor, name: str) -> torch.Tensor:
            return F.linear(x, params[f"{name}.weight"], params[f"{name}.bias"])

        def norm(x: torch.Tensor, name: str) -> torch.Tensor:
            return standardised(x, (-1,))[0] * params[f"{name}.weight"] + params[f"{name}.bias"]

        x = linear(_patches(x, self.patch), "patches") + params["position"]
        for place in range(self.depth):
            block = f"block{place}"
            mixed = _attention(linear(norm(x, f"{block}.norm1"), f"{block}.attention"), self.heads)
            x = x + linear(mixed, f"{block}.mixed")
            x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.wide")), f"{block}.narrow")
        return norm(x, "norm").mean(1), buffers

    def logits(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        """Logits [n, k]."""
        features, buffers = self.features(params, buffers, x, mode)
        return F.linear(features, params["linear.weight"], params["linear.bias"]), buffers


def _patches(x: torch.Tensor, side: int) -> torch.Tensor:
    """Images [n, c, h, w] cut into patches row by row, [n, tokens, c * side * side]."""
    n, c, h, w = x.shape
    cut = x.reshape(n, c, h // side, side, w // side, side)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _attention(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Values mixed by softmax(queries . keys / sqrt(d)): from [n, tokens, 3 * width] to [n, tokens, width]."""
    n, tokens, _ = x.shape
    queries, keys, values = x.reshape(n, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    weights = (queries @ keys.mT / math.sqrt(queries.shape[-1])).softmax(-1)
    mixed: torch.Tensor = (weights @ values).transpose(1, 2).flatten(2)
    return mixed
