"""Wang et al. 2018, RTP and RaT-BPTT against slow twins. (BPTT's own stand in ``test_distillers.py``.)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F

from distillens import augment
from distillens.core.checks import UserError
from distillens.core.contracts import Distiller, Params, Problem, State
from distillens.core.dataset import Dataset
from distillens.core.labels import Hard, Logits
from distillens.core.rng import Key
from distillens.core.space import Pixel
from distillens.data.planted import planted
from distillens.distillers.rat_bptt import RaTBPTT
from distillens.distillers.rtp import RTP
from distillens.distillers.wang2018 import Wang2018
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.train import on, train

K, IPC, CHANNELS = 3, 2, 2
NET = ConvNet(depth=2, width=4)
KEY = Key(3, ("reference",))
Y = torch.arange(K).repeat_interleave(IPC)

WAYS = [("graph", "stored"), ("adjoint", "stored"), ("adjoint", "recomputed")]
every_way = pytest.mark.parametrize(("mode", "states"), WAYS)
Way = Literal["graph", "adjoint"]
Kept = Literal["stored", "recomputed"]


def fine() -> Dataset:
    """Three classes of ten 2 x 8 x 12 images in float64: twins agree to many digits."""
    rough = planted(Key(7), per_class=10, shape=(CHANNELS, 8, 12)).train
    return Dataset(rough.images.double(), rough.labels, rough.classes, rough.space)


def problem(ipc: int = IPC) -> Problem:
    return Problem(fine(), ipc, KEY)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def classify(params: Params, x: torch.Tensor) -> torch.Tensor:
    """The network once more, with torch's functions only."""
    for block in range(2):
        x = F.conv2d(x, params[f"conv{block}.weight"], params[f"conv{block}.bias"], padding=1)
        mean = x.mean((2, 3), keepdim=True)
        spread = (x - mean).square().mean((2, 3), keepdim=True)
        x = (x - mean) / (spread + 1e-5).sqrt()
        x = x * params[f"norm{block}.weight"].view(-1, 1, 1) + params[f"norm{block}.bias"].view(-1, 1, 1)
        x = F.avg_pool2d(x.relu(), 2)
    return x.flatten(1) @ params["linear.weight"].T + params["linear.bias"]


def fresh(key: Key) -> Params:
    return {n: value.double().requires_grad_() for n, value in NET.init(fine(), key)[0].items()}


def gradients(params: Params, x: torch.Tensor, share: torch.Tensor) -> Params:
    """The gradient of the mean cross-entropy against a distribution an image; it can be differentiated again."""
    loss = -(share * classify(params, x).log_softmax(1)).sum(1).mean()
    found = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    return dict(zip(params, found, strict=True))


def detached(params: Params) -> Params:
    return {name: value.detach().requires_grad_() for name, value in params.items()}


def flipped(x: torch.Tensor, key: Key, strategy: str) -> torch.Tensor:
    """Each image as it is or mirrored."""
    drawn = augment.draw(strategy, key, len(x))
    if drawn is None:
        return x
    turns = drawn.numbers[:, 0] < 0.5
    return torch.stack([image.flip(2) if turn else image for image, turn in zip(x, turns, strict=True)])


def real_loss(params: Params, key: Key, per_class: int, strategy: str = "") -> torch.Tensor:
    """The mean cross-entropy on ``per_class`` random real images of every class."""
    data = fine()
    images, labels = [], []
    for c, members in enumerate(data.by_class):
        chosen = members[key.fold("real", c).permutation(len(members))[:per_class]]
        images.append(data.images[chosen])
        labels += [c] * len(chosen)
    x = flipped(torch.cat(images), key.fold("augment real"), strategy)
    return F.cross_entropy(classify(params, x), torch.tensor(labels))


def drawn(key: Key, t: int, stored: int, shown: int) -> torch.Tensor:
    """The images of inner step t: ``shown`` of each class's ``stored``."""
    if shown >= stored:
        return torch.arange(K * stored)
    place = key.fold("batch", t)
    return torch.cat([c * stored + place.fold(c).permutation(stored)[:shown] for c in range(K)])


def one_hot(per_class: int) -> torch.Tensor:
    return F.one_hot(torch.arange(K).repeat_interleave(per_class), K).double()


def go(method: Distiller, asked: Problem, steps: int) -> tuple[list[State], list[dict[str, float]]]:
    states, logs = [method.start(asked)], []
    for i in range(steps):
        state, log = method.step(asked, states[-1], i)
        states.append(state)
        logs.append(log)
    return states, logs


def length(tensors: tuple[torch.Tensor, ...]) -> float:
    return float(torch.cat([t.flatten() for t in tensors]).norm())


# ---- Wang et al. 2018 ----


def wangs(**changes: Any) -> Wang2018:
    return Wang2018(
        **{
            "distill_epochs": 3,
            "lr_start": 0.1,
            "lr_img": 0.05,
            "batch_real": 5,
            "init": "real",
            "net": NET,
            **changes,
        }
    )


def walked(params: Params, images: torch.Tensor, rates: torch.Tensor, per_step: int, ipc: int) -> Params:
    """The ordered steps: ``per_step`` images of every class, then the next, and all of them again."""
    turns = ipc // per_step
    for t in range(len(rates)):
        first = (t % turns) * per_step
        index = [c * ipc + first + j for c in range(K) for j in range(per_step)]
        share = F.one_hot(torch.tensor([i // ipc for i in index]), K).double()
        slopes = gradients(params, images[index], share)
        params = {name: value - rates[t] * slopes[name] for name, value in params.items()}
    return params


@every_way
@pytest.mark.parametrize(("ipc", "per_step", "nets"), [(2, 1, 1), (2, 2, 1), (4, 2, 2)])
def test_wang_is_a_slow_loop(mode: Way, states: Kept, ipc: int, per_step: int, nets: int) -> None:
    """Losses of the networks averaged; Adam on images and raw rates, its rate halved every two steps."""
    method = wangs(per_step=per_step, n_nets=nets, decay_steps=2, mode=mode, states=states)
    asked = problem(ipc)
    found, logs = go(method, asked, 4)
    images = found[0].tensors["images"].clone().requires_grad_()
    raw = torch.full((3 * ipc // per_step,), 0.1, dtype=torch.float64).expm1().log().requires_grad_()
    assert off(found[0].tensors["rates"], raw.detach()) < 1e-12
    optimiser = torch.optim.Adam([images, raw], 0.05, (0.5, 0.999))
    halving = torch.optim.lr_scheduler.StepLR(optimiser, 2, 0.5)
    for i in range(4):
        optimiser.zero_grad()
        losses = []
        for j in range(nets):
            key = KEY.fold("step", i, "net", j)
            end = walked(fresh(key), images, (1 + raw.exp()).log(), per_step, ipc)
            losses.append(real_loss(end, key, 5))
        loss = torch.stack(losses).mean()
        loss.backward()
        optimiser.step()
        halving.step()
        assert logs[i]["loss"] == pytest.approx(float(loss.detach()), rel=1e-10)
        assert off(found[i + 1].tensors["images"], images.detach()) < 1e-9
        assert off(found[i + 1].tensors["rates"], raw.detach()) < 1e-9
    assert off(found[-1].tensors["rates"], found[0].tensors["rates"]) > 0.01


@pytest.mark.parametrize("per_step", [1, 2])
def test_who_trains_on_wangs_set_walks_its_steps(per_step: int) -> None:
    """Our trainer on the finished set ends where the slow loop ends, from the same initialisation."""
    method = wangs(per_step=per_step)
    asked = problem()
    states, _ = go(method, asked, 2)
    done = method.finish(asked, states[-1])
    assert done.order is not None and done.recipe is not None
    rates = (1 + states[-1].tensors["rates"].exp()).log()
    assert off(done.order.lr, rates) < 1e-12
    assert len(torch.unique(done.order.lr)) == len(rates) == 3 * IPC // per_step
    keys = Key(11).split(2)
    for plan in (Plan("loop", 1, precision="float64"), Plan("stacked", 2, precision="float64")):
        population = train(on(done, NET, done.recipe, keys), plan)
        for j, key in enumerate(keys):
            end = walked(fresh(key.fold("init")), done.stored["images"], rates, per_step, IPC)
            expected = torch.cat([value.detach().reshape(-1) for value in end.values()])
            assert off(population.final[j], expected) < 1e-10


def test_wangs_steps_share_the_images_out_evenly_or_are_refused() -> None:
    with pytest.raises(UserError) as error:
        wangs(per_step=3).start(problem(2))
    assert str(error.value) == (
        "wang2018: the steps do not share the images out; got 2 images a class, 3 a step; choose a per_step "
        "that divides the images a class"
    )


# ---- remember the past ----


def rtps(**changes: Any) -> RTP:
    return RTP(
        **{
            "n_bases": 5,
            "downsample": 2,
            "inner_steps": 5,
            "inner_lr": 0.1,
            "batch_syn": 2,
            "batch_real": 5,
            "lr_img": 3.0,
            "clip": 0.02,
            "init": "real",
            "net": NET,
            **changes,
        }
    )


def like(shape: tuple[int, int, int], k: int) -> Dataset:
    names = tuple(map(str, range(k)))
    return Dataset(torch.zeros(k, *shape), Hard(torch.arange(k)), names, Pixel())


@pytest.mark.parametrize(
    ("shape", "k", "ipc", "bases", "downsample", "expected"),
    [
        ((3, 32, 32), 10, 1, 16, 2, 115),  # the paper's: (3072 * 10 - 16 * 768) / 160
        ((3, 32, 32), 10, 10, 48, 2, 563),  # (30720 * 10 - 48 * 768) / 480 = 563.2
        ((3, 32, 32), 100, 1, 64, 2, 40),  # (307200 - 49152) / 6400 = 40.3
        ((1, 28, 28), 10, 1, 8, 1, 19),  # (7840 - 6272) / 80 = 19.6: no more than is paid for
        ((2, 8, 12), 3, 2, 5, 2, 60),  # (1152 - 240) / 15 = 60.8
    ],
)
def test_rtp_makes_as_many_images_as_the_storage_pays_for(
    shape: tuple[int, int, int], k: int, ipc: int, bases: int, downsample: int, expected: int
) -> None:
    method = rtps(n_bases=bases, downsample=downsample, init="noise")
    asked = Problem(like(shape, k), ipc, KEY)
    assert method.per_class(asked) == expected
    state = method.start(asked)
    assert state.tensors["coefficients"].shape == (k * expected, bases)
    assert state.tensors["bases"].shape == (bases, shape[0], shape[1] // downsample, shape[2] // downsample)
    assert method.finish(asked, state).dataset().images.shape == (k * expected, *shape)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64)], ids=str)
def test_rtps_defaults_leave_half_of_the_storage_to_the_coefficients(shape: tuple[int, int, int]) -> None:
    for k in (2, 3, 10, 100):
        for ipc in (1, 2, 10, 50):
            method = RTP.defaults(like(shape, k), ipc)
            asked = Problem(like(shape, k), ipc, KEY)
            rows = k * method.per_class(asked) * method.n_bases
            budget = ipc * k * torch.Size(shape).numel()
            assert rows >= 0.5 * budget - k * method.n_bases
    assert RTP.defaults(like((3, 32, 32), 10), 1).n_bases == 16


def test_more_bases_than_the_storage_holds_are_refused() -> None:
    with pytest.raises(UserError) as error:
        rtps(n_bases=7, downsample=1).start(problem(2))
    assert str(error.value) == (
        "rtp: 7 bases of 2 x 8 x 12 leave no room for coefficients; got the storage of 2 images a class; "
        "use fewer --set n_bases or a larger --set downsample"
    )


@pytest.mark.parametrize("downsample", [1, 2])
def test_rtp_from_real_images_is_their_best_approximation_by_so_many_bases(downsample: int) -> None:
    """Its squared error is the sum of the squared singular values that are left out."""
    method = rtps(n_bases=3, downsample=downsample)
    asked = problem()
    state = method.start(asked)
    each = method.per_class(asked)
    data = fine()
    # A random order of each class, again from its beginning where it has too few.
    index = []
    for c, members in enumerate(data.by_class):
        order = members[KEY.fold("init", c).permutation(10)].tolist()
        index += [order[j % 10] for j in range(each)]
    cells = data.images[index].view(-1, CHANNELS, 8 // downsample, downsample, 12 // downsample, downsample)
    goal = cells.mean((3, 5)).flatten(1)
    found = state.tensors["coefficients"] @ state.tensors["bases"].flatten(1)
    singular = torch.linalg.svdvals(goal)
    assert float((found - goal).square().sum()) == pytest.approx(float(singular[3:].square().sum()), rel=1e-9)
    assert float(singular[3]) > 0.01 * float(singular[0])  # something is left out
    images = method.finish(asked, state).dataset().images
    if downsample == 1:
        assert off(images.flatten(1), found) < 1e-12
    sizes = [float(state.tensors[name].norm(dim=-1).mean()) for name in ("bases", "coefficients")]
    assert 0.05 < sizes[0] / sizes[1] < 20  # both kinds of tensor are moved at one rate


def test_rtp_learns_all_of_its_bases_where_there_are_more_than_directions() -> None:
    """Bases of 2 x 3 x 4 span 24 directions: the others start at random, with nothing made of them yet."""
    method = rtps(n_bases=30, downsample=3, clip=1e3)
    asked = problem(4)
    state = method.start(asked)
    bases, rows = state.tensors["bases"].flatten(1), state.tensors["coefficients"]
    assert off(bases[24:].norm(dim=1), bases[:24].norm(dim=1)[:6]) < 1e-9
    assert float(rows[:, 24:].abs().max()) == 0
    after, _ = method.step(asked, state, 0)
    after, _ = method.step(asked, after, 1)
    for name in ("bases", "coefficients"):
        change = after.tensors[name].flatten(1) - state.tensors[name].flatten(1)
        assert bool((change.norm(dim=1 if name == "bases" else 0) > 0).all())


def test_rtp_from_noise_has_coefficients_of_unit_length() -> None:
    method = rtps(init="noise")
    state = method.start(problem(20))
    rows, bases = state.tensors["coefficients"], state.tensors["bases"]
    assert float((rows.norm(dim=1) - 1).abs().max()) < 1e-6
    assert abs(float(rows.mean())) < 5 / rows.numel() ** 0.5
    assert float(bases.std()) == pytest.approx(1, abs=0.15)


@every_way
@pytest.mark.parametrize("strategy", ["", "flip"])
def test_rtp_is_a_slow_loop(mode: Way, states: Kept, strategy: str) -> None:
    """Bases and coefficients are moved by one gradient, cut to one length; the coefficients decay."""
    method = rtps(mode=mode, states=states, augment=strategy, coefficient_decay=0.1)
    asked = problem()
    found, logs = go(method, asked, 3)
    bases, rows = (found[0].tensors[name].clone().requires_grad_() for name in ("bases", "coefficients"))
    optimiser = torch.optim.SGD(
        [{"params": [bases]}, {"params": [rows], "weight_decay": 0.1}], 3.0, momentum=0.5
    )
    each = len(rows) // K
    assert each > 2
    for i in range(3):
        key = KEY.fold("step", i)
        params = fresh(key.fold("net"))
        velocity = {name: torch.zeros_like(value) for name, value in params.items()}
        for t in range(5):
            index = drawn(key, t, each, 2)
            small = torch.einsum("nb,bchw->nchw", rows[index], bases)
            shown = F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
            shown = flipped(shown, key.fold("augment", t), strategy)
            slopes = gradients(params, shown, one_hot(each)[index])
            velocity = {name: 0.9 * v + slopes[name] for name, v in velocity.items()}
            params = {name: value - 0.1 * velocity[name] for name, value in params.items()}
        loss = real_loss(params, key, 5)
        pulls = torch.autograd.grad(loss, [bases, rows])
        norm = length(pulls)
        assert norm > 0.02  # it is cut
        for leaf, pull in zip((bases, rows), pulls, strict=True):
            leaf.grad = pull * 0.02 / norm
        optimiser.step()
        assert logs[i]["loss"] == pytest.approx(float(loss.detach()), rel=1e-10)
        assert logs[i]["norm"] == pytest.approx(norm, rel=1e-9)
        assert off(found[i + 1].tensors["bases"], bases.detach()) < 1e-9
        assert off(found[i + 1].tensors["coefficients"], rows.detach()) < 1e-9
    made = method.finish(asked, found[-1]).dataset()
    small = torch.einsum("nb,bchw->nchw", rows, bases)
    expected = F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
    assert off(made.images, expected.detach()) < 1e-9
    assert made.labels.hard().tolist() == [c for c in range(K) for _ in range(each)]


# ---- RaT-BPTT ----


def rats(**changes: Any) -> RaTBPTT:
    return RaTBPTT(
        **{
            "inner_steps": 9,
            "window": 3,
            "min_window": 1,
            "redraw": 2,
            "inner_lr": 0.02,
            "batch_syn": 1,
            "batch_real": 5,
            "lr_img": 0.05,
            "augment": "",
            "init": "real",
            "net": NET,
            **changes,
        }
    )


@every_way
@pytest.mark.parametrize("strategy", ["", "flip"])
@pytest.mark.parametrize("learn_labels", [False, True])
def test_rat_is_a_slow_loop(mode: Way, states: Kept, strategy: str, learn_labels: bool) -> None:
    """Adam inside, only the window before a random end differentiated, the gradient cut, Adam outside."""
    method = rats(mode=mode, states=states, augment=strategy, learn_labels=learn_labels, clip=0.8)
    asked = problem()
    found, logs = go(method, asked, 5)
    learned = [found[0].tensors["images"].clone().requires_grad_()]
    if learn_labels:
        assert torch.equal(found[0].tensors["logits"], 5 * one_hot(IPC))
        learned.append(found[0].tensors["logits"].clone().requires_grad_())
    optimiser = torch.optim.Adam(learned, 0.05)
    running, cut, ends = 0.0, 0, []
    for i in range(5):
        key = KEY.fold("step", i)
        end = 4 + int(KEY.fold("end", i // 2).integers(6, 1))  # from min_window + window up to inner_steps
        ends.append(end)
        params = fresh(key.fold("net"))
        first = second = {name: torch.zeros_like(value) for name, value in params.items()}
        for t in range(end):
            if t == end - 3:
                params, first, second = detached(params), detached(first), detached(second)
            index = drawn(key, t, IPC, 1)
            share = learned[1].softmax(1) if learn_labels else one_hot(IPC)
            shown = flipped(learned[0][index], key.fold("augment", t), strategy)
            slopes = gradients(params, shown, share[index])
            first = {n: 0.9 * m + 0.1 * slopes[n] for n, m in first.items()}
            second = {n: 0.999 * s + 0.001 * slopes[n] ** 2 for n, s in second.items()}
            sizes = {n: (s / (1 - 0.999 ** (t + 1)) + 1e-300).sqrt() + 1e-8 for n, s in second.items()}
            params = {n: v - 0.02 * first[n] / (1 - 0.9 ** (t + 1)) / sizes[n] for n, v in params.items()}
        loss = real_loss(params, key, 5, strategy)
        pulls = torch.autograd.grad(loss, learned)
        norm = length(pulls)
        share_kept = min(1.0, 0.8 * running / norm) if i else 1.0
        cut += share_kept < 1
        running = 0.9 * running + 0.1 * norm * share_kept if i else norm
        for leaf, pull in zip(learned, pulls, strict=True):
            leaf.grad = pull * share_kept
        optimiser.step()
        assert logs[i]["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)
        assert logs[i]["norm"] == pytest.approx(norm, rel=1e-7)
        assert logs[i]["end"] == end
        assert found[i + 1].values["norm"] == pytest.approx(running, rel=1e-7)
        for name, leaf in zip(("images", "logits"), learned, strict=False):
            assert off(found[i + 1].tensors[name], leaf.detach()) < 1e-7
    assert 0 < cut < 4
    assert ends[0] == ends[1] and ends[2] == ends[3] and len(set(ends)) > 1
    done = method.finish(asked, found[-1])
    assert isinstance(done.labels, Logits if learn_labels else Hard)
    if learn_labels:
        assert torch.equal(done.labels.tensors()["values"], found[-1].tensors["logits"])


def test_rats_end_is_uniform_over_where_the_window_fits() -> None:
    method = rats(redraw=3)
    asked = problem()
    ends = [method.end(asked, i) for i in range(3 * 900)]
    assert all(ends[i] == ends[i + 1] == ends[i + 2] for i in range(0, len(ends), 3))
    counts = [ends[::3].count(end) for end in range(4, 10)]
    assert sum(counts) == 900
    assert all(abs(count - 150) < 5 * (900 / 6 * 5 / 6) ** 0.5 for count in counts)
    assert {rats(min_window=6).end(asked, i) for i in range(20)} == {9}  # one place is left


def test_rats_gradient_is_cut_to_twice_its_running_norm() -> None:
    """The first gradient sets the norm; a state whose running norm is small has the next one cut to twice that."""
    method, asked = rats(), problem()
    start = method.start(asked)
    after, log = method.step(asked, start, 0)
    assert after.values["norm"] == log["norm"]
    whole = after.tensors["images.first"]  # 0.1 of the gradient
    small = State(start.tensors, {"norm": log["norm"] / 10})
    cut, _ = method.step(asked, small, 0)
    assert off(cut.tensors["images.first"], whole / 5) < 1e-12
    assert cut.values["norm"] == pytest.approx(log["norm"] * (0.9 / 10 + 0.1 * 2 / 10), rel=1e-12)
    large = State(start.tensors, {"norm": log["norm"] * 10})
    left, _ = method.step(asked, large, 0)
    assert torch.equal(left.tensors["images.first"], whole)


def test_rat_from_noise_starts_on_the_sphere() -> None:
    images = rats(init="noise").start(problem(20)).tensors["images"].flatten(1)
    assert float((images.norm(dim=1) - (CHANNELS * 96) ** 0.5).abs().max()) < 1e-4
    assert abs(float(images.mean())) < 5 / images.numel() ** 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: rats(window=9, min_window=1),
            "rat_bptt: the window does not fit into the training; got min_window 1 + window 9; expected up to "
            "inner_steps 9",
        ),
        (lambda: rats(norm_decay=1.0), "rat_bptt: norm_decay must be below 1; got 1.0"),
        (lambda: rats(window=0), "rat_bptt: window must be at least 1; got 0"),
        (lambda: rtps(n_bases=0), "rtp: n_bases must be at least 1; got 0"),
        (lambda: rtps(clip=0.0), "rtp: clip must be above 0; got 0.0"),
        (lambda: wangs(lr_start=0.0), "wang2018: lr_start must be above 0; got 0.0"),
        (lambda: wangs(n_nets=0), "wang2018: n_nets must be at least 1; got 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == message


def test_graph_and_adjoint_are_the_same_method_under_augmentation() -> None:
    strategy = "color_crop_cutout_flip_scale_rotate"
    for method in (rtps(augment=strategy, clip=1e3), rats(augment=strategy, learn_labels=True)):
        asked = problem()
        start = method.start(asked)
        for i in range(3):
            exact, *others = (
                replace(method, mode=mode, states=states).step(asked, start, i)[0]  # type: ignore[type-var]
                for mode, states in WAYS
            )
            for other in others:
                for name, tensor in exact.tensors.items():
                    assert off(other.tensors[name], tensor) < 1e-8
