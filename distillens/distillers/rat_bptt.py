"""RaT-BPTT, back-propagation through a random window of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from distillens import augment
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError, at_least, positive
from distillens.core.contracts import Log, Problem, State
from distillens.core.dataset import Dataset
from distillens.core.labels import Hard, Labels, Logits
from distillens.core.recipe import Recipe
from distillens.distillers._pixels import (
    adam_moved,
    check_finite,
    clipped,
    finished,
    fresh,
    initial,
    small,
    with_moments,
)
from distillens.distillers._unrolled import Student, Unrolling, pixels
from distillens.nets.convnet import ConvNet
from distillens.unroll import Adam, unroll

CERTAIN = 5.0  # the logit of its own class that a learned label starts with


@dataclass(frozen=True)
class RaTBPTT(Unrolling):
    """A fresh network is trained with Adam; the loss at a random moment is carried back through a window before it.

    The training ends at step e, uniform in [min_window + W, T]; only its last W = ``window`` steps are differentiated.
    e is drawn anew every ``redraw`` steps (an epoch of the authors' loader). The gradient is cut to twice its running
    norm. ``batch_real`` is real images a class; both sides are augmented.

    ``learn_labels`` learns a logit a class and image beside the pixels.

    Source: Feng et al. 2024, section 4; ``framework/distill_higher.py``, ``framework/base.py``. Where we differ: the exact
    adjoint of Adam stands in for the graph, so memory does not grow with the window; learned labels are logits (their
    table is clipped from below at 0); their curriculum type 2 only.
    """

    paper: ClassVar[str] = "Feng et al. 2024"

    steps: int = 60_000
    inner_steps: int = 200
    window: int = 60
    min_window: int = 0
    redraw: int = 10
    inner_lr: float = 0.001
    batch_syn: int = 10
    batch_real: int = 500
    lr_img: float = 0.001
    clip: float = 2.0
    norm_decay: float = 0.9
    learn_labels: bool = False
    augment: str = "flip_rotate"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, "rat_bptt", min_window=self.min_window, norm_decay=self.norm_decay)
        at_least(
            1,
            "rat_bptt",
            inner_steps=self.inner_steps,
            window=self.window,
            redraw=self.redraw,
            batch_syn=self.batch_syn,
        )
        positive("rat_bptt", inner_lr=self.inner_lr, clip=self.clip)
        if self.min_window + self.window > self.inner_steps:
            raise UserError(
                "rat_bptt: the window does not fit into the training",
                got=f"min_window {self.min_window} + window {self.window}",
                expected=f"up to inner_steps {self.inner_steps}",
            )
        if self.norm_decay >= 1:
            raise UserError("rat_bptt: norm_decay must be below 1", got=f"{self.norm_decay!r}")
        augment.parse(self.augment)

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> RaTBPTT:
        """The authors' values by data, hard labels; on digits' scale a shorter training with larger rates, from real images."""
        net = ConvNet.defaults(like)
        if small(like):
            return cls(
                steps=60,
                inner_steps=30,
                window=15,
                redraw=1,
                inner_lr=0.01,
                batch_real=32,
                lr_img=0.1,
                augment="",
                init="real",
                mode="graph",
                net=net,
            )
        if min(like.shape[1:]) >= 48:  # Tiny ImageNet
            return cls(inner_steps=300, window=100, lr_img=0.0003, net=net)
        if like.k >= 50:  # CIFAR-100
            if ipc < 5:
                return cls(inner_steps=130, window=90, lr_img=0.0003, net=net)
            return cls(inner_steps=300, window=100, net=net)
        return cls(net=net)

    def start(self, problem: Problem) -> State:
        """The initial images (noise has norm sqrt(D) an image), labels where they are learned, empty moments."""
        images = initial(problem, self.init)
        if self.init == "noise":
            flat = images.flatten(1)
            images = (F.normalize(flat, dim=1) * flat.shape[1] ** 0.5).view_as(images)
        tensors = {"images": images}
        if self.learn_labels:
            one_hot = F.one_hot(problem.labels(), problem.real.k).to(images)
            tensors["logits"] = CERTAIN * one_hot
        return with_moments(tensors, norm=0.0)

    def end(self, problem: Problem, i: int) -> int:
        """The inner step at which the training of outer step i ends."""
        low = self.min_window + self.window
        drawn = problem.key.fold("end", i // self.redraw).integers(self.inner_steps - low + 1, 1)
        return low + int(drawn)

    def step(self, problem: Problem, state: State, i: int) -> tuple[State, Log]:
        """One training of a fresh network up to a random end, and the way back through its window."""
        key = problem.key.fold("step", i)
        params = fresh(self.net, problem, key.fold("net"))
        student = Student(self.net, params, problem, key, problem.ipc, self.batch_syn, self.augment)
        hard: Labels = Hard(problem.labels().to(problem.real.device))
        end = self.end(problem, i)
        names = ["images", "logits"] if self.learn_labels else ["images"]
        found = unroll(
            student.inner(pixels, lambda learned: Logits(learned[1]) if self.learn_labels else hard),
            student.outer(self.batch_real, augmented=True),
            student.start,
            [state.tensors[name] for name in names],
            torch.full((end,), self.inner_lr, dtype=student.start.dtype, device=student.start.device),
            rule=Adam(),
            mode=self.mode,
            window=self.window,
            states=self.states,
        )
        check_finite(found.value, "the loss after the inner training", "inner_lr or lr_img")
        running = float(state.values["norm"])
        gradients, norm = clipped(found.gradients, self.clip * running if running else torch.inf)
        for name, gradient in zip(names, gradients, strict=True):
            state = adam_moved(state, gradient, self.lr_img, (0.9, 0.999), i, name)
        shown = min(norm, self.clip * running) if running else norm
        running = self.norm_decay * running + (1 - self.norm_decay) * shown if running else norm
        log = {"loss": found.value, "norm": norm, "end": float(end)}
        return State(state.tensors, {**state.values, "norm": running}), log

    def shown(self, problem: Problem) -> int:
        """Images of an inner step."""
        return problem.real.k * min(self.batch_syn, problem.ipc)

    def work(self, problem: Problem) -> float:
        """2.93 passes an image and step before the window, the unroll's in it, and the real batch's."""
        before = 2.93 * self.shown(problem) * (self.min_window + self.inner_steps - self.window) / 2
        return self.steps * (before + self.passes(problem, self.window * self.shown(problem)))

    def memory(self, problem: Problem) -> float:
        """The window's and the real batch's."""
        return self.bytes(problem, self.window, vectors=3)

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """The images (and learned labels), with the training they were made for."""
        recipe = Recipe(steps=1000, optimiser="adam", lr=self.inner_lr, momentum=0.0, augment=self.augment)
        labels = Logits(state.tensors["logits"]) if self.learn_labels else None
        return finished(problem, state.tensors["images"], recipe, labels)
