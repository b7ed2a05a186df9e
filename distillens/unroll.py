"""Differentiating through training: gradients of an outer loss in what the inner training saw.

Inner training is SGD with momentum on a flat parameter vector:
v <- mu v + g(theta; learned, t),  theta <- theta - alpha v.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Inner = Callable[[torch.Tensor, Sequence[torch.Tensor], int], torch.Tensor]  # (theta, learned, t) -> loss
Outer = Callable[[torch.Tensor], torch.Tensor]  # theta after the last step -> loss


@dataclass(frozen=True, eq=False)
class Unrolled:
    """The outer loss, its gradients in each learned tensor and in the step size, the last parameters."""

    value: float
    gradients: tuple[torch.Tensor, ...]
    rate_gradient: float
    final: torch.Tensor


def unroll(
    inner: Inner,
    outer: Outer,
    start: torch.Tensor,
    learned: Sequence[torch.Tensor],
    rate: float,
    *,
    steps: int,
    momentum: float,
    mode: Literal["graph", "adjoint"],
) -> Unrolled:
    """Train for ``steps`` from ``start`` [P] and differentiate the outer loss.

    ``graph`` keeps the whole computation: memory grows with the steps. ``adjoint`` is as exact and keeps one copy
    of the parameters a step: it walks back through training, one step's graph at a time (11.7 forward passes
    an image and step against 8.8). The gradients agree to rounding; the tests hold them to 1e-10 in float64.

    Source: Deng & Russakovsky 2022 (remember-the-past), with the step size's gradient added.
    """
    run = _graph if mode == "graph" else _adjoint
    return run(inner, outer, start, [x.detach().requires_grad_() for x in learned], rate, steps, momentum)


def _graph(
    inner: Inner,
    outer: Outer,
    start: torch.Tensor,
    learned: Sequence[torch.Tensor],
    rate: float,
    steps: int,
    momentum: float,
) -> Unrolled:
    alpha = torch.tensor(rate, dtype=start.dtype, device=start.device, requires_grad=True)
    theta = start.detach().requires_grad_()
    velocity = torch.zeros_like(start)
    for t in range(steps):
        (gradient,) = torch.autograd.grad(inner(theta, learned, t), theta, create_graph=True)
        velocity = momentum * velocity + gradient if momentum else gradient
        theta = theta - alpha * velocity
    value = outer(theta)
    *gradients, by_rate = torch.autograd.grad(
        value, [*learned, alpha], allow_unused=True, materialize_grads=True
    )
    return Unrolled(float(value.detach()), tuple(gradients), float(by_rate), theta.detach())


def _adjoint(
    inner: Inner,
    outer: Outer,
    start: torch.Tensor,
    learned: Sequence[torch.Tensor],
    rate: float,
    steps: int,
    momentum: float,
) -> Unrolled:
    path = [start.detach()]
    velocity = torch.zeros_like(start)
    for t in range(steps):
        theta = path[-1].requires_grad_()
        (gradient,) = torch.autograd.grad(inner(theta, learned, t), theta)
        velocity = momentum * velocity + gradient
        path.append(theta.detach() - rate * velocity)

    theta = path[-1].requires_grad_()
    value = outer(theta)
    (by_theta,) = torch.autograd.grad(value, theta)
    last = theta.detach()
    pull = torch.zeros_like(start)  # minus the outer loss's gradient in the velocity, over the step size
    by_rate = torch.zeros((), dtype=start.dtype, device=start.device)
    totals = [torch.zeros_like(x) for x in learned]
    path.pop()
    for t in reversed(range(steps)):
        theta = path.pop().detach().requires_grad_()
        pull = momentum * pull + by_theta
        (gradient,) = torch.autograd.grad(inner(theta, learned, t), theta, create_graph=True)
        # The sum over steps of velocity . by_theta, rearranged: no velocity has to be stored, or found again as a
        # difference of parameters, which loses digits when steps are small.
        by_rate -= gradient.detach() @ pull
        by_step = torch.autograd.grad(
            gradient, [theta, *learned], -rate * pull, allow_unused=True, materialize_grads=True
        )
        by_theta = by_theta + by_step[0]
        for total, piece in zip(totals, by_step[1:], strict=True):
            total += piece
    return Unrolled(float(value.detach()), tuple(totals), float(by_rate), last)
