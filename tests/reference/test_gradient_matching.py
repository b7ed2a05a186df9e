"""DSA and IDC beside slow loops of plain autograd, and what gradient matching shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from distillens import augment
from distillens.augment import Draw
from distillens.core.checks import DivergedError, UserError
from distillens.core.contracts import Distiller, Params, Problem, State
from distillens.core.dataset import Dataset
from distillens.core.decode import MultiFormation, Pixels
from distillens.core.rng import Key
from distillens.core.space import Pixel, Space, Standardised, Zca
from distillens.data.planted import planted
from distillens.distillers import _pixels
from distillens.distillers._formations import per_pixel
from distillens.distillers._gradient import Match, Network, absolute, as_they_are, cosine, squared
from distillens.distillers._pixels import real_batch
from distillens.distillers.dc import DC
from distillens.distillers.dsa import DSA
from distillens.distillers.idc import IDC
from distillens.nets.convnet import ConvNet
from distillens.nets.mlp import MLP

K, IPC = 3, 2
NET = ConvNet(depth=2, width=4)
KEY = Key(3, ("reference",))
MEAN, STD = (0.5, 0.4), (0.1, 0.2)
Metric = Literal["mse", "l1", "cos"]


def fine() -> Dataset:
    """Three classes of ten 2 x 8 x 12 images in float64, in a space whose channels have their own units."""
    rough = planted(Key(7), per_class=10, shape=(2, 8, 12)).train
    return Dataset(rough.images.double(), rough.labels, rough.classes, Standardised(MEAN, STD))


def problem() -> Problem:
    return Problem(fine(), IPC, KEY)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def go(method: Distiller, asked: Problem, steps: int) -> list[State]:
    states = [method.start(asked)]
    for i in range(steps):
        states.append(method.step(asked, states[-1], i)[0])
    return states


@pytest.fixture(params=[1, 1 << 18], ids=["a class at a time", "all classes at once"])
def classes_in_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many classes go through a network together is for speed alone."""
    monkeypatch.setattr(_pixels, "AT_ONCE", request.param)


# ---- everything once more, with torch's functions only ----


def classify(params: Params, x: torch.Tensor) -> torch.Tensor:
    for block in range(2):
        x = F.conv2d(x, params[f"conv{block}.weight"], params[f"conv{block}.bias"], padding=1)
        mean = x.mean((2, 3), keepdim=True)
        spread = (x - mean).square().mean((2, 3), keepdim=True)
        x = (x - mean) / (spread + 1e-5).sqrt()
        x = x * params[f"norm{block}.weight"].view(-1, 1, 1) + params[f"norm{block}.bias"].view(-1, 1, 1)
        x = F.avg_pool2d(x.relu(), 2)
    return x.flatten(1) @ params["linear.weight"].T + params["linear.bias"]


def fresh(key: Key) -> Params:
    return {name: value.double().requires_grad_() for name, value in NET.init(fine(), key)[0].items()}


def mean_loss(params: Params, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -classify(params, x).log_softmax(1)[torch.arange(len(y)), y].mean()


def shown(x: torch.Tensor, drawn: Draw | None) -> torch.Tensor:
    """Images under a draw of colours, of flips, or of one after the other; numbers of one row are everybody's."""
    while drawn is not None:
        rows = drawn.numbers.double().expand(len(x), 3)
        if drawn.operation == "color":
            x = torch.stack([coloured(image, u) for image, u in zip(x, rows, strict=True)])
        else:
            assert drawn.operation == "flip"
            x = torch.stack([im.flip(2) if u[0] < 0.5 else im for im, u in zip(x, rows, strict=True)])
        drawn = drawn.then
    return x


def coloured(image: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    image = image + (u[0] - 0.5)
    grey = image.mean(0, keepdim=True)
    image = (image - grey) * (2 * u[1]) + grey
    return (image - image.mean()) * (u[2] + 0.5) + image.mean()


def slow_distance(first: torch.Tensor, second: torch.Tensor, metric: str) -> torch.Tensor:
    """One weight's gradients compared number by number, or unit by unit."""
    total = torch.zeros((), dtype=torch.float64)
    if metric == "cos":
        for a, b in zip(first.flatten(1), second.flatten(1), strict=True):
            total = total + 1 - a.dot(b) / (a.norm() * b.norm() + 1e-6)
        return total
    for a, b in zip(first.reshape(-1), second.reshape(-1), strict=True):
        total = total + ((a - b) ** 2 if metric == "mse" else (a - b).abs())
    return total


def class_loss(
    params: Params, real: torch.Tensor, own: torch.Tensor, c: int, names: Sequence[str], metric: str
) -> torch.Tensor:
    """How far the gradients of a class's real and distilled images are apart."""
    weights = [params[name] for name in names]
    goal = torch.autograd.grad(mean_loss(params, real, torch.full((len(real),), c)), weights)
    loss = mean_loss(params, own, torch.full((len(own),), c))
    mine = torch.autograd.grad(loss, weights, create_graph=True)
    terms = [slow_distance(a, b, metric) for a, b in zip(goal, mine, strict=True)]
    return torch.stack(terms).sum()


CONVOLUTIONS = ("conv0.weight", "conv1.weight")
WEIGHTS = (*CONVOLUTIONS, "linear.weight")


# ---- distances ----


def test_distances_are_sums_over_numbers_or_output_units() -> None:
    shapes = [(4, 2, 3, 3), (5, 7), (2, 4, 3, 3), (6,)]
    first, second = (
        [Key(s).fold(i).normal(*shape).double() for i, shape in enumerate(shapes)] for s in (1, 2)
    )
    for metric, ours in (("mse", squared), ("l1", absolute), ("cos", cosine)):
        pairs = zip(first, second, strict=True)
        slow = sum(
            float(slow_distance(a.reshape(len(a), -1), b.reshape(len(b), -1), metric)) for a, b in pairs
        )
        assert float(ours(first, second)) == pytest.approx(slow, rel=1e-12)
        assert float(ours(first, first)) == pytest.approx(0, abs=1e-4)
    # By hand: differences 1 and 2.
    one, other = [torch.tensor([[1.0, 0.0]])], [torch.tensor([[0.0, 2.0]])]
    assert (float(squared(one, other)), float(absolute(one, other))) == (5.0, 3.0)


@pytest.mark.parametrize("name", ["mse", "l1", "cos"])
def test_the_gradient_of_the_sum_over_classes_is_that_of_each_class(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    distance = {"mse": squared, "l1": absolute, "cos": cosine}[name]
    asked = problem()
    network = Network.fresh(NET, asked, Key(1))
    draws = [augment.draw("color_crop_cutout_flip_scale_rotate", Key(2).fold(c)) for c in range(K)]
    match = Match(WEIGHTS, distance, draws, IPC, as_they_are)
    real, own = real_batch(asked, Key(3), 4), Key(4).normal(K, IPC, 2, 8, 12).double()
    target = match.targets(network, asked.real, real)
    loss, gradient = match.slope(network, asked.real, target, own)
    alone = []
    for c in range(K):
        other = own.clone()
        other[[d for d in range(K) if d != c]] += 1  # a class's gradient does not look at the others' images
        alone.append(match.slope(network, asked.real, target, other)[1].reshape(own.shape)[c])
    assert off(gradient.reshape(own.shape), torch.stack(alone)) < 1e-10
    monkeypatch.setattr(_pixels, "AT_ONCE", 1)
    again = match.targets(network, asked.real, real)
    one_by_one, pieces = match.slope(network, asked.real, again, own)
    assert one_by_one == pytest.approx(loss, rel=1e-12)
    assert off(pieces, gradient) < 1e-12


# ---- DSA ----


@pytest.mark.usefixtures("classes_in_chunks")
def test_dsa_is_dc_with_one_draw_a_class_and_one_an_image_in_training() -> None:
    method = DSA(
        outer_loop=3,
        inner_loop=2,
        batch_train=4,
        batch_real=5,
        lr_img=2.0,
        lr_net=0.3,
        augment="color_flip",
        net=NET,
    )
    asked = problem()
    states = go(method, asked, 2)
    images = states[0].tensors["images"].clone().requires_grad_()
    mover = torch.optim.SGD([images], 2.0, momentum=0.5)
    y = torch.arange(K).repeat_interleave(IPC)
    seen = []
    for i in range(2):
        key = KEY.fold("step", i)
        params = fresh(key.fold("net"))
        trainer = torch.optim.SGD(params.values(), 0.3)
        losses = []
        for turn in range(3):
            place = key.fold("turn", turn)
            real = real_batch(asked, place.fold("real"), 5)
            loss = torch.zeros((), dtype=torch.float64)
            for c in range(K):
                drawn = augment.draw("color_flip", place.fold("augment", c))
                assert drawn is not None and drawn.numbers.shape == (1, 3)
                seen.append(drawn.operation)
                own = shown(images[c * IPC : (c + 1) * IPC], drawn)
                loss = loss + class_loss(params, shown(real[c], drawn), own, c, WEIGHTS, "cos")
            losses.append(float(loss.detach()))
            mover.zero_grad()
            (images.grad,) = torch.autograd.grad(loss, images)
            mover.step()
            if turn == 2:
                continue
            for a_pass in range(2):
                order = place.fold("train").fold(a_pass).permutation(K * IPC)
                for number, batch in enumerate((order[:4], order[4:])):
                    drawn = augment.draw(
                        "color_flip", place.fold("train", "augment", 2 * a_pass + number), len(batch)
                    )
                    assert drawn is not None and drawn.numbers.shape == (len(batch), 3)
                    trainer.zero_grad()
                    mean_loss(params, shown(images.detach()[batch], drawn), y[batch]).backward()
                    trainer.step()
        assert off(states[i + 1].tensors["images"], images.detach()) < 1e-9
        assert method.step(asked, states[i], i)[1]["loss"] == pytest.approx(sum(losses) / 3, rel=1e-9)
    assert {"color", "flip"} <= set(seen)


def test_dsa_without_augmentation_is_dc() -> None:
    fields = {"outer_loop": 2, "inner_loop": 1, "batch_real": 4, "init": "real", "net": NET}
    plain, siamese = DC(**fields), DSA(augment="", **fields)  # type: ignore[arg-type]
    first, second = go(plain, problem(), 2)[-1], go(siamese, problem(), 2)[-1]
    assert torch.equal(first.tensors["images"], second.tensors["images"])
    other = go(replace(siamese, augment="crop"), problem(), 2)[-1]
    assert not torch.equal(first.tensors["images"], other.tensors["images"])


def test_dsa_of_the_real_batch_itself_has_nothing_to_match() -> None:
    """Siamese: under any draw the same images give the same gradients."""
    data = fine()
    index = torch.cat([members[:IPC] for members in data.by_class])
    asked = Problem(data.take(index), IPC, KEY)
    method = DSA(batch_real=IPC, net=NET)
    for i in range(4):
        assert method.step(asked, method.start(asked), i)[1]["loss"] < 1e-3


# ---- IDC ----


class SlowIDC:
    """The authors' loop over classes: pixels under one optimiser, the network under another."""

    def __init__(self, method: IDC, asked: Problem) -> None:
        self.method, self.asked = method, asked
        self.mean, self.std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (MEAN, STD))
        self.pixels = (method.start(asked).tensors["images"] * self.std + self.mean).requires_grad_()
        rate = method.lr_img * IPC / 10 * 96 / method.base**2
        self.mover = torch.optim.SGD([self.pixels], rate, momentum=method.momentum)
        self.renew(KEY.fold("net"))
        self.mixed = 0

    def renew(self, key: Key) -> None:
        self.params = fresh(key)
        self.trainer = torch.optim.SGD(self.params.values(), 0.05, momentum=0.9, weight_decay=0.01)

    def images(self) -> torch.Tensor:
        return (self.pixels - self.mean) / self.std

    def own(self, c: int, key: Key) -> torch.Tensor:
        """What a class's two images show: their four quarters, enlarged; of the eight those that were drawn."""
        whole = self.images()[c * IPC : (c + 1) * IPC]
        if self.method.factor == 1:
            return whole
        quarters = [
            F.interpolate(whole[:, :, top : top + 4, left : left + 6], size=(8, 12), mode="bilinear")
            for top in (0, 4)
            for left in (0, 6)
        ]
        every = torch.cat(quarters)
        most = self.method.batch_syn_max
        return every if most >= 8 else every[key.fold(c).permutation(8)[:most]]

    def train(self, steps: int, key: Key) -> None:
        data = self.asked.real
        for step in range(steps):
            a_pass, place = divmod(step, 4)  # 30 images in batches of 8
            index = key.fold(a_pass).permutation(30)[8 * place : 8 * place + 8]
            drawn = augment.draw("color+flip", key.fold("augment", step), len(index))
            x, y = shown(data.images[index], drawn), data.labels.hard()[index]
            mix = augment.draw_mix(0.5, key.fold("cutmix", step), len(index), (8, 12))
            if mix is None:
                loss = mean_loss(self.params, x, y)
            else:
                self.mixed += 1
                box = torch.zeros(8, 12, dtype=torch.bool)
                box[mix.top : mix.bottom, mix.left : mix.right] = True
                x = torch.where(box, x[mix.partner], x)
                share = float(box.double().mean())
                theirs = mean_loss(self.params, x, y[mix.partner])
                loss = (1 - share) * mean_loss(self.params, x, y) + share * theirs
            self.trainer.zero_grad()
            loss.backward()
            self.trainer.step()

    def step(self, i: int) -> float:
        key, method = KEY.fold("step", i), self.method
        if i % method.inner_loop == 0:
            self.pixels.data.clamp_(0, 1)
        if i % (method.inner_loop * method.fix_iter) == 0:
            self.train(4 * method.early, key.fold("early"))
        real = real_batch(self.asked, key.fold("real"), method.batch_real)
        names = {"convolutions": CONVOLUTIONS, "weights": WEIGHTS, "all": tuple(self.params)}[method.layers]
        total = 0.0
        losses = []
        for c in range(K):
            drawn = augment.draw("color+flip", key.fold("augment", c))
            own = shown(self.own(c, key.fold("shown")), drawn)
            loss = class_loss(self.params, shown(real[c], drawn), own, c, names, method.metric)
            losses.append(loss)
            total += float(loss.detach())
            if method.stepping == "class":
                self.move(loss)
        if method.stepping == "sum":
            self.move(torch.stack(losses).sum())
        if (i + 1) % (method.inner_loop * method.fix_iter) == 0:
            self.renew(key.fold("net"))
        else:
            self.train(2, key.fold("train"))
        return total

    def move(self, loss: torch.Tensor) -> None:
        self.mover.zero_grad()
        (self.pixels.grad,) = torch.autograd.grad(loss, self.pixels)
        self.mover.step()


def idc(**changes: object) -> IDC:
    method = IDC(
        inner_loop=3,
        lr_img=1.0,
        base=8,
        batch_real=5,
        augment="color+flip",
        n_data=12,  # two batches
        batch_train=8,
        lr_net=0.05,
        weight_decay=0.01,
        augment_net="color+flip",
        net=NET,
    )
    return replace(method, **changes)  # type: ignore[arg-type]  # dataclasses checks the names


VARIANTS: dict[str, dict[str, object]] = {
    "factor 2, class after class": {},
    "some of the decoded images": {"batch_syn_max": 5},
    "IDC-I, on the sum": {"factor": 1, "stepping": "sum"},
    "cosine of all weights": {"metric": "cos", "layers": "weights", "lr_img": 0.1},
    "absolute differences of everything": {"metric": "l1", "layers": "all", "lr_img": 0.05},
    "a network for two rounds, warmed up": {"fix_iter": 2, "early": 1, "inner_loop": 2},
}


@pytest.mark.usefixtures("classes_in_chunks")
@pytest.mark.parametrize("variant", VARIANTS)
def test_idc_is_the_authors_loop_over_classes(variant: str) -> None:
    method, asked = idc(**VARIANTS[variant]), problem()
    states = go(method, asked, 5)
    slow = SlowIDC(method, asked)
    for i in range(5):
        _, log = method.step(asked, states[i], i)
        assert log["loss"] == pytest.approx(slow.step(i), rel=1e-8)
        assert off(states[i + 1].tensors["images"], slow.images().detach()) < 1e-8
        flat = torch.cat([p.detach().reshape(-1) for p in slow.params.values()])
        assert off(states[i + 1].tensors["net"], flat) < 1e-9
    moved = (states[-1].tensors["images"] - states[0].tensors["images"]).abs().amax((1, 2, 3))
    assert float(moved.min()) > 1e-3
    assert slow.mixed > 0


def test_pixels_are_brought_into_range_once_a_round() -> None:
    method, asked = idc(lr_img=30.0), problem()
    states = go(method, asked, 4)

    def beyond(state: State) -> float:
        pixels = asked.real.space.to_pixels(state.tensors["images"])
        return float((pixels - pixels.clamp(0, 1)).abs().max())

    assert beyond(states[3]) > 0.1
    still = replace(method, lr_img=1e-12)
    velocity = torch.zeros_like(states[3].tensors["velocity"])
    resting = State({**states[3].tensors, "velocity": velocity})
    assert beyond(still.step(asked, resting, 3)[0]) < 1e-9  # the first step of a round
    assert beyond(still.step(asked, resting, 4)[0]) > 0.1


def test_stepping_is_the_same_without_momentum_and_not_with_it() -> None:
    def ends(momentum: float) -> list[torch.Tensor]:
        ways: tuple[Literal["class", "sum"], ...] = ("class", "sum")
        methods = [idc(momentum=momentum, stepping=way) for way in ways]
        return [go(method, problem(), 3)[-1].tensors["images"] for method in methods]

    one, other = ends(0.0)
    assert torch.equal(one, other)
    one, other = ends(0.5)
    assert off(one, other) > 1e-6


def test_idc_with_factor_one_stores_and_shows_real_images_as_they_are() -> None:
    method, asked = idc(factor=1), problem()
    start = method.start(asked)
    images = start.tensors["images"]
    for c in range(K):
        own = asked.real.images[asked.real.by_class[c]]
        assert all(bool((own == image).flatten(1).all(1).any()) for image in images[IPC * c : IPC * c + IPC])
    done = method.finish(asked, start)
    assert isinstance(done.decode, Pixels)
    assert torch.equal(done.dataset().images, images)
    stored = images.reshape(K, IPC, 2, 8, 12)
    assert torch.equal(method._decoded(stored, 0, KEY), stored)


def test_idc_keeps_how_its_images_decode() -> None:
    method, asked = idc(factor=2), problem()
    done = method.finish(asked, method.start(asked))
    assert done.decode == MultiFormation(2)
    assert len(done) == K * IPC and len(done.dataset()) == 4 * K * IPC


def test_of_too_many_images_each_class_shows_its_own_part() -> None:
    """The first class's images are the numbers 0, 1, ...; so are the others'."""
    method = idc(factor=1, batch_syn_max=5)
    stored = torch.arange(20.0)[None, :, None, None, None].expand(K, 20, 2, 8, 12)
    shown = method._decoded(stored, 0, KEY)[:, :, 0, 0, 0]
    assert shown.shape == (K, 5)
    assert all(len(set(row.tolist())) == 5 for row in shown)
    assert len({tuple(row.tolist()) for row in shown}) == K
    assert torch.equal(method._decoded(stored[1:], 1, KEY)[:, :, 0, 0, 0], shown[1:])  # in any chunk
    assert not torch.equal(method._decoded(stored, 0, KEY.fold(1))[:, :, 0, 0, 0], shown)


@pytest.mark.parametrize("change", [{"base": 4}, {"lr_img": 4.0}])
def test_idcs_rate_grows_with_images_and_area(change: dict[str, object]) -> None:
    asked = problem()

    def way(method: IDC, of: Problem) -> float:
        start = method.start(of)
        return float((method.step(of, start, 1)[0].tensors["images"] - start.tensors["images"]).norm())

    one = idc(momentum=0.0, factor=1)
    assert way(replace(one, **change), asked) == pytest.approx(4 * way(one, asked), rel=1e-9)  # type: ignore[arg-type]
    assert one._rate(replace(asked, ipc=10)) == pytest.approx(5 * one._rate(asked))


@pytest.mark.parametrize("kind", ["pixel", "standardised", "kornia", "frepo"])
def test_steps_of_images_are_those_of_their_pixels(kind: str) -> None:
    rough = Key(3).uniform(20, 2, 4, 4)
    spaces: dict[str, Space] = {"pixel": Pixel(), "standardised": Standardised(MEAN, STD)}
    space = spaces.get(kind) or Zca.fit(rough, "kornia" if kind == "kornia" else "frepo")
    pixels = Key(2).uniform(3, 2, 4, 4).double().requires_grad_()

    def loss(images: torch.Tensor) -> torch.Tensor:
        return (images**3).sum()

    images = space.from_pixels(pixels.detach()).requires_grad_()
    (by_pixels,) = torch.autograd.grad(loss(space.from_pixels(pixels)), pixels)
    (by_images,) = torch.autograd.grad(loss(images), images)
    after = space.from_pixels(pixels.detach() - 0.01 * by_pixels)
    close = 1e-12 if kind in spaces else 1e-6  # a whitening's inverse is kept in float32
    assert off(images.detach() - 0.01 * per_pixel(space, images, by_images), after) < close


def test_where_pixels_are_lost_images_step_in_their_own_units() -> None:
    gradient = Key(1).normal(3, 2, 4, 4).double()
    lost = Zca.fit(Key(3).uniform(20, 2, 4, 4), "kip")
    assert torch.equal(per_pixel(lost, gradient, gradient), gradient)


# ---- what is refused ----


def test_idc_says_that_a_network_has_no_convolutions() -> None:
    method = idc(net=MLP(depth=1, width=4))
    with pytest.raises(UserError) as error:
        method.start(problem())
    assert str(error.value) == (
        "idc matches the gradients of convolutions, and this network has none; got MLP; set layers=weights"
    )
    states = go(replace(method, layers="weights"), problem(), 2)
    assert off(states[-1].tensors["images"], states[0].tensors["images"]) > 1e-6


@pytest.mark.parametrize("kind", [DC, DSA])
def test_a_network_that_diverges_is_named(kind: Callable[..., Distiller]) -> None:
    method = kind(outer_loop=2, inner_loop=9, lr_net=1e200, init="real", net=NET)
    with pytest.raises(DivergedError) as error:
        method.step(problem(), method.start(problem()), 0)
    assert str(error.value) == (
        "the distillation diverged: the inner network is not finite; "
        "the last good state is kept; start again with --force and a smaller --set lr_net"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DSA(augment="blur"), "unknown augmentation 'blur'"),
        (lambda: DSA(outer_loop=0), "dsa: outer_loop must be at least 1; got 0"),
        (lambda: DC(lr_net=0.0), "dc: lr_net must be above 0; got 0.0"),
        (lambda: idc(factor=0), "idc: factor must be at least 1; got 0"),
        (lambda: idc(metric="l2"), "unknown metric 'l2'"),
        (lambda: idc(layers="conv"), "unknown layers 'conv'"),
        (lambda: idc(stepping="both"), "unknown stepping 'both'"),
        (lambda: idc(augment_net="blur"), "unknown augmentation 'blur'"),
        (lambda: idc(cutmix=1.5), "cutmix is a probability; got 1.5"),
        (lambda: idc(momentum=1.0), "idc: momentum must be below 1; got 1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Callable[[], Distiller], message: str) -> None:
    with pytest.raises(UserError) as error:
        make()
    assert message in str(error.value)


def test_published_settings() -> None:
    def data(shape: tuple[int, int, int]) -> Dataset:
        return planted(Key(7), per_class=1, shape=shape).train

    assert (
        DSA.defaults(data((3, 32, 32)), 10).outer_loop,
        DSA.defaults(data((3, 32, 32)), 10).inner_loop,
    ) == (10, 50)
    cifar, grey = IDC.defaults(data((3, 32, 32)), 10), IDC.defaults(data((1, 28, 28)), 10)
    assert (cifar.metric, cifar.lr_img, cifar.n_data, cifar.steps) == ("mse", 5e-3, 2000, 200_000)
    assert (grey.metric, grey.lr_img, grey.n_data, grey.base) == ("l1", 1e-4, 500, 28)
    large = IDC.defaults(data((3, 128, 128)), 10)
    assert (large.metric, large.factor, large.early, large.steps) == ("l1", 3, 10, 50_000)
