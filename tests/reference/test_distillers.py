from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pytest
import torch
import torch.nn.functional as F

from distillens import augment
from distillens.core.checks import UserError
from distillens.core.contracts import Buffers, Distiller, Like, Mode, Params, Problem, State
from distillens.core.dataset import Dataset
from distillens.core.labels import Hard
from distillens.core.rng import Key
from distillens.core.vector import Shapes
from distillens.data.planted import planted
from distillens.distillers import _pixels
from distillens.distillers._gradient import cosine
from distillens.distillers._pixels import initial, real_batch
from distillens.distillers.bptt import BPTT
from distillens.distillers.dc import DC
from distillens.distillers.dm import DM
from distillens.distillers.herding import Herding, herd
from distillens.distillers.mtt import MTT
from distillens.distillers.random_subset import RandomSubset
from distillens.engine.plan import Plan
from distillens.experts import Trajectories
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Population

K, IPC, CHANNELS = 3, 2, 2
NET = ConvNet(depth=2, width=4)
KEY = Key(3, ("reference",))


def fine() -> Dataset:
    """Three classes of ten 2 x 8 x 12 images in float64: twins agree to many digits."""
    rough = planted(Key(7), per_class=10, shape=(CHANNELS, 8, 12)).train
    return Dataset(rough.images.double(), rough.labels, rough.classes, rough.space)


def problem(**inputs: Any) -> Problem:
    return Problem(fine(), IPC, KEY, inputs)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# ---- the network once more, with torch's functions only ----


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


def fresh(key: Key) -> Params:
    return {name: value.double() for name, value in NET.init(fine(), key)[0].items()}


def gradients(params: Params, x: torch.Tensor, y: torch.Tensor, keep: bool = True) -> Params:
    """The gradient of the mean loss in each parameter; it can be differentiated again."""
    leaves = {
        name: value if value.requires_grad else value.clone().requires_grad_()
        for name, value in params.items()
    }
    loss = -classify(leaves, x).log_softmax(1)[torch.arange(len(y)), y].mean()
    found = torch.autograd.grad(loss, list(leaves.values()), create_graph=keep)
    return dict(zip(leaves, found, strict=True))


class Pixels:
    """The images and their velocity, moved as the authors' SGD moves them."""

    def __init__(self, images: torch.Tensor, lr: float, momentum: float) -> None:
        self.images = images.clone().requires_grad_()
        self.optimiser = torch.optim.SGD([self.images], lr, momentum)

    def step(self, gradient: torch.Tensor) -> None:
        self.images.grad = gradient.detach().clone()
        self.optimiser.step()


def go(method: Distiller, asked: Problem, steps: int) -> list[State]:
    states = [method.start(asked)]
    for i in range(steps):
        states.append(method.step(asked, states[-1], i)[0])
    return states


# ---- random subset and the start ----


def test_a_random_subset_is_uniform() -> None:
    """Each of the ten images of a class is drawn about as often: 1,000 draws of 2."""
    data = fine()
    counts = torch.zeros(len(data))
    for seed in range(1000):
        counts[RandomSubset().start(Problem(data, IPC, Key(seed))).tensors["index"]] += 1
    assert float((counts - 200).abs().max()) < 5 * (1000 * 0.2 * 0.8) ** 0.5


def test_noise_is_standard_normal() -> None:
    asked = Problem(fine(), 50, KEY)
    images = DC(net=NET).start(asked).tensors["images"]
    assert images.shape == (150, CHANNELS, 8, 12)
    assert abs(float(images.mean())) < 5 / images.numel() ** 0.5
    assert float(images.std()) == pytest.approx(1, abs=0.02)


# ---- DM ----


@dataclass(frozen=True)
class Identity:
    """Features are the pixels themselves: distribution matching has a closed form."""

    mixes_examples: ClassVar[bool] = False

    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        return {}, {}

    def features(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        return x.flatten(1), buffers

    def logits(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        raise AssertionError("distribution matching looks at features only")


def test_dm_on_pixels_reaches_the_class_means() -> None:
    """loss = ||mu - mean(S)||^2: with two images each step of rate 0.25 takes a quarter of the way."""
    data = fine()
    method = DM(lr_img=0.25, momentum=0.0, batch_real=10, augment="", net=Identity())
    states = go(method, problem(), 12)
    for c, members in enumerate(data.by_class):
        goal = data.images[members].mean(0)
        gaps = [state.tensors["images"][c * IPC : (c + 1) * IPC].mean(0) - goal for state in states]
        for before, after in itertools.pairwise(gaps):
            assert off(after, 0.75 * before) < 1e-9
    own = states[0].tensors["images"].view(K, IPC, -1)
    moved = states[-1].tensors["images"].view(K, IPC, -1)
    assert off(moved[:, 0] - moved[:, 1], own[:, 0] - own[:, 1]) < 1e-12  # only the mean is pulled


@pytest.fixture(params=[1, 1 << 18], ids=["a class at a time", "all classes at once"])
def classes_in_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many classes go through a network together is for speed alone."""
    monkeypatch.setattr(_pixels, "AT_ONCE", request.param)


@pytest.mark.usefixtures("classes_in_chunks")
@pytest.mark.parametrize("strategy", ["", "color"])
def test_dm_is_a_loop_over_classes(strategy: str) -> None:
    method = DM(lr_img=3.0, batch_real=6, augment=strategy, net=NET)
    asked = problem()
    states = go(method, asked, 3)
    pixels = Pixels(states[0].tensors["images"], 3.0, 0.5)
    for i in range(3):
        key = KEY.fold("step", i)
        params = fresh(key.fold("net"))
        real = real_batch(asked, key.fold("real"), 6)
        loss = torch.zeros((), dtype=torch.float64)
        for c in range(K):
            own, theirs = pixels.images[c * IPC : (c + 1) * IPC], real[c]
            if strategy:  # one draw a class, the same for real and distilled images
                drawn = augment.draw("color", key.fold("augment", c))
                assert drawn is not None and drawn.numbers.shape == (1, 3)
                own, theirs = (coloured(x, drawn.numbers[0].double()) for x in (own, theirs))
            gap = embed(params, theirs).mean(0) - embed(params, own).mean(0)
            loss = loss + (gap * gap).sum()
        assert method.step(asked, states[i], i)[1]["loss"] == pytest.approx(float(loss.detach()), rel=1e-10)
        pixels.step(torch.autograd.grad(loss, pixels.images)[0])
        assert off(states[i + 1].tensors["images"], pixels.images.detach()) < 1e-10


def coloured(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    x = x + u[0] - 0.5
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * 2 * u[1] + grey
    level = x.mean((1, 2, 3), keepdim=True)
    return (x - level) * (u[2] + 0.5) + level


def test_real_batches_are_of_each_class_without_repeats() -> None:
    asked = problem()
    data = asked.real
    for seed in range(20):
        batch = real_batch(asked, Key(seed), 6)
        assert batch.shape == (K, 6, CHANNELS, 8, 12)
        for c in range(K):
            where = [int((data.images == image).flatten(1).all(1).nonzero()) for image in batch[c]]
            assert len(set(where)) == 6
            assert set(where) <= set(data.by_class[c].tolist())
    assert real_batch(asked, Key(0), 1000).shape[1] == 10  # never more than there are


# ---- DC ----


def slow_distance(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> torch.Tensor:
    """Equation 9, output unit by output unit."""
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(first, second, strict=True):
        for unit in range(a.shape[0]):
            left, right = a[unit].reshape(-1), b[unit].reshape(-1)
            total = total + 1 - left.dot(right) / (left.norm() * right.norm() + 1e-6)
    return total


def test_dcs_distance_is_one_minus_cosine_summed_over_output_units() -> None:
    shapes = [(4, 2, 3, 3), (5, 7), (2, 4, 3, 3)]
    first, second = (
        tuple(Key(s).fold(i).normal(*shape).double() for i, shape in enumerate(shapes)) for s in (1, 2)
    )
    assert float(cosine(first, second)) == pytest.approx(float(slow_distance(first, second)), rel=1e-12)
    assert float(cosine(first, first)) == pytest.approx(0, abs=1e-4)
    assert float(cosine(first, tuple(-x for x in first))) == pytest.approx(2 * (4 + 5 + 2), abs=1e-4)
    longer = tuple(3 * x for x in second)
    assert float(cosine(first, longer)) == pytest.approx(float(cosine(first, second)), abs=1e-5)


@pytest.mark.usefixtures("classes_in_chunks")
def test_dc_is_the_gradient_of_the_loss_summed_over_classes_and_trains_in_between() -> None:
    """All classes in one graph, weights only, plain SGD on the set between two matches."""
    method = DC(
        outer_loop=3, inner_loop=2, batch_train=4, batch_real=5, lr_img=2.0, lr_net=0.3, init="real", net=NET
    )
    asked = problem()
    states = go(method, asked, 2)
    pixels = Pixels(states[0].tensors["images"], 2.0, 0.5)
    y = torch.arange(K).repeat_interleave(IPC)
    for i in range(2):
        key = KEY.fold("step", i)
        params = fresh(key.fold("net"))
        weights = [name for name in params if name.startswith(("conv", "linear")) and name.endswith("weight")]
        losses = []
        for turn in range(3):
            real = real_batch(asked, key.fold("turn", turn).fold("real"), 5)
            loss = torch.zeros((), dtype=torch.float64)
            for c in range(K):
                mine = gradients(params, pixels.images[c * IPC : (c + 1) * IPC], y[c * IPC : (c + 1) * IPC])
                goal = gradients(params, real[c], torch.full((5,), c), keep=False)
                loss = loss + slow_distance([goal[n] for n in weights], [mine[n] for n in weights])
            losses.append(float(loss.detach()))
            pixels.step(torch.autograd.grad(loss, pixels.images)[0])
            if turn < 2:
                place = key.fold("turn", turn, "train")
                for a_pass in range(2):
                    order = place.fold(a_pass).permutation(K * IPC)
                    for batch in (order[:4], order[4:]):
                        slopes = gradients(params, pixels.images.detach()[batch], y[batch], keep=False)
                        params = {name: value - 0.3 * slopes[name] for name, value in params.items()}
        assert off(states[i + 1].tensors["images"], pixels.images.detach()) < 1e-9
        log = method.step(asked, states[i], i)[1]
        assert log["loss"] == pytest.approx(sum(losses) / 3, rel=1e-9)


def test_dc_on_the_real_batch_itself_has_nothing_to_match() -> None:
    """Distilled images that are the class's real images give the same gradients: distance 0."""
    data = fine()
    index = torch.cat([members[:IPC] for members in data.by_class])
    asked = Problem(data.take(index), IPC, KEY)
    method = DC(batch_real=IPC, init="real", net=NET)
    _, log = method.step(asked, method.start(asked), 0)
    assert log["loss"] < 1e-3  # the norm product's 1e-6 keeps it from 0


# ---- MTT ----


def expert(images: torch.Tensor, steps: int, rate: float) -> Trajectories:
    """One expert of plain SGD on these images: a pass of ``steps`` steps."""
    params = fresh(KEY.fold("expert by hand"))
    shapes = Shapes.of(params)
    begin = shapes.flatten(params)
    y = problem().labels()
    for _ in range(steps):
        slopes = gradients(params, images, y, keep=False)
        params = {name: value - rate * slopes[name] for name, value in params.items()}
    way = torch.stack([begin, shapes.flatten(params)])[None]
    return Trajectories(NET, shapes, 1, (way,), (1,))


@pytest.mark.parametrize("mode", ["graph", "adjoint"])
def test_mtt_has_nothing_to_do_where_the_expert_saw_the_distilled_set(
    mode: Literal["graph", "adjoint"],
) -> None:
    method = MTT(
        syn_steps=5,
        expert_epochs=1,
        max_start_epoch=1,
        experts=1,
        lr_start=0.2,
        augment="",
        mode=mode,
        net=NET,
    )
    images = initial(problem(), "real")
    asked = problem(experts=expert(images, 5, 0.2))
    start = method.start(asked)
    assert torch.equal(start.tensors["images"], images)
    after, log = method.step(asked, start, 0)
    assert log["loss"] < 1e-20
    assert float(after.tensors["velocity"].abs().max()) < 1e-10
    assert after.values["rate"] == pytest.approx(0.2, abs=1e-12)
    # And one that went further is not matched.
    far = problem(experts=expert(images, 6, 0.2))
    assert method.step(far, start, 0)[1]["loss"] > 1e-3


def real_experts(method: MTT, asked: Problem) -> Trajectories:
    return Runs(Plan("loop", 1, precision="float64")).trajectories(method.needs(asked)["experts"])


@pytest.mark.parametrize("mode", ["graph", "adjoint"])
@pytest.mark.parametrize("batch", [None, 4])
def test_mtt_is_a_slow_loop(mode: Literal["graph", "adjoint"], batch: int | None) -> None:
    method = MTT(
        syn_steps=5,
        expert_epochs=2,
        max_start_epoch=3,
        experts=2,
        expert_batch=8,
        lr_img=20.0,
        lr_lr=1e-5,
        lr_start=0.1,
        batch_syn=batch,
        augment="",
        mode=mode,
        net=NET,
    )
    bare = problem()
    experts = real_experts(method, bare)
    asked = problem(experts=experts)
    states = go(method, asked, 3)
    pixels = Pixels(states[0].tensors["images"], 20.0, 0.5)
    rate, speed = 0.1, 0.0
    y = torch.arange(K).repeat_interleave(IPC)
    starts = set()
    for i in range(3):
        key = KEY.fold("step", i)
        who = int(key.fold("expert").integers(2, 1))
        when = int(key.fold("start").integers(3, 1))
        starts.add((who, when))
        begin, end = experts.at(who, when), experts.at(who, when + 2)
        params = {n: v.requires_grad_() for n, v in experts.shapes.unflatten(begin.clone()).items()}
        alpha = torch.tensor(rate, dtype=torch.float64, requires_grad=True)
        order = [torch.arange(6)] * 5
        if batch:  # a permutation cut in two, then the next: they differ by how many steps came before
            cuts = [key.fold("batches", 2 * p).permutation(6) for p in range(3)]
            order = [cut[place] for cut in cuts for place in (slice(0, 4), slice(4, 6))][:5]
        for index in order:
            slopes = gradients(params, pixels.images[index], y[index])
            params = {name: value - alpha * slopes[name] for name, value in params.items()}
        last = torch.cat([value.reshape(-1) for value in params.values()])
        loss = ((last - end) ** 2).sum() / ((begin - end) ** 2).sum()
        by_images, by_rate = torch.autograd.grad(loss, [pixels.images, alpha])
        pixels.step(by_images)
        speed = 0.5 * speed + float(by_rate)
        rate -= 1e-5 * speed
        after, log = method.step(asked, states[i], i)
        assert log["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)
        assert off(after.tensors["images"], pixels.images.detach()) < 1e-9
        assert after.values["rate"] == pytest.approx(rate, rel=1e-9)
    assert len(starts) > 1


def test_mtts_experts_are_trained_as_the_paper_says() -> None:
    method = MTT(
        expert_epochs=2, max_start_epoch=3, experts=2, expert_batch=8, expert_lr=0.3, augment="flip", net=NET
    )
    experts = method.needs(problem())["experts"]
    assert experts.passes == 4  # the last start is at pass 2
    training = experts.training
    assert training.snapshots == (0, 4, 8, 12, 16)  # 30 images in batches of 8: 4 steps a pass
    assert training.steps == 16
    recipe = training.recipe
    assert (recipe.batch, recipe.lr, recipe.momentum, recipe.weight_decay) == (8, 0.3, 0.0, 0.0)
    assert (recipe.optimiser, recipe.schedule, recipe.augment) == ("sgd", "constant", "flip")
    assert len(set(training.keys)) == 2
    assert training.data.fingerprint == fine().fingerprint
    # They serve every method and size of a replicate: their keys are the shared ones.
    other = replace(problem(), ipc=5, key=Key(9))
    assert method.needs(other)["experts"].fingerprint == experts.fingerprint
    another = replace(problem(), shared=Key(1, ("shared",)))
    assert method.needs(another)["experts"].fingerprint != experts.fingerprint


def test_a_trajectory_is_the_expert_after_each_pass_over_the_data() -> None:
    """Batches of a permutation, plain SGD: 30 images in batches of 8 are 4 steps."""
    method = MTT(
        expert_epochs=1, max_start_epoch=2, experts=2, expert_batch=8, expert_lr=0.3, augment="", net=NET
    )
    asked = problem()
    experts = real_experts(method, asked)
    assert (len(experts), experts.passes) == (2, 2)
    for j, key in enumerate(asked.shared.fold("experts").split(2)):
        params = fresh(key.fold("init"))
        for a_pass in range(2):
            assert off(experts.at(j, a_pass), experts.shapes.flatten(params)) < 1e-10
            order = key.fold("batches", a_pass).permutation(30)
            for index in torch.split(order, 8):
                slopes = gradients(params, fine().images[index], fine().labels.hard()[index], keep=False)
                params = {name: value - 0.3 * slopes[name] for name, value in params.items()}
        assert off(experts.at(j, 2), experts.shapes.flatten(params)) < 1e-10


def test_mtt_never_takes_more_than_half_of_its_step_size() -> None:
    method = MTT(
        syn_steps=3,
        expert_epochs=1,
        max_start_epoch=1,
        experts=1,
        lr_start=0.2,
        lr_lr=1e6,
        augment="",
        net=NET,
    )
    asked = problem(experts=expert(initial(problem(), "real"), 2, 0.2))  # a shorter way than ours
    after, _ = method.step(asked, method.start(asked), 0)
    assert after.values["rate"] == 0.1


def test_mtt_keeps_the_learned_step_size_with_the_set() -> None:
    method = MTT(
        syn_steps=3, expert_epochs=1, max_start_epoch=1, experts=1, lr_start=0.2, augment="", net=NET
    )
    asked = problem(experts=expert(initial(problem(), "real"), 3, 0.2))
    start = method.start(asked)
    recipe = method.finish(asked, State(start.tensors, {**start.values, "rate": 0.123})).recipe
    assert recipe is not None and recipe.lr == 0.123


# ---- BPTT ----


def unrolled(method: BPTT, asked: Problem, images: torch.Tensor, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The outer loss of step i and its gradient, by one graph over explicit parameters."""
    key = KEY.fold("step", i)
    params = {name: value.requires_grad_() for name, value in fresh(key.fold("net")).items()}
    velocity = {name: torch.zeros_like(value) for name, value in params.items()}
    leaf = images.clone().requires_grad_()
    y = torch.arange(K).repeat_interleave(IPC)
    for t in range(method.inner_steps):
        index = torch.arange(K * IPC)
        if method.batch_syn < IPC:
            place = key.fold("batch", t)
            index = torch.cat(
                [c * IPC + place.fold(c).permutation(IPC)[: method.batch_syn] for c in range(K)]
            )
        shown = leaf[index]
        if method.augment == "color":
            drawn = augment.draw("color", key.fold("augment", t), len(index))
            assert drawn is not None
            rows = [coloured(x[None], u) for x, u in zip(shown, drawn.numbers.double(), strict=True)]
            shown = torch.cat(rows)
        slopes = gradients(params, shown, y[index])
        velocity = {n: method.inner_momentum * v + slopes[n] for n, v in velocity.items()}
        params = {n: v - method.inner_lr * velocity[n] for n, v in params.items()}
    real = real_batch(asked, key.fold("real"), method.batch_real)
    b = real.shape[1]
    labels = torch.arange(K).repeat_interleave(b)
    loss = -classify(params, real.reshape(K * b, *real.shape[2:])).log_softmax(1)
    value = loss[torch.arange(K * b), labels].mean()
    return value, torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("mode", ["graph", "adjoint"])
@pytest.mark.parametrize(("batch", "strategy"), [(10, ""), (1, ""), (1, "color")])
def test_bptt_is_a_slow_loop(mode: Literal["graph", "adjoint"], batch: int, strategy: str) -> None:
    method = BPTT(
        inner_steps=6,
        inner_lr=0.1,
        batch_syn=batch,
        batch_real=5,
        lr_img=30.0,
        clip=0.01,
        init="real",
        augment=strategy,
        mode=mode,
        net=NET,
    )
    asked = problem()
    states = go(method, asked, 2)
    pixels = Pixels(states[0].tensors["images"], 30.0, 0.5)
    for i in range(2):
        loss, gradient = unrolled(method, asked, pixels.images.detach(), i)
        norm = gradient.square().sum().sqrt()
        assert float(norm) > 0.01  # it is clipped
        pixels.step(gradient / norm * 0.01)
        after, log = method.step(asked, states[i], i)
        assert log["loss"] == pytest.approx(float(loss.detach()), rel=1e-10)
        assert log["norm"] == pytest.approx(float(norm), rel=1e-9)
        assert off(after.tensors["images"], pixels.images.detach()) < 1e-9


def test_bptt_leaves_short_gradients_alone() -> None:
    method = BPTT(inner_steps=3, inner_lr=0.1, lr_img=30.0, clip=1e3, init="real", net=NET)
    asked = problem()
    start = method.start(asked)
    _, gradient = unrolled(method, asked, start.tensors["images"], 0)
    after, _ = method.step(asked, start, 0)
    assert off(after.tensors["velocity"], gradient) < 1e-9


# ---- both unrolled methods ----


@pytest.mark.parametrize("name", ["mtt", "bptt"])
def test_graph_and_adjoint_are_the_same_method(name: str) -> None:
    strategy = "color_crop_cutout_flip_scale_rotate"
    method: MTT | BPTT
    if name == "mtt":
        method = MTT(
            syn_steps=8,
            expert_epochs=1,
            max_start_epoch=2,
            experts=2,
            expert_batch=8,
            lr_start=0.1,
            batch_syn=4,
            augment=strategy,
            net=NET,
        )
        asked = problem(experts=real_experts(method, problem()))
    else:
        method = BPTT(inner_steps=8, inner_lr=0.1, batch_syn=1, augment=strategy, net=NET)
        asked = problem()
    start = method.start(asked)
    for i in range(3):
        one, other = (replace(method, mode=mode).step(asked, start, i)[0] for mode in ("graph", "adjoint"))
        assert off(other.tensors["velocity"], one.tensors["velocity"]) < 1e-10
        if name == "mtt":
            assert other.values["rate_velocity"] == pytest.approx(one.values["rate_velocity"], rel=1e-10)


def test_a_gradient_that_is_not_finite_is_said_and_nothing_is_lost() -> None:
    asked = problem()
    method = DM(net=NET, augment="")
    start = method.start(asked)
    broken = State({**start.tensors, "images": start.tensors["images"] * torch.inf})
    with pytest.raises(UserError) as error:
        method.step(asked, broken, 0)
    assert str(error.value) == (
        "the distillation diverged: the gradient of the images is not finite; "
        "the last good state is kept; start again with --force and a smaller --set lr_img"
    )


# ---- herding ----


def slow_herd(features: torch.Tensor, count: int) -> list[int]:
    centre = features.mean(0)
    chosen: list[int] = []
    for _ in range(count):
        rest = [i for i in range(len(features)) if i not in chosen]
        gaps = [float((centre - features[[*chosen, i]].mean(0)).norm()) for i in rest]
        chosen.append(rest[gaps.index(min(gaps))])
    return chosen


def test_herding_is_the_brute_force_greedy_choice() -> None:
    for seed in range(5):
        features = Key(seed).normal(30, 6).double()
        assert herd(features, 12).tolist() == slow_herd(features, 12)


def test_herding_takes_each_image_once_and_all_of_them_at_last() -> None:
    features = Key(0).normal(9, 4).double()
    assert sorted(herd(features, 9).tolist()) == list(range(9))
    assert sorted(herd(torch.zeros(5, 3), 5).tolist()) == list(range(5))  # all alike


def test_herding_follows_the_mean_far_better_than_chance() -> None:
    features = Key(1).normal(200, 16).double()
    centre = features.mean(0)
    ours = float((features[herd(features, 10)].mean(0) - centre).norm())
    chance = [
        float((features[Key(2).fold(i).permutation(200)[:10]].mean(0) - centre).norm()) for i in range(200)
    ]
    assert ours < 0.5 * min(chance)


def test_herding_looks_at_the_features_of_a_network_trained_on_the_real_data() -> None:
    data = fine()
    method = Herding.defaults(data, IPC)
    method = replace(method, net=NET, recipe=method.recipe.but(steps=5))
    training = method.needs(problem())["embedding"]
    assert training.data.fingerprint == data.fingerprint and training.net == NET
    (embedding,) = Runs(Plan(precision="float64")).get(training)
    index = method.start(problem(embedding=embedding)).tensors["index"]
    params = embedding.shapes.unflatten(embedding.final[0])
    expected = []
    for members in data.by_class:
        features = embed(params, data.images[members])
        expected += members[torch.tensor(slow_herd(features, IPC))].tolist()
    assert index.tolist() == expected
    assert isinstance(data.labels, Hard)
    assert data.labels.index[index].tolist() == [0, 0, 1, 1, 2, 2]


@dataclass(frozen=True)
class Weighted(Identity):
    """Pixels under a mask that is remembered, not learned: features need the buffers."""

    def features(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        return x.flatten(1) * buffers["mask"], buffers


def test_herding_takes_the_buffers_of_the_embedding() -> None:
    data = fine()
    mask = torch.zeros(2, CHANNELS * 96, dtype=torch.float64)
    mask[0, 5] = 1  # one pixel settles the choice
    embedding = Population(
        Weighted(), Shapes((), ()), torch.zeros(2, 0), (), torch.zeros(2, 0, 0), buffers={"mask": mask}
    )
    index = Herding(net=Weighted()).start(problem(embedding=embedding)).tensors["index"]
    for c, members in enumerate(data.by_class):
        pixel = data.images[members].flatten(1)[:, 5:6]
        assert index[c * IPC : (c + 1) * IPC].tolist() == members[slow_herd(pixel, IPC)].tolist()
