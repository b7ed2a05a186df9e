"""TESLA, FTD and DATM against slow twins. (MTT's own stand in ``test_distillers.py``.)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F

from distillens import augment
from distillens.core.checks import UserError
from distillens.core.contracts import Distiller, Params, Problem, State
from distillens.core.dataset import Dataset
from distillens.core.labels import Logits, Probabilities
from distillens.core.rng import Key
from distillens.data.planted import planted
from distillens.distillers.datm import DATM
from distillens.distillers.ftd import FTD
from distillens.distillers.mtt import MTT
from distillens.distillers.tesla import TESLA
from distillens.engine.plan import Plan
from distillens.experts import Trajectories
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs

K, IPC, CHANNELS = 3, 2, 2
NET = ConvNet(depth=2, width=4)
KEY = Key(3, ("reference",))
Y = torch.arange(K).repeat_interleave(IPC)
every_way = pytest.mark.parametrize(
    ("mode", "states"), [("graph", "stored"), ("adjoint", "stored"), ("adjoint", "recomputed")]
)
# Two experts that know a little of the data, kept over four passes of four steps.
SHORT: dict[str, Any] = {
    "syn_steps": 5,
    "expert_epochs": 2,
    "max_start_epoch": 3,
    "experts": 2,
    "expert_batch": 8,
    "expert_lr": 0.1,
    "lr_img": 20.0,
    "lr_lr": 1e-4,
    "lr_start": 0.1,
    "augment": "",
    "net": NET,
}


def fine() -> Dataset:
    """Three classes of ten 2 x 8 x 12 images in float64: twins agree to many digits."""
    rough = planted(Key(7), per_class=10, shape=(CHANNELS, 8, 12)).train
    return Dataset(rough.images.double(), rough.labels, rough.classes, rough.space)


def problem(method: Distiller) -> Problem:
    bare = Problem(fine(), IPC, KEY)
    runs = Runs(Plan("loop", 1, precision="float64"))
    return replace(bare, inputs={"experts": runs.trajectories(method.needs(bare)["experts"])})


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


def at(experts: Trajectories, who: int, when: int) -> Params:
    """An expert's parameters by name, cut from its vector."""
    flat, params, place = experts.at(who, when), {}, 0
    for name, shape in zip(experts.shapes.names, experts.shapes.shapes, strict=True):
        size = torch.Size(shape).numel()
        params[name] = flat[place : place + size].view(shape).clone()
        place += size
    return params


def flat(params: Params) -> torch.Tensor:
    return torch.cat([value.reshape(-1) for value in params.values()])


def soft(logits: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy against a distribution an image."""
    return -(share * logits.log_softmax(1)).sum(1).mean()


def flipped(x: torch.Tensor, key: Key, strategy: str) -> torch.Tensor:
    """Each image as it is or mirrored."""
    drawn = augment.draw(strategy, key, len(x))
    if drawn is None:
        return x
    turns = drawn.numbers[:, 0] < 0.5
    return torch.stack([image.flip(2) if turn else image for image, turn in zip(x, turns, strict=True)])


class Student:
    """One step's matching by hand: who is followed from where, and the student's training in one graph."""

    def __init__(self, method: Any, asked: Problem, i: int, low: int, high: int) -> None:
        self.method, self.key = method, KEY.fold("step", i)
        experts = asked.inputs["experts"]
        self.who = int(self.key.fold("expert").integers(len(experts), 1))
        self.when = low + int(self.key.fold("start").integers(high - low, 1))
        self.begin = at(experts, self.who, self.when)
        self.end = at(experts, self.who, self.when + method.expert_epochs)
        self.scale = (flat(self.begin) - flat(self.end)).square().sum()

    def order(self) -> list[torch.Tensor]:
        """The images of each inner step: a permutation cut in two, then the next."""
        if self.method.batch_syn is None:
            return [torch.arange(6)] * self.method.syn_steps
        cuts = [self.key.fold("batches", 2 * p).permutation(6) for p in range(9)]
        pieces = [cut[place] for cut in cuts for place in (slice(0, 4), slice(4, 6))]
        return pieces[: self.method.syn_steps]

    def gradient(
        self, params: Params, images: torch.Tensor, share: torch.Tensor, t: int, index: torch.Tensor
    ) -> Params:
        leaves = {n: v if v.requires_grad else v.clone().requires_grad_() for n, v in params.items()}
        shown = flipped(images[index], self.key.fold("augment", t), self.method.augment)
        loss = soft(classify(leaves, shown), share[index])
        found = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        return dict(zip(leaves, found, strict=True))

    def matching(self, params: Params) -> torch.Tensor:
        return (flat(params) - flat(self.end)).square().sum() / self.scale

    def exact(self, images: torch.Tensor, share: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
        """The loss, with the whole training behind it."""
        params = self.begin
        for t, index in enumerate(self.order()):
            slopes = self.gradient(params, images, share, t, index)
            params = {name: value - rate * slopes[name] for name, value in params.items()}
        return self.matching(params)

    def teslas(
        self, images: torch.Tensor, share: torch.Tensor, rate: float
    ) -> tuple[float, torch.Tensor, float]:
        """The loss, and each inner gradient pulled by the slope at the end as if it stood alone."""
        path = [self.begin]
        for t, index in enumerate(self.order()):
            slopes = self.gradient(path[-1], images.detach(), share, t, index)
            path.append({name: v - rate * slopes[name].detach() for name, v in path[-1].items()})
        # Equation 9: d loss / d theta_N = 2 (theta_N - theta*) / scale.
        slope = 2 * (flat(path[-1]) - flat(self.end)) / self.scale
        by_images, by_rate = torch.zeros_like(images), 0.0
        for t, index in enumerate(self.order()):
            pull = flat(self.gradient(path[t], images, share, t, index)) @ slope
            by_images = by_images - rate * torch.autograd.grad(pull, images)[0]
            by_rate -= float(pull.detach())
        return float(self.matching(path[-1])), by_images, by_rate


class Learner:
    """Images, step size (and labels) as the authors' three SGDs move them."""

    def __init__(self, state: State, method: Any) -> None:
        self.images = state.tensors["images"].clone().requires_grad_()
        self.rate = torch.tensor(method.lr_start, dtype=torch.float64, requires_grad=True)
        self.optimisers = [
            torch.optim.SGD([self.images], method.lr_img, method.momentum),
            torch.optim.SGD([self.rate], method.lr_lr, method.momentum),
        ]

    def move(self, by_images: torch.Tensor, by_rate: torch.Tensor | float) -> None:
        self.images.grad = by_images.detach().clone()
        self.rate.grad = torch.as_tensor(by_rate, dtype=torch.float64).detach().clone()
        for optimiser in self.optimisers:
            optimiser.step()


def go(method: Distiller, asked: Problem, steps: int) -> tuple[list[State], list[dict[str, float]]]:
    states, logs = [method.start(asked)], []
    for i in range(steps):
        state, log = method.step(asked, states[-1], i)
        states.append(state)
        logs.append(log)
    return states, logs


def one_hot() -> torch.Tensor:
    return F.one_hot(Y, K).double()


# ---- TESLA ----


@pytest.mark.parametrize("batch", [None, 4])
@pytest.mark.parametrize("strategy", ["", "flip"])
def test_tesla_is_a_slow_loop(batch: int | None, strategy: str) -> None:
    method = TESLA(**{**SHORT, "batch_syn": batch, "augment": strategy})
    asked = problem(method)
    states, logs = go(method, asked, 3)
    twin = Learner(states[0], method)
    seen = set()
    for i in range(3):
        student = Student(method, asked, i, 0, 3)
        seen.add((student.who, student.when))
        loss, by_images, by_rate = student.teslas(twin.images, one_hot(), float(twin.rate.detach()))
        twin.move(by_images, by_rate)
        assert logs[i]["loss"] == pytest.approx(loss, rel=1e-9)
        assert off(states[i + 1].tensors["images"], twin.images.detach()) < 1e-9
        assert states[i + 1].values["rate"] == pytest.approx(float(twin.rate.detach()), rel=1e-9)
    assert len(seen) > 1
    assert states[-1].values["rate"] != pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 5])
def test_tesla_is_mtt_at_one_inner_step_only(steps: int) -> None:
    settings = {**SHORT, "syn_steps": steps}
    asked = problem(MTT(**settings))
    (_, mtt), (_, tesla) = (go(kind(**settings), asked, 1)[0] for kind in (MTT, TESLA))
    gap = off(tesla.tensors["velocity"], mtt.tensors["velocity"])
    by_rate = float(tesla.values["rate_velocity"]) / float(mtt.values["rate_velocity"]) - 1
    if steps == 1:
        assert gap < 1e-10 and abs(by_rate) < 1e-10
    else:
        assert gap > 1e-3 and abs(by_rate) > 1e-3


def test_teslas_teacher_is_the_network_at_the_end_of_the_stretch() -> None:
    method = TESLA(**SHORT, teacher_label=True)
    asked = problem(method)
    states, logs = go(method, asked, 3)
    assert torch.equal(states[0].tensors["labels"], one_hot())
    twin = Learner(states[0], method)
    for i in range(3):
        student = Student(method, asked, i, 0, 3)
        share = classify(student.end, twin.images.detach()).softmax(1)
        loss, by_images, by_rate = student.teslas(twin.images, share, float(twin.rate.detach()))
        twin.move(by_images, by_rate)
        assert off(states[i + 1].tensors["labels"], share) < 1e-9
        assert logs[i]["loss"] == pytest.approx(loss, rel=1e-9)
        assert off(states[i + 1].tensors["images"], twin.images.detach()) < 1e-9
    done = method.finish(asked, states[-1])
    assert isinstance(done.labels, Probabilities)
    assert torch.equal(done.labels.values, states[-1].tensors["labels"])
    assert float((share - one_hot()).abs().max()) > 0.1  # soft they are


# ---- FTD ----


@every_way
def test_ftd_is_mtt_with_its_images_averaged(
    mode: Literal["graph", "adjoint"], states: Literal["stored", "recomputed"]
) -> None:
    method = FTD(**SHORT, mode=mode, states=states, rho=0.05, gsam_alpha=0.5, ema_decay=0.7)
    asked = problem(method)
    found, logs = go(method, asked, 3)
    twin = Learner(found[0], method)
    average = twin.images.detach().clone()
    assert torch.equal(found[0].tensors["average"], average)
    for i in range(3):
        student = Student(method, asked, i, 0, 3)
        loss = student.exact(twin.images, one_hot(), twin.rate)
        twin.move(*torch.autograd.grad(loss, [twin.images, twin.rate]))
        average = 0.7 * average + 0.3 * twin.images.detach()
        assert logs[i]["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)
        assert off(found[i + 1].tensors["images"], twin.images.detach()) < 1e-9
        assert off(found[i + 1].tensors["average"], average) < 1e-9
        assert found[i + 1].values["rate"] == pytest.approx(float(twin.rate.detach()), rel=1e-9)
    done = method.finish(asked, found[-1])
    assert torch.equal(done.stored["images"], found[-1].tensors["average"])
    assert off(done.stored["images"], found[-1].tensors["images"]) > 1e-3
    assert done.recipe is not None and done.recipe.lr == found[-1].values["rate"]


def test_flat_experts_are_trained_by_gsam() -> None:
    bare = Problem(fine(), IPC, KEY)
    plain = MTT(**SHORT).needs(bare)["experts"].recipe
    assert (plain.rho, plain.gsam_alpha) == (0.0, 0.0)
    for method in (FTD(**SHORT, rho=0.05, gsam_alpha=0.5), DATM(**SHORT, **EASY, rho=0.05, gsam_alpha=0.5)):
        assert method.needs(bare)["experts"].recipe == plain.but(rho=0.05, gsam_alpha=0.5)
    # DATM without a radius asks for plain ones: gsam_alpha alone means nothing.
    assert DATM(**SHORT, **EASY, rho=0.0).needs(bare)["experts"].recipe == plain


# ---- DATM ----

EASY: dict[str, Any] = {"first_max_start_epoch": 1, "expansion_end": 2}


@every_way
@pytest.mark.parametrize("batch", [None, 4])
def test_datm_is_a_slow_loop(
    mode: Literal["graph", "adjoint"], states: Literal["stored", "recomputed"], batch: int | None
) -> None:
    """Logits are learned beside the images, start epochs come from a range that grows from 1 over 2 to 3."""
    settings = {**SHORT, "batch_syn": batch, "mode": mode, "states": states}
    method = DATM(**settings, **EASY, lr_y=3.0, momentum_y=0.8, threshold=1e9)
    asked = problem(method)
    found, logs = go(method, asked, 3)
    twin = Learner(found[0], method)
    logits = found[0].tensors["logits"].clone().requires_grad_()
    for_logits = torch.optim.SGD([logits], 3.0, 0.8)
    for i, high in enumerate((1, 2, 3)):
        student = Student(method, asked, i, 0, high)
        loss = student.exact(twin.images, logits.softmax(1), twin.rate)
        by_images, by_rate, by_logits = torch.autograd.grad(loss, [twin.images, twin.rate, logits])
        twin.move(by_images, by_rate)
        logits.grad = by_logits
        for_logits.step()
        assert logs[i]["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)
        assert logs[i]["skipped"] == 0
        assert off(found[i + 1].tensors["images"], twin.images.detach()) < 1e-9
        assert off(found[i + 1].tensors["logits"], logits.detach()) < 1e-9
        assert found[i + 1].values["rate"] == pytest.approx(float(twin.rate.detach()), rel=1e-9)
    assert off(found[-1].tensors["logits"], found[0].tensors["logits"]) > 1e-3
    done = method.finish(asked, found[-1])
    assert isinstance(done.labels, Logits)
    assert torch.equal(done.labels.values, found[-1].tensors["logits"])


def test_datm_skips_a_step_that_matches_badly() -> None:
    method = DATM(**SHORT, **EASY, threshold=1e9)
    asked = problem(method)
    start = method.start(asked)
    loss = method.step(asked, start, 0)[1]["loss"]
    for threshold, skipped in ((loss * 1.001, 0.0), (loss * 0.999, 1.0)):
        after, log = replace(method, threshold=threshold).step(asked, start, 0)
        assert log["loss"] == loss
        assert log["skipped"] == skipped
        same = all(torch.equal(after.tensors[name], start.tensors[name]) for name in start.tensors)
        assert same == bool(skipped)
        assert (after.values == start.values) == bool(skipped)


def test_datms_start_epochs_grow_linearly() -> None:
    method = DATM(first_max_start_epoch=2, max_start_epoch=8, expansion_end=30, net=NET)
    assert [method.last_start(i) for i in (0, 4, 5, 9, 10, 24, 25, 29, 30, 1000)] == [
        2, 2, 3, 3, 4, 6, 7, 7, 8, 8,
    ]  # fmt: skip
    whole = replace(method, expansion_end=0)
    assert whole.last_start(0) == whole.last_start(99) == 8


def test_datm_draws_every_start_epoch_of_its_range_and_no_other() -> None:
    settings = {**SHORT, "max_start_epoch": 5, "expert_epochs": 1}
    method = DATM(**settings, min_start_epoch=2, first_max_start_epoch=3, expansion_end=100)
    asked = problem(method)
    experts = asked.inputs["experts"]
    looked: list[int] = []

    class Watched:
        net, shapes, passes = experts.net, experts.shapes, experts.passes

        def __len__(self) -> int:
            return len(experts)

        def at(self, expert: int, passes: int) -> torch.Tensor:
            looked.append(passes)
            return experts.at(expert, passes)

    quick = replace(method, syn_steps=1, threshold=1e-9)  # every step is skipped
    start = method.start(asked)
    watched = replace(asked, inputs={"experts": Watched()})
    early, late = range(20), range(100, 140)
    drawn = []
    for steps in (early, late):
        looked.clear()
        for i in steps:
            quick.step(watched, start, i)
        drawn.append(set(looked[::2]))  # the beginning of each stretch
        assert set(looked[1::2]) == {epoch + 1 for epoch in drawn[-1]}
    assert drawn == [{2}, {2, 3, 4}]


def understood(experts: Trajectories, last: int) -> list[list[tuple[int, list[int], torch.Tensor]]]:
    """Of each class in the order in which they are looked at: image, which experts get it right, what all say."""
    data = fine()
    networks = [at(experts, who, last) for who in range(len(experts))]
    found = []
    for c in range(K):
        members = [i for i in range(len(data)) if int(data.labels.hard()[i]) == c]
        rows = []
        for place in KEY.fold("understood", c).permutation(len(members)).tolist():
            image = members[place]
            said = torch.cat([classify(params, data.images[image][None]) for params in networks])
            rows.append((image, [e for e in range(len(said)) if int(said[e].argmax()) == c], said))
        found.append(rows)
    return found


@pytest.mark.parametrize("experts", [2, 3])
def test_datm_starts_from_images_that_experts_get_right(experts: int) -> None:
    """Experts that were hardly trained: some images only some of them know, some none."""
    method = DATM(**{**SHORT, "experts": experts, "expert_lr": 0.005}, **EASY, rho=0.0)
    asked = problem(method)
    state = method.start(asked)
    some = passed_over = 0
    for c, rows in enumerate(understood(asked.inputs["experts"], 4)):
        right = [row for row in rows if row[1]]
        assert len(right) >= IPC
        passed_over += rows.index(right[IPC - 1]) >= IPC
        for place, (image, who, said) in enumerate(right[:IPC]):
            some += len(who) < experts
            row = c * IPC + place
            assert torch.equal(state.tensors["images"][row], fine().images[image])
            mean = sum(said[e] for e in who) / len(who)
            assert off(state.tensors["logits"][row], torch.as_tensor(mean)) < 1e-12
    assert some and passed_over
    assert float(state.tensors["velocity"].abs().max()) == 0
    assert float(state.tensors["logits.velocity"].abs().max()) == 0


def biased(asked: Problem, shift: dict[int, float]) -> Problem:
    """The problem with experts that are pulled from or to some classes."""
    experts = asked.inputs["experts"]
    (bias,) = [i for i, name in enumerate(experts.shapes.names) if name == "linear.bias"]
    place = sum(torch.Size(shape).numel() for shape in experts.shapes.shapes[:bias])
    parts = []
    for part in experts.parts:
        changed = part.clone()
        for c, by in shift.items():
            changed[:, :, place + c] += by
        parts.append(changed)
    return replace(asked, inputs={"experts": replace(experts, parts=tuple(parts))})


def test_a_class_that_no_expert_knows_begins_with_its_likeliest_images() -> None:
    method = DATM(**SHORT, **EASY)
    asked = biased(problem(method), {2: -20.0})
    rows = understood(asked.inputs["experts"], 4)[2]
    assert not any(who for _, who, _ in rows)
    state = method.start(asked)
    likely = sorted(range(len(rows)), key=lambda r: -float(rows[r][2].softmax(1)[:, 2].mean()))[:IPC]
    for place, r in enumerate(likely):
        image, _, said = rows[r]
        assert torch.equal(state.tensors["images"][2 * IPC + place], fine().images[image])
        found, mean = state.tensors["logits"][2 * IPC + place], said.mean(0)
        assert off(found[:2], mean[:2]) < 1e-12  # all experts' mean, its own class above the others
        assert float(found[2]) == pytest.approx(float(mean.max()) + 1, rel=1e-12)
    after, _ = replace(method, threshold=1e9).step(asked, state, 0)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in after.tensors.values())


def test_a_class_that_experts_know_too_little_of_is_filled_up() -> None:
    """Those that are right come first, then the likeliest of the others."""
    method = DATM(**{**SHORT, "experts": 3, "expert_lr": 0.02}, **EASY, rho=0.0)
    asked = problem(method)
    for by in torch.linspace(0, -3, 61).tolist():
        shifted = biased(asked, {1: by})
        rows = understood(shifted.inputs["experts"], 4)[1]
        if sum(bool(who) for _, who, _ in rows) == 1:
            break
    else:
        raise AssertionError("no shift leaves a single image")
    (best,) = [row for row in rows if row[1]]
    others = [row for row in rows if not row[1]]
    second = max(others, key=lambda row: float(row[2].softmax(1)[:, 1].mean()))
    images = method.start(shifted).tensors["images"][IPC : 2 * IPC]
    assert torch.equal(images, fine().images[[best[0], second[0]]])


def test_datm_with_certain_labels_that_stay_is_mtt() -> None:
    mtt = MTT(**SHORT)
    datm = DATM(**SHORT, expansion_end=0, rho=0.0, lr_y=0.0, threshold=1e9)
    asked = problem(mtt)
    first = mtt.start(asked)
    second = datm.start(asked)
    tensors = {**second.tensors, "images": first.tensors["images"].clone(), "logits": 1e4 * one_hot()}
    second = State(tensors, second.values)
    for i in range(3):
        first, said = mtt.step(asked, first, i)
        second, also = datm.step(asked, second, i)
        assert also["loss"] == pytest.approx(said["loss"], rel=1e-12)
        assert off(second.tensors["images"], first.tensors["images"]) < 1e-12
        assert second.values == pytest.approx(first.values, rel=1e-12)
    assert torch.equal(second.tensors["logits"], 1e4 * one_hot())


# ---- what is refused ----

every_kind = pytest.mark.parametrize(
    ("name", "make"),
    [
        ("mtt", lambda: MTT(**SHORT)),
        ("tesla", lambda: TESLA(**SHORT)),
        ("ftd", lambda: FTD(**SHORT)),
        ("datm", lambda: DATM(**SHORT, **EASY)),
    ],
)


@every_kind
def test_experts_of_another_network_are_refused(name: str, make: Callable[[], Any]) -> None:
    method = make()
    wider = problem(replace(method, net=ConvNet(depth=2, width=5)))
    with pytest.raises(UserError) as error:
        method.start(wider)
    assert str(error.value) == (
        f"{name}: the experts are of another network; got conv0.weight of shape (5, 2, 3, 3); expected "
        "(4, 2, 3, 3); choose the experts' network with --set net.width, net.depth ..."
    )
    deeper = problem(replace(method, net=ConvNet(depth=1, width=4)))
    with pytest.raises(UserError) as error:
        method.start(deeper)
    assert "got conv1.weight of shape none; expected (4, 4, 3, 3)" in str(error.value)


@every_kind
def test_experts_that_end_too_early_are_refused(name: str, make: Callable[[], Any]) -> None:
    method = make()
    short = problem(replace(method, expert_epochs=1))
    with pytest.raises(UserError) as error:
        method.start(short)
    assert str(error.value) == (
        f"{name}: the experts end too early; got 3 passes; expected at least max_start_epoch - 1 + "
        "expert_epochs = 4; use a smaller max_start_epoch, or experts of 4 passes"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FTD(**SHORT, ema_decay=1.0), "ftd: ema_decay must be below 1; got 1.0"),
        (lambda: FTD(**SHORT, ema_decay=-0.1), "ftd: ema_decay must be at least 0; got -0.1"),
        (lambda: FTD(**SHORT, rho=0.0), "ftd: rho must be above 0; got 0.0"),
        (lambda: DATM(**SHORT, **EASY, threshold=0.0), "datm: threshold must be above 0; got 0.0"),
        (
            lambda: DATM(**SHORT, first_max_start_epoch=4),
            "datm: start epochs do not ascend; got min 0, first max 4, max 3; expected min_start_epoch < "
            "first_max_start_epoch <= max_start_epoch",
        ),
        (
            lambda: DATM(**SHORT, min_start_epoch=3, expansion_end=0),
            "datm: start epochs do not ascend; got min 3, first max 3, max 3; expected min_start_epoch < "
            "first_max_start_epoch <= max_start_epoch",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == message


# ---- published settings ----


@dataclass(frozen=True)
class Images:
    shape: tuple[int, int, int]
    k: int


CIFAR10, CIFAR100 = Images((3, 32, 32), 10), Images((3, 32, 32), 100)
TINY, IMAGENET = Images((3, 64, 64), 200), Images((3, 128, 128), 10)


@pytest.mark.parametrize(
    ("kind", "like", "ipc", "published"),
    [
        (MTT, CIFAR10, 1, {"syn_steps": 50, "max_start_epoch": 2, "lr_lr": 1e-7, "lr_start": 0.01}),
        (MTT, CIFAR10, 10, {"syn_steps": 30, "max_start_epoch": 20, "lr_img": 100.0, "lr_start": 0.001}),
        (MTT, CIFAR10, 50, {"max_start_epoch": 40, "lr_img": 1000.0, "batch_syn": None, "lr_lr": 1e-5}),
        (MTT, CIFAR100, 1, {"syn_steps": 20, "expert_epochs": 3, "max_start_epoch": 20}),
        (MTT, CIFAR100, 50, {"syn_steps": 80, "max_start_epoch": 40, "batch_syn": 125}),
        (MTT, TINY, 10, {"syn_steps": 20, "max_start_epoch": 40, "lr_img": 1e4, "batch_syn": 200}),
        (MTT, IMAGENET, 1, {"syn_steps": 20, "max_start_epoch": 10, "lr_lr": 1e-6}),
        (TESLA, CIFAR10, 1, {"steps": 10_000, "max_start_epoch": 5, "lr_img": 1000.0}),
        (TESLA, CIFAR100, 50, {"syn_steps": 80, "lr_img": 1000.0, "lr_lr": 1e-5, "batch_syn": 125}),
        (TESLA, TINY, 1, {"syn_steps": 10, "expert_epochs": 3, "lr_img": 1e4, "batch_syn": 100}),
        (FTD, CIFAR10, 1, {"syn_steps": 50, "gsam_alpha": 0.3, "ema_decay": 0.9999, "rho": 0.01}),
        (FTD, CIFAR10, 50, {"lr_start": 0.01, "gsam_alpha": 1.0, "ema_decay": 0.999}),
        (FTD, CIFAR100, 50, {"batch_syn": 1000, "ema_decay": 0.999}),
        (FTD, TINY, 1, {"syn_steps": 30, "max_start_epoch": 10, "lr_img": 1e4}),
        (DATM, CIFAR10, 1, {"syn_steps": 80, "max_start_epoch": 4, "lr_y": 5.0, "expansion_end": 0}),
        (DATM, CIFAR10, 10, {"first_max_start_epoch": 10, "max_start_epoch": 20, "lr_y": 2.0}),
        (DATM, CIFAR10, 1000, {"syn_steps": 100, "min_start_epoch": 40, "max_start_epoch": 60}),
        (DATM, CIFAR100, 10, {"first_max_start_epoch": 30, "max_start_epoch": 50, "gsam_alpha": 1.0}),
        (DATM, TINY, 50, {"syn_steps": 20, "min_start_epoch": 40, "max_start_epoch": 70}),
    ],
)
def test_defaults_are_the_published_rows(
    kind: Any, like: Images, ipc: int, published: dict[str, Any]
) -> None:
    method = kind.defaults(like, ipc)
    assert {name: getattr(method, name) for name in published} == published
