"""BPTT, back-propagation through training with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from distillens import augment
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import at_least, positive
from distillens.core.contracts import Log, Problem, State
from distillens.core.dataset import Dataset
from distillens.core.labels import Hard
from distillens.core.recipe import Recipe
from distillens.distillers._pixels import (
    begin,
    check_finite,
    clipped,
    finished,
    fresh,
    initial,
    moved,
    small,
)
from distillens.distillers._unrolled import Student, Unrolling, pixels
from distillens.nets.convnet import ConvNet
from distillens.unroll import Momentum, unroll


@dataclass(frozen=True)
class BPTT(Unrolling):
    """A fresh network is trained on the distilled set; its loss on real data is carried back to the images.

    min_S  E_theta0  L(theta_T(S); T),  theta_T after T steps of SGD with momentum. The gradient is exact.

    Source: Deng & Russakovsky 2022 (remember-the-past), the plain storage form; ``tools/trainer.py``. Where we
    differ: each inner step draws its own augmentation (their code shares one seed), and pixels are not
    clipped to unit norm.
    """

    paper: ClassVar[str] = "Deng & Russakovsky 2022"

    inner_steps: int = 150
    inner_lr: float = 0.01
    inner_momentum: float = 0.9
    batch_syn: int = 10
    momentum: float = 0.5
    clip: float = 2.0
    augment: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, "bptt", momentum=self.momentum, inner_momentum=self.inner_momentum)
        at_least(1, "bptt", inner_steps=self.inner_steps, batch_syn=self.batch_syn)
        positive("bptt", inner_lr=self.inner_lr, clip=self.clip)
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
                mode="graph",
                net=net,
            )
        return cls(net=net)

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

    def shown(self, problem: Problem) -> int:
        """Images of an inner step."""
        return problem.real.k * min(self.batch_syn, problem.ipc)

    def work(self, problem: Problem) -> float:
        """The unroll's and the real batch's."""
        return self.steps * self.passes(problem, self.inner_steps * self.shown(problem))

    def memory(self, problem: Problem) -> float:
        """The unroll's and the real batch's."""
        return self.bytes(problem, self.inner_steps)

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """The images, with the training they were made for."""
        recipe = Recipe(steps=300, lr=self.inner_lr, momentum=self.inner_momentum, augment=self.augment)
        return finished(problem, state.tensors["images"], recipe)
