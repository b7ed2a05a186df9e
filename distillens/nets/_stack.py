"""A stack of stages {convolution, norm, ReLU, perhaps max pooling}: what LeNet, AlexNet and VGG begin with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from distillens.core.contracts import Buffers, Like, Params
from distillens.core.rng import Key
from distillens.kernels import entering
from distillens.nets._layers import Norm, Pass, fresh_norm, uniform


class Stage(NamedTuple):
    """One stage: its channels, the side and padding of its convolution, whether it ends in max pooling by 2."""

    channels: int
    kernel: int
    padding: int
    pooled: bool


def pools(stages: Sequence[Stage], place: int, h: int, w: int) -> bool:
    """Whether a stage halves a map of h x w.

    A map that convolutions and norms still follow keeps two pixels a side, else a norm would leave nothing of it;
    the last may come down to one. Images of the field's sizes are always halved.
    """
    return stages[place].pooled and min(h, w) >= (2 if place == len(stages) - 1 else 4)


def fresh_stack(
    like: Like, stages: Sequence[Stage], norm: Norm, key: Key
) -> tuple[Params, Buffers, tuple[int, int, int]]:
    """Fresh stages, and the shape of what leaves them."""
    params: Params = {}
    buffers: Buffers = {}
    channels, h, w = like.shape
    for place, stage in enumerate(stages):
        name = f"conv{place}"
        shape = (stage.channels, channels, stage.kernel, stage.kernel)
        scale, remembered = fresh_norm(f"norm{place}", stage.channels, norm)
        params |= uniform(name, shape, key.fold(name)) | scale
        buffers |= remembered
        grown = 2 * stage.padding - stage.kernel + 1
        channels, h, w = stage.channels, h + grown, w + grown
        if pools(stages, place, h, w):
            h, w = h // 2, w // 2
    return params, buffers, (channels, h, w)


def through_stack(x: torch.Tensor, stages: Sequence[Stage], passing: Pass) -> torch.Tensor:
    """What leaves the stages, flattened, [n, c * h * w], in the precision of the parameters."""
    x = entering(x)
    for place, stage in enumerate(stages):
        x = F.relu(passing.norm(passing.conv(x, f"conv{place}", padding=stage.padding), f"norm{place}"))
        if pools(stages, place, x.shape[-2], x.shape[-1]):
            x = F.max_pool2d(x, 2)
    return x.flatten(1).to(passing.params["linear.weight"].dtype)
