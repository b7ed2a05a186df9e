from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pytest
import torch

from distillens.core.rng import Key
from distillens.unroll import Unrolled, unroll

Mode = Literal["graph", "adjoint"]
MODES: tuple[Mode, ...] = ("graph", "adjoint")

# A smooth little network: 5 inputs, 4 tanh units, 1 output; 29 parameters, 6 examples, learned labels.
START = Key(1).normal(29).double() / 2
GOAL = Key(2).normal(29).double() / 2
X = Key(3).normal(6, 5).double()
Y = Key(4).normal(6).double()
RATE = 0.07


def inner(theta: torch.Tensor, learned: Sequence[torch.Tensor], t: int) -> torch.Tensor:
    """The loss of step t: it sees four of the six examples, other ones each time."""
    x, y = learned
    rows = torch.arange(4) + t % 3
    hidden = torch.tanh(x[rows] @ theta[:20].view(5, 4) + theta[20:24])
    return (hidden @ theta[24:28] + theta[28] - y[rows]).square().mean()


def outer(theta: torch.Tensor) -> torch.Tensor:
    return (theta - GOAL).square().sum() + theta.sin().sum()


def go(
    mode: Mode,
    *,
    steps: int = 7,
    momentum: float = 0.9,
    rate: float = RATE,
    x: torch.Tensor = X,
    y: torch.Tensor = Y,
    start: torch.Tensor = START,
) -> Unrolled:
    return unroll(inner, outer, start, [x, y], rate, steps=steps, momentum=momentum, mode=mode)


def by_hand(steps: int, momentum: float, rate: float, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The last parameters, with torch's own SGD."""
    theta = START.clone().requires_grad_()
    optimiser = torch.optim.SGD([theta], rate, momentum)
    for t in range(steps):
        optimiser.zero_grad()
        inner(theta, [x, y], t).backward()
        optimiser.step()
    return theta.detach()


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


settings = pytest.mark.parametrize(("steps", "momentum"), [(1, 0.0), (1, 0.9), (7, 0.0), (7, 0.9)])


@settings
@pytest.mark.parametrize("mode", MODES)
def test_the_inner_training_is_torchs_sgd(mode: Mode, steps: int, momentum: float) -> None:
    found = go(mode, steps=steps, momentum=momentum)
    expected = by_hand(steps, momentum, RATE, X, Y)
    assert off(found.final, expected) < 1e-13
    assert found.value == pytest.approx(float(outer(expected)), rel=1e-13)


@settings
def test_the_adjoint_is_the_graph(steps: int, momentum: float) -> None:
    graph, adjoint = (go(mode, steps=steps, momentum=momentum) for mode in MODES)
    for found, expected in zip(adjoint.gradients, graph.gradients, strict=True):
        assert off(found, expected) < 1e-10
    assert adjoint.rate_gradient == pytest.approx(graph.rate_gradient, rel=1e-10)


@settings
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", [0, 1], ids=["pixels", "labels"])
def test_gradients_are_those_of_finite_differences(
    mode: Mode, steps: int, momentum: float, which: int
) -> None:
    h = 1e-5
    gradient = go(mode, steps=steps, momentum=momentum).gradients[which]
    expected = torch.zeros_like(gradient)
    for i in range(gradient.numel()):
        ends = []
        for sign in (1, -1):
            learned = [X.clone(), Y.clone()]
            learned[which].view(-1)[i] += sign * h
            ends.append(outer(by_hand(steps, momentum, RATE, *learned)))
        expected.view(-1)[i] = (ends[0] - ends[1]) / (2 * h)
    assert off(gradient, expected) < 1e-7


@settings
@pytest.mark.parametrize("mode", MODES)
def test_the_rates_gradient_is_that_of_finite_differences(mode: Mode, steps: int, momentum: float) -> None:
    h = 1e-6
    ahead, behind = (outer(by_hand(steps, momentum, RATE + s * h, X, Y)) for s in (1, -1))
    found = go(mode, steps=steps, momentum=momentum).rate_gradient
    assert found == pytest.approx(float((ahead - behind) / (2 * h)), rel=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_one_step_in_closed_form(mode: Mode) -> None:
    """theta_1 = theta_0 - rate g, so the rate's gradient is -g . outer'(theta_1)."""
    theta = START.clone().requires_grad_()
    (g,) = torch.autograd.grad(inner(theta, [X, Y], 0), theta)
    end = (START - RATE * g).requires_grad_()
    (slope,) = torch.autograd.grad(outer(end), end)
    found = go(mode, steps=1)
    assert off(found.final, end.detach()) < 1e-14
    assert found.rate_gradient == pytest.approx(-float(g @ slope), rel=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_no_steps_leave_the_start_and_no_gradient(mode: Mode) -> None:
    found = go(mode, steps=0)
    assert torch.equal(found.final, START)
    assert found.value == float(outer(START))
    assert [g.abs().sum().item() for g in found.gradients] == [0, 0]
    assert found.rate_gradient == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_tensor_that_no_step_sees_has_a_zero_gradient(mode: Mode) -> None:
    unused = Key(8).normal(3).double()
    found = unroll(
        lambda theta, learned, t: inner(theta, learned[:2], t),
        outer,
        START,
        [X, Y, unused],
        RATE,
        steps=3,
        momentum=0.9,
        mode=mode,
    )
    assert torch.equal(found.gradients[2], torch.zeros(3, dtype=torch.float64))
    assert off(found.gradients[0], go(mode, steps=3).gradients[0]) < 1e-14


@pytest.mark.parametrize("mode", MODES)
def test_the_same_call_gives_the_same_bytes_and_changes_nothing(mode: Mode) -> None:
    given = [START.clone(), X.clone(), Y.clone()]
    first = go(mode, start=given[0], x=given[1], y=given[2])
    second = go(mode, start=given[0], x=given[1], y=given[2])
    assert torch.equal(first.gradients[0], second.gradients[0])
    assert first.rate_gradient == second.rate_gradient
    for tensor, kept in zip(given, (START, X, Y), strict=True):
        assert torch.equal(tensor, kept)
        assert not tensor.requires_grad
    assert not first.final.requires_grad
    assert not any(g.requires_grad for g in first.gradients)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("rate", [1e-1, 1e-3, 1e-6])
def test_float32_is_near_float64_at_any_rate(momentum: float, rate: float) -> None:
    """Small steps must not lose the rate's gradient in the parameters' rounding."""
    exact = go("graph", momentum=momentum, rate=rate)
    for mode in MODES:
        found = unroll(
            inner,
            lambda theta: (theta - GOAL.float()).square().sum() + theta.sin().sum(),
            START.float(),
            [X.float(), Y.float()],
            rate,
            steps=7,
            momentum=momentum,
            mode=mode,
        )
        assert found.rate_gradient == pytest.approx(exact.rate_gradient, rel=1e-5)
        assert off(found.gradients[0].double(), exact.gradients[0]) < 1e-5
