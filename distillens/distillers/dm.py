"""DM, distribution matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from distillens import augment, cost, kernels
from distillens.augment import Draw
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import at_least, one_of, positive
from distillens.core.contracts import Buffers, Log, Net, Params, Problem, State
from distillens.core.dataset import Dataset
from distillens.distillers._pixels import (
    Init,
    begin,
    classes_together,
    finished,
    initial,
    moved,
    real_batch,
    small,
)
from distillens.nets.convnet import ConvNet


@dataclass(frozen=True)
class DM:
    """Each class's mean feature under random networks is made that of the real images.

    min_S  E_theta  sum_c || mean psi_theta(A(T_c)) - mean psi_theta(A(S_c)) ||^2, with a fresh network at
    every step, never trained, and one siamese draw A a class and step shared by its real and distilled images.

    Source: Zhao & Bilen 2023, equation 4; ``main_DM.py``. Where we differ: all classes go through the network
    as one batch, of the real ones as many as a cache holds (instance norm keeps images apart, so the gradient is the
    same), and draws come from keys.
    """

    paper: ClassVar[str] = "Zhao & Bilen 2023"
    family: ClassVar[str] = "distribution"
    selects: ClassVar[bool] = False
    soft_labels: ClassVar[bool] = False
    learns_lr: ClassVar[bool] = False
    needs_experts: ClassVar[bool] = False

    steps: int = 20_000
    lr_img: float = 1.0
    momentum: float = 0.5
    batch_real: int = 256
    augment: str = "color_crop_cutout_flip_scale_rotate"
    init: Init = "real"
    net: Net = field(default_factory=ConvNet)

    def __post_init__(self) -> None:
        at_least(0, "dm", steps=self.steps, momentum=self.momentum)
        positive("dm", lr_img=self.lr_img)
        at_least(1, "dm", batch_real=self.batch_real)
        one_of("init", self.init, ("real", "noise"))
        augment.parse(self.augment)

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> DM:
        """The authors' values; on digits' scale fewer steps and no augmentation."""
        net = ConvNet.defaults(like)
        if small(like):
            return cls(steps=300, lr_img=1.0, batch_real=64, augment="", net=net)
        return cls(lr_img=10.0 if ipc >= 100 else 1.0, net=net)

    def needs(self, problem: Problem) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def start(self, problem: Problem) -> State:
        """The initial images."""
        return begin(initial(problem, self.init))

    def step(self, problem: Problem, state: State, i: int) -> tuple[State, Log]:
        """One matching step under a fresh network."""
        key = problem.key.fold("step", i)
        params, buffers = self.net.init(problem.real, key.fold("net"))
        params = {name: value.to(problem.real.images) for name, value in params.items()}
        real = real_batch(problem, key.fold("real"), self.batch_real)
        images = state.tensors["images"].detach().requires_grad_()
        k = problem.real.k
        draws = [augment.draw(self.augment, key.fold("augment", c)) for c in range(k)]
        with torch.no_grad(), kernels.for_targets():
            target = self._means(params, buffers, real, draws, classes_together(real.shape[1], problem.real))
        ours = self._means(params, buffers, _by_class(images, k), draws, k)
        loss = (target - ours).square().sum()
        (gradient,) = torch.autograd.grad(loss, images)
        return moved(state, gradient, self.lr_img, self.momentum), {"loss": float(loss.detach())}

    def _means(
        self,
        params: Params,
        buffers: Buffers,
        images: torch.Tensor,
        draws: Sequence[Draw | None],
        together: int,
    ) -> torch.Tensor:
        """The mean feature [k, d] of each class's augmented images [k, n, c, h, w], so many classes at a time."""
        means = []
        for first in range(0, len(images), together):
            own = images[first : first + together]
            pairs = zip(own, draws[first : first + together], strict=True)
            shown = torch.cat([augment.apply(batch, drawn) for batch, drawn in pairs])
            means.append(_by_class(self.net.features(params, buffers, shown)[0], len(own)).mean(1))
        return torch.cat(means)

    def work(self, problem: Problem) -> float:
        """One forward of the real batch, forward and backward of the distilled images."""
        real = min(self.batch_real, min(map(len, problem.by_class)))
        return self.steps * problem.real.k * (real + 3.0 * problem.ipc)

    def memory(self, problem: Problem) -> float:
        """The distilled images' graph; the real batch passes through without one."""
        one = cost.cost(self.net, problem.real)
        real = min(self.batch_real, min(map(len, problem.by_class)))
        classes = min(problem.real.k, classes_together(real, problem.real))
        # Without a graph no more than two layers are alive at once: a third of it at most.
        return problem.real.k * problem.ipc * one.first + classes * real * one.first / 3

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """The images."""
        return finished(problem, state.tensors["images"])


def _by_class(items: torch.Tensor, k: int) -> torch.Tensor:
    """Class-major items [k * n, ...] as [k, n, ...]."""
    return items.reshape(k, -1, *items.shape[1:])
