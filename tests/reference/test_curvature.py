"""Curvature against the exact Hessian of a small network (1,026 parameters), and estimators against their errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from distillens.core.contracts import Net
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Probabilities
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.vector import Shapes
from distillens.curvature import (
    PILOT,
    Curved,
    Trace,
    bridge,
    lanczos,
    largest_eigenvalues,
    quadratic_forms,
    signs,
    trace,
)
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.train import Training, train

KEY = Key(17, ("curvature",))
NET = ConvNet(depth=2, width=8)


@dataclass(frozen=True, eq=False)
class Anchor:
    """A trained network in float64, its data, and the exact Hessian [P, P] of its mean loss."""

    shapes: Shapes
    flat: torch.Tensor
    data: Dataset
    hessian: torch.Tensor


def slow_hessian(net: Net, shapes: Shapes, flat: torch.Tensor, data: Dataset) -> torch.Tensor:
    """Row by row, by autograd twice."""
    leaf = flat.clone().requires_grad_()
    logits, _ = net.logits(shapes.unflatten(leaf), {}, data.images)
    loss = torch.nn.functional.cross_entropy(logits, data.labels.hard())
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    return torch.stack([torch.autograd.grad(g, leaf, retain_graph=True)[0] for g in gradient])


@pytest.fixture(scope="module")
def anchor(digits: Splits) -> Anchor:
    data = digits.train.take(torch.arange(64))
    double = Dataset(data.images.double(), data.labels, data.classes, data.space)
    recipe = Recipe(steps=120, batch=64, lr=0.03)
    population = train(Training(data, NET, recipe, (KEY.fold("net"),)), Plan(precision="float64"))
    flat = population.final[0]
    assert len(flat) == 1026
    return Anchor(population.shapes, flat, double, slow_hessian(NET, population.shapes, flat, double))


def probe(place: Key, size: int = 1026) -> torch.Tensor:
    return signs(place.uniform(size)).double()


def test_products_are_those_of_the_exact_hessian(anchor: Anchor, monkeypatch: pytest.MonkeyPatch) -> None:
    vector = KEY.fold("vector").normal(1026).double()
    whole = Curved(NET, anchor.shapes, anchor.flat, anchor.data)
    torch.testing.assert_close(whole.product(vector), anchor.hessian @ vector, rtol=1e-8, atol=1e-10)
    monkeypatch.setattr("distillens.curvature.TOGETHER", 50 * 64)
    pieces = Curved(NET, anchor.shapes, anchor.flat, anchor.data)
    torch.testing.assert_close(pieces.product(vector), whole.product(vector), rtol=1e-9, atol=1e-12)
    forms = quadratic_forms(NET, anchor.shapes, anchor.flat, anchor.data, vector[None])
    assert float(forms.mean()) == pytest.approx(whole.form(vector), rel=1e-8)


def test_the_largest_eigenvalues_are_the_exact_ones(anchor: Anchor) -> None:
    exact = torch.linalg.eigvalsh(anchor.hessian).flip(0)[:5]
    curved = Curved(NET, anchor.shapes, anchor.flat, anchor.data)
    found = largest_eigenvalues(curved, 5, KEY.fold("start").normal(1026).double())
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=0.0)


def test_the_density_has_the_moments_of_the_spectrum(anchor: Anchor) -> None:
    start = KEY.fold("density").normal(1026).double()
    curved = Curved(NET, anchor.shapes, anchor.flat, anchor.data)
    nodes, weights = lanczos(curved, start, 12)
    assert len(nodes) == 12 and float(weights.sum()) == pytest.approx(1.0)
    unit, power = start / start.norm(), start / start.norm()
    for degree in range(1, 8):
        power = anchor.hessian @ power
        assert float((weights * nodes**degree).sum()) == pytest.approx(float(unit @ power), rel=1e-6)


def test_no_eigenvalue_comes_twice(anchor: Anchor) -> None:
    exact = torch.linalg.eigvalsh(anchor.hessian).flip(0)[:5]
    curved = Curved(NET, anchor.shapes, anchor.flat, anchor.data)
    nodes, _ = lanczos(curved, KEY.fold("twice").normal(1026).double(), 80)
    torch.testing.assert_close(nodes.flip(0)[:5], exact, rtol=1e-6, atol=0.0)


def test_a_space_that_is_exhausted_ends_the_iteration() -> None:
    class Two(Curved):
        def __init__(self) -> None:
            pass

        def product(self, vector: torch.Tensor) -> torch.Tensor:
            return torch.tensor([3.0, 3.0, 1.0, 1.0, 1.0], dtype=torch.float64) * vector

    nodes, weights = lanczos(Two(), torch.ones(5, dtype=torch.float64), 5)
    assert nodes.tolist() == pytest.approx([1.0, 3.0])
    assert weights.tolist() == pytest.approx([0.6, 0.4])


def test_a_network_with_running_statistics_and_soft_labels(digits: Splits) -> None:
    net = ConvNet(depth=1, width=4, norm="batch")
    params, buffers = net.init(digits.train, KEY)
    buffers = {name: value.double() + 0.1 for name, value in buffers.items()}
    shapes = Shapes.of(params)
    flat = shapes.flatten(params).double()
    soft = Probabilities(KEY.fold("soft").normal(9, 10).double().softmax(1))
    data = Dataset(digits.train.images[:9].double(), soft, digits.train.classes, digits.train.space)

    def slope(at: torch.Tensor) -> torch.Tensor:
        leaf = at.clone().requires_grad_()
        logits, _ = net.logits(shapes.unflatten(leaf), buffers, data.images)
        loss = -(soft.values * logits.log_softmax(1)).sum(1).mean()
        return torch.autograd.grad(loss, leaf)[0]

    vector = KEY.fold("direction").normal(len(flat)).double()
    expected = (slope(flat + 1e-6 * vector) - slope(flat - 1e-6 * vector)) / 2e-6
    found = Curved(net, shapes, flat, data, buffers).product(vector)
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    forms = quadratic_forms(net, shapes, flat, data, vector[None], buffers)
    assert float(forms.mean()) == pytest.approx(float(found @ vector), rel=1e-8)


# ---- how many probes, and how well the trace is known ----


def test_the_interval_covers_the_exact_trace(anchor: Anchor) -> None:
    """With probes alone, and with images drawn for each probe: nominal 95, at least 88 of 100."""
    from scipy.stats import t

    exact = float(anchor.hessian.trace())
    whole = Curved(NET, anchor.shapes, anchor.flat, anchor.data)

    def sampled(place: Key, i: int) -> float:
        some = anchor.data.take(place.fold("images", i).permutation(64)[:16])
        return Curved(NET, anchor.shapes, anchor.flat, some).form(probe(place.fold(i)))

    for kind, form in (("whole", lambda place, i: whole.form(probe(place.fold(i)))), ("sampled", sampled)):
        covered = 0
        for repeat in range(100):
            place = KEY.fold(kind, repeat)
            found = trace(lambda i, place=place, form=form: form(place, i), 16, 0.12, 16)
            half = float(t.ppf(0.975, found.probes - 1)) * found.error
            covered += abs(found.value - exact) <= half
        assert covered >= 88, kind


def test_as_many_probes_as_the_error_asks_for() -> None:
    draws = KEY.fold("draws").normal(4000).double()
    found = trace(lambda i: 10 + 2 * float(draws[i]), 7, 0.01, 10_000)
    spread = float(draws[:PILOT].std()) * 2
    wanted = math.ceil((spread / (0.01 * (10 + 2 * float(draws[:PILOT].mean())))) ** 2)
    assert found.probes == wanted and found.products == 7 * wanted
    values = 10 + 2 * draws[:wanted]
    assert found.value == pytest.approx(float(values.mean()))
    assert found.error == pytest.approx(float(values.std()) / wanted**0.5)
    assert trace(lambda i: 10 + 2 * float(draws[i]), 7, 0.01, 50).probes == 50
    assert trace(lambda i: 5.0, 7, 0.01, 50) == Trace(5.0, 0.0, PILOT, 7 * PILOT)
    assert trace(lambda i: float(draws[i]) - float(draws[i]), 7, 0.01, 50).value == 0.0


def test_a_bridge_meets_the_curve_between_its_ends() -> None:
    """Measurements whose noise bends smoothly: the bridge finds the curve at a small part of their spread, and knows its error."""
    moments = (10, 12, 15, 20)

    def curve(t: int) -> float:
        return 100 + 3 * t - 0.2 * t * t

    covered, errors = 0, []
    for repeat in range(200):
        draws = KEY.fold("bridge", repeat).normal(3, 40).double()

        def form(i: int, t: int, draws: torch.Tensor = draws) -> float:
            level, slope, bend = draws[:, i].tolist()
            return curve(t) + 30 * level + 2 * slope * t + 0.05 * bend * (t - 15) ** 2

        ends = [Trace(curve(t), 0.0, 6, 600) for t in (10, 20)]
        found = bridge(form, moments, *ends, 16, 0.005, 40)
        errors.append(found[0].value - curve(12))
        # As many probes as bring the error to a quarter of a hundredth, from the spread of the first six.
        assert found[0].probes == 40 or found[0].error < 0.005 * curve(12) / 2 * 1.6
        covered += abs(found[0].value - curve(12)) <= 2.2 * found[0].error
    assert abs(sum(errors) / 200) < 0.05
    assert max(map(abs, errors)) < 2  # single measurements are 30 away
    assert covered >= 176


def test_the_work_of_a_bridge_is_counted() -> None:
    met: list[tuple[int, int]] = []

    def form(i: int, t: int) -> float:
        met.append((i, t))
        return 50 + (-1) ** i * {0: 0, 4: 1, 8: 30, 10: 0}[t]

    ends = Trace(50.0, 0.0, 6, 1), Trace(50.0, 0.0, 6, 1)
    found = bridge(form, (0, 4, 8, 10), *ends, 7, 0.1, 30)
    # The second moment spreads more: it meets the ends of the probes that it adds.
    assert [one.probes for one in found] == [PILOT, 30]
    assert sum(one.products for one in found) == 7 * len(met)
    assert len(set(met)) == len(met)


def test_errors_of_the_ends_stay_in_a_bridge() -> None:
    ends = Trace(10.0, 1.0, 6, 1), Trace(20.0, 3.0, 6, 1)
    (found,) = bridge(lambda i, t: float(t), (0, 5, 10), *ends, 1, 0.1, 10)
    assert (found.value, found.error, found.probes) == (15.0, 2.0, PILOT)
