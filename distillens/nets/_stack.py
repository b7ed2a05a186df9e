"""A stack of stages {convolution, norm, ReLU, perhaps max pooling}: what LeNet, AlexNet and VGG begin with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F

from distillens.core.contracts import Buffers, Like, Params
from distillens.core.rng import Key
from distillens.nets._layers import Norm, Pass, fresh_norm, uniform


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
