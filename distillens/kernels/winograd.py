"""3 x 3 convolutions in fewer products, by Winograd's minimal filtering: ``winograd.cpp``, compiled on first use.

A tile of 2 x 2 results takes 16 products a channel instead of 36; what else it takes are sums, of which there are few a product
where there are many channels. Float32 throughout, with errors no larger than those of PyTorch's own convolutions.

Source: Winograd 1980; Lavin & Gray 2016 (F(2 x 2, 3 x 3)). The gradient in the filters is the transpose of the same lines.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from distillens.kernels import compiled

SOURCE = Path(__file__).with_suffix(".cpp")
WIDTHS = (8, 16, 32)  # of planes whose rows of tiles are whole vectors; planes of 4 x 4 are one
PANEL = 8  # channels that are taken together, in and out


def available() -> bool:
    """Whether the kernels can be used here: there is a compiler that makes them."""
    return compiled.library(SOURCE) is not None


def fit(x: torch.Tensor, weight: torch.Tensor, padding: int) -> bool:
    """Whether the kernels take a convolution of images [n, c, h, w] by ``weight`` [o, c / groups, 3, 3], and its gradients."""
    h, w = x.shape[-2:]
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and len(x) > 0
    sides = (h == w == 4) or (w in WIDTHS and h % 2 == 0)
    inputs = weight.shape[1]
    outputs = len(weight) * inputs // x.shape[1]
    return plain and padding == 1 and sides and inputs % PANEL == 0 and outputs % PANEL == 0


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: int) -> torch.Tensor:
    """``torch.conv2d(x, weight, bias, padding=1, groups=groups)``."""
    return _convolve(x, weight, bias, groups, len(weight) // groups, weight.shape[1], turned=0)


def back(gradient: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
    """The gradient in x from that in the result: a convolution by the filters turned, from outputs to inputs."""
    return _convolve(gradient, weight, None, groups, weight.shape[1], len(weight) // groups, turned=1)


def in_weight(x: torch.Tensor, gradient: torch.Tensor, groups: int) -> torch.Tensor:
    """The gradient in the weight from that in the result."""
    n, c, h, w = x.shape
    inputs, outputs = c // groups, gradient.shape[1] // groups
    x, gradient = x.contiguous(), gradient.contiguous()
    found = x.new_empty(groups * outputs, inputs, 3, 3)
    _call("weights_float32", (x, gradient, found), n, groups, inputs, outputs, h, w)
    return found


def _convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    groups: int,
    outputs: int,
    inputs: int,
    turned: int,
) -> torch.Tensor:
    n, _, h, w = x.shape
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(n, groups * outputs, h, w)
    _call("convolve_float32", (x, weight, bias, y), n, groups, inputs, outputs, h, w, turned)
    return y


def _call(name: str, tensors: tuple[torch.Tensor | None, ...], *sizes: int) -> None:
    library = compiled.library(SOURCE)
    assert library is not None, "asked for without a look at available()"
    places = (ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors)
    getattr(library, name)(*places, *map(ctypes.c_int64, sizes))
