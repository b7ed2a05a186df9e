"""The neural tangent kernel of infinitely wide networks, in closed form."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F

Kernel = Literal["fc", "conv"]

# The variances of weights (2) and biases (0.1 ** 2) in NTK parametrisation: a layer is
# sqrt(2 / fan-in) W x + 0.1 b with W and b standard normal, all of them trained.
WEIGHT, BIAS = 2.0, 0.01
# Tensors of one number a pair, layer (and pixel): up to 9 that autograd keeps (counted), and those of the moment.
KEPT = 12


def ntk(x: torch.Tensor, z: torch.Tensor | None, depth: int, kernel: Kernel) -> torch.Tensor:
    """The kernel [n, n'] between images [n, c, h, w] and [n', c, h, w], or of images with themselves (None).

    ``fc`` flattens the image and has ``depth`` hidden layers of ReLU units; at depth 0 it is linear. ``conv`` has
    ``depth`` layers of 3 x 3 convolution, padded with zeros, and ReLU, then a linear layer on the flattened rest:
    without pooling a pixel meets only itself in the other image, which makes the kernel exact with one number a pair
    and pixel.

    Where two images are the same the kernel has a kink (its slope is one of a distance). On the diagonal of images with
    themselves it is smooth, and taken so: both arguments move together. Elsewhere such a pair passes on the middle
    of its slopes.

    Source: Jacot et al. 2018; Cho & Saul 2009 (``moments``); Arora et al. 2019 (convolutions). Nguyen et al.
    2021 take both from neural_tangents with these variances.
    """
    a = _squares(x, kernel)
    if z is None:
        c = _products(x, x, kernel)
        same = torch.eye(len(x), dtype=torch.bool, device=x.device)[..., None, None]
        b = a
    else:
        c, b = _products(x, z, kernel), _squares(z, kernel)
        same = None
    theta = torch.zeros_like(c)
    for layer in range(depth + 1):
        if layer:
            c, slope = moments(c, a[:, None], b[None], same)
            a, b, theta = a / 2, b / 2, theta * slope
        last = layer == depth
        c, a, b = (WEIGHT * _sums(v, kernel, last) + BIAS for v in (c, a, b))
        if same is not None:  # rounding must not part the diagonal from its squares
            c = torch.where(same, a[:, None], c)
        theta = c + WEIGHT * _sums(theta, kernel, last)
    return theta[..., 0, 0]


def moments(
    c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, same: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """E relu(u) relu(v) and E relu'(u) relu'(v) for normal u, v of covariance c and variances a, b above 0.

    With t the angle between them: sqrt(ab) (sin t + (pi - t) cos t) / 2 pi and (pi - t) / 2 pi. ``same`` marks pairs
    that are one and the same: c / 2 and 1 / 2, with the right slopes, where arccos has an infinite one.
    """
    scale = (a * b).sqrt()
    cosine = c / scale
    ends = cosine.abs() >= 1
    if same is not None:
        ends = ends | same
    inner = torch.where(ends, 0.0, cosine)
    angle = torch.where(ends & (cosine < 0), math.pi, torch.where(ends, 0.0, inner.arccos()))
    sine = torch.where(ends, 0.0, (1 - inner.square()).sqrt())
    return (scale * sine + (math.pi - angle) * c) / (2 * math.pi), (math.pi - angle) / (2 * math.pi)


def _products(x: torch.Tensor, z: torch.Tensor, kernel: Kernel) -> torch.Tensor:
    """Mean products of inputs [n, n', h, w], a pixel each; [n, n', 1, 1] over all of an image."""
    if kernel == "fc":
        return (x.flatten(1) @ z.flatten(1).mT / x[0].numel())[..., None, None]
    return torch.einsum("nchw,mchw->nmhw", x, z) / x.shape[1]


def _squares(x: torch.Tensor, kernel: Kernel) -> torch.Tensor:
    """Mean squares of inputs, [n, h, w] or [n, 1, 1]."""
    if kernel == "fc":
        return x.square().flatten(1).mean(1)[..., None, None]
    return x.square().mean(1)


def _sums(v: torch.Tensor, kernel: Kernel, last: bool) -> torch.Tensor:
    """What a linear layer averages [..., h, w] over: all pixels in the last, 3 x 3 of them in a convolution."""
    if last:
        return v.mean((-2, -1), keepdim=True)
    if kernel == "fc":
        return v
    shape = v.shape
    # Zeros from beyond the border count among the nine.
    return F.avg_pool2d(v.reshape(-1, 1, *shape[-2:]), 3, stride=1, padding=1).reshape(shape)
