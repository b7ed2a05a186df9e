"""Differentiating through training: gradients of an outer loss in what the inner training saw.

The inner training moves a flat parameter vector by a ``Rule`` (momentum SGD or Adam), one step t at a time:
g_t = grad L(theta_t; learned, t), state_{t+1} = rule.step(state_t, g_t, rate_t, t).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from distillens.core.checks import UserError, at_least

Inner = Callable[[torch.Tensor, Sequence[torch.Tensor], int], torch.Tensor]  # (theta, learned, t) -> loss
Outer = Callable[[torch.Tensor], torch.Tensor]  # theta after the last step -> loss
Mode = Literal["graph", "adjoint", "tesla"]
States = Literal["stored", "recomputed"]
Vectors = tuple[torch.Tensor, ...]  # the parameters [P] first, then what the rule remembers


class Rule(Protocol):
    """How the inner training moves: pure, and with its own derivative."""

    @property
    def vectors(self) -> int:
        """How many vectors [P] a state holds."""

    def begin(self, theta: torch.Tensor) -> Vectors:
        """The state before the first step."""

    def step(self, state: Vectors, gradient: torch.Tensor, rate: torch.Tensor, t: int) -> Vectors:
        """The state after step t; differentiable."""

    def pull(
        self, back: Vectors, after: Vectors, gradient: torch.Tensor, rate: torch.Tensor, t: int
    ) -> tuple[Vectors, torch.Tensor, torch.Tensor]:
        """An outer loss's derivative ``back`` in the state after step t, pulled through ``step``.

        Gives the derivatives in the state before (what passes through ``gradient`` left out), in the gradient
        and in the rate.
        """


@dataclass(frozen=True)
class Momentum:
    """SGD as PyTorch defines it: v <- mu v + g, theta <- theta - rate v."""

    momentum: float = 0.0

    @property
    def vectors(self) -> int:
        """Parameters and velocity."""
        return 2

    def begin(self, theta: torch.Tensor) -> Vectors:
        """At rest."""
        return theta, torch.zeros_like(theta)

    def step(self, state: Vectors, gradient: torch.Tensor, rate: torch.Tensor, t: int) -> Vectors:
        """One step."""
        theta, velocity = state
        velocity = self.momentum * velocity + gradient if self.momentum else gradient
        return theta - rate * velocity, velocity

    def pull(
        self, back: Vectors, after: Vectors, gradient: torch.Tensor, rate: torch.Tensor, t: int
    ) -> tuple[Vectors, torch.Tensor, torch.Tensor]:
        """Deng & Russakovsky 2022, with the rate's derivative added."""
        by_theta, by_velocity = back
        total = by_velocity - rate * by_theta
        return (by_theta, self.momentum * total), total, -(after[1] @ by_theta)


@dataclass(frozen=True)
class Adam:
    """Adam as PyTorch defines it, without weight decay.

    A parameter whose gradients were all zero stays where it is, and passes no derivative on (the square root's
    slope at zero is infinite, what it is multiplied with is zero).
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    @property
    def vectors(self) -> int:
        """Parameters and two moments."""
        return 3

    def begin(self, theta: torch.Tensor) -> Vectors:
        """Empty moments."""
        return theta, torch.zeros_like(theta), torch.zeros_like(theta)

    def step(self, state: Vectors, gradient: torch.Tensor, rate: torch.Tensor, t: int) -> Vectors:
        """One step, with the bias corrections of step t (from 0)."""
        theta, first, second = state
        first = self.beta1 * first + (1 - self.beta1) * gradient
        second = self.beta2 * second + (1 - self.beta2) * gradient.square()
        root = self._root(second / (1 - self.beta2 ** (t + 1)))
        return (
            theta - rate * (first / (1 - self.beta1 ** (t + 1))) / (root + self.epsilon),
            first,
            second,
        )

    @staticmethod
    def _root(x: torch.Tensor) -> torch.Tensor:
        moved = x > 0
        return torch.where(moved, x, 1.0).sqrt() * moved

    def pull(
        self, back: Vectors, after: Vectors, gradient: torch.Tensor, rate: torch.Tensor, t: int
    ) -> tuple[Vectors, torch.Tensor, torch.Tensor]:
        """The chain rule through ``step``."""
        by_theta, by_first, by_second = back
        _, first, second = after
        c1, c2 = 1 - self.beta1 ** (t + 1), 1 - self.beta2 ** (t + 1)
        root = self._root(second / c2)
        size = root + self.epsilon
        direction = first / c1 / size
        by_first = by_first - rate * by_theta / (c1 * size)
        # d direction / d second = -direction / size / (2 root c2)
        slope = torch.where(root > 0, direction / (size * 2 * c2 * torch.where(root > 0, root, 1.0)), 0.0)
        by_second = by_second + rate * by_theta * slope
        by_gradient = (1 - self.beta1) * by_first + 2 * (1 - self.beta2) * gradient * by_second
        return (
            (by_theta, self.beta1 * by_first, self.beta2 * by_second),
            by_gradient,
            -(direction @ by_theta),
        )


@dataclass(frozen=True, eq=False)
class Unrolled:
    """The outer loss, its gradients in each learned tensor and each step's rate [steps], the last parameters."""

    value: float
    gradients: tuple[torch.Tensor, ...]
    rate_gradients: torch.Tensor
    final: torch.Tensor


def unroll(
    inner: Inner,
    outer: Outer,
    start: torch.Tensor,
    learned: Sequence[torch.Tensor],
    rates: torch.Tensor,
    *,
    rule: Rule = Momentum(),
    mode: Mode = "adjoint",
    window: int | None = None,
    states: States = "stored",
) -> Unrolled:
    """Train from ``start`` [P] with ``rates`` [steps], one step a rate, and differentiate the outer loss.

    ``graph`` keeps the whole computation: memory grows with the steps. ``adjoint`` is as exact and walks back
    through training one step's graph at a time (11.7 forward passes an image and step against 8.8), with one
    vector [P] a step in memory; ``states="recomputed"`` keeps about the square root of that many, for 2.9 passes
    more. The two agree to rounding; the tests hold them to 1e-10 in float64. ``tesla`` needs no vector a step and is
    *not* exact: it drops what earlier steps do to later gradients (``docs/methods.md`` has by how much), and
    is defined for plain SGD only.

    With ``window`` only the last so many steps are differentiated, from a state that is taken as given.

    Source: Deng & Russakovsky 2022 (adjoint); Cui et al. 2023 (tesla); Feng et al. 2024 (window). Where we differ:
    rates have gradients too, the adjoint is there for Adam, and tesla's factor 2 is not lost.

    Raises:
        UserError: the window is longer than the training, or tesla is asked of a rule that is not plain SGD.
    """
    first = 0 if window is None else len(rates) - window
    if window is not None:
        at_least(0, "unroll", window=window)
    if first < 0:
        raise UserError(
            "the window is longer than the training", got=str(window), expected=f"up to {len(rates)}"
        )
    if mode == "tesla" and rule != Momentum():
        raise UserError("tesla's rule is for plain SGD", got=repr(rule), fix="choose mode=adjoint")
    given = [x.detach() for x in learned]
    state = rule.begin(start.detach())
    for t in range(first):
        state = rule.step(state, _slope(inner, state[0], given, t), rates[t], t)
    run = {"graph": _graph, "adjoint": _adjoint, "tesla": _tesla}[mode]
    leaves = [x.detach().requires_grad_() for x in given]
    return run(inner, outer, state, leaves, rates.detach(), rule, first, states)


def _slope(inner: Inner, theta: torch.Tensor, learned: Sequence[torch.Tensor], t: int) -> torch.Tensor:
    """The inner gradient [P], a number: nothing leads back from it."""
    leaf = theta.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(inner(leaf, [x.detach() for x in learned], t), leaf)
    return gradient


def _end(outer: Outer, theta: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The outer loss and its gradient [P]."""
    leaf = theta.detach().requires_grad_()
    value = outer(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return float(value.detach()), gradient


def _graph(
    inner: Inner,
    outer: Outer,
    state: Vectors,
    learned: Sequence[torch.Tensor],
    rates: torch.Tensor,
    rule: Rule,
    first: int,
    states: States,
) -> Unrolled:
    rates = rates.clone().requires_grad_()
    state = (state[0].detach().requires_grad_(), *state[1:])
    for t in range(first, len(rates)):
        (gradient,) = torch.autograd.grad(inner(state[0], learned, t), state[0], create_graph=True)
        state = rule.step(state, gradient, rates[t], t)
    value = outer(state[0])
    *gradients, by_rates = torch.autograd.grad(
        value, [*learned, rates], allow_unused=True, materialize_grads=True
    )
    return Unrolled(float(value.detach()), tuple(gradients), by_rates, state[0].detach())


def _adjoint(
    inner: Inner,
    outer: Outer,
    state: Vectors,
    learned: Sequence[torch.Tensor],
    rates: torch.Tensor,
    rule: Rule,
    first: int,
    states: States,
) -> Unrolled:
    steps = len(rates)
    # Of each step its gradient is kept (or nothing), and now and then a whole state: the states in between are
    # replayed from the two, which costs no pass through the network.
    stride = max(1, math.isqrt(max(steps - first, 1)))
    marks: list[tuple[int, Vectors]] = []
    kept: dict[int, torch.Tensor] = {}
    for t in range(first, steps):
        if (t - first) % stride == 0:
            marks.append((t, state))
        gradient = _slope(inner, state[0], learned, t)
        if states == "stored":
            kept[t] = gradient
        state = rule.step(state, gradient, rates[t], t)
    final = state[0]
    value, by_theta = _end(outer, final)
    back: Vectors = (by_theta, *(torch.zeros_like(by_theta) for _ in state[1:]))
    by_rates = torch.zeros_like(rates)
    totals = [torch.zeros_like(x) for x in learned]
    stop = steps
    while marks:
        begin, state = marks.pop()
        path = [state]
        for t in range(begin, stop):
            gradient = kept.pop(t) if t in kept else _slope(inner, path[-1][0], learned, t)
            path.append(rule.step(path[-1], gradient, rates[t], t))
        for t in reversed(range(begin, stop)):
            after = path.pop()
            theta = path[-1][0].detach().requires_grad_()
            (gradient,) = torch.autograd.grad(inner(theta, learned, t), theta, create_graph=True)
            back, by_gradient, by_rates[t] = rule.pull(back, after, gradient.detach(), rates[t], t)
            through, *pieces = torch.autograd.grad(
                gradient, [theta, *learned], by_gradient, allow_unused=True, materialize_grads=True
            )
            back = (back[0] + through, *back[1:])
            for total, piece in zip(totals, pieces, strict=True):
                total += piece
        stop = begin
    return Unrolled(value, tuple(totals), by_rates, final)


def _tesla(
    inner: Inner,
    outer: Outer,
    state: Vectors,
    learned: Sequence[torch.Tensor],
    rates: torch.Tensor,
    rule: Rule,
    first: int,
    states: States,
) -> Unrolled:
    begin = state
    for t in range(first, len(rates)):
        state = rule.step(state, _slope(inner, state[0], learned, t), rates[t], t)
    final = state[0]
    value, by_theta = _end(outer, final)
    by_rates = torch.zeros_like(rates)
    totals = [torch.zeros_like(x) for x in learned]
    # The terms are a plain sum over the steps: the second walk goes forward too, and remembers nothing.
    state = begin
    for t in range(first, len(rates)):
        theta = state[0].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(inner(theta, learned, t), theta, create_graph=True)
        by_rates[t] = -(gradient.detach() @ by_theta)
        pieces = torch.autograd.grad(
            gradient, list(learned), -rates[t] * by_theta, allow_unused=True, materialize_grads=True
        )
        for total, piece in zip(totals, pieces, strict=True):
            total += piece
        state = rule.step(state, gradient.detach(), rates[t], t)
    return Unrolled(value, tuple(totals), by_rates, final)
