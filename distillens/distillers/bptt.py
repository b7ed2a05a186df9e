"""BPTT, back-propagation through training with momentum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from distillens import augment
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError, at_least, one_of, positive
from distillens.core.contracts import Log, Net, Problem, State
from distillens.core.dataset import Dataset
from distillens.core.recipe import Recipe
from distillens.core.vector import Shapes
from distillens.distillers._pixels import Init, begin, finished, fresh, initial, moved, real_batch, small
from distillens.nets.convnet import ConvNet
from distillens.unroll import unroll


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
    net: Net = field(default_factory=ConvNet)

    def __post_init__(self) -> None:
        at_least(0, "bptt", steps=self.steps, momentum=self.momentum, inner_momentum=self.inner_momentum)
        at_least(
            1, "bptt", inner_steps=self.inner_steps, batch_syn=self.batch_syn, batch_real=self.batch_real
        )
        positive("bptt", inner_lr=self.inner_lr, lr_img=self.lr_img, clip=self.clip)
        one_of("init", self.init, ("real", "noise"))
        one_of("mode", self.mode, ("graph", "adjoint"))
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
        shapes = Shapes.of(params)
        real = real_batch(problem, key.fold("real"), self.batch_real)
        k, b = real.shape[:2]
        real_images = real.flatten(0, 1)
        real_labels = torch.arange(k, device=real.device).repeat_interleave(b)
        labels = problem.labels().to(real.device)
        # Each inner step sees batch_syn images of every class: all of them up to 10 images a class.
        per_class = min(self.batch_syn, problem.ipc)
        everything = torch.arange(k * problem.ipc).view(k, problem.ipc)

        def inner(flat: torch.Tensor, learned: Sequence[torch.Tensor], t: int) -> torch.Tensor:
            shown, own = learned[0], labels
            if per_class < problem.ipc:
                place = key.fold("batch", t)
                index = torch.cat(
                    [
                        row[place.fold(c).permutation(problem.ipc)[:per_class]]
                        for c, row in enumerate(everything)
                    ]
                )
                shown, own = shown[index], labels[index]
            shown = augment.apply(shown, augment.draw(self.augment, key.fold("augment", t), len(shown)))
            return F.cross_entropy(self.net.logits(shapes.unflatten(flat), {}, shown, "train")[0], own)

        def outer(flat: torch.Tensor) -> torch.Tensor:
            logits = self.net.logits(shapes.unflatten(flat), {}, real_images)[0]
            return F.cross_entropy(logits, real_labels)

        found = unroll(
            inner,
            outer,
            shapes.flatten(params),
            [state.tensors["images"]],
            self.inner_lr,
            steps=self.inner_steps,
            momentum=self.inner_momentum,
            mode=self.mode,
        )
        gradient = found.gradients[0]
        norm = float(gradient.norm())
        if norm > self.clip:
            gradient = gradient * (self.clip / norm)
        if not torch.isfinite(torch.tensor(found.value)):
            raise UserError(
                "bptt: the inner training diverged",
                fix="the last good state is kept; start again with --force and a smaller inner_lr or lr_img",
            )
        return moved(state, gradient, self.lr_img, self.momentum), {"loss": found.value, "norm": norm}

    def work(self, problem: Problem) -> float:
        """8.8 passes an image and inner step with the full graph, 11.7 with the adjoint; the real batch."""
        k = problem.real.k
        each = 8.8 if self.mode == "graph" else 11.7
        inner = self.inner_steps * k * min(self.batch_syn, problem.ipc) * each
        return self.steps * (inner + 2.9 * k * min(self.batch_real, min(map(len, problem.by_class))))

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """The images, with the training they were made for."""
        recipe = Recipe(steps=300, lr=self.inner_lr, momentum=self.inner_momentum, augment=self.augment)
        return finished(problem, state.tensors["images"], recipe)
