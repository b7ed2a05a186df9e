"""What methods that follow experts share: their settings, a stretch of an expert, the match."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from distillens import augment, cost
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError, at_least, one_of, positive
from distillens.core.contracts import Like, Log, Net, Problem, State
from distillens.core.labels import Hard, Labels
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.distillers._donors import FOLLOWS
from distillens.distillers._pixels import (
    Init,
    begin,
    check_finite,
    finished,
    initial,
    moved,
    refuse_buffers,
)
from distillens.experts import Experts, Trajectories
from distillens.nets.convnet import ConvNet
from distillens.unroll import Mode, States, Unrolled, unroll

LabelsOf = Callable[[Sequence[torch.Tensor]], Labels]  # learned tensors -> labels of all images


@dataclass(frozen=True, eq=False)
class Stretch:
    """The part of an expert's way that is matched: parameters [P] before and after."""

    theta: torch.Tensor
    target: torch.Tensor


@dataclass(frozen=True)
class Matching(ABC):
    """Settings and pieces of trajectory matching; the methods put them together.

    From an expert's parameters after t passes a student takes N steps of SGD on the distilled set:
    loss = ||student_{t+N} - expert_{t+M}||^2 / ||expert_t - expert_{t+M}||^2. Images and step size are learned.
    Fields carry the names of the authors' code: ``syn_steps`` N, ``expert_epochs`` M, ``max_start_epoch`` T+.
    """

    paper: ClassVar[str] = ""
    family: ClassVar[str] = "trajectory"
    selects: ClassVar[bool] = False
    soft_labels: ClassVar[bool] = False
    learns_lr: ClassVar[bool] = True
    needs_experts: ClassVar[bool] = True
    lacks: ClassVar[Mapping[str, str]] = FOLLOWS

    steps: int = 5000
    syn_steps: int = 30
    expert_epochs: int = 2
    max_start_epoch: int = 20
    lr_img: float = 100.0
    lr_lr: float = 1e-5
    lr_start: float = 0.001
    momentum: float = 0.5
    batch_syn: int | None = None
    experts: int = 100
    expert_lr: float = 0.01
    expert_batch: int = 256
    augment: str = "color_crop_cutout_flip_scale_rotate"
    init: Init = "real"
    states: States = "stored"
    net: Net = field(default_factory=ConvNet)

    def __post_init__(self) -> None:
        name = self.name
        at_least(0, name, steps=self.steps, momentum=self.momentum, lr_lr=self.lr_lr)
        at_least(
            1,
            name,
            syn_steps=self.syn_steps,
            expert_epochs=self.expert_epochs,
            max_start_epoch=self.max_start_epoch,
            experts=self.experts,
            expert_batch=self.expert_batch,
        )
        positive(name, lr_img=self.lr_img, lr_start=self.lr_start, expert_lr=self.expert_lr)
        if self.batch_syn is not None:
            at_least(1, name, batch_syn=self.batch_syn)
        one_of("init", self.init, ("real", "noise"))
        one_of("states", self.states, ("stored", "recomputed"))
        one_of("mode", self.way, ("graph", "adjoint", "tesla"))
        augment.parse(self.augment)

    @property
    def name(self) -> str:
        """The method's name in messages: that of its file."""
        return type(self).__module__.rpartition(".")[2]

    @property
    @abstractmethod
    def way(self) -> Mode:
        """How the gradient goes back through the student's training."""

    @property
    @abstractmethod
    def expert_recipe(self) -> Recipe:
        """How an expert is trained."""

    @property
    def plain_experts(self) -> Recipe:
        """Experts of plain SGD, as MTT trains them."""
        return Recipe(batch=self.expert_batch, lr=self.expert_lr, momentum=0.0, augment=self.augment)

    def needs(self, problem: Problem) -> Mapping[str, Any]:
        """The experts, up to the last pass that is used.

        The last start is at pass max_start_epoch - 1: the authors' ``np.random.randint`` excludes its bound.
        """
        passes = self.max_start_epoch - 1 + self.expert_epochs
        keys = problem.shared.fold("experts").split(self.experts)
        return {"experts": Experts(problem.real, self.net, self.expert_recipe, keys, passes)}

    def begun(self, problem: Problem) -> State:
        """The initial images and step size.

        Raises:
            UserError: the network has buffers, or the experts are not of this network, or too short.
        """
        params, buffers = self.net.init(problem.real, problem.key)
        refuse_buffers(self.net, buffers)
        experts: Trajectories = problem.inputs["experts"]
        name = self.name
        expected = {n: tuple(p.shape) for n, p in params.items()}
        got = dict(zip(experts.shapes.names, experts.shapes.shapes, strict=True))
        if got != expected:
            wrong = next(n for n in [*expected, *got] if got.get(n) != expected.get(n))
            raise UserError(
                f"{name}: the experts are of another network",
                got=f"{wrong} of shape {got.get(wrong, 'none')}",
                expected=f"{expected.get(wrong, 'none')}",
                fix="choose the experts' network with --set net.width, net.depth ...",
            )
        needed = self.max_start_epoch - 1 + self.expert_epochs
        if experts.passes < needed:
            raise UserError(
                f"{name}: the experts end too early",
                got=f"{experts.passes} passes",
                expected=f"at least max_start_epoch - 1 + expert_epochs = {needed}",
                fix=f"use a smaller max_start_epoch, or experts of {needed} passes",
            )
        return begin(initial(problem, self.init), rate=self.lr_start, rate_velocity=0.0)

    def stretch(self, problem: Problem, key: Key, low: int, high: int) -> Stretch:
        """A random expert from a start epoch in [low, high) over the next ``expert_epochs``."""
        experts: Trajectories = problem.inputs["experts"]
        expert = int(key.fold("expert").integers(len(experts), 1))
        epoch = low + int(key.fold("start").integers(high - low, 1))
        theta, target = (
            experts.at(expert, at).to(problem.real.images) for at in (epoch, epoch + self.expert_epochs)
        )
        return Stretch(theta, target)

    def matched(
        self,
        problem: Problem,
        key: Key,
        stretch: Stretch,
        rate: float,
        learned: Sequence[torch.Tensor],
        labels_of: LabelsOf | None = None,
    ) -> Unrolled:
        """The student's training and the way back. ``learned`` are the images [k * ipc, c, h, w] and what follows.

        Raises:
            DivergedError: the loss is not finite; the state before the step is kept.
        """
        experts: Trajectories = problem.inputs["experts"]
        hard = Hard(problem.labels().to(learned[0].device))
        batches = self._batches(len(learned[0]), key)
        scale = (stretch.theta - stretch.target).square().sum()

        def inner(flat: torch.Tensor, learned: Sequence[torch.Tensor], t: int) -> torch.Tensor:
            index = batches[t]
            shown = learned[0] if index is None else learned[0][index]
            labels = hard if labels_of is None else labels_of(learned)
            shown = augment.apply(shown, augment.draw(self.augment, key.fold("augment", t), len(shown)))
            logits = self.net.logits(experts.shapes.unflatten(flat), {}, shown, "train")[0]
            return (labels if index is None else labels.take(index)).loss(logits).mean()

        found = unroll(
            inner,
            lambda flat: (flat - stretch.target).square().sum() / scale,
            stretch.theta,
            learned,
            torch.full((self.syn_steps,), rate, dtype=stretch.theta.dtype, device=stretch.theta.device),
            mode=self.way,
            states=self.states,
        )
        check_finite(found.value, f"the matching loss (step size {rate:.3g})", "lr_lr, lr_start or lr_img")
        check_finite(found.rate_gradients, "the gradient of the step size", "lr_lr or lr_start")
        return found

    def after(self, state: State, found: Unrolled) -> tuple[State, Log]:
        """The state after one step of images and step size.

        A step of the step size's SGD never takes off more than half of it: it stays positive, whatever ``lr_lr``.
        """
        state = moved(state, found.gradients[0], self.lr_img, self.momentum)
        rate = float(state.values["rate"])
        velocity = self.momentum * float(state.values["rate_velocity"]) + float(found.rate_gradients.sum())
        new_rate = max(rate - self.lr_lr * velocity, rate / 2)
        values = {**state.values, "rate": new_rate, "rate_velocity": velocity}
        return State(state.tensors, values), {"loss": found.value, "rate": new_rate}

    def _batches(self, n: int, key: Key) -> list[torch.Tensor | None]:
        """The images of each inner step: a permutation cut in chunks, then the next one."""
        if self.batch_syn is None or self.batch_syn >= n:
            return [None] * self.syn_steps
        batches: list[torch.Tensor | None] = []
        while len(batches) < self.syn_steps:
            batches += torch.split(key.fold("batches", len(batches)).permutation(n), self.batch_syn)
        return batches[: self.syn_steps]

    def _shown(self, problem: Problem) -> int:
        """Images of an inner step."""
        n = problem.real.k * problem.ipc
        return min(n, self.batch_syn or n)

    def work(self, problem: Problem) -> float:
        """Passes an image and inner step: 8.8 with the graph, 11.7 with the adjoint, 10.7 with TESLA's rule."""
        each = {"graph": 8.8, "adjoint": 11.7, "tesla": 10.7}[self.way]
        if self.way == "adjoint" and self.states == "recomputed":
            each += 2.9
        return self.steps * self.syn_steps * self._shown(problem) * each

    def memory(self, problem: Problem) -> float:
        """The unroll's."""
        one = cost.cost(self.net, problem.real)
        return one.unrolled(self._shown(problem), self.syn_steps, self.way, states=self.states)

    def set_of(
        self, problem: Problem, images: torch.Tensor, state: State, labels: Labels | None = None
    ) -> DistilledDataset:
        """The images, with the learned step size in the recipe they were made for."""
        recipe = Recipe(
            steps=1000,
            batch=256,
            lr=float(state.values["rate"]),
            weight_decay=5e-4,
            schedule="tenth_at_half",
            augment=self.augment,
        )
        return finished(problem, images, recipe, labels)


def quick(ipc: int) -> dict[str, Any]:
    """Settings for digits' scale. The experts are trained alike for all sizes: the store trains them once."""
    # Few images match the start of training, more match further on (as DATM finds at larger scale).
    few = ipc < 5
    return {
        "steps": 60,
        "syn_steps": 20,
        "max_start_epoch": 2 if few else 8,
        "lr_img": 20.0 if few else 50.0,
        "lr_lr": 1e-4,
        "lr_start": 0.05 if few else 0.1,
        "experts": 4,
        "expert_lr": 0.1,
        "expert_batch": 64,
        "augment": "",
    }


Rows = Mapping[str, Mapping[int, Mapping[str, Any]]]  # scale -> images a class -> settings

# MTT's own, as its author corrected them; where a paper after it has no row, this is what it stands on.
MTT_ROWS: Rows = {
    "cifar10": {
        1: {"syn_steps": 50, "max_start_epoch": 2, "lr_lr": 1e-7, "lr_start": 0.01},
        10: {},
        50: {"max_start_epoch": 40, "lr_img": 1000.0},
    },
    "cifar100": {
        1: {"syn_steps": 20, "expert_epochs": 3, "lr_img": 1000.0, "lr_start": 0.01},
        10: {"syn_steps": 20, "lr_img": 1000.0, "lr_start": 0.01},
        50: {
            "syn_steps": 80,
            "max_start_epoch": 40,
            "lr_img": 1000.0,
            "lr_start": 0.01,
            "batch_syn": 125,
        },
    },
    "tiny": {
        1: {"syn_steps": 10, "max_start_epoch": 10, "lr_img": 1e4, "lr_lr": 1e-4, "lr_start": 0.01},
        10: {
            "syn_steps": 20,
            "max_start_epoch": 40,
            "lr_img": 1e4,
            "lr_lr": 1e-4,
            "lr_start": 0.01,
            "batch_syn": 200,
        },
        50: {
            "syn_steps": 20,
            "max_start_epoch": 40,
            "lr_img": 1e4,
            "lr_lr": 1e-4,
            "lr_start": 0.01,
            "batch_syn": 300,
        },
    },
    # lr_img 1e3 to 1e4 by subset.
    "imagenet": {
        1: {"syn_steps": 20, "max_start_epoch": 10, "lr_img": 1000.0, "lr_lr": 1e-6, "lr_start": 0.01}
    },
}


def scale(like: Like) -> str:
    """The published data set that some images are most like: cifar10, cifar100, tiny or imagenet."""
    side = min(like.shape[1:])
    if side >= 96:
        return "imagenet"
    if side >= 48:
        return "tiny"
    return "cifar100" if like.k >= 50 else "cifar10"


def row(like: Like, ipc: int, rows: Rows) -> dict[str, Any]:
    """The published row for such images whose size lies nearest on a log scale; MTT's where there is none."""
    known = rows.get(scale(like)) or MTT_ROWS[scale(like)]
    return dict(known[min(known, key=lambda size: abs(math.log(size / ipc)))])
