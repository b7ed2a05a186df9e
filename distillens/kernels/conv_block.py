"""The block of the field's ConvNet, {3 x 3 convolution, instance norm, ReLU, average pooling by 2}, as one function.

Its first and second derivatives are written out, so that no step of them walks over memory more than it must, and so
that the second takes the products that PyTorch's own conv takes for the first (its double backward runs a convolution
with the images as channels, which no library is fast at). A third derivative falls back on plain PyTorch.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from distillens.kernels import convolutions, planes
from distillens.kernels.convolutions import FEW

EPSILON = 1e-5  # PyTorch's


def plain(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    padding: int = 1,
    groups: int = 1,
) -> torch.Tensor:
    """The block in plain PyTorch.

    The norm is GroupNorm with one channel a group, which is affine instance norm: the same function, with right
    derivatives of every order. It is taken in float32 where the images are rounded further.
    """
    kind, taken = x.dtype, _multiplied(x)
    w, b = weight.to(kind).to(taken), bias.to(kind).to(taken)
    z = F.conv2d(x.to(taken), w, b, padding=padding, groups=groups)
    y = F.relu(F.group_norm(z.to(kind).to(gamma.dtype), z.shape[1], gamma, beta, EPSILON))
    return average_pool(y).to(kind)


def average_pool(x: torch.Tensor) -> torch.Tensor:
    """Means of 2 x 2 pixels; an odd last row or column is dropped, as ``avg_pool2d`` does.

    Small images take one product with a constant matrix: the same function, faster forward and backward on a
    CPU (``benchmarks/results/layout.json``), where pooling was a quarter of a training step.
    """
    h, w = x.shape[-2:]
    if h * w > 64:
        return F.avg_pool2d(x, 2)
    small = x.flatten(-2) @ torch.from_numpy(_pooling_matrix(h, w)).to(x)
    return small.view(*x.shape[:-2], h // 2, w // 2)


@lru_cache(maxsize=64)
def _pooling_matrix(h: int, w: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[h * w, h//2 * w//2]: a quarter where a pixel belongs to a cell.

    Not a tensor: one that is first made under a derivative would belong to it, and be kept beyond it.
    """
    matrix = np.zeros((h, w, h // 2, w // 2), np.float32)
    for i in range(h // 2 * 2):
        for j in range(w // 2 * 2):
            matrix[i, j, i // 2, j // 2] = 0.25
    return matrix.reshape(h * w, -1)


def fused(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    padding: int = 1,
    groups: int = 1,
    fewer: bool = False,
) -> torch.Tensor:
    """The block by the kernels: ``x`` [n, c, h, w] to [n, o, h' // 2, w' // 2], in the precision of ``x``.

    ``weight`` [o, c / groups, 3, 3] and ``bias`` [o] are rounded to it; gamma and beta [o] are not, nor are sums. With
    ``fewer`` the convolutions are in fewer products, where ``convolutions`` takes them.
    """
    # Images of one channel count as plain in either order of memory: the convolution would take the slow one. Here, not
    # inside: what a Function saves must be what it was given, or the second derivative loses its way.
    x = x.contiguous().flatten().view(x.shape)
    gamma, beta = gamma.contiguous(), beta.contiguous()
    y: torch.Tensor = _Block.apply(x, weight, bias, gamma, beta, padding, groups, fewer)  # type: ignore[no-untyped-call]
    return y


@cache
def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 as PyTorch goes about it."""
    # A build without the library has no such question to ask.
    return bool(torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _multiplied(x: torch.Tensor) -> torch.dtype:
    """What kind of number convolutions of such images are taken in: float32 for bfloat16 on a CPU that does not multiply it.

    A product of two is exact there, and the sums of those that multiply it are in float32 as well: the same result but
    for the order of sums. PyTorch's own way on such a CPU is some 60 times as slow.
    """
    slow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not multiplies_bfloat16()
    return torch.float32 if slow else x.dtype


def _conv(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, padding: int, groups: int, fewer: bool
) -> torch.Tensor:
    if fewer and convolutions.fit(x, w, padding):
        return convolutions.convolve(x, w, b, padding, groups)
    kind = _multiplied(x)
    bias = None if b is None else b.to(kind)
    return torch.conv2d(x.to(kind), w.to(kind), bias, padding=padding, groups=groups).to(x.dtype).contiguous()


def _conv_back(
    g: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    padding: int,
    groups: int,
    fewer: bool,
    wanted: tuple[bool, bool],
) -> tuple[Any, Any]:
    """The gradient in x and w, where wanted. In the bias it is nothing: the norm takes a channel's mean away."""
    if fewer and convolutions.fit(x, w, padding):
        return (
            convolutions.back(g, w, padding, groups) if wanted[0] else None,
            convolutions.in_weight(x, g, padding, groups) if wanted[1] else None,
        )
    kind, taken = g.dtype, _multiplied(g)
    g, x, w = g.to(taken), x.to(taken), w.to(taken)
    gx = None
    if wanted[0] and groups == 1 and x.shape[1] <= FEW:
        # Colours are fewer than the lanes of a vector: the library is slow at them, a product is not (2 to 4 times).
        gx = F.fold(w.flatten(1).mT @ g.flatten(2), x.shape[-2:], 3, padding=padding).to(kind)
        wanted = (False, wanted[1])
    if not any(wanted):
        return gx, None
    found = torch.ops.aten.convolution_backward(
        g, x, w, [len(w)], [1, 1], [padding, padding], [1, 1], False, [0, 0], groups, [*wanted, False]
    )
    more, gw = (each.to(kind) if asked else None for each, asked in zip(found[:2], wanted, strict=True))
    return more if gx is None else gx, gw


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        gamma: torch.Tensor,
        beta: torch.Tensor,
        padding: int,
        groups: int,
        fewer: bool,
    ) -> torch.Tensor:
        w, b = weight.to(x.dtype), bias.to(x.dtype)
        if _few(x, w, padding, fewer):
            # z is for those who differentiate; of small images only in x, or in the gradient: the latter find it again.
            small = convolutions.small(w.shape[1], *x.shape[2:], padding)
            kept = any(ctx.needs_input_grad[: 1 if small else 5])
            z, y, means, rstds = convolutions.block(x, w, b, gamma, beta, padding, groups, EPSILON, kept)
        else:
            z = _conv(x, w, b, padding, groups, fewer)
            y, means, rstds = planes.forward(z, gamma, beta, EPSILON)
        ctx.save_for_backward(x, weight, bias, gamma, beta, z, means, rstds)
        ctx.sizes = padding, groups, fewer
        return y

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        x, weight, bias, gamma, beta, z, means, rstds = ctx.saved_tensors
        if z is None and torch.is_grad_enabled():
            padding, groups, _ = ctx.sizes
            z, *_ = convolutions.block(x, weight, bias, gamma, beta, padding, groups, EPSILON, True)
        tensors = g.contiguous(), x, weight, bias, gamma, beta, z, means, rstds
        given = *tensors, *ctx.sizes, tuple(ctx.needs_input_grad[:5])
        # Where nobody differentiates on, nothing is kept for that.
        slope = _Slope.apply(*given) if torch.is_grad_enabled() else _slope(*given, last=True)[0]  # type: ignore[no-untyped-call]
        return *slope, None, None, None


def _few(x: torch.Tensor, w: torch.Tensor, padding: int, fewer: bool) -> bool:
    """Whether a block is of few channels, which our kernels take as one."""
    return fewer and w.shape[1] <= FEW and convolutions.fit(x, w, padding)


def _slope(
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
    fewer: bool,
    wanted: tuple[bool, ...],
    *,
    last: bool = False,
) -> tuple[tuple[torch.Tensor | None, ...], torch.Tensor | None]:
    """The block's gradient in x, weight, bias, gamma and beta, where wanted, and that in z.

    With ``last`` nobody needs that in z: of few channels it is then never written down.
    """
    w = weight.to(x.dtype)
    if z is None or (last and wanted[:2] == (False, True) and _few(x, w, padding, fewer)):
        gx, gz = None, None
        tensors = g, x, w, bias, gamma, beta, z, means, rstds
        gw, ggamma, gbeta = convolutions.block_slope(*tensors, padding, groups)
    else:
        gz, ggamma, gbeta = planes.backward(g, z, gamma, beta, means, rstds)
        gx, gw = _conv_back(gz, x, w, padding, groups, fewer, (wanted[0], wanted[1]))
    found = (
        gx,
        None if gw is None else gw.to(weight.dtype),
        torch.zeros_like(bias) if wanted[2] else None,
        ggamma if wanted[3] else None,
        gbeta if wanted[4] else None,
    )
    return found, gz


class _Slope(torch.autograd.Function):
    """``_slope``, with a derivative of its own."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Any:
        found, gz = _slope(*given)
        *tensors, padding, groups, fewer, _ = given
        ctx.save_for_backward(*tensors, gz)
        ctx.sizes = padding, groups, fewer
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx: Any, *v: torch.Tensor | None) -> Any:
        g, x, weight, bias, gamma, beta, z, means, rstds, gz = ctx.saved_tensors
        padding, groups, fewer = ctx.sizes
        if torch.is_grad_enabled():
            return (*_third(g, x, weight, bias, gamma, beta, padding, groups, v), *[None] * 7)
        vx, vw, _, vgamma, vbeta = v
        needs_g, needs_x, needs_w, needs_b = ctx.needs_input_grad[:4]
        kind = x.dtype
        w = weight.to(kind)
        if vx is not None:
            vx = vx.contiguous()
        # In gz, by the convolution's gradients, which are linear in it.
        in_gz = None if vx is None else _conv(vx, w, None, padding, groups, fewer)
        if vw is not None:
            through = _conv(x, vw.to(kind), None, padding, groups, fewer)
            in_gz = through if in_gz is None else in_gz.add_(through)
        nothing = torch.zeros_like(gamma)
        sg, sz, sgamma = planes.twice(
            torch.zeros_like(z) if in_gz is None else in_gz,
            nothing if vgamma is None else vgamma.contiguous(),
            nothing if vbeta is None else vbeta.contiguous(),
            g,
            z,
            gamma,
            beta,
            means,
            rstds,
        )
        sx, sw = _conv_back(sz, x, w, padding, groups, fewer, (needs_x, needs_w))
        if needs_x and vw is not None:
            more = _conv_back(gz, x, vw.to(kind), padding, groups, fewer, (True, False))[0]
            sx = sx.add_(more)
        if needs_w and vx is not None:
            sw = sw.add_(_conv_back(gz, vx, w, padding, groups, fewer, (False, True))[1])
        return (
            sg if needs_g else None,
            sx,
            None if sw is None else sw.to(weight.dtype),
            torch.zeros_like(bias) if needs_b else None,
            sgamma,
            nothing,  # where the ReLU bends, the derivative in beta is nowhere
            *[None] * 7,
        )


def _third(
    g: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    padding: int,
    groups: int,
    v: tuple[torch.Tensor | None, ...],
) -> tuple[torch.Tensor | None, ...]:
    """The derivative of <v, gradients> as a plain graph that can be differentiated on."""
    inputs = (x, weight, bias, gamma, beta)
    x, weight, bias, gamma, beta = (t if t.requires_grad else t.detach().requires_grad_() for t in inputs)
    y = plain(x, weight, bias, gamma, beta, padding, groups)
    gradients = torch.autograd.grad(y, (x, weight, bias, gamma, beta), g, create_graph=True)
    total = sum((one * other).sum() for one, other in zip(gradients, v, strict=True) if other is not None)
    if not isinstance(total, torch.Tensor) or not total.requires_grad:
        return (None,) * 6
    wanted = [t for t in (g, *inputs) if t.requires_grad]
    found = iter(torch.autograd.grad(total, wanted, create_graph=True, allow_unused=True))
    return tuple(next(found) if t.requires_grad else None for t in (g, *inputs))
