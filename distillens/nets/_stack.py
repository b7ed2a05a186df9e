"""A stack of stages {convolution, norm, ReLU, perhaps max pooling}: what LeNet, AlexNet and VGG begin with."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from distillens.core.checks import at_least, one_of
from distillens.core.contracts import Buffers, Like, Mode, Params
from distillens.core.rng import Key
from distillens.nets._layers import Norm, Pass, check_sides, fresh_norm, uniform


class Stage(NamedTuple):
    """One stage: its channels, the side and padding of its convolution, whether it ends in max pooling by 2."""

    channels: int
    kernel: int
    padding: int
    pooled: bool


def pooled(stages: Sequence[Stage], h: int, w: int) -> list[bool]:
    """Which stages pool images of h x w: of those that may, as many of the last as leave one pixel a side or more.

    So a small image is taken for one that has been pooled already, and all but the last maps keep two pixels a side:
    of a single one a norm would leave nothing. Images of the field's sizes are pooled by all.
    """
    side = min(h, w) + 2 * stages[0].padding - stages[0].kernel + 1
    spare = sum(stage.pooled for stage in stages) - int(math.log2(side))
    seen = accumulate(stage.pooled for stage in stages)
    return [stage.pooled and count > spare for stage, count in zip(stages, seen, strict=True)]


def fresh_stack(
    like: Like, stages: Sequence[Stage], norm: Norm, key: Key
) -> tuple[Params, Buffers, tuple[int, int, int]]:
    """Fresh stages, and the shape of what leaves them."""
    params: Params = {}
    buffers: Buffers = {}
    channels, h, w = like.shape
    for place, (stage, halves) in enumerate(zip(stages, pooled(stages, h, w), strict=True)):
        name = f"conv{place}"
        shape = (stage.channels, channels, stage.kernel, stage.kernel)
        scale, remembered = fresh_norm(f"norm{place}", stage.channels, norm)
        params |= uniform(name, shape, key.fold(name)) | scale
        buffers |= remembered
        grown = 2 * stage.padding - stage.kernel + 1
        channels, h, w = stage.channels, h + grown, w + grown
        if halves:
            h, w = h // 2, w // 2
    return params, buffers, (channels, h, w)


def through_stack(x: torch.Tensor, stages: Sequence[Stage], passing: Pass) -> torch.Tensor:
    """What leaves the stages, flattened, [n, c * h * w]."""
    halvings = pooled(stages, x.shape[-2], x.shape[-1])
    for place, (stage, halves) in enumerate(zip(stages, halvings, strict=True)):
        x = F.relu(passing.norm(passing.conv(x, f"conv{place}", padding=stage.padding), f"norm{place}"))
        if halves:
            x = F.max_pool2d(x, 2)
    return x.flatten(1)


@dataclass(frozen=True)
class Stacked(ABC):
    """A stack of stages, then one linear layer. ``width`` scales the channels of all."""

    width: int
    norm: Literal["group", "batch", "none"]

    def __post_init__(self) -> None:
        at_least(1, type(self).__name__.lower(), width=self.width)
        one_of("norm", self.norm, ("group", "batch", "none"))

    @abstractmethod
    def _stages(self, side: int) -> tuple[Stage, ...]:
        """The stages for images whose shorter side is ``side``."""

    @property
    def mixes_examples(self) -> bool:
        """Whether training mode lets one image change another's output: by batch norm."""
        return self.norm == "batch"

    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        """Fresh parameters; running statistics where the norm is batch norm."""
        check_sides(type(self).__name__, like)
        params, buffers, left = fresh_stack(like, self._stages(min(like.shape[1:])), self.norm, key)
        return params | uniform("linear", (like.k, math.prod(left)), key.fold("linear")), buffers

    def features(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        """The flattened last stage, [n, c * h' * w']."""
        passing = Pass(params, buffers, mode, self.norm)
        return through_stack(x, self._stages(min(x.shape[-2:])), passing), passing.after()

    def logits(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        """Logits [n, k]."""
        features, buffers = self.features(params, buffers, x, mode)
        return F.linear(features, params["linear.weight"], params["linear.bias"]), buffers
