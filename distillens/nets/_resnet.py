"""The residual networks of the distillation literature: all but how many blocks a stage has."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F

from distillens.core.checks import at_least, one_of
from distillens.core.contracts import Buffers, Like, Mode, Params
from distillens.core.rng import Key
from distillens.nets._layers import Pass, check_sides, fresh_norm, uniform


class Block(NamedTuple):
    """One residual block: its name, channels before and after, and whether it may halve the map."""

    name: str
    before: int
    after: int
    halving: bool


@dataclass(frozen=True)
class ResNet(ABC):
    """A 3 x 3 stem, four stages of basic blocks with 1, 2, 4, 8 times ``width`` channels, one linear layer.

    A block is {3 x 3 convolution, norm, ReLU, 3 x 3 convolution, norm} plus its input, then ReLU; where channels
    or sides change, its input goes through a 1 x 1 convolution and a norm. The last three stages begin with a halving:

    - ``downsample="stride"``: by strided convolutions; the last maps are averaged.
    - ``downsample="average"``: the field's "AP" variant, by convolution and average pooling, which gives matched
      images smoother gradients; as in the authors' code the last maps are flattened, not averaged.

    No convolution has a bias. Below 32 px a halving that would leave less than two pixels a side is left out: on a
    single pixel ``group`` norm leaves nothing of the image.
    """

    blocks: ClassVar[tuple[int, int, int, int]]  # of each stage

    width: int = 64
    norm: Literal["group", "batch", "none"] = "group"
    downsample: Literal["stride", "average"] = "stride"

    def __post_init__(self) -> None:
        at_least(1, type(self).__name__.lower(), width=self.width)
        one_of("norm", self.norm, ("group", "batch", "none"))
        one_of("downsample", self.downsample, ("stride", "average"))

    @classmethod
    def defaults(cls, like: Like) -> Self:
        """Width 64; 16 below 16 px."""
        return cls(width=16 if min(like.shape[1:]) < 16 else 64)

    @property
    def mixes_examples(self) -> bool:
        """Whether training mode lets one image change another's output: by batch norm."""
        return self.norm == "batch"

    def _blocks(self) -> Iterator[Block]:
        before = self.width
        for stage, count in enumerate(self.blocks):
            for place in range(count):
                after = self.width << stage
                yield Block(f"stage{stage}.block{place}", before, after, stage > 0 and place == 0)
                before = after

    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        """Fresh parameters; running statistics where the norm is batch norm."""
        check_sides(type(self).__name__, like)
        params: Params = {}
        buffers: Buffers = {}

        def add(name: str, norm: str, before: int, after: int, side: int) -> None:
            params.update(uniform(name, (after, before, side, side), key.fold(name), bias=False))
            scale, remembered = fresh_norm(norm, after, self.norm)
            params.update(scale)
            buffers.update(remembered)

        channels, *sides = like.shape
        add("stem", "norm", channels, self.width, 3)
        for block in self._blocks():
            add(f"{block.name}.conv1", f"{block.name}.norm1", block.before, block.after, 3)
            add(f"{block.name}.conv2", f"{block.name}.norm2", block.after, block.after, 3)
            if block.before != block.after:
                add(f"{block.name}.shortcut", f"{block.name}.norm3", block.before, block.after, 1)
            if _halves(block, *sides):
                sides = [side // 2 for side in sides]
        maps = 1 if self.downsample == "stride" else math.prod(sides)
        inputs = 8 * self.width * maps
        return params | uniform("linear", (like.k, inputs), key.fold("linear")), buffers

    def features(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        """The averaged last maps [n, 8 * width], or with average pooling the flattened ones [n, 8 * width * h' * w']."""
        passing = Pass(params, buffers, mode, self.norm)
        x = F.relu(passing.norm(passing.conv(x, "stem", padding=1), "norm"))
        for block in self._blocks():
            x = self._block(x, block, passing)
        return x.mean((2, 3)) if self.downsample == "stride" else x.flatten(1), passing.after()

    def logits(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        """Logits [n, k]."""
        features, buffers = self.features(params, buffers, x, mode)
        return F.linear(features, params["linear.weight"], params["linear.bias"]), buffers

    def _block(self, x: torch.Tensor, block: Block, passing: Pass) -> torch.Tensor:
        halves = _halves(block, x.shape[-2], x.shape[-1])
        strided = halves and self.downsample == "stride"
        pooled = halves and self.downsample == "average"
        stride = 2 if strided else 1
        inner = passing.conv(x, f"{block.name}.conv1", padding=1, stride=stride)
        inner = F.relu(passing.norm(inner, f"{block.name}.norm1"))
        if pooled:
            inner = F.avg_pool2d(inner, 2)
        inner = passing.norm(passing.conv(inner, f"{block.name}.conv2", padding=1), f"{block.name}.norm2")
        if block.before != block.after:
            x = passing.conv(x, f"{block.name}.shortcut", padding=0, stride=stride)
            if pooled:
                x = F.avg_pool2d(x, 2)
            x = passing.norm(x, f"{block.name}.norm3")
        return F.relu(inner + x)


def _halves(block: Block, h: int, w: int) -> bool:
    return block.halving and min(h, w) >= 4
