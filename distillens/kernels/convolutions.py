"""3 x 3 convolutions of our own: ``convolutions.cpp``, compiled on first use.

PyTorch's are slow at the few colours of an image (a tenth of what the processor can, on some), and take every product. Ours are one
matrix product where channels are few. Where they are many, planes of 4 x 4 are rings, whose Fourier transform leaves 37 products for a
plane and a pair of channels instead of 144; the others go by Winograd's minimal filtering, 16 instead of 36 for 2 x 2 results. Float32
throughout, with errors of the size of those of PyTorch's own (docs/engine.md).

Source: Winograd 1980; Lavin & Gray 2016 (F(2 x 2, 3 x 3)); Zlateski et al. 2018 (the Fourier transform with Gauss' products). The gradient
in the filters is the transpose of the same lines.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from distillens.kernels import compiled, planes

SOURCE = Path(__file__).with_suffix(".cpp")
WIDTHS = (8, 16, 32)  # of planes whose rows of tiles are whole vectors; planes of 4 x 4 are one
PANEL = 8  # channels that are taken together, in and out
FEW = 4  # channels of an image, not of a hidden layer
SMALL = 256  # numbers of an image that stays in the nearest cache with all that a block makes of it


def available() -> bool:
    """Whether the kernels can be used here: there is a compiler that makes them."""
    return compiled.library(SOURCE) is not None


def fit(x: torch.Tensor, weight: torch.Tensor, padding: int) -> bool:
    """Whether the kernels take a convolution of images [n, c, h, w] by ``weight`` [o, c / groups, 3, 3], and its gradient in the weight."""
    if not (x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"):
        return False
    n, channels, h, w = x.shape
    outputs, inputs = weight.shape[:2]
    return n > 0 and take(inputs, outputs * inputs // channels, h, w, padding)


@cache
def take(inputs: int, outputs: int, h: int, w: int, padding: int) -> bool:
    """Whether the kernels take a group of so many channels, in and out, on images of h x w.

    What they find for one group depends on no other.
    """
    if outputs % PANEL:
        return False
    if inputs <= FEW:
        h, w = h + 2 * padding - 2, w + 2 * padding - 2
        return w % 8 == 0 and w > 0 and h * w % 16 == 0
    sides = (h == w == 4) or (w in WIDTHS and h % 2 == 0)
    return padding == 1 and sides and inputs % PANEL == 0


@cache
def small(inputs: int, h: int, w: int, padding: int) -> bool:
    """Whether a block of so few channels, which the kernels take, is sooner done again than read back."""
    h, w = h + 2 * padding - 2, w + 2 * padding - 2
    return inputs * h * w <= SMALL and h % 2 == 0 and h * w % 32 == 0


def convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: int, groups: int
) -> torch.Tensor:
    """``torch.conv2d(x, weight, bias, padding=padding, groups=groups)``."""
    n, _, h, w = x.shape
    inputs, outputs = weight.shape[1], weight.shape[0] // groups
    y = x.new_empty(n, weight.shape[0], h + 2 * padding - 2, w + 2 * padding - 2)
    if inputs <= FEW:
        _call("few_convolve_float32", (x, weight, bias, y), n, groups, inputs, outputs, h, w, padding)
    else:
        _call("convolve_float32", (x, weight, bias, y), n, groups, inputs, outputs, h, w, 0)
    return y


def back(gradient: torch.Tensor, weight: torch.Tensor, padding: int, groups: int) -> torch.Tensor:
    """The gradient in x. Of many channels it is a convolution by the filters turned, from outputs to inputs."""
    n, _, h, w = gradient.shape
    inputs, outputs = weight.shape[1], weight.shape[0] // groups
    h, w = h + 2 - 2 * padding, w + 2 - 2 * padding
    found = gradient.new_empty(n, groups * inputs, h, w)
    if inputs <= FEW:
        _call("few_back_float32", (gradient, weight, found), n, groups, inputs, outputs, h, w, padding)
    else:
        _call("convolve_float32", (gradient, weight, None, found), n, groups, outputs, inputs, h, w, 1)
    return found


def in_weight(x: torch.Tensor, gradient: torch.Tensor, padding: int, groups: int) -> torch.Tensor:
    """The gradient in the weight."""
    n, c, h, w = x.shape
    inputs, outputs = c // groups, gradient.shape[1] // groups
    found = x.new_empty(groups * outputs, inputs, 3, 3)
    if inputs <= FEW:
        _call("few_weights_float32", (x, gradient, found), n, groups, inputs, outputs, h, w, padding)
    else:
        _call("weights_float32", (x, gradient, found), n, groups, inputs, outputs, h, w)
    return found


def block(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    padding: int,
    groups: int,
    epsilon: float,
    kept: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``convolve`` by a ``weight`` of few channels, then ``planes.forward``, image by image: z, and what that gives.

    Unless it is to be ``kept``, z is not written down.
    """
    n, _, h, w = x.shape
    inputs, outputs = weight.shape[1], weight.shape[0] // groups
    high, wide = h + 2 * padding - 2, w + 2 * padding - 2
    z = x.new_empty(n, weight.shape[0], high, wide) if kept else None
    y = x.new_empty(n, weight.shape[0], high // 2, wide // 2)
    means, rstds = x.new_empty(n * weight.shape[0]), x.new_empty(n * weight.shape[0])
    tensors = (x, weight, bias, gamma, beta, z, y, means, rstds)
    name = "small_block_float32" if small(inputs, h, w, padding) else "few_block_float32"
    _call(name, tensors, n, groups, inputs, outputs, h, w, padding, numbers=(epsilon,))
    return z, y, means, rstds


def block_slope(
    g: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    z: torch.Tensor | None,
    means: torch.Tensor,
    rstds: torch.Tensor,
    padding: int,
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``planes.backward``, then ``in_weight`` of few channels, image by image: the gradient in the weight, gamma and beta.

    Without z, which ``block`` has not kept, it is found again, to the bit.
    """
    n, _, h, w = x.shape
    ggamma, gbeta = gamma.new_empty(n, len(gamma)), gamma.new_empty(n, len(gamma))
    found = torch.empty_like(weight)
    rest = (gamma, beta, means, rstds, ggamma, gbeta, found)
    name, tensors = (
        ("few_slope_float32", (g, x, z, *rest))
        if z is not None
        else ("small_slope_float32", (g, x, weight, bias, *rest))
    )
    _call(name, tensors, n, groups, weight.shape[1], len(weight) // groups, h, w, padding)
    return found, planes.added(ggamma), planes.added(gbeta)


def _call(
    name: str, tensors: tuple[torch.Tensor | None, ...], *sizes: int, numbers: tuple[float, ...] = ()
) -> None:
    """Give the last of the tensors what a function of the library finds from the others."""
    plain = [None if tensor is None else tensor.contiguous() for tensor in tensors]  # held until the end
    places = [None if tensor is None else tensor.data_ptr() for tensor in plain]
    compiled.function(SOURCE, name, len(places), len(sizes), len(numbers))(*places, *sizes, *numbers)
