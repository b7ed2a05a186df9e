"""Curvature against the exact Hessian of a small network (1,026 parameters), and estimators against their errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from distillens.core.contracts import Net
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Probabilities
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.vector import Shapes
from distillens.curvature import (
    FIRST,
    REACH,
    Curved,
    curve,
    joined,
    lanczos,
    largest_eigenvalues,
    quadratic_forms,
    signs,
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


# ---- how many measurements, and how well the curve is known ----


def test_the_interval_covers_the_exact_trace(digits: Splits) -> None:
    """Along training, with all images at each measurement and with a part of them: nominal 95, at least 88 of 100 at every moment."""
    data = digits.train.take(torch.arange(64))
    double = Dataset(data.images.double(), data.labels, data.classes, data.space)
    moments = (30, 32, 34, 37, 40, 44, 50, 60, 80)
    net = ConvNet(depth=2, width=4)
    training = Training(
        data, net, Recipe(steps=80, batch=64, lr=0.03), (KEY.fold("along"),), snapshots=moments
    )
    population = train(training, Plan(precision="float64"))
    exact, forms = [], {}
    for t in moments:
        flat, size = population.at(t)[0], population.shapes.size
        exact.append(float(slow_hessian(net, population.shapes, flat, double).trace()))
        probes = signs(KEY.fold("bank", t).uniform(400, size)).double()
        bank = quadratic_forms(net, population.shapes, flat, double, probes)  # [probes, images]
        assert float(bank.mean()) == pytest.approx(exact[-1], rel=0.06)
        # What the repetitions draw from is no source of error itself.
        forms[t] = bank + exact[-1] - bank.mean()
    for images in (64, 16):
        covered = torch.zeros(len(moments))
        for repeat in range(100):
            place = KEY.fold("covered", images, repeat)
            orders = {t: place.fold("order", t).permutation(400) for t in moments}

            def measure(
                i: int, t: int, images: int = images, place: Key = place, orders: Any = orders
            ) -> float:
                at = images * (i * len(moments) + moments.index(t))
                turn = place.fold("images", at // 64).permutation(64)[at % 64 :][:images]
                return float(forms[t][orders[t][i], turn].mean())

            found = curve(measure, moments, images, 0.12, 24)
            for m, (one, truth) in enumerate(zip(found, exact, strict=True)):
                half = float(stats.t.ppf(0.975, one.measurements - 1 + FIRST)) * one.error
                covered[m] += abs(one.value - truth) <= half
        assert int(covered.min()) >= 88, (images, covered)


def bend(t: float) -> float:
    return 300 * math.exp(-((t - 20) ** 2) / 300) + 40


def noisy(place: Key, spread: float) -> Callable[[int, int], float]:
    return lambda i, t: bend(t) + spread * float(place.fold(i, t).normal(1))


def test_as_many_measurements_as_the_error_asks_for() -> None:
    moments = tuple(range(0, 60, 2))
    found = curve(noisy(KEY.fold("many"), 20.0), moments, 7, 0.03, 25)
    assert all(one.error <= 0.03 * one.value or one.measurements == 25 for one in found)
    counts = [one.measurements for one in found]
    assert counts[10] == min(counts) < 6 and counts[-1] == 25  # high and low on the curve
    assert [one.products for one in found] == [7 * one.measurements for one in found]
    again = curve(noisy(KEY.fold("many"), 20.0), moments, 7, 0.03, 25)
    assert again == found


def test_no_measurement_is_made_twice() -> None:
    """Each moment has its first ones, then those that follow: one taken again would count as news."""
    moments = tuple(range(0, 30, 3))
    met: list[tuple[int, int]] = []
    plain = noisy(KEY.fold("twice"), 20.0)

    def measure(i: int, t: int) -> float:
        met.append((i, t))
        return plain(i, t)

    found = curve(measure, moments, 7, 0.05, 25)
    expected = {(i, t) for one, t in zip(found, moments, strict=True) for i in range(one.measurements)}
    assert len(met) == len(expected) and set(met) == expected


def test_neighbours_help_each_other_where_the_trace_bends_smoothly() -> None:
    off, stated = [], []
    for repeat in range(20):
        place = KEY.fold("smooth", repeat)
        moments = tuple(range(60))
        measure = noisy(place, 20.0)
        mean, spread = joined(moments, [[measure(i, t) for i in range(2)] for t in moments])
        off += [m - bend(t) for m, t in zip(mean, moments, strict=True)]
        stated += spread
    alone = 20 / 2**0.5
    error = math.sqrt(sum(x * x for x in off) / len(off))
    assert error < 0.6 * alone
    assert error == pytest.approx(sum(stated) / len(stated), rel=0.2)


def test_a_rough_curve_is_not_smoothed_away() -> None:
    """Where neighbours have nothing in common, each moment is known by its own measurements alone."""
    moments = tuple(range(0, 2000, 50))
    heights = [100 + 60 * float(x) for x in KEY.fold("rough").normal(len(moments))]
    values = [
        [h + 2 * float(KEY.fold("rough", i, t).normal(1)) for i in range(4)]
        for h, t in zip(heights, moments, strict=True)
    ]
    mean, spread = joined(moments, values)
    assert max(abs(m - sum(own) / 4) for m, own in zip(mean, values, strict=True)) < 1.0
    assert all(0.4 < sd < 1.8 for sd in spread)


def test_the_process_is_the_one_of_the_book() -> None:
    """Another hand: the likelihood over a grid of heights, then the posterior in closed form."""
    moments = tuple(range(0, 40, 2))
    measure = noisy(KEY.fold("book"), 15.0)
    values = [[measure(i, t) for i in range(3)] for t in moments]
    y = np.array([sum(own) / 3 for own in values])
    each = [sum((v - m) ** 2 for v in own) for own, m in zip(values, y, strict=True)]
    n = len(y)
    pooled = [sum(each[min(max(0, i - 4), n - 9) : max(9, i + 5)]) / (2 * 9) for i in range(n)]
    noise = np.array([(own + FIRST * p) / (2 + FIRST) / 3 for own, p in zip(each, pooled, strict=True)])
    apart = np.abs(np.subtract.outer(np.array(moments), np.array(moments))) * math.sqrt(5)

    def kernel(height: float, reach: float) -> np.ndarray[Any, Any]:
        d = apart / reach
        found: np.ndarray[Any, Any] = height * (1 + d + d * d / 3) * np.exp(-d)
        return found

    def likelihood(height: float, reach: float) -> float:
        k = kernel(height, reach) + np.diag(noise)
        return float(-0.5 * y @ np.linalg.solve(k, y) - 0.5 * np.linalg.slogdet(k)[1])

    grid = [(h * y.max() ** 2, REACH) for h in np.geomspace(0.01, 100, 2000)]
    k = kernel(*max(grid, key=lambda at: likelihood(*at)))
    gain = np.linalg.solve(k + np.diag(noise), k).T
    mean, spread = joined(moments, values)
    assert np.abs(mean - gain @ y).max() < 0.005 * y.max()
    assert spread == pytest.approx(np.sqrt(np.diag(k - gain @ k)), rel=0.05)


def test_a_trace_of_nothing_ends() -> None:
    found = curve(lambda i, t: 0.0, (0, 1, 2, 3), 5, 0.05, 10)
    assert [(one.value, one.measurements) for one in found] == [(0.0, FIRST)] * 4
