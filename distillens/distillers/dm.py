"""DM, distribution matching."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from distillens import augment
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import at_least, one_of, positive
from distillens.core.contracts import Log, Net, Problem, State
from distillens.core.dataset import Dataset
from distillens.distillers._donors import begun, credited, over_length, recorded, way_back
from distillens.distillers._features import (
    Draws,
    View,
    by_class,
    draws_of,
    felt,
    matching_bytes,
    per_class,
    slope,
)
from distillens.distillers._pixels import Init, begin, finished, initial, moved, real_index, small
from distillens.nets.convnet import ConvNet


@dataclass(frozen=True)
class DM:
    """Each class's mean feature under random networks is made that of the real images.

    min_S  E_theta  sum_c || mean psi_theta(A(T_c)) - mean psi_theta(A(S_c)) ||^2, with a fresh network at
    every step, never trained, and one siamese draw A a class and step shared by its real and distilled images.
    A network with batch norm takes the statistics of a batch of all classes, the real and the distilled each of theirs.

    ``donors`` writes down which real images each step came from (``shares``).

    Source: Zhao & Bilen 2023, equation 4; ``main_DM.py``. Where we differ: as many classes go through the network
    together as a cache holds (instance norm keeps images apart, so the gradient is the same), and draws come from keys.
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
    donors: bool = False

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
        """The initial images.

        Raises:
            UserError: donors are asked for under a network that mixes images.
        """
        return begun(problem, begin(initial(problem, self.init)), self.net, self.donors)

    def step(self, problem: Problem, state: State, i: int) -> tuple[State, Log]:
        """One matching step under a fresh network."""
        key, k = problem.key.fold("step", i), problem.real.k
        view = View.fresh(self.net, problem, key.fold("net"))
        index = real_index(problem, key.fold("real"), self.batch_real)
        draws = draws_of(self.augment, key.fold("augment"), k)
        features: list[torch.Tensor] = []

        def means(part: torch.Tensor) -> torch.Tensor:
            if self.donors:
                features.append(part)
            return _means(part)

        target = view.targets(problem.real.images[index], draws, means, problem.real)

        def loss(own: torch.Tensor, part: slice) -> torch.Tensor:
            return (target[part] - _means(view.features(own, draws[part]))).square().sum(1)

        images = by_class(state.tensors["images"], k)
        together = view.together(problem.ipc, problem.real)
        losses, gradient = slope(images, loss, together)
        if self.donors:
            back = way_back(state, gradient)
            parts = shares(view, images, back, torch.cat(features), draws, together)
            state = credited(state, index, parts, i)
        return moved(state, gradient.flatten(0, 1), self.lr_img, self.momentum), {"loss": float(losses.sum())}

    def work(self, problem: Problem) -> float:
        """One forward of the real batch, forward and backward of the distilled images."""
        real = per_class(problem, self.batch_real)
        return self.steps * problem.real.k * (real + 3.0 * problem.ipc)

    def memory(self, problem: Problem) -> float:
        """The graph of the distilled images that go together; the real batch passes through without one."""
        real = per_class(problem, self.batch_real)
        return matching_bytes(self.net, "train", problem, real, problem.ipc)

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """The images, and their donors where they were asked for."""
        return replace(finished(problem, state.tensors["images"]), donors=recorded(state))


def _means(features: torch.Tensor) -> torch.Tensor:
    """The mean feature [m, d] of each class, from [m, n, d]."""
    return features.mean(1)


def shares(
    view: View,
    images: torch.Tensor,
    back: torch.Tensor,
    real: torch.Tensor,
    draws: Draws,
    together: int,
) -> torch.Tensor:
    """What each real image, with features ``real`` [k, b, d], gave to the way of each distilled image of its class [k, n, b].

    The gradient of the loss is that of the mean of ||psi_i - mean psi(S)||^2 over the real images i: their squared distances differ
    from the distance of their mean by what does not depend on S. So it is a sum over real images, exactly, and a
    real image's part is the derivative of its term along the way ``back`` r [k, n, c, h, w]: 2 (mean psi(S) - psi_i).(J r) / (n b |r|).
    J r is one product for all distilled images together (``felt``).
    """
    n, b = images.shape[1], real.shape[1]
    at, moving = felt(view, images, back, draws, together)
    away = (at.mean(1, keepdim=True) * moving).sum(2, keepdim=True) - moving @ real.mT
    return over_length(2 / (n * b) * away, back)
