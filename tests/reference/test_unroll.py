from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch

from distillens.core.checks import UserError
from distillens.core.rng import Key
from distillens.unroll import Adam, Mode, Momentum, Rule, States, Unrolled, Vectors, unroll

EXACT: tuple[Mode, ...] = ("graph", "adjoint")
STATES: tuple[States, ...] = ("stored", "recomputed")

# A smooth little network: 5 inputs, 4 tanh units, 1 output; 29 parameters, 6 examples, learned labels.
P = 29
START = Key(1).normal(P).double() / 2
GOAL = Key(2).normal(P).double() / 2
X = Key(3).normal(6, 5).double()
Y = Key(4).normal(6).double()
RATE = 0.07
RULES = {"sgd": Momentum(), "momentum": Momentum(0.9), "adam": Adam(), "soft adam": Adam(0.8, 0.95, 0.01)}


def inner(theta: torch.Tensor, learned: Sequence[torch.Tensor], t: int) -> torch.Tensor:
    """The loss of step t: it sees four of the six examples, other ones each time."""
    x, y = learned
    rows = torch.arange(4) + t % 3
    hidden = torch.tanh(x[rows] @ theta[:20].view(5, 4) + theta[20:24])
    return (hidden @ theta[24:28] + theta[28] - y[rows]).square().mean()


def outer(theta: torch.Tensor) -> torch.Tensor:
    return (theta[:P] - GOAL).square().sum() + theta.sin().sum()


def equal(steps: int, rate: float = RATE) -> torch.Tensor:
    return torch.full((steps,), rate, dtype=torch.float64)


def uneven(steps: int) -> torch.Tensor:
    """A rate of its own for each step, between 0.02 and 0.1."""
    return 0.02 + 0.08 * Key(5).uniform(steps).double()


def go(
    mode: Mode,
    rates: torch.Tensor,
    rule: Rule,
    *,
    window: int | None = None,
    states: States = "stored",
    x: torch.Tensor = X,
    y: torch.Tensor = Y,
    start: torch.Tensor = START,
) -> Unrolled:
    return unroll(inner, outer, start, [x, y], rates, rule=rule, mode=mode, window=window, states=states)


def by_hand(rates: torch.Tensor, rule: Rule, x: torch.Tensor = X, y: torch.Tensor = Y) -> torch.Tensor:
    """The last parameters, with torch's own optimisers."""
    theta = START.clone().requires_grad_()
    optimiser: torch.optim.Optimizer
    if isinstance(rule, Adam):
        optimiser = torch.optim.Adam([theta], 1.0, (rule.beta1, rule.beta2), rule.epsilon)
    else:
        assert isinstance(rule, Momentum)
        optimiser = torch.optim.SGD([theta], 1.0, rule.momentum)
    for t, rate in enumerate(rates.tolist()):
        optimiser.param_groups[0]["lr"] = rate
        optimiser.zero_grad()
        inner(theta, [x, y], t).backward()
        optimiser.step()
    return theta.detach()


def slow(rates: torch.Tensor, rule: Rule, free: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The outer loss's gradients in x, y and rates by one graph, the first ``free`` steps detached."""
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    alpha = rates.clone().requires_grad_()
    theta, v, s = START.clone().requires_grad_(), torch.zeros(P).double(), torch.zeros(P).double()
    for t in range(len(rates)):
        if t == free:
            theta, v, s = theta.detach().requires_grad_(), v.detach(), s.detach()
        (g,) = torch.autograd.grad(inner(theta, [x, y], t), theta, create_graph=True)
        if isinstance(rule, Adam):
            v = rule.beta1 * v + (1 - rule.beta1) * g
            s = rule.beta2 * s + (1 - rule.beta2) * g * g
            mean, square = v / (1 - rule.beta1 ** (t + 1)), s / (1 - rule.beta2 ** (t + 1))
            theta = theta - alpha[t] * mean / (square.sqrt() + rule.epsilon)
        else:
            assert isinstance(rule, Momentum)
            v = rule.momentum * v + g
            theta = theta - alpha[t] * v
    end = theta.detach().requires_grad_() if free == len(rates) else theta
    found = torch.autograd.grad(outer(end), [x, y, alpha], allow_unused=True, materialize_grads=True)
    return theta.detach(), list(found)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def parts(found: Unrolled) -> list[torch.Tensor]:
    return [*found.gradients, found.rate_gradients]


every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
exact_modes = pytest.mark.parametrize("mode", EXACT)
all_states = pytest.mark.parametrize("states", STATES)


# ---- the inner training ----


@every_rule
@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("steps", [1, 7, 16])
def test_the_inner_training_is_torchs(mode: Mode, rule: Rule, steps: int) -> None:
    for states in STATES:
        found = go(mode, uneven(steps), rule, states=states)
        expected = by_hand(uneven(steps), rule)
        assert off(found.final, expected) < 1e-13
        assert found.value == pytest.approx(float(outer(expected)), rel=1e-13)


def test_teslas_training_is_torchs_sgd() -> None:
    assert off(go("tesla", uneven(7), Momentum()).final, by_hand(uneven(7), Momentum())) < 1e-13


# ---- the way back ----

# At one step of Adam the direction is nearly the gradient's sign: what is left of the derivative is what
# 1 - |g| / (|g| + 1e-8) leaves of the digits.
ONE_STEP_OF_ADAM = 1e-7


@every_rule
@all_states
@pytest.mark.parametrize("steps", [1, 2, 7, 16, 23])
@pytest.mark.parametrize("rates_of", [equal, uneven])
def test_the_adjoint_is_the_graph(
    rule: Rule, states: States, steps: int, rates_of: Callable[[int], torch.Tensor]
) -> None:
    rates = rates_of(steps)
    graph, adjoint = go("graph", rates, rule), go("adjoint", rates, rule, states=states)
    bound = ONE_STEP_OF_ADAM if (steps == 1 and rule == Adam()) else 1e-10
    for found, expected in zip(adjoint.gradients, graph.gradients, strict=True):
        assert off(found, expected) < bound
    assert adjoint.rate_gradients.shape == (steps,)
    assert off(adjoint.rate_gradients, graph.rate_gradients) < 1e-10
    assert adjoint.value == pytest.approx(graph.value, rel=1e-14)
    assert torch.equal(adjoint.final, go("adjoint", rates, rule).final)


def test_stored_and_recomputed_states_are_the_same_to_the_byte() -> None:
    for rule in RULES.values():
        stored, again = (go("adjoint", uneven(23), rule, states=states) for states in STATES)
        assert all(torch.equal(a, b) for a, b in zip(parts(stored), parts(again), strict=True))


# (One step of plain Adam is left out: a derivative of 1e-8 is lost in a difference.)
@pytest.mark.parametrize(
    ("name", "steps"), [(name, steps) for name in RULES for steps in (1, 7) if (name, steps) != ("adam", 1)]
)
@exact_modes
@pytest.mark.parametrize("which", [0, 1], ids=["pixels", "labels"])
def test_gradients_are_those_of_finite_differences(mode: Mode, steps: int, name: str, which: int) -> None:
    rule, h = RULES[name], 1e-5
    gradient = go(mode, uneven(steps), rule).gradients[which]
    expected = torch.zeros_like(gradient)
    for i in range(gradient.numel()):
        ends = []
        for sign in (1, -1):
            learned = [X.clone(), Y.clone()]
            learned[which].view(-1)[i] += sign * h
            ends.append(outer(by_hand(uneven(steps), rule, *learned)))
        expected.view(-1)[i] = (ends[0] - ends[1]) / (2 * h)
    assert off(gradient, expected) < (1e-6 if "adam" in name else 1e-7)


@pytest.mark.parametrize("steps", [1, 7])
@every_rule
@exact_modes
def test_each_rates_gradient_is_that_of_finite_differences(mode: Mode, steps: int, rule: Rule) -> None:
    h = 1e-6
    expected = torch.zeros(steps, dtype=torch.float64)
    for t in range(steps):
        ends = []
        for sign in (1, -1):
            rates = uneven(steps)
            rates[t] += sign * h
            ends.append(outer(by_hand(rates, rule)))
        expected[t] = (ends[0] - ends[1]) / (2 * h)
    assert off(go(mode, uneven(steps), rule).rate_gradients, expected) < 1e-7


@pytest.mark.parametrize("mode", ["graph", "adjoint", "tesla"])
def test_one_step_in_closed_form(mode: Mode) -> None:
    """theta_1 = theta_0 - rate g, so the rate's gradient is -g . outer'(theta_1)."""
    theta = START.clone().requires_grad_()
    (g,) = torch.autograd.grad(inner(theta, [X, Y], 0), theta)
    end = (START - RATE * g).requires_grad_()
    (slope,) = torch.autograd.grad(outer(end), end)
    found = go(mode, equal(1), Momentum())
    assert off(found.final, end.detach()) < 1e-14
    assert found.rate_gradients.tolist() == pytest.approx([-float(g @ slope)], rel=1e-12)


@exact_modes
@every_rule
def test_no_steps_leave_the_start_and_no_gradient(mode: Mode, rule: Rule) -> None:
    for states in STATES:
        found = go(mode, equal(0), rule, states=states)
        assert torch.equal(found.final, START)
        assert found.value == float(outer(START))
        assert [g.abs().sum().item() for g in found.gradients] == [0, 0]
        assert found.rate_gradients.shape == (0,)


@pytest.mark.parametrize("mode", ["graph", "adjoint", "tesla"])
def test_a_tensor_that_no_step_sees_has_a_zero_gradient(mode: Mode) -> None:
    unused = Key(8).normal(3).double()
    found = unroll(
        lambda theta, learned, t: inner(theta, learned[:2], t),
        outer,
        START,
        [X, Y, unused],
        equal(3),
        mode=mode,
    )
    assert torch.equal(found.gradients[2], torch.zeros(3, dtype=torch.float64))
    assert off(found.gradients[0], go(mode, equal(3), Momentum()).gradients[0]) < 1e-14


@every_rule
@all_states
@exact_modes
def test_a_parameter_that_no_step_moves_costs_nothing(mode: Mode, rule: Rule, states: States) -> None:
    """A weight of a unit that is shut: its gradients are all zero, where Adam's root has an infinite slope."""
    longer = torch.cat([START, Key(9).normal(2).double()])

    def shut(theta: torch.Tensor, learned: Sequence[torch.Tensor], t: int) -> torch.Tensor:
        x, y = learned
        return inner(theta, learned, t) + y.sum() * ((x.sum() - 1000).relu() * theta[P:]).sum()

    found = unroll(shut, outer, longer, [X, Y], uneven(7), rule=rule, mode=mode, states=states)
    plain = go(mode, uneven(7), rule, states=states)
    assert torch.equal(found.final[P:], longer[P:])
    for one, other in zip(parts(found), parts(plain), strict=True):
        assert bool(torch.isfinite(one).all())
        assert off(one, other) < 1e-12


@pytest.mark.parametrize("mode", ["graph", "adjoint", "tesla"])
@every_rule
def test_the_same_call_gives_the_same_bytes_and_changes_nothing(mode: Mode, rule: Rule) -> None:
    rule = Momentum() if mode == "tesla" else rule
    given = [START.clone(), X.clone(), Y.clone(), uneven(7)]
    for window in (None, 3):
        first, second = (
            go(mode, given[3], rule, start=given[0], x=given[1], y=given[2], window=window) for _ in range(2)
        )
        for one, other in zip(parts(first), parts(second), strict=True):
            assert torch.equal(one, other)
            assert not one.requires_grad
        assert not first.final.requires_grad
    for tensor, kept in zip(given, (START, X, Y, uneven(7)), strict=True):
        assert torch.equal(tensor, kept)
        assert not tensor.requires_grad and tensor.grad is None


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("rate", [1e-1, 1e-3, 1e-6])
def test_float32_is_near_float64_at_any_rate(momentum: float, rate: float) -> None:
    """Small steps must not lose the rates' gradients in the parameters' rounding."""
    exact = go("graph", equal(7, rate), Momentum(momentum))
    for mode in EXACT:
        found = unroll(
            inner,
            lambda theta: (theta - GOAL.float()).square().sum() + theta.sin().sum(),
            START.float(),
            [X.float(), Y.float()],
            equal(7, rate).float(),
            rule=Momentum(momentum),
            mode=mode,
        )
        assert off(found.rate_gradients.double(), exact.rate_gradients) < 1e-5
        assert off(found.gradients[0].double(), exact.gradients[0]) < 1e-5


# ---- the window ----


@every_rule
@exact_modes
def test_a_window_over_all_steps_is_no_window(mode: Mode, rule: Rule) -> None:
    whole, windowed = go(mode, uneven(7), rule), go(mode, uneven(7), rule, window=7)
    assert all(torch.equal(a, b) for a, b in zip(parts(whole), parts(windowed), strict=True))


@every_rule
@exact_modes
@all_states
@pytest.mark.parametrize("window", [0, 2, 5, 11])
def test_before_the_window_nothing_is_differentiated(
    mode: Mode, rule: Rule, states: States, window: int
) -> None:
    rates = uneven(12)
    final, expected = slow(rates, rule, 12 - window)
    found = go(mode, rates, rule, window=window, states=states)
    assert off(found.final, final) < 1e-13
    assert torch.equal(found.rate_gradients[: 12 - window], torch.zeros(12 - window, dtype=torch.float64))
    for one, other in zip(parts(found), expected, strict=True):
        if window:
            assert off(one, other) < 1e-10
        else:
            assert float(one.abs().max()) == float(other.abs().max()) == 0
    assert window == 11 or off(found.gradients[0], go(mode, rates, rule).gradients[0]) > 0.01


@pytest.mark.parametrize("mode", ["graph", "adjoint", "tesla"])
def test_a_window_that_does_not_fit_is_refused(mode: Mode) -> None:
    with pytest.raises(UserError) as error:
        go(mode, equal(7), Momentum(), window=8)
    assert str(error.value) == "the window is longer than the training; got 8; expected up to 7"
    with pytest.raises(UserError) as error:
        go(mode, equal(7), Momentum(), window=-1)
    assert str(error.value) == "unroll: window must be at least 0; got -1"


# ---- TESLA's rule ----


def teslas(rates: torch.Tensor, free: int = 0) -> list[torch.Tensor]:
    """sum_i -beta_i (d g_i / d x)^T lambda and -g_i . lambda, lambda the outer slope at the end."""
    path = [START]
    for t, rate in enumerate(rates):
        theta = path[-1].clone().requires_grad_()
        path.append(path[-1] - rate * torch.autograd.grad(inner(theta, [X, Y], t), theta)[0])
    end = path[-1].clone().requires_grad_()
    (slope,) = torch.autograd.grad(outer(end), end)
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    total, by_rates = torch.zeros((), dtype=torch.float64), torch.zeros(len(rates), dtype=torch.float64)
    for t in range(free, len(rates)):
        theta = path[t].clone().requires_grad_()
        (g,) = torch.autograd.grad(inner(theta, [x, y], t), theta, create_graph=True)
        total = total - rates[t] * (g @ slope)
        by_rates[t] = -(g.detach() @ slope)
    return [*torch.autograd.grad(total, [x, y]), by_rates]


def test_tesla_is_exact_at_one_step() -> None:
    tesla, graph = (go(mode, equal(1), Momentum()) for mode in ("tesla", "graph"))
    for found, expected in zip(parts(tesla), parts(graph), strict=True):
        assert off(found, expected) < 1e-13


@pytest.mark.parametrize("steps", [2, 7])
@pytest.mark.parametrize("window", [None, 2])
def test_tesla_is_the_sum_of_every_steps_own_pull(steps: int, window: int | None) -> None:
    found = go("tesla", uneven(steps), Momentum(), window=window)
    expected = teslas(uneven(steps), 0 if window is None else steps - window)
    for one, other in zip(parts(found), expected, strict=True):
        assert off(one, other) < 1e-12


def test_tesla_is_not_exact_at_many_steps() -> None:
    tesla, graph = (go(mode, equal(30), Momentum()) for mode in ("tesla", "graph"))
    assert torch.equal(tesla.final, go("adjoint", equal(30), Momentum()).final)
    for found, expected in zip(parts(tesla), parts(graph), strict=True):
        assert off(found, expected) > 0.05


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (Momentum(0.9), "Momentum(momentum=0.9)"),
        (Adam(), "Adam(beta1=0.9, beta2=0.999, epsilon=1e-08)"),
    ],
)
def test_tesla_is_for_plain_sgd_only(rule: Rule, said: str) -> None:
    with pytest.raises(UserError) as error:
        go("tesla", equal(3), rule)
    assert str(error.value) == f"tesla's rule is for plain SGD; got {said}; choose mode=adjoint"


# ---- memory ----


def peak_of(mode: Mode, steps: int, states: States = "stored") -> int:
    """The most bytes that autograd kept at any one time during an unroll."""
    alive = peak = 0

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal alive, peak
            self.tensor = tensor
            alive += tensor.nbytes
            peak = max(peak, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= self.tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        go(mode, equal(steps), Momentum() if mode == "tesla" else Momentum(0.9), states=states)
    assert alive == 0
    return peak


def test_what_autograd_keeps_does_not_grow_with_the_steps() -> None:
    for mode, states in (("adjoint", "stored"), ("adjoint", "recomputed"), ("tesla", "stored")):
        short, long = (peak_of(mode, steps, states) for steps in (5, 40))  # type: ignore[arg-type]
        assert long <= 1.1 * short
        assert short <= 1.5 * peak_of("graph", 1)
    short, long = (peak_of("graph", steps) for steps in (5, 40))
    assert 7 < long / short < 9


@dataclass(frozen=True)
class Counted:
    """SGD with momentum that counts how many states are alive."""

    plain: Momentum = Momentum(0.9)
    seen: list[int] = field(default_factory=lambda: [0, 0])  # alive, at most

    @property
    def vectors(self) -> int:
        return self.plain.vectors

    def begin(self, theta: torch.Tensor) -> Vectors:
        return self.plain.begin(theta)

    def step(self, state: Vectors, gradient: torch.Tensor, rate: torch.Tensor, t: int) -> Vectors:
        after = self.plain.step(state, gradient, rate, t)
        for tensor in (*after, gradient):
            weakref.finalize(tensor, self._gone)
            self.seen[0] += 1
        self.seen[1] = max(self.seen)
        return after

    def _gone(self) -> None:
        self.seen[0] -= 1

    def pull(
        self, back: Vectors, after: Vectors, gradient: torch.Tensor, rate: torch.Tensor, t: int
    ) -> tuple[Vectors, torch.Tensor, torch.Tensor]:
        return self.plain.pull(back, after, gradient, rate, t)


@pytest.mark.parametrize("steps", [25, 100])
def test_recomputed_states_are_about_the_square_root_of_the_steps(steps: int) -> None:
    counts = {}
    for states in STATES:
        rule = Counted()
        go("adjoint", equal(steps), rule, states=states)
        counts[states] = rule.seen[1]
    root = math.isqrt(steps)
    assert counts["stored"] <= steps + 2 * 2 * root + 6  # a gradient a step; marks and one stretch of states
    assert counts["recomputed"] <= 2 * 2 * root + root + 6
