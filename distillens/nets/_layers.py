"""What networks share: fresh layers, and a pass through layers by name with whatever norm was chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F

from distillens.core.checks import UserError
from distillens.core.contracts import Buffers, Like, Mode, Params
from distillens.core.rng import Key

Norm = Literal["group", "batch", "layer", "none"]
EPSILON = 1e-5  # PyTorch's
MOMENTUM = 0.1  # PyTorch's: the share of a running statistic that a batch replaces


def uniform(name: str, shape: tuple[int, ...], place: Key, *, bias: bool = True) -> Params:
    """A fresh convolution or linear layer [out, in, ...]: uniform in +-1/sqrt(fan-in), PyTorch's default."""
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    params = {f"{name}.weight": place.fold("weight").uniform(*shape, low=-bound, high=bound)}
    if bias:
        params[f"{name}.bias"] = place.fold("bias").uniform(shape[0], low=-bound, high=bound)
    return params


def fresh_norm(name: str, channels: int, kind: Norm) -> tuple[Params, Buffers]:
    """A norm's scale 1 and shift 0, and what batch norm remembers: mean 0 and variance 1."""
    if kind == "none":
        return {}, {}
    params = {f"{name}.weight": torch.ones(channels), f"{name}.bias": torch.zeros(channels)}
    if kind != "batch":
        return params, {}
    return params, {f"{name}.mean": torch.zeros(channels), f"{name}.variance": torch.ones(channels)}


def check_sides(owner: str, like: Like) -> None:
    """Refuse images of a single row or column: a norm would leave nothing of them.

    Raises:
        UserError: the height or the width is below 2.
    """
    if min(like.shape[1:]) < 2:
        raise UserError(
            f"images of {like.shape[1]} x {like.shape[2]} are too small for {owner}",
            expected="at least 2 pixels a side",
        )


def standardised(
    x: torch.Tensor, axes: tuple[int, ...], eps: float = EPSILON
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``x`` with mean 0 and variance 1 over ``axes``, that mean and that (biased) variance, axes kept.

    Elementary operations: torch's own batch, instance and layer norm have wrong third derivatives, and wrong second
    ones under ``torch.vmap``.
    """
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    variance = centred.square().mean(axes, keepdim=True)
    return centred * (variance + eps).rsqrt(), mean, variance


def batch_norm(
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    mode: Mode,
    *,
    momentum: float = MOMENTUM,
    eps: float = EPSILON,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Channels of ``x`` [n, c, ...] standardised, without scale and shift, and the running statistics [c] afterwards.

    Training takes the batch's statistics and moves the running ones towards them (variance with n - 1, as PyTorch);
    evaluation takes the running ones. No gradient flows into the running ones.
    """
    axes = (0, *range(2, x.ndim))
    shape = (-1, *[1] * (x.ndim - 2))
    if mode == "evaluate":
        return (x - mean.view(shape)) * (variance.view(shape) + eps).rsqrt(), mean, variance
    y, seen, spread = standardised(x, axes, eps)
    count = x.numel() // x.shape[1]
    unbiased = spread * (count / max(count - 1, 1))  # one value alone has no spread
    return (
        y,
        torch.lerp(mean, seen.detach().flatten().to(mean), momentum),
        torch.lerp(variance, unbiased.detach().flatten().to(variance), momentum),
    )


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass of images through layers by name, and in ``new`` the running statistics that it leaves.

    With ``models`` > 1 as many networks go at once, their channels side by side.
    """

    params: Params
    buffers: Buffers
    mode: Mode
    kind: Norm
    models: int = 1
    new: Buffers = field(default_factory=dict)

    def conv(
        self, x: torch.Tensor, name: str, *, padding: int, stride: int = 1, groups: int = 1
    ) -> torch.Tensor:
        """A convolution, in the precision of ``x``."""
        weight, bias = self.params[f"{name}.weight"], self.params.get(f"{name}.bias")
        return F.conv2d(
            x,
            weight.to(x.dtype),
            None if bias is None else bias.to(x.dtype),
            stride=stride,
            padding=padding,
            groups=groups,
        )

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """The chosen norm, in the precision of its parameters.

        ``group`` has one channel a group, which is affine instance norm: the same function, with right derivatives
        of every order. ``layer`` has one group of all channels of a model.
        """
        if self.kind == "none":
            return x
        gamma, beta = self.params[f"{name}.weight"], self.params[f"{name}.bias"]
        z = x.to(gamma.dtype)
        if self.kind != "batch":
            groups = len(gamma) if self.kind == "group" else self.models
            return F.group_norm(z, groups, gamma, beta, EPSILON).to(x.dtype)
        mean, variance = f"{name}.mean", f"{name}.variance"
        y, self.new[mean], self.new[variance] = batch_norm(
            z, self.buffers[mean], self.buffers[variance], self.mode
        )
        return (y * gamma[:, None, None] + beta[:, None, None]).to(x.dtype)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """A linear layer."""
        return F.linear(x, self.params[f"{name}.weight"], self.params[f"{name}.bias"])

    def after(self) -> Buffers:
        """The buffers after the pass."""
        return {**self.buffers, **self.new}
