"""What a small network spends its time on, compiled, in the precision asked for; plain PyTorch unless asked.

What is in use is a setting of the process, as the number of threads is: a ``Plan`` pins it while its work runs
(``Plan.pinned``), an import never does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch

from distillens.kernels import conv_block, convolutions, planes

Kernels = Literal["winograd", "fused", "plain"]


@dataclass(frozen=True)
class Setting:
    """Which kernels, and whether the products of convolutions are rounded to bfloat16.

    Kernels are PyTorch's (plain), compiled planes beside PyTorch's convolutions (fused), or these with
    convolutions of our own in fewer products (winograd).
    ``products`` are those that a gradient flows through, ``targets`` those of real data that none flows through. Sums,
    norms, parameters and what leaves a network stay in float32.
    """

    kernels: Kernels = "plain"
    products: torch.dtype = torch.float32
    targets: torch.dtype = torch.float32


def available() -> tuple[Kernels, ...]:
    """Which kernels this machine can have, the simplest first."""
    fused: tuple[Kernels, ...] = ("fused",) if planes.available() else ()
    fewer: tuple[Kernels, ...] = ("winograd",) if fused and convolutions.available() else ()
    return "plain", *fused, *fewer


_now = Setting()


def current() -> Setting:
    """What is in use."""
    return _now


@contextmanager
def using(setting: Setting) -> Iterator[None]:
    """Use a setting for a while, then the one before."""
    global _now
    before, _now = _now, setting
    try:
        yield
    finally:
        _now = before


@contextmanager
def for_targets() -> Iterator[None]:
    """Work that no gradient flows through to what is distilled: in the precision of targets."""
    with using(replace(_now, products=_now.targets)):
        yield


def entering(x: torch.Tensor) -> torch.Tensor:
    """Images in the precision of the convolutions. Float64 stays: it is asked for where rounding must not matter."""
    return x if x.dtype == torch.float64 else x.to(_now.products)


def block(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    padding: int = 1,
    groups: int = 1,
) -> torch.Tensor:
    """{3 x 3 convolution, instance norm, ReLU, average pooling by 2}: [n, c, h, w] to [n, o, h' // 2, w' // 2].

    By the fused kernels where they are in use and take such images, else in plain PyTorch. Under transforms of
    ``torch.func`` it is plain: they look inside.
    """
    looked_into = torch._C._functorch.is_functorch_wrapped_tensor
    if (
        _now.kernels != "plain"
        and planes.fit(x, gamma, padding)
        and not (looked_into(weight) or looked_into(x))
    ):
        return conv_block.fused(x, weight, bias, gamma, beta, padding, groups, _now.kernels == "winograd")
    return conv_block.plain(x, weight, bias, gamma, beta, padding, groups)
