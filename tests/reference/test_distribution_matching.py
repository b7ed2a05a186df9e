from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import pytest
import torch
import torch.nn.functional as F

from distillens.core.checks import UserError
from distillens.core.contracts import Buffers, Distiller, Like, Mode, Params, Problem, State
from distillens.core.dataset import Dataset
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.storage import fingerprint
from distillens.data.planted import planted
from distillens.distillers import _pixels
from distillens.distillers._features import View, draws_of, slope
from distillens.distillers._formations import in_pixels, out_of_pixels
from distillens.distillers._pixels import real_batch
from distillens.distillers.dm import DM
from distillens.distillers.m3d import M3D, WIDTHS, discrepancy
from distillens.distillers.ncfm import (
    HIDDEN,
    LATENT,
    NCFM,
    blend,
    characteristic,
    distance,
    fresh_sampler,
    sampled,
)
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Population

K, IPC, CHANNELS, FACTOR = 3, 2, 2, 2
NET = ConvNet(depth=2, width=4)
KEY = Key(3, ("distribution",))
SHORT = Recipe(steps=3, batch=8, lr=0.1, cutmix=0.5)


def fine() -> Dataset:
    """Three classes of ten 2 x 8 x 12 images in float64: twins agree to many digits."""
    rough = planted(Key(7), per_class=10, shape=(CHANNELS, 8, 12)).train
    return Dataset(rough.images.double(), rough.labels, rough.classes, rough.space)


def problem_of(method: Distiller) -> Problem:
    asked = Problem(fine(), IPC, KEY)
    runs = Runs(Plan("loop", 1, precision="float64"))
    return replace(asked, inputs={name: runs.get(need)[0] for name, need in method.needs(asked).items()})


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def numbers(place: str, *shape: int) -> torch.Tensor:
    return Key(11).fold(place).normal(*shape).double()


@pytest.fixture(params=[1, 1 << 18], ids=["a class at a time", "all classes at once"])
def classes_in_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many classes go through a network together is for speed alone."""
    monkeypatch.setattr(_pixels, "AT_ONCE", request.param)


# ---- networks once more ----


def embed(params: Params, x: torch.Tensor) -> torch.Tensor:
    for block in range(2):
        x = F.conv2d(x, params[f"conv{block}.weight"], params[f"conv{block}.bias"], padding=1)
        mean = x.mean((2, 3), keepdim=True)
        spread = (x - mean).square().mean((2, 3), keepdim=True)
        x = (x - mean) / (spread + 1e-5).sqrt()
        x = x * params[f"norm{block}.weight"].view(-1, 1, 1) + params[f"norm{block}.bias"].view(-1, 1, 1)
        x = F.avg_pool2d(x.relu(), 2)
    return x.flatten(1)


def classify(params: Params, x: torch.Tensor) -> torch.Tensor:
    return embed(params, x) @ params["linear.weight"].T + params["linear.bias"]


@dataclass(frozen=True)
class Normed:
    """Pixels standardised by the batch, or by what was seen before, then bent: a network that mixes its images."""

    mixes_examples: ClassVar[bool] = True

    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        d = math.prod(like.shape)
        params = {"shift": key.fold("shift").normal(d), "weight": key.fold("weight").normal(like.k, d) / 10}
        return params, {"mean": torch.full((d,), 0.25)}

    def features(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        x = x.flatten(1)
        if mode == "evaluate":
            return bent(params, x, buffers["mean"]), buffers
        new = 0.9 * buffers["mean"] + 0.1 * x.mean(0).detach()
        return bent(params, x, x.mean(0)), {"mean": new}

    def logits(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        features, buffers = self.features(params, buffers, x, mode)
        return features @ params["weight"].T, buffers


def bent(params: Params, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    return (x - mean + params["shift"]).tanh()


def patches(stored: torch.Tensor) -> torch.Tensor:
    """The four 4 x 6 patches of each 8 x 12 image, each enlarged."""
    return torch.cat(
        [
            F.interpolate(
                stored[:, :, top : top + 4, left : left + 6],
                size=(8, 12),
                mode="bilinear",
                align_corners=False,
            )
            for top in (0, 4)
            for left in (0, 6)
        ]
    )


class Stored:
    """The stored images in units of pixels, moved by an optimiser of torch; planted data has mean 0.5 and std 0.1."""

    def __init__(self, images: torch.Tensor, optimiser: Callable[[list[torch.Tensor]], Any]) -> None:
        self.pixels = (0.1 * images + 0.5).detach().requires_grad_()
        self.optimiser = optimiser([self.pixels])

    @property
    def images(self) -> torch.Tensor:
        return (self.pixels - 0.5) / 0.1

    def of(self, c: int) -> torch.Tensor:
        return self.images[c * IPC : (c + 1) * IPC]

    def step(self, loss: torch.Tensor) -> None:
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()

    def clamp(self) -> None:
        self.pixels.data.clamp_(0, 1)


def test_steps_in_pixels_are_the_chain_rule() -> None:
    data = fine()
    gradient = numbers("gradient", 4, CHANNELS, 8, 12)
    pixels, pulled = in_pixels(data.space, data.images[:4], gradient)
    assert off(pixels, 0.1 * data.images[:4] + 0.5) < 1e-12
    assert off(pulled, gradient / 0.1) < 1e-12
    assert off(out_of_pixels(data.space, pixels), data.images[:4]) < 1e-12


@dataclass(frozen=True)
class Lossy:
    """A space that cannot be undone."""

    invertible: ClassVar[bool] = False


def test_steps_are_in_the_space_where_pixels_are_not_known() -> None:
    images, gradient = numbers("images", 4, 1, 3, 3), numbers("gradient", 4, 1, 3, 3)
    space: Any = Lossy()
    found = in_pixels(space, images, gradient)
    assert found[0] is images and found[1] is gradient
    assert out_of_pixels(space, images) is images


def test_a_slope_of_some_classes_is_theirs() -> None:
    images = numbers("images", 5, 2, 1, 3, 3)

    def loss(own: torch.Tensor, part: slice) -> torch.Tensor:
        weights = torch.arange(5.0, dtype=torch.float64)[part]
        return weights * own.square().sum((1, 2, 3, 4))

    for together in (1, 2, 9):
        losses, gradient = slope(images, loss, together, range(1, 4))
        for place, c in enumerate((1, 2, 3)):
            assert float(losses[place]) == pytest.approx(c * float(images[c].square().sum()))
            assert off(gradient[place], 2 * c * images[c]) < 1e-12


# ---- M3D ----


def slow_discrepancy(real: torch.Tensor, distilled: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """MMD^2 of two samples [n, d], pair by pair."""

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        gap = ((a - b) ** 2).sum()
        return sum(
            ((-gap / (bandwidth * 2.0**power)).exp() for power in (-2, -1, 0, 1, 2)), start=torch.zeros(())
        )

    def mean(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return torch.stack([kernel(a, b) for a in first for b in second]).mean()

    return mean(real, real) - 2 * mean(real, distilled) + mean(distilled, distilled)


def mean_squared_distance(real: torch.Tensor, distilled: torch.Tensor) -> float:
    """Over all pairs of different members of the two samples together."""
    both = [*real, *distilled]
    gaps = [float(((a - b) ** 2).sum()) for i, a in enumerate(both) for j, b in enumerate(both) if i != j]
    return sum(gaps) / len(gaps)


@pytest.mark.parametrize("ours", [1, 4])
def test_m3ds_discrepancy_is_a_double_loop_over_pairs(ours: int) -> None:
    real, distilled = numbers("real", K, 5, 7), 2 * numbers("distilled", K, ours, 7) + 1
    found = discrepancy(real, distilled)
    assert found.shape == (K,)
    for c in range(K):
        expected = slow_discrepancy(real[c], distilled[c], mean_squared_distance(real[c], distilled[c]))
        assert float(found[c]) == pytest.approx(float(expected), rel=1e-9)


def test_m3ds_gradient_is_that_of_finite_differences_at_a_fixed_bandwidth() -> None:
    real, distilled = numbers("real", 1, 4, 5), numbers("distilled", 1, 3, 5) + 0.5
    width = mean_squared_distance(real[0], distilled[0])
    leaf = distilled.clone().requires_grad_()
    (found,) = torch.autograd.grad(discrepancy(real, leaf).sum(), leaf)
    for i in range(3):
        for j in range(5):
            values = []
            for sign in (1, -1):
                moved = distilled[0].clone()
                moved[i, j] += sign * 1e-6
                values.append(float(slow_discrepancy(real[0], moved, width)))
            assert float(found[0, i, j]) == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-8)


def test_m3d_sees_what_means_do_not() -> None:
    """Two samples of the same mean and other spread: the linear kernel is blind, the Gaussian is not."""
    real = numbers("real", 1, 6, 4)
    centre = real.mean(1, keepdim=True)
    wider = centre + 3 * (real - centre)
    assert abs(float(discrepancy(real, wider, "linear"))) < 1e-12
    assert float(discrepancy(real, wider)) > 0.1
    assert abs(float(discrepancy(real, real))) < 1e-12


def test_equal_features_only_have_no_discrepancy_and_a_finite_gradient() -> None:
    leaf = torch.ones(1, 3, 4, dtype=torch.float64, requires_grad=True)
    found = discrepancy(torch.ones(1, 5, 4, dtype=torch.float64), leaf)
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    assert abs(float(found.detach())) < 1e-12
    assert float(gradient.abs().max()) < 1e-12


@pytest.mark.usefixtures("classes_in_chunks")
def test_m3d_with_a_linear_kernel_has_dms_loss() -> None:
    plain: Any = {"augment": "", "batch_real": 6, "net": NET}
    m3d = M3D(kernel="linear", factor=1, redraw=1, **plain)
    asked = problem_of(m3d)
    start = m3d.start(asked)
    # DM draws its network elsewhere: its loss by hand, on M3D's.
    params = {n: v.double() for n, v in NET.init(asked.real, KEY.fold("net", 0))[0].items()}
    real = real_batch(asked, KEY.fold("step", 0, "real"), 6)
    expected = 0.0
    for c in range(K):
        own = start.tensors["images"][c * IPC : (c + 1) * IPC]
        gap = embed(params, real[c]).mean(0) - embed(params, own).mean(0)
        expected += float((gap * gap).sum())
    assert m3d.step(asked, start, 0)[1]["loss"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.usefixtures("classes_in_chunks")
def test_m3d_is_a_loop_over_classes_in_pixels() -> None:
    method = M3D(lr_img=0.05, batch_real=6, redraw=2, augment="crop", net=NET)
    asked = problem_of(method)
    states = [method.start(asked)]
    stored = Stored(states[0].tensors["images"], lambda p: torch.optim.SGD(p, 0.05, 0.5))
    for i in range(4):
        state, log = method.step(asked, states[-1], i)
        states.append(state)
        key = KEY.fold("step", i)
        params = {n: v.double() for n, v in NET.init(asked.real, KEY.fold("net", i // 2))[0].items()}
        real = real_batch(asked, key.fold("real"), 6)
        draws = draws_of("crop", key.fold("augment"), K)
        loss = torch.zeros((), dtype=torch.float64)
        for c in range(K):
            theirs, ours = (shifted(x, draws[c]) for x in (real[c], patches(stored.of(c))))
            features = embed(params, theirs), embed(params, ours)
            width = mean_squared_distance(*(f.detach() for f in features))
            loss = loss + slow_discrepancy(*features, width)
        stored.step(loss)
        stored.clamp()
        assert log["loss"] == pytest.approx(float(loss.detach()), rel=1e-8)
        assert off(state.tensors["images"], stored.images.detach()) < 1e-8
    assert (
        float(stored.pixels.detach().min()) == 0 or float(stored.pixels.detach().max()) == 1
    )  # some were cut


def shifted(x: torch.Tensor, drawn: Any) -> torch.Tensor:
    """A siamese crop: all images moved by the same whole pixels (one of eight up and down, two of twelve across)."""
    assert drawn.operation == "crop" and drawn.numbers.shape == (1, 3)
    down, right = int(drawn.numbers[0, 0] * 3), int(drawn.numbers[0, 1] * 5)
    padded = F.pad(x, (2, 2, 1, 1))
    return padded[:, :, down : down + 8, right : right + 12]


def test_m3ds_widths_are_the_published_ones() -> None:
    assert list(WIDTHS) == [2.0**power for power in range(-2, 3)]


# ---- batch norm ----


def test_dm_and_m3d_take_the_statistics_of_one_batch_of_all_classes() -> None:
    common: Any = {"augment": "", "batch_real": 6, "lr_img": 1e-3, "net": Normed()}
    for method in (DM(**common), M3D(factor=1, redraw=1, kernel="linear", **common)):
        asked = problem_of(method)
        start = method.start(asked)
        place = KEY.fold("step", 0, "net") if isinstance(method, DM) else KEY.fold("net", 0)
        params = {n: v.double() for n, v in Normed().init(asked.real, place)[0].items()}
        real = real_batch(asked, KEY.fold("step", 0, "real"), 6).flatten(0, 1).flatten(1)
        leaf = start.tensors["images"].clone().requires_grad_()
        ours = leaf.flatten(1)
        theirs = bent(params, real, real.mean(0)).reshape(K, 6, -1).mean(1)
        means = bent(params, ours, ours.mean(0)).reshape(K, IPC, -1).mean(1)
        loss = (theirs - means).square().sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        after, log = method.step(asked, start, 0)
        assert log["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)
        if isinstance(method, DM):
            expected = start.tensors["images"] - 1e-3 * gradient
        else:  # a step in pixels, which are a tenth of the space's units, cut to [0, 1]
            pixels = 0.1 * start.tensors["images"] + 0.5 - 1e-3 * gradient / 0.1
            expected = (pixels.clamp(0, 1) - 0.5) / 0.1
        assert off(after.tensors["images"], expected) < 1e-10


@pytest.mark.parametrize("at_once", [1, 1 << 18])
def test_batch_norm_is_not_cut_in_chunks(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pixels, "AT_ONCE", at_once)
    asked = problem_of(DM())
    view = View.fresh(Normed(), asked, KEY)
    assert view.together(100, asked.real) == K
    assert replace(view, mode="evaluate").together(100, asked.real) == min(K, max(1, at_once // 9600))


# ---- NCFM: the loss ----


def slow_phi(features: torch.Tensor, t: torch.Tensor) -> complex:
    """The characteristic function of a sample [n, d] at one frequency [d]."""
    total = 0j
    for z in features.tolist():
        length = math.sqrt(sum(x * x for x in z))
        total += cmath.exp(1j * sum(a * b / length for a, b in zip(t.tolist(), z, strict=True)))
    return total / len(features)


@pytest.mark.parametrize("amplitude", [0.0, 0.5, 0.8, 1.0])
def test_ncfms_loss_is_explicit_complex_loops(amplitude: float) -> None:
    real, distilled = numbers("real", K, 5, 7), numbers("distilled", K, 2, 7) + 0.3
    frequencies = 3 * numbers("t", 11, 7)
    found = distance(characteristic(real, frequencies), characteristic(distilled, frequencies), amplitude)
    for c in range(K):
        expected = 0.0
        for t in frequencies:
            a, b = slow_phi(real[c], t), slow_phi(distilled[c], t)
            turned = abs(a) * abs(b) * (1 - math.cos(cmath.phase(a) - cmath.phase(b)))
            expected += math.sqrt(amplitude * (abs(a) - abs(b)) ** 2 + (1 - amplitude) * 2 * turned)
            if amplitude == 0.5:
                assert math.sqrt(0.5 * (abs(a) - abs(b)) ** 2 + turned) == pytest.approx(
                    abs(a - b) / 2**0.5, abs=1e-12
                )
        assert float(found[c]) == pytest.approx(expected / 11, rel=1e-9)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_ncfms_loss_vanishes_for_equal_samples_with_a_finite_gradient(kind: torch.dtype) -> None:
    features, frequencies = numbers("real", K, 5, 7).to(kind), numbers("t", 40, 7).to(kind)
    leaf = features.clone().requires_grad_()
    found = distance(characteristic(features, frequencies), characteristic(leaf, frequencies))
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    assert float(found.detach().max()) < (1e-7 if kind == torch.float64 else 1e-3)
    assert bool(torch.isfinite(gradient).all())
    doubled = characteristic(2 * features.repeat(1, 2, 1), frequencies)  # a sample twice, at any length
    assert float(distance(doubled, characteristic(features, frequencies)).max()) < 1e-3


def test_a_characteristic_function_that_vanishes_has_a_finite_gradient() -> None:
    """Phases 0 and pi: the mean is exactly nothing, and its length has no slope there."""
    leaf = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[math.pi / 2, 0.0]], dtype=torch.float64)
    phi = characteristic(leaf, t)
    assert float(phi.detach().norm()) < 1e-15
    (gradient,) = torch.autograd.grad(distance(torch.zeros_like(phi), phi).sum(), leaf)
    assert bool(torch.isfinite(gradient).all())


# ---- NCFM: the steps ----

QUICK: Any = {"num_freqs": 13, "batch_real": 6, "n_nets": 2, "recipe": SHORT, "net": NET, "augment": "crop"}


def in_torch(
    method: NCFM, asked: Problem, images: torch.Tensor, steps: int
) -> list[tuple[torch.Tensor, dict[str, float]]]:
    """Images and log after each step, by torch's optimiser and schedule and a loop over classes."""
    networks: Population = asked.inputs["networks"]
    stored = Stored(images, lambda p: torch.optim.AdamW(p, method.lr_img, weight_decay=method.weight_decay))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        stored.optimiser, "min", factor=0.5, patience=method.patience
    )
    out = []
    for i in range(steps):
        key = KEY.fold("step", i)
        j, share = int(key.fold("net", "which").integers(2, 1)), float(key.fold("net", "share").uniform(1))
        first, last = networks.at(0)[j], networks.final[j]
        mixture = networks.shapes.unflatten((1 - share) * first + share * last)
        trained = networks.shapes.unflatten(last)
        t = key.fold("frequencies", "noise").normal(13, 24).double()
        real = real_batch(asked, key.fold("real"), 6)

        def matching(c: int) -> torch.Tensor:
            drawn = draws_of("crop", key.fold("augment"), K)[c]  # noqa: B023
            pair = []
            for x in (real[c], patches(stored.of(c))):  # noqa: B023
                z = F.normalize(embed(mixture, shifted(x, drawn)), dim=1)  # noqa: B023
                pair.append(torch.polar(torch.ones((), dtype=torch.float64), z @ t.T).mean(0))  # noqa: B023
            return 300 * ((pair[0].detach() - pair[1]).abs() / 2**0.5).mean()

        def calibrating(c: int) -> torch.Tensor:
            drawn = draws_of("crop", key.fold("calibration"), K)[c]  # noqa: B023
            logits = classify(trained, shifted(patches(stored.of(c)), drawn))  # noqa: B023
            return -2 * logits.log_softmax(1)[:, c].mean()

        sums = {"loss": 0.0, "calibration": 0.0}
        terms = {"loss": matching, "calibration": calibrating}
        if method.stepping == "by_class":
            for name, term in terms.items():
                for c in range(K):
                    value = term(c)
                    stored.step(value)
                    sums[name] += float(value.detach())
        else:
            values = {name: sum(map(term, range(K)), torch.zeros(())) for name, term in terms.items()}
            stored.step(values["loss"] + values["calibration"])
            sums = {name: float(value.detach()) for name, value in values.items()}
        stored.clamp()
        plateau.step((sums["loss"] + sums["calibration"]) / K)
        rate = float(stored.optimiser.param_groups[0]["lr"])
        out.append((stored.images.detach().clone(), {**sums, "rate": rate}))
    return out


@pytest.mark.usefixtures("classes_in_chunks")
@pytest.mark.parametrize("stepping", ["summed", "by_class"])
def test_ncfms_steps_are_torchs_adamw_and_schedule(stepping: Literal["summed", "by_class"]) -> None:
    method = NCFM(stepping=stepping, lr_img=0.02, weight_decay=0.3, patience=1, calibration=2.0, **QUICK)
    asked = problem_of(method)
    state = method.start(asked)
    expected = in_torch(method, asked, state.tensors["images"], 8)
    for i, (images, log) in enumerate(expected):
        state, found = method.step(asked, state, i)
        assert found == pytest.approx(log, rel=1e-6)
        assert off(state.tensors["images"], images) < 1e-6
    assert expected[-1][1]["rate"] < 0.02  # the schedule had something to do


def test_the_schedule_is_torchs() -> None:
    method = NCFM(patience=3)
    parameter = torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.SGD([parameter], 0.001)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, "min", factor=0.5, patience=3)
    values: dict[str, float | int | str] = {"rate": 0.001, "bad": 0}
    losses = [5.0, 4.0, 4.0 * (1 - 0.5e-4), 4.1, 4.2, 4.3, 3.0, *[3.5] * 9, 2.0, *[2.0] * 8]
    rates = set()
    for loss in losses:
        optimiser.step()
        plateau.step(loss)
        values = method._judged(values, loss)
        assert values["rate"] == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-12)
        rates.add(values["rate"])
    assert len(rates) > 3


def test_without_calibration_nothing_is_asked_of_a_trained_network() -> None:
    method = NCFM(calibration=0.0, **QUICK)
    asked = problem_of(method)
    after, log = method.step(asked, method.start(asked), 0)
    assert log.keys() == {"loss", "rate"}
    other = replace(method, calibration=1.0)
    again, both = other.step(asked, other.start(asked), 0)
    assert both["loss"] == log["loss"] and both["calibration"] > 0
    assert not torch.equal(after.tensors["images"], again.tensors["images"])


# ---- NCFM: the networks ----


@pytest.mark.parametrize("net", [NET, Normed()], ids=["convnet", "batch norm"])
def test_mixed_weights_are_the_initial_ones_at_0_and_the_trained_at_1(net: Any) -> None:
    method = NCFM(**{**QUICK, "net": net})
    asked = problem_of(method)
    networks: Population = asked.inputs["networks"]
    images = asked.real.images[:4]
    for j in range(2):
        params, buffers = (
            {n: v.double() for n, v in part.items()}
            for part in net.init(asked.real, asked.shared.fold("ncfm", j, "init"))
        )
        begun = blend(net, asked, networks, j, 0.0)
        assert off(begun.features(images[None], [None])[0], net.features(params, buffers, images)[0]) < 1e-12
        trained = networks.shapes.unflatten(networks.final[j])
        stored = {n: v[j] for n, v in networks.buffers.items()}
        ended = blend(net, asked, networks, j, 1.0)
        assert torch.equal(ended.features(images[None], [None])[0], net.features(trained, stored, images)[0])
        between = blend(net, asked, networks, j, 0.25).params
        for name, value in between.items():
            assert off(value, 0.75 * params[name] + 0.25 * trained[name]) < 1e-12
        assert off(trained[next(iter(trained))], params[next(iter(params))]) > 1e-3


def test_ncfm_looks_by_stored_statistics() -> None:
    """A class alone and all classes together: batch mates do not count."""
    method = NCFM(**{**QUICK, "net": Normed(), "augment": ""})
    asked = problem_of(method)
    view, trained = method._views(asked, KEY)
    assert view.mode == trained.mode == "evaluate"
    own = asked.real.images[:6].reshape(K, 2, CHANNELS, 8, 12)
    whole = view.features(own, [None] * K)
    alone = torch.cat([view.features(own[c : c + 1], [None]) for c in range(K)])
    assert torch.allclose(whole, alone, rtol=1e-12)
    assert not torch.allclose(whole, replace(view, mode="train").features(own, [None] * K), rtol=1e-3)


# ---- NCFM: the sampler ----


def test_a_fresh_sampler_gives_normal_frequencies() -> None:
    sampler = fresh_sampler(7, Key(1)).double()
    noise = numbers("noise", 50, 7)
    assert torch.equal(sampled(sampler, numbers("latent", 50, LATENT), noise), noise)


def test_frequencies_are_distinct_of_the_features_width_and_bounded() -> None:
    sampler = 3 * numbers("sampler", LATENT * HIDDEN + HIDDEN + 24 * HIDDEN + 24)
    method = NCFM(sampler=True, **{**QUICK, "num_freqs": 200})
    asked = problem_of(method)
    view = method._views(asked, KEY)[0]
    found = method._frequencies(view, asked, sampler, KEY)
    noise = KEY.fold("noise").normal(200, 24).double()
    assert found.shape == (200, 24)
    assert len(torch.unique(found, dim=0)) == 200
    scales = found / noise
    assert len(torch.unique(scales, dim=0)) == 200  # each frequency has scales of its own
    assert float(scales.min()) >= 1 / math.e - 1e-9 and float(scales.max()) <= math.e + 1e-9


def test_a_step_of_the_sampler_raises_the_discrepancy() -> None:
    method = NCFM(sampler=True, lr_sampler=0.003, lr_img=1e-12, calibration=0.0, **{**QUICK, "num_freqs": 64})
    asked = problem_of(method)
    state = method.start(asked)
    losses = [method.step(asked, state, 0)[1]["loss"]]
    for _ in range(6):  # the same step again: the same network, images and noise
        moved, _ = method.step(asked, state, 0)
        kept = {n: moved.tensors[n] for n in ("sampler", "sampler.first", "sampler.second")}
        state = State({**state.tensors, **kept}, state.values)
        losses.append(method.step(asked, state, 0)[1]["loss"])
    assert all(before < after for before, after in pairwise(losses))
    assert losses[-1] > losses[0] * 1.001


def test_the_samplers_slope_is_that_of_finite_differences() -> None:
    method = NCFM(sampler=True, **{**QUICK, "num_freqs": 5})
    asked = problem_of(method)
    images = method.start(asked).tensors["images"]
    view = method._views(asked, KEY)[0]
    real, draws = real_batch(asked, KEY, 6), draws_of("crop", KEY, K)
    t = numbers("t", 5, 24)
    found = method._uphill(asked, view, real, images, draws, t)

    def loss(t: torch.Tensor) -> float:
        total = 0.0
        for c in range(K):
            theirs = embed(view.params, shifted(real[c], draws[c]))
            ours = embed(view.params, shifted(patches(images[c * IPC : (c + 1) * IPC]), draws[c]))
            gaps = [abs(slow_phi(theirs, row) - slow_phi(ours, row)) for row in t]
            total += 300 * sum(gaps) / len(gaps) / 2**0.5
        return total

    for row, column in ((0, 0), (3, 17), (4, 23)):
        step = torch.zeros_like(t)
        step[row, column] = 1e-6
        assert float(found[row, column]) == pytest.approx((loss(t + step) - loss(t - step)) / 2e-6, abs=1e-5)


@pytest.mark.parametrize("sampler", [False, True])
def test_a_killed_run_of_every_kind_of_step_ends_in_the_same_bytes(sampler: bool, tmp_path: Any) -> None:
    method = NCFM(sampler=sampler, stepping="by_class", patience=0, **QUICK)
    asked = problem_of(method)
    states = [method.start(asked)]
    for i in range(4):
        states.append(method.step(asked, states[-1], i)[0])
    assert ("sampler.second" in states[0].tensors) == sampler
    states[2].save(tmp_path / "state")
    again = State.load(tmp_path / "state")
    for i in (2, 3):
        again = method.step(asked, again, i)[0]
    assert again.values == states[-1].values
    names = sorted(again.tensors)
    assert fingerprint(*(again.tensors[n] for n in names)) == fingerprint(
        *(states[-1].tensors[n] for n in names)
    )


# ---- messages ----


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: NCFM(amplitude=1.5), "ncfm: amplitude is a share; got 1.5; expected 0 to 1"),
        (lambda: NCFM(stepping="class"), "unknown stepping 'class'; Did you mean 'by_class'? Known: by_class, summed"),
        (lambda: NCFM(n_nets=0), "ncfm: n_nets must be at least 1; got 0"),
        (lambda: M3D(kernel="gauss"), "unknown kernel 'gauss'; Did you mean 'gaussian'? Known: gaussian, linear"),
        (lambda: M3D(redraw=0), "m3d: redraw must be at least 1; got 0"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == said
