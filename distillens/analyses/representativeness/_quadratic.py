"""The curvature of each image's own loss along given directions."""

from __future__ import annotations

import warnings

import torch
from torch.func import jvp

from distillens.core.contracts import Net
from distillens.core.dataset import Dataset
from distillens.core.vector import Shapes

TOGETHER = 1 << 18  # pixels that one pass takes: derivatives of both orders travel with every activation


def quadratic_forms(
    net: Net, shapes: Shapes, flat: torch.Tensor, data: Dataset, probes: torch.Tensor
) -> torch.Tensor:
    """``v' H_i v`` [probes, n] of each image's own loss at the parameters ``flat`` [P], for each v of ``probes`` [q, P].

    Two directional derivatives, one in the other: all images at once, exact but for rounding. The mean over images and over
    probes with independent signs estimates the trace of the mean loss's Hessian.
    """
    size = max(1, TOGETHER // data.images[0].numel())
    pieces = torch.split(torch.arange(len(data), device=data.device), size)
    return torch.stack([torch.cat([_form(net, shapes, flat, data, at, v) for at in pieces]) for v in probes])


def _form(
    net: Net, shapes: Shapes, flat: torch.Tensor, data: Dataset, at: torch.Tensor, direction: torch.Tensor
) -> torch.Tensor:
    images, labels = data.images[at].to(flat), data.labels.take(at)

    def losses(parameters: torch.Tensor) -> torch.Tensor:
        return labels.loss(net.logits(shapes.unflatten(parameters), {}, images)[0])

    def slopes(parameters: torch.Tensor) -> torch.Tensor:
        return jvp(losses, (parameters,), (direction,))[1]  # type: ignore[no-any-return]

    with torch.no_grad(), warnings.catch_warnings():
        # Forward mode compiles its decompositions at its first use, with a call that torch itself has deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        return jvp(slopes, (flat,), (direction,))[1]  # type: ignore[no-any-return]
