"""KIP and FRePo against slow twins and closed forms. The twins take values of ours (draws), no rules."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from distillens.core.checks import DivergedError, UserError
from distillens.core.contracts import Buffers, Like, Mode, Params, Problem, State
from distillens.core.dataset import Dataset
from distillens.core.labels import Targets
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.cost import saved_bytes
from distillens.data.planted import planted
from distillens.distillers import frepo as frepo_file
from distillens.distillers import kip as kip_file
from distillens.distillers._kernel import centred, dual, flops_a_pass, lamb_moved
from distillens.distillers._ntk import KEPT, Kernel, moments, ntk
from distillens.distillers._pixels import real_batch, with_moments
from distillens.distillers.frepo import FRePo, margin
from distillens.distillers.kip import KIP
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.nets.mlp import MLP
from distillens.train import networks, on, train

K, IPC = 3, 2
KEY = Key(3, ("reference", "kernel"))
NET = ConvNet(depth=1, width=4)


def fine(per_class: int = 6, shape: tuple[int, int, int] = (2, 4, 6)) -> Dataset:
    """Three classes of images in float64."""
    rough = planted(Key(7), per_class=per_class, shape=shape).train
    return Dataset(rough.images.double(), rough.labels, rough.classes, rough.space)


def problem(data: Dataset | None = None) -> Problem:
    return Problem(data or fine(), IPC, KEY)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return Key(seed, ("numbers",)).normal(*shape).double()


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def go(method: Any, asked: Problem, steps: int) -> list[State]:
    states = [method.start(asked)]
    for i in range(steps):
        states.append(method.step(asked, states[-1], i)[0])
    return states


# ---- the kernel, one pair after another ----


def expectations(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E relu(u) relu(v) and E relu'(u) relu'(v) from the angle between u and v, for one pair."""
    angle = torch.arccos(c / torch.sqrt(a * b))
    first = torch.sqrt(a * b) * (torch.sin(angle) + (math.pi - angle) * torch.cos(angle)) / (2 * math.pi)
    return first, (math.pi - angle) / (2 * math.pi)


Grid = dict[tuple[int, int], torch.Tensor]


def slow(x: torch.Tensor, z: torch.Tensor, depth: int, kernel: Kernel) -> torch.Tensor:
    """The kernel of one pair of images [c, h, w], layer by layer and pixel by pixel, by dictionaries."""
    same = x is z
    if kernel == "fc":
        pixels = [(0, 0)]
        flat = {"x": {(0, 0): x.flatten()}, "z": {(0, 0): z.flatten()}}
    else:
        pixels = [(i, j) for i in range(x.shape[1]) for j in range(x.shape[2])]
        flat = {"x": {p: x[:, p[0], p[1]] for p in pixels}, "z": {p: z[:, p[0], p[1]] for p in pixels}}

    def inner(first: str, second: str) -> Grid:
        return {p: (flat[first][p] * flat[second][p]).sum() / len(flat[first][p]) for p in pixels}

    def linear(of: Grid, last: bool) -> Grid:
        if last:
            return {(0, 0): sum(of.values(), torch.zeros(())) / len(of)}
        if kernel == "fc":
            return of
        around = [(di, dj) for di in (-1, 0, 1) for dj in (-1, 0, 1)]
        return {
            (i, j): sum((of.get((i + di, j + dj), torch.zeros(())) for di, dj in around), torch.zeros(())) / 9
            for i, j in of
        }

    c, a, b = inner("x", "z"), inner("x", "x"), inner("z", "z")
    theta: Grid = {p: torch.zeros((), dtype=x.dtype) for p in c}
    for layer in range(depth + 1):
        last = layer == depth
        if layer:
            both = {p: (c[p] / 2, torch.tensor(0.5)) if same else expectations(c[p], a[p], b[p]) for p in c}
            theta = {p: theta[p] * both[p][1] for p in c}
            c, a, b = {p: both[p][0] for p in c}, {p: a[p] / 2 for p in a}, {p: b[p] / 2 for p in b}
        c, a, b = ({p: 2 * v + 0.1**2 for p, v in linear(one, last).items()} for one in (c, a, b))
        theta = {p: c[p] + 2 * v for p, v in linear(theta, last).items()}
    return theta[(0, 0)]


def slow_table(x: torch.Tensor, z: torch.Tensor, depth: int, kernel: Kernel) -> torch.Tensor:
    """All pairs. An image with itself is known by being the same row of the same tensor."""
    rows = list(x)
    columns = rows if x is z else list(z)
    return torch.stack([torch.stack([slow(one, two, depth, kernel) for two in columns]) for one in rows])


every_kernel = pytest.mark.parametrize("kernel", ["fc", "conv"])
every_depth = pytest.mark.parametrize("depth", [0, 1, 3])


@every_kernel
@every_depth
def test_the_kernel_is_the_slow_recursion(kernel: Kernel, depth: int) -> None:
    x, z = numbers(3, 2, 4, 3), numbers(4, 2, 4, 3, seed=1)
    assert off(ntk(x, z, depth, kernel), slow_table(x, z, depth, kernel)) < 1e-12
    assert off(ntk(x, None, depth, kernel), slow_table(x, x, depth, kernel)) < 1e-12


@pytest.mark.parametrize("angle", [0.1, 1.0, 2.0, 3.0])
def test_the_moments_are_the_integrals(angle: float) -> None:
    """In polar coordinates the radius integrates to 2, the angle over where both are above 0 numerically."""
    a, b = torch.tensor(1.7).double(), torch.tensor(0.6).double()
    c = (a * b).sqrt() * math.cos(angle)
    around = torch.linspace(angle - math.pi / 2, math.pi / 2, 20_001, dtype=torch.float64)
    expected = (
        2 * (a * b).sqrt() * torch.trapezoid(around.cos() * (around - angle).cos(), around) / (2 * math.pi)
    )
    found, slope = moments(c, a, b)
    assert float(found) == pytest.approx(float(expected), rel=1e-7)
    assert float(slope) == pytest.approx((math.pi - angle) / (2 * math.pi), rel=1e-12)


def test_opposite_and_equal_inputs_have_their_limits() -> None:
    a = torch.tensor([2.0, 2.0]).double()
    c = torch.tensor([2.0, -2.0]).double().requires_grad_()
    found, slope = moments(c, a, a)
    assert found.tolist() == pytest.approx([1.0, 0.0]) and slope.tolist() == pytest.approx([0.5, 0.0])
    (gradient,) = torch.autograd.grad(found.sum(), c)
    assert gradient.tolist() == pytest.approx([0.5, 0.0])


def wide(x: torch.Tensor, depth: int, kernel: Kernel, width: int, key: Key) -> torch.Tensor:
    """The kernel [n, n] of one network of finite width: products of its output's gradients in every parameter."""
    leaves: list[torch.Tensor] = []

    def draw(name: str, *shape: int) -> torch.Tensor:
        leaves.append(key.fold(name).normal(*shape).double().requires_grad_())
        return leaves[-1]

    def forward() -> torch.Tensor:
        h = x.flatten(1) if kernel == "fc" else x
        for layer in range(depth):
            before = h.shape[1]
            bias = 0.1 * draw(f"b{layer}", width)
            if kernel == "fc":
                h = h @ draw(f"w{layer}", width, before).mT * math.sqrt(2 / before) + bias
            else:
                weight = draw(f"w{layer}", width, before, 3, 3) * math.sqrt(2 / (9 * before))
                h = F.conv2d(h, weight, bias, padding=1)
            h = h.relu()
        h = h.flatten(1)
        return h @ draw("last", h.shape[1]) * math.sqrt(2 / h.shape[1]) + 0.1 * draw("last b", 1)

    outputs = forward()
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(one, leaves, retain_graph=True)])
        for one in outputs
    ]
    jacobian = torch.stack(rows)
    return jacobian @ jacobian.mT


@pytest.mark.parametrize(
    ("kernel", "depth", "width", "nets"), [("fc", 1, 4096, 4), ("fc", 3, 1024, 8), ("conv", 2, 128, 12)]
)
def test_wide_networks_have_this_kernel(kernel: Kernel, depth: int, width: int, nets: int) -> None:
    """The mean over networks is within five standard errors, and those are small."""
    x = numbers(3, 2, 4, 3)
    found = torch.stack([wide(x, depth, kernel, width, KEY.fold("wide", j)) for j in range(nets)])
    expected = ntk(x, None, depth, kernel)
    error = found.std(0) / nets**0.5
    assert float((error / expected).max()) < 0.1
    assert float(((found.mean(0) - expected).abs() / error).max()) < 5
    if depth == 1:  # the planted fault: a kernel without the slope's part is far away
        without = ntk(x, None, depth, kernel) - ntk(x, None, 0, kernel)
        assert float(((found.mean(0) - without).abs() / error).max()) > 20


@every_kernel
@every_depth
def test_the_kernels_gradient_is_that_of_finite_differences(kernel: Kernel, depth: int) -> None:
    x, z = numbers(3, 1, 3, 4).requires_grad_(), numbers(2, 1, 3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, z: ntk(x, z, depth, kernel), (x, z))
    assert torch.autograd.gradcheck(lambda x: ntk(x, None, depth, kernel), (x,))


@every_kernel
@pytest.mark.parametrize("depth", [1, 3])
def test_at_an_image_that_is_there_twice_the_gradient_is_the_middle_of_the_slopes(
    kernel: Kernel, depth: int
) -> None:
    """A real image that the set began with is met in the first step: the kernel has a kink there, but no hole."""
    x = numbers(2, 1, 3, 4)
    z = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ntk(x, z, depth, kernel).trace(), z)

    def differences(small: float) -> torch.Tensor:
        found = torch.zeros_like(x)
        for place in range(x.numel()):
            step = torch.zeros(x.numel()).double()
            step[place] = small
            up, down = (ntk(x, x + sign * step.view_as(x), depth, kernel).trace() for sign in (1, -1))
            found.view(-1)[place] = (up - down) / (2 * small)
        return found

    expected = 2 * differences(5e-4) - differences(1e-3)  # around a kink the error is linear in the step
    assert off(gradient, expected) < 1e-4


# ---- ridge regression ----


def test_at_depth_0_it_is_ridge_regression_on_pixels() -> None:
    data = fine()
    support, labels, new = data.images[:7], numbers(7, K), data.images[7:]
    ridge = 0.01
    features = [
        torch.cat([math.sqrt(2 / x[0].numel()) * x.flatten(1), torch.full((len(x), 1), 0.1).double()], 1)
        for x in (support, new)
    ]
    strength = ridge * features[0].square().sum() / 7
    inside = features[0].T @ features[0] + strength * torch.eye(features[0].shape[1]).double()
    expected = features[1] @ torch.linalg.inv(inside) @ features[0].T @ labels
    assert off(KIP(depth=0, ridge=ridge).outputs(support, labels, new), expected) < 1e-9


@every_kernel
def test_it_is_scikit_learns_kernel_ridge(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.kernel_ridge import KernelRidge

    monkeypatch.setattr(kip_file, "PAIRS", 100)  # several pieces, the last a short one
    data = fine()
    support, labels, new = data.images[:7], numbers(7, K), data.images[7:]
    method = KIP(kernel=kernel, depth=2, ridge=1e-4)
    gram = ntk(support, None, 2, kernel)
    judge = KernelRidge(alpha=float(1e-4 * gram.trace() / 7), kernel="precomputed").fit(gram, labels)
    expected = torch.from_numpy(judge.predict(ntk(new, support, 2, kernel)))
    assert off(method.outputs(support, labels, new), expected) < 1e-10


def test_the_ridge_is_relative() -> None:
    gram, labels = ntk(numbers(5, 1, 3, 4), None, 1, "fc"), numbers(5, K, seed=1)
    assert off(dual(100 * gram, labels, 0.1) * 100, dual(gram, labels, 0.1)) < 1e-12
    assert off(dual(gram, labels, 0.1), dual(gram, labels, 0.2)) > 0.01


def test_labels_are_centred() -> None:
    found = centred(torch.tensor([2, 0]), 4)
    assert found.tolist() == [[-0.25, -0.25, 0.75, -0.25], [0.75, -0.25, -0.25, -0.25]]


# ---- KIP ----


class SlowKIP:
    """Pair by pair, an explicit inverse, PyTorch's Adam."""

    def __init__(self, asked: Problem, start: State, method: KIP) -> None:
        self.asked, self.method = asked, method
        self.images = start.tensors["images"].clone().requires_grad_()
        one_hot = torch.zeros(K * IPC, K).double()
        for place in range(K * IPC):
            one_hot[place, place // IPC] = 1.0
        self.labels = one_hot - 1 / K
        learned = [self.images]
        if method.labels == "learned":
            learned.append(self.labels.requires_grad_())
        self.adam = torch.optim.Adam(learned, method.lr_img)

    def step(self, i: int) -> tuple[float, float]:
        real = real_batch(self.asked, KEY.fold("step", i, "real"), self.method.batch_real)
        own = slow_table(self.images, self.images, self.method.depth, self.method.kernel)
        strength = self.method.ridge * own.diagonal().sum() / len(own)
        inverse = torch.linalg.inv(own + strength * torch.eye(len(own)).double())
        loss, right, count = torch.zeros(()).double(), 0, 0
        for c in range(K):
            for image in real[c]:
                row = torch.stack(
                    [slow(image, one, self.method.depth, self.method.kernel) for one in self.images]
                )
                said = row @ inverse @ self.labels
                for place in range(K):
                    loss = loss + 0.5 * (said[place] - (float(place == c) - 1 / K)) ** 2
                right += int(said.argmax()) == c
                count += 1
        self.adam.zero_grad()
        (loss / count).backward()
        self.adam.step()
        return float(loss.detach()) / count, right / count


@pytest.mark.parametrize(
    ("labels", "kernel", "depth"), [("fixed", "fc", 2), ("learned", "fc", 1), ("learned", "conv", 1)]
)
def test_kip_is_its_slow_twin(
    labels: Any, kernel: Kernel, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kip_file, "PAIRS", 24)  # real images pass by a few at a time
    # Noise: a twin of plain arccos has no slope at a real image that it began with.
    method = KIP(steps=3, batch_real=2, labels=labels, kernel=kernel, depth=depth, ridge=1e-3, init="noise")
    asked = problem(fine(shape=(1, 3, 3)))
    state = method.start(asked)
    twin = SlowKIP(asked, state, method)
    for i in range(3):
        state, log = method.step(asked, state, i)
        loss, right = twin.step(i)
        assert log["loss"] == pytest.approx(loss, rel=1e-9)
        assert log["accuracy"] == pytest.approx(right)
        assert off(state.tensors["images"], twin.images.detach()) < 1e-8
        assert off(state.tensors["labels"], twin.labels.detach()) < 1e-8


def test_the_log_tells_the_regressions_own_loss_and_accuracy() -> None:
    asked = problem()
    method = KIP(batch_real=100)
    state = method.start(asked)
    _, log = method.step(asked, state, 0)
    said = method.outputs(state.tensors["images"], state.tensors["labels"], asked.real.images)
    wanted = centred(asked.real.labels.hard(), K)
    assert log["loss"] == pytest.approx(float(0.5 * (said - wanted).square().sum(1).mean()))
    right = (said.argmax(1) == asked.real.labels.hard()).double().mean()
    assert log["accuracy"] == pytest.approx(float(right))


@pytest.mark.parametrize("labels", ["fixed", "learned"])
def test_kips_loss_falls_and_the_regression_gets_better_on_other_images(labels: Any) -> None:
    splits = planted(Key(7), per_class=30, shape=(1, 8, 8), noise=1.0)
    asked = Problem(splits.train, 1, KEY)
    method = KIP(steps=60, labels=labels)
    states = [method.start(asked)]
    losses = []
    for i in range(method.steps):
        state, log = method.step(asked, states[-1], i)
        states.append(state)
        losses.append(log["loss"])
    assert losses[-1] < 0.7 * losses[0]

    def error(state: State) -> float:
        said = method.outputs(state.tensors["images"], state.tensors["labels"], splits.test.images)
        return float((said - centred(splits.test.labels.hard(), splits.test.k)).square().sum(1).mean())

    assert error(states[-1]) < 0.8 * error(states[0])


# ---- label solve ----


def whole_loss(method: KIP, data: Dataset, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss on all real images, with an explicit inverse; differentiable in the labels."""
    own = ntk(images, None, method.depth, method.kernel)
    strength = method.ridge * own.trace() / len(own)
    inverse = torch.linalg.inv(own + strength * torch.eye(len(own)).double())
    said = ntk(data.images, images, method.depth, method.kernel) @ inverse @ labels
    return 0.5 * (said - centred(data.labels.hard(), data.k)).square().sum(1).mean()


def test_no_other_labels_do_better_than_the_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    data, method = fine(per_class=9), KIP(steps=0, labels="solved", ridge=1e-3)
    asked = problem(data)
    monkeypatch.setattr(kip_file, "PAIRS", 20)
    start = method.start(asked)
    done = method.finish(asked, start)
    images = start.tensors["images"]
    assert isinstance(done.labels, Targets)
    found = done.labels.values
    best = float(whole_loss(method, data, images, found))
    assert best < 0.9 * float(whole_loss(method, data, images, start.tensors["labels"]))
    for j in range(50):
        for size in (1e-4, 1e-2, 1.0):
            other = found + size * numbers(*found.shape, seed=j)
            assert float(whole_loss(method, data, images, other)) > best
    # Real labels are centred, and so are the best ones: the regression is linear in them.
    assert float(found.sum(1).abs().max()) < 1e-9
    monkeypatch.setattr(kip_file, "PAIRS", 1 << 18)
    assert off(method.solved(data, images), found) < 1e-9


def test_gradient_steps_come_to_the_solved_labels() -> None:
    data, method = fine(per_class=9), KIP(steps=0, labels="solved", ridge=1e-2)
    asked = problem(data)
    start = method.start(asked)
    labels = start.tensors["labels"].clone().requires_grad_()
    descent = torch.optim.LBFGS([labels], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> torch.Tensor:
        descent.zero_grad()
        loss = whole_loss(method, data, start.tensors["images"], labels)
        loss.backward()
        return loss

    descent.step(closure)  # type: ignore[no-untyped-call]
    assert off(labels.detach(), method.solved(data, start.tensors["images"])) < 1e-5


def test_of_many_best_labels_the_shortest_are_taken() -> None:
    """More images in the set than real ones: the labels are not settled by the loss."""
    data = fine(per_class=2)
    method = KIP(labels="solved", ridge=1e-2)
    images = numbers(10, 2, 4, 6)
    found = method.solved(data, images)
    own = ntk(images, None, 1, "fc")
    a = ntk(data.images, images, 1, "fc") @ torch.linalg.inv(
        own + 1e-2 * own.trace() / 10 * torch.eye(10).double()
    )
    assert off(found, torch.linalg.pinv(a) @ centred(data.labels.hard(), K)) < 1e-6


# ---- LAMB ----


def test_lamb_is_its_slow_twin() -> None:
    """Number by number, with Python's own floats."""
    start, gradients = numbers(2, 3), [numbers(2, 3, seed=1 + t) for t in range(4)]
    state = with_moments({"x": start})
    x, first, second = start.flatten().tolist(), [0.0] * 6, [0.0] * 6
    for t, gradient in enumerate(gradients):
        state = lamb_moved(state, gradient, 0.1 / (t + 1), t, "x")
        direction = []
        for place, g in enumerate(gradient.flatten().tolist()):
            first[place] = 0.9 * first[place] + 0.1 * g
            second[place] = 0.999 * second[place] + 0.001 * g * g
            upper, lower = first[place] / (1 - 0.9 ** (t + 1)), second[place] / (1 - 0.999 ** (t + 1))
            direction.append(upper / (math.sqrt(lower) + 1e-6))
        ratio = math.sqrt(sum(v * v for v in x)) / math.sqrt(sum(v * v for v in direction))
        x = [v - 0.1 / (t + 1) * ratio * d for v, d in zip(x, direction, strict=True)]
        assert state.tensors["x"].flatten().tolist() == pytest.approx(x, rel=1e-12)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_step_of_lamb_is_a_share_of_the_tensors_length(size: float) -> None:
    start = size * numbers(4, 5)
    after = lamb_moved(with_moments({"x": start}), numbers(4, 5, seed=1), 0.01, 0, "x").tensors["x"]
    assert off(after, start) == pytest.approx(0.01, rel=1e-9)


def test_lamb_of_zeros() -> None:
    zero, other = torch.zeros(3).double(), numbers(3)
    moved = lamb_moved(with_moments({"x": zero}), other, 0.5, 0, "x").tensors["x"]
    assert off(moved, -0.5 * other.sign()) < 1e-4  # Adam's first step
    assert bool((lamb_moved(with_moments({"x": other}), zero, 0.5, 0, "x").tensors["x"] == other).all())


# ---- FRePo ----


def embed(params: Params, x: torch.Tensor) -> torch.Tensor:
    x = F.conv2d(x, params["conv0.weight"], params["conv0.bias"], padding=1)
    mean = x.mean((2, 3), keepdim=True)
    spread = (x - mean).square().mean((2, 3), keepdim=True)
    x = (x - mean) / (spread + 1e-5).sqrt()
    x = x * params["norm0.weight"].view(-1, 1, 1) + params["norm0.bias"].view(-1, 1, 1)
    return F.avg_pool2d(x.relu(), 2).flatten(1)


def classify(params: Params, x: torch.Tensor) -> torch.Tensor:
    return embed(params, x) @ params["linear.weight"].T + params["linear.bias"]


def fresh(key: Key) -> Params:
    return {name: value.double() for name, value in NET.init(fine(), key)[0].items()}


def slow_loss(
    params: Params, images: torch.Tensor, labels: torch.Tensor, real: torch.Tensor, ridge: float, flip: bool
) -> torch.Tensor:
    """FRePo's loss for real images [k, b, c, h, w]."""
    if flip:
        images = torch.cat([images, torch.stack([torch.flip(one, (2,)) for one in images])])
        wanted = torch.cat([labels, labels])
    else:
        wanted = labels
    features = embed(params, images)
    own = features @ features.T
    inverse = torch.linalg.inv(own + ridge * own.diagonal().sum() / len(own) * torch.eye(len(own)).double())
    total, count = torch.zeros(()).double(), 0
    for c in range(K):
        for image in real[c]:
            said = embed(params, image[None])[0] @ features.T @ inverse @ wanted
            target = torch.full((K,), -1 / K, dtype=torch.float64)
            target[c] = 1 - 1 / K
            total = total + 0.5 * ((said - target) ** 2).sum()
            count += 1
    apart = torch.zeros(()).double()
    for row in labels:
        ordered = row.sort().values
        apart = apart - (ordered[-1] - ordered[-2]).clamp(max=1 / K)
    return total / count + apart / len(labels)


class SlowFRePo:
    """Networks with PyTorch's Adam, images and labels with LAMB written out."""

    def __init__(self, asked: Problem, method: FRePo, start: State) -> None:
        self.asked, self.method = asked, method
        self.images, self.labels = start.tensors["images"].clone(), start.tensors["labels"].clone()
        self.moments = {name: [0.0, 0.0] for name in ("images", "labels")}
        self.nets = [self.new(KEY.fold("pool", j)) for j in range(method.pool)]
        self.ages = [j * method.max_age // method.pool for j in range(method.pool)]
        self.renewed = 0

    def new(self, key: Key) -> tuple[Params, torch.optim.Adam]:
        params = {name: value.requires_grad_() for name, value in fresh(key).items()}
        return params, torch.optim.Adam(list(params.values()), self.method.lr_net)

    def step(self, i: int) -> float:
        method, key = self.method, KEY.fold("step", i)
        j = int(key.fold("which").integers(method.pool, 1))
        params, adam = self.nets[j]
        real = real_batch(self.asked, key.fold("real"), method.batch_real)
        images, labels = self.images.clone().requires_grad_(), self.labels.clone().requires_grad_()
        loss = slow_loss(
            {n: p.detach() for n, p in params.items()}, images, labels, real, method.ridge, method.flip
        )
        loss.backward()
        rate = method.lr * (0.55 + 0.45 * math.cos(math.pi * i / method.steps))
        self.images = self.lamb("images", self.images, images.grad, rate, i)
        self.labels = self.lamb("labels", self.labels, labels.grad, rate, i)
        if self.ages[j] == method.max_age:
            self.nets[j], self.ages[j] = self.new(key.fold("net")), 0
            self.renewed += 1
        else:
            some = key.fold("train").permutation(K * IPC)[: method.batch_train]
            some = torch.arange(K * IPC) if method.batch_train >= K * IPC else some
            adam.zero_grad()
            (
                0.5 * (classify(params, self.images[some]) - self.labels[some]).square().sum(1)
            ).mean().backward()
            adam.step()
            self.ages[j] += 1
        return float(loss.detach())

    def lamb(self, name: str, x: torch.Tensor, g: torch.Tensor | None, rate: float, i: int) -> torch.Tensor:
        assert g is not None
        one, two = self.moments[name]
        one, two = 0.9 * one + 0.1 * g, 0.999 * two + 0.001 * g**2
        self.moments[name] = [one, two]
        way = (one / (1 - 0.9 ** (i + 1))) / ((two / (1 - 0.999 ** (i + 1))).sqrt() + 1e-6)
        return x - rate * x.norm() / way.norm() * way


@pytest.mark.parametrize(("flip", "batch_train"), [(False, 500), (True, 4)])
def test_frepo_is_its_slow_twin(flip: bool, batch_train: int) -> None:
    asked = problem()
    method = FRePo(
        steps=16, lr=0.02, lr_net=0.01, pool=2, max_age=4, batch_real=3, ridge=1e-3, flip=flip,
        batch_train=batch_train, net=NET,
    )  # fmt: skip
    state = method.start(asked)
    twin = SlowFRePo(asked, method, state)
    for i in range(method.steps):
        state, log = method.step(asked, state, i)
        assert log["loss"] == pytest.approx(twin.step(i), rel=1e-8)
    assert twin.renewed >= 2
    assert off(state.tensors["images"], twin.images) < 1e-7
    assert off(state.tensors["labels"], twin.labels) < 1e-7
    assert state.tensors["ages"].tolist() == twin.ages
    for j, (params, _) in enumerate(twin.nets):
        expected = torch.cat([p.detach().flatten() for p in params.values()])
        assert off(state.tensors[f"net{j}"], expected) < 1e-6


@pytest.mark.parametrize("flip", [False, True])
def test_frepos_gradient_is_that_of_finite_differences(flip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = problem()
    method = FRePo(steps=1, pool=1, batch_real=3, ridge=1e-3, flip=flip, net=NET)
    state = method.start(asked)
    state = State({**state.tensors, "labels": 0.2 * numbers(K * IPC, K)})  # some margins below 1 / k
    caught: dict[str, torch.Tensor] = {}

    def catch(state: State, gradient: torch.Tensor, lr: float, i: int, name: str) -> State:
        caught[name] = gradient
        return state

    monkeypatch.setattr(frepo_file, "lamb_moved", catch)
    method.step(asked, state, 0)
    params = fresh(KEY.fold("pool", 0))
    real = real_batch(asked, KEY.fold("step", 0, "real"), 3)
    given = {"images": state.tensors["images"], "labels": state.tensors["labels"]}
    small = 1e-6
    for name, found in caught.items():
        for place in range(0, found.numel(), 7 if name == "images" else 1):
            ends = []
            for sign in (1, -1):
                moved = {n: t.clone() for n, t in given.items()}
                moved[name].view(-1)[place] += sign * small
                ends.append(slow_loss(params, moved["images"], moved["labels"], real, 1e-3, flip))
            expected = float(ends[0] - ends[1]) / (2 * small)
            assert float(found.view(-1)[place]) == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_the_margin_is_between_the_two_largest_and_bounded() -> None:
    labels = torch.tensor([[0.5, 0.4, -1.0, 0.0], [2.0, -1.0, 0.0, 0.0]]).double()
    assert float(margin(labels)) == pytest.approx((0.1 + 0.25) / 2)


def test_learned_labels_start_centred_and_scaled() -> None:
    data = planted(Key(7), per_class=3, shape=(1, 8, 8)).train
    k = data.k
    state = FRePo(net=NET).start(Problem(data, 2, KEY))
    expected = centred(torch.arange(k).repeat_interleave(2), k) / math.sqrt(k / 10)
    assert off(state.tensors["labels"].double(), expected) < 1e-6


def test_the_first_networks_are_fresh_and_of_different_ages() -> None:
    asked = problem()
    method = FRePo(pool=4, max_age=100, net=NET)
    state = method.start(asked)
    assert state.tensors["ages"].tolist() == [0, 25, 50, 75]
    assert state.tensors["updates"].tolist() == [0, 0, 0, 0]
    for j in range(4):
        expected = torch.cat([p.flatten() for p in fresh(KEY.fold("pool", j)).values()])
        assert bool((state.tensors[f"net{j}"] == expected).all())


def test_a_network_is_made_anew_at_max_age() -> None:
    """Only the drawn network changes; it is trained until it has ``max_age``, then a fresh one of that step's key."""
    asked = problem()
    method = FRePo(steps=40, pool=3, max_age=4, batch_real=2, net=NET)
    states = go(method, asked, method.steps)
    ends = 0
    for i in range(method.steps):
        before, after = states[i].tensors, states[i + 1].tensors
        drawn = int(KEY.fold("step", i, "which").integers(3, 1))
        for j in range(3):
            same = bool((after[f"net{j}"] == before[f"net{j}"]).all())
            assert same == (j != drawn)
            if j == drawn:
                continue
            assert after["ages"][j] == before["ages"][j]
        if int(before["ages"][drawn]) == 4:
            ends += 1
            expected = torch.cat([p.flatten() for p in fresh(KEY.fold("step", i, "net")).values()])
            assert bool((after[f"net{drawn}"] == expected).all())
            assert not bool(after[f"net{drawn}.first"].any()) and not bool(after[f"net{drawn}.second"].any())
            assert int(after["ages"][drawn]) == int(after["updates"][drawn]) == 0
        else:
            assert int(after["ages"][drawn]) == int(before["ages"][drawn]) + 1
            assert int(after["updates"][drawn]) == int(before["updates"][drawn]) + 1
        assert int(after["ages"].max()) <= 4
    assert ends >= 5


@dataclass(frozen=True)
class Counting(MLP):
    """Its features are scaled by what it remembers: one more at each training step."""

    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        return super().init(like, key)[0], {"seen": torch.ones(1)}

    def features(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        hidden, _ = super().features(params, buffers, x, mode)
        more = 1.0 if mode == "train" else 0.0
        return hidden * buffers["seen"].to(x), {"seen": buffers["seen"] + more}


def test_what_a_network_remembers_goes_with_it() -> None:
    asked = problem()
    method = FRePo(steps=9, pool=1, max_age=3, batch_real=2, net=Counting(depth=1, width=5))
    seen = [int(state.tensors["net0.buffer.seen"]) for state in go(method, asked, 9)]
    assert seen == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]


def test_frepos_loss_falls() -> None:
    splits = planted(Key(7), per_class=30, shape=(1, 8, 8), noise=1.0)
    method = replace(FRePo.defaults(splits.train, 1), steps=60, net=ConvNet(depth=1, width=8))
    asked = Problem(splits.train, 1, KEY)
    state, fits = method.start(asked), []
    for i in range(method.steps):
        state, log = method.step(asked, state, i)
        fits.append(log["fit"])
        assert log["loss"] == pytest.approx(log["fit"] - log["margin"])
    assert sum(fits[-10:]) < 0.8 * sum(fits[:10])


def test_the_rate_falls_to_a_tenth() -> None:
    method = FRePo(steps=100, lr=0.01)
    assert [method.rate(i) for i in (0, 50, 100)] == pytest.approx([0.01, 0.0055, 0.001])


# ---- what networks make of the targets ----


@pytest.mark.parametrize("method", [KIP(steps=3), FRePo(steps=3, net=NET)], ids=["kip", "frepo"])
def test_networks_are_trained_on_the_targets_by_half_the_squared_error(method: Any) -> None:
    data = planted(Key(7), per_class=6, shape=(1, 8, 8)).train
    asked = Problem(data, 1, KEY)
    done = method.finish(asked, go(method, asked, 3)[-1])
    assert done.labels.kind == "targets"
    training = on(done, ConvNet(depth=1, width=8), Recipe(), networks(KEY, 0, 1))
    population = train(training, Plan())
    said = population.logits(done.dataset())[0]
    assert float((said - done.labels.values).square().sum(1).mean()) < 0.05


def test_frepo_brings_the_training_that_its_networks_had() -> None:
    data = planted(Key(7), per_class=6, shape=(1, 8, 8)).train
    asked = Problem(data, 1, KEY)
    for flip in (True, False):
        method = FRePo(flip=flip, net=NET)
        recipe = method.finish(asked, method.start(asked)).recipe
        assert recipe is not None
        assert (recipe.optimiser, recipe.lr, recipe.batch, recipe.schedule) == ("adam", 0.0003, 500, "cosine")
        assert recipe.steps == 1000 and recipe.augment == ("flip" if flip else "")


# ---- what they cost ----


def test_flops_are_those_of_a_pass() -> None:
    like = planted(Key(7), per_class=1, shape=(1, 8, 8)).train
    assert flops_a_pass(MLP(depth=1, width=10), like) == 2 * (64 * 10 + 10 * like.k)  # 2 a product


@every_kernel
@every_depth
def test_the_kernel_keeps_no_more_than_the_law_says(kernel: Kernel, depth: int) -> None:
    n, x = 30, numbers(30, 1, 8, 8).requires_grad_()
    pairs = n * n * (64 if kernel == "conv" else 1) * (depth + 1)
    assert saved_bytes(lambda: ntk(x, None, depth, kernel)) < 8.0 * KEPT * pairs


def test_laws_grow_with_what_they_say() -> None:
    data = planted(Key(7), per_class=20, shape=(1, 8, 8)).train

    def of(method: Any, ipc: int, what: str) -> float:
        return float(getattr(method, what)(Problem(data, ipc, KEY)))

    conv = KIP(kernel="conv", depth=3)
    for what in ("work", "memory"):
        assert of(conv, 10, what) > 2 * of(KIP(), 10, what)
    assert of(KIP(batch_real=20), 10, "work") > of(KIP(batch_real=5), 10, "work")
    assert of(KIP(batch_real=20), 10, "memory") == of(KIP(batch_real=5), 10, "memory")
    large = KIP(batch_real=1)
    assert of(large, 2000, "work") > 6 * of(large, 1000, "work")  # the solve is cubic
    assert of(large, 2000, "memory") > 3.5 * of(large, 1000, "memory")
    plain, mirrored = FRePo(flip=False, net=NET), FRePo(flip=True, net=NET)
    for what in ("work", "memory"):
        assert of(mirrored, 10, what) > of(plain, 10, what)
    assert of(FRePo(pool=20, net=NET), 1, "memory") > of(FRePo(pool=2, net=NET), 1, "memory")


# ---- messages ----


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: KIP(depth=-1), "kip: depth must be at least 0; got -1"),
        (lambda: KIP(batch_real=0), "kip: batch_real must be at least 1; got 0"),
        (lambda: KIP(ridge=0), "kip: ridge must be above 0; got 0"),
        (lambda: KIP(labels="solve"), "unknown labels 'solve'; Did you mean 'solved'? Known: fixed, learned, solved"),
        (lambda: KIP(kernel="cnn"), "unknown kernel 'cnn'; Did you mean 'conv'? Known: conv, fc"),
        (lambda: FRePo(pool=0), "frepo: pool must be at least 1; got 0"),
        (lambda: FRePo(lr_net=0), "frepo: lr_net must be above 0; got 0"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(make: Any, text: str) -> None:
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("method", "what"),
    [
        (KIP(steps=1), "the loss is not finite"),
        (FRePo(steps=1, net=NET), "the loss is not finite"),
    ],
    ids=["kip", "frepo"],
)
def test_a_run_that_leaves_the_finite_numbers_says_so(method: Any, what: str) -> None:
    asked = problem()
    state = method.start(asked)
    broken = State({**state.tensors, "labels": state.tensors["labels"] * torch.inf})
    with pytest.raises(DivergedError, match=what):
        method.step(asked, broken, 0)


def test_lamb_refuses_what_is_not_finite() -> None:
    with pytest.raises(DivergedError, match=r"the gradient of the x is not finite; .* smaller --set lr"):
        lamb_moved(with_moments({"x": numbers(2)}), torch.full((2,), torch.nan).double(), 0.1, 0, "x")
