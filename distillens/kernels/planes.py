"""Norm, ReLU and average pooling in one pass over memory: ``planes.cpp``, compiled on first use.

PyTorch walks over an activation seven times for these three, forward and back, which on a CPU costs more than the
convolutions of a small network.
"""

from __future__ import annotations

from pathlib import Path

import torch

from distillens.kernels import compiled

SOURCE = Path(__file__).with_suffix(".cpp")
LARGEST = 128 * 128  # pixels of a plane that the kernels hold on the stack
_KINDS = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}


def available() -> bool:
    """Whether the kernels can be used here: there is a compiler that makes them."""
    return compiled.library(SOURCE) is not None


def fit(x: torch.Tensor, gamma: torch.Tensor, padding: int) -> bool:
    """Whether the kernels take the planes that a 3 x 3 convolution of images [n, c, h, w] gives, and their norm."""
    h, w = (side + 2 * padding - 2 for side in x.shape[-2:])
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    known = x.device.type == "cpu" and x.dtype in _KINDS and gamma.dtype == exact
    return known and h * w <= LARGEST and min(h, w) > 1


def forward(
    z: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pooled activations [n, c, h // 2, w // 2] of ``z`` [n, c, h, w]; mean and 1 / deviation [n * c] of each plane."""
    n, c, h, w = z.shape
    y = z.new_empty(n, c, h // 2, w // 2)
    means, rstds = gamma.new_empty(n * c), gamma.new_empty(n * c)
    _call("forward", z, (z, gamma, beta, y, means, rstds), epsilon)
    return y, means, rstds


def backward(
    g: torch.Tensor,
    z: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    means: torch.Tensor,
    rstds: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient in ``z``, gamma [c] and beta [c] from the one in the pooled activations."""
    n, c = z.shape[:2]
    gz = torch.empty_like(z)
    ggamma, gbeta = gamma.new_empty(n, c), gamma.new_empty(n, c)
    _call("backward", z, (g, z, gamma, beta, means, rstds, gz, ggamma, gbeta))
    return gz, added(ggamma), added(gbeta)


def twice(
    v: torch.Tensor,
    vgamma: torch.Tensor,
    vbeta: torch.Tensor,
    g: torch.Tensor,
    z: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    means: torch.Tensor,
    rstds: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient in g, z and gamma of <v, gz> + <vgamma, ggamma> + <vbeta, gbeta>, the results of ``backward``."""
    n, c = z.shape[:2]
    sg, sz, sgamma = torch.empty_like(g), torch.empty_like(z), gamma.new_empty(n, c)
    _call("twice", z, (v, vgamma, vbeta, g, z, gamma, beta, means, rstds, sg, sz, sgamma))
    return sg, sz, added(sgamma)


def added(rows: torch.Tensor) -> torch.Tensor:
    """The sum [c] of ``rows`` [n, c] over images. PyTorch's takes another order where other channels stand beside one."""
    total = rows.new_empty(rows.shape[1])
    function = compiled.function(SOURCE, f"added_{_KINDS[rows.dtype]}", 2, 2)
    function(rows.data_ptr(), total.data_ptr(), *rows.shape)
    return total


def _call(name: str, z: torch.Tensor, tensors: tuple[torch.Tensor, ...], *more: float) -> None:
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("the kernels walk over plain memory")
    n, c, h, w = z.shape
    function = compiled.function(SOURCE, f"{name}_{_KINDS[z.dtype]}", len(tensors), 4, len(more))
    function(*[tensor.data_ptr() for tensor in tensors], n * c, c, h, w, *more)
