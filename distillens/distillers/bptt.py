"""BPTT, back-propagation through training with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from distillens import augment, cost
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import at_least, one_of, positive
from distillens.core.contracts import Log, Net, Problem, State
from distillens.core.dataset import Dataset
from distillens.core.labels import Hard
from distillens.core.recipe import Recipe
from distillens.distillers._pixels import (
    Init,
    begin,
    check_finite,
    clipped,
    finished,
    fresh,
    initial,
    moved,
    small,
)
from distillens.distillers._unrolled import Student, outer_bytes, pixels, real_images
from distillens.nets.convnet import ConvNet
from distillens.unroll import Momentum, States, unroll


@dataclass(frozen=True)
class BPTT:
    """A fresh network is trained on the distilled set; its loss on real data is carried back to the images.

    min_S  E_theta0  L(theta_T(S); T),  theta_T after T steps of SGD with momentum. The gradient is exact.

    Source: Deng & Russakovsky 2022 (remember-the-past), the plain storage form; ``tools/trainer.py``. Where we
    differ: each inner step draws its own augmentation (their code shares one seed), and pixels are not
    clipped to unit norm.
    """

    paper: ClassVar[str] = "Deng & Russakovsky 2022"
    family: ClassVar[str] = "unrolled"
    selects: ClassVar[bool] = False
    soft_labels: ClassVar[bool] = False
    learns_lr: ClassVar[bool] = False
    needs_experts: ClassVar[bool] = False

    steps: int = 50_000
    inner_steps: int = 150
    inner_lr: float = 0.01
    inner_momentum: float = 0.9
    batch_syn: int = 10
    batch_real: int = 64
    lr_img: float = 0.1
    momentum: float = 0.5
    clip: float = 2.0
    augment: str = ""
    init: Init = "noise"
    mode: Literal["graph", "adjoint"] = "adjoint"
    states: States = "stored"
    net: Net = field(default_factory=ConvNet)

    def __post_init__(self) -> None:
        at_least(0, "bptt", steps=self.steps, momentum=self.momentum, inner_momentum=self.inner_momentum)
        at_least(
            1, "bptt", inner_steps=self.inner_steps, batch_syn=self.batch_syn, batch_real=self.batch_real
        )
        positive("bptt", inner_lr=self.inner_lr, lr_img=self.lr_img, clip=self.clip)
        one_of("init", self.init, ("real", "noise"))
        one_of("mode", self.mode, ("graph", "adjoint"))
        one_of("states", self.states, ("stored", "recomputed"))
        augment.parse(self.augment)

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> BPTT:
        """The authors' loops; on digits' scale a shorter unroll with a larger inner rate, from real images."""
        net = ConvNet.defaults(like)
        if small(like):
            return cls(
                steps=60,
                inner_steps=20,
                inner_lr=0.1,
                batch_real=32,
                lr_img=100.0,
                init="real",
                net=net,
            )
        return cls(net=net)

    def needs(self, problem: Problem) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def start(self, problem: Problem) -> State:
        """The initial images."""
        return begin(initial(problem, self.init))

    def step(self, problem: Problem, state: State, i: int) -> tuple[State, Log]:
        """One training of a fresh network, and the way back."""
        key = problem.key.fold("step", i)
        params = fresh(self.net, problem, key.fold("net"))
        student = Student(self.net, params, problem, key, problem.ipc, self.batch_syn, self.augment)
        labels = Hard(problem.labels().to(problem.real.device))
        found = unroll(
            student.inner(pixels, lambda _: labels),
            student.outer(self.batch_real),
            student.start,
            [state.tensors["images"]],
            torch.full(
                (self.inner_steps,), self.inner_lr, dtype=student.start.dtype, device=labels.index.device
            ),
            rule=Momentum(self.inner_momentum),
            mode=self.mode,
            states=self.states,
        )
        check_finite(found.value, "the loss after the inner training", "inner_lr or lr_img")
        (gradient,), norm = clipped(found.gradients, self.clip)
        return moved(state, gradient, self.lr_img, self.momentum), {"loss": found.value, "norm": norm}

    def work(self, problem: Problem) -> float:
        """8.8 passes an image and inner step with the full graph, 11.7 with the adjoint; the real batch."""
        each = 8.8 if self.mode == "graph" else 11.7 if self.states == "stored" else 14.6
        inner = self.inner_steps * problem.real.k * min(self.batch_syn, problem.ipc) * each
        return self.steps * (inner + 2.9 * real_images(problem, self.batch_real))

    def memory(self, problem: Problem) -> float:
        """The unroll's and the real batch's."""
        shown = problem.real.k * min(self.batch_syn, problem.ipc)
        one = cost.cost(self.net, problem.real)
        inner = one.unrolled(shown, self.inner_steps, self.mode, states=self.states)
        return inner + outer_bytes(self.net, problem, self.batch_real)

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """The images, with the training they were made for."""
        recipe = Recipe(steps=300, lr=self.inner_lr, momentum=self.inner_momentum, augment=self.augment)
        return finished(problem, state.tensors["images"], recipe)
