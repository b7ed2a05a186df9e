"""M3D, dataset condensation by minimising the maximum mean discrepancy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch

from distillens import augment
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import at_least, one_of, positive
from distillens.core.contracts import Log, Net, Problem, State
from distillens.core.dataset import Dataset
from distillens.core.decode import MultiFormation
from distillens.distillers._donors import begun, credited, over_length, recorded, way_back
from distillens.distillers._features import (
    View,
    by_class,
    draws_of,
    felt,
    matching_bytes,
    of_stored,
    per_class,
    slope,
    themselves,
)
from distillens.distillers._formations import (
    decoded,
    in_pixels,
    in_range,
    mixed,
    out_of_pixels,
    per_pixel,
)
from distillens.distillers._pixels import (
    AS_THEY_ARE,
    Init,
    begin,
    finished,
    initial,
    moved,
    real_index,
    small,
)
from distillens.nets.convnet import ConvNet

WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # kernels beside one another, times the bandwidth
FLOAT = 4  # bytes


@dataclass(frozen=True)
class M3D:
    """Each class's features under random networks are made those of the real images, in all their moments.

    min_S  E_theta  sum_c  MMD^2(psi_theta(A(T_c)), psi_theta(A(f(S_c)))), in the space of a sum of five Gaussian
    kernels exp(-d^2 / (w b)); the bandwidth b is the mean squared distance of the two samples' pairs and w runs over
    powers of two from 1/4 to 4. With ``kernel=linear`` it is the loss of ``dm``. f cuts each stored image in
    ``factor``^2 patches, each enlarged to full size. A fresh network every ``redraw`` steps, never trained; one
    siamese draw A a class and step. A network with batch norm takes the statistics of a batch of all classes, the
    real and the distilled each of theirs.

    The estimate of MMD^2 is the biased one, as in the authors' code: all pairs count, each image's with itself too.
    The unbiased one has no value for a single image.

    ``donors`` writes down which real images each step came from (``shares``).

    Source: Zhang et al. 2024; ``condense_m3d.py``, ``m3dloss.py`` and IDC's code below them, as a public copy has them.
    Their settings files were not to be had: ``steps``, ``redraw``, ``lr_img`` (1 for each image a class) and
    ``batch_real`` are those of a published program built on theirs. Where we differ: one step for the sum over classes,
    where theirs steps the whole tensor class by class; pixels are cut to [0, 1] after every step, the last too; noise
    is standard normal in the data's space.
    """

    paper: ClassVar[str] = "Zhang et al. 2024"
    family: ClassVar[str] = "distribution"
    selects: ClassVar[bool] = False
    soft_labels: ClassVar[bool] = False
    learns_lr: ClassVar[bool] = False
    needs_experts: ClassVar[bool] = False

    steps: int = 10_000
    lr_img: float = 10.0
    momentum: float = 0.5
    batch_real: int = 128
    redraw: int = 5
    kernel: Literal["gaussian", "linear"] = "gaussian"
    factor: int = 2
    augment: str = "color+crop+cutout"
    init: Init = "real"
    net: Net = field(default_factory=ConvNet)
    donors: bool = False

    def __post_init__(self) -> None:
        at_least(0, "m3d", steps=self.steps, momentum=self.momentum)
        positive("m3d", lr_img=self.lr_img)
        at_least(1, "m3d", batch_real=self.batch_real, redraw=self.redraw, factor=self.factor)
        one_of("kernel", self.kernel, ("gaussian", "linear"))
        one_of("init", self.init, ("real", "noise"))
        augment.parse(self.augment)

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> M3D:
        """The values above; on digits' scale fewer steps, no augmentation, and whole images (patches are 4 x 4)."""
        net = ConvNet.defaults(like)
        if small(like):
            lr = 0.03 if ipc == 1 else 0.1 * ipc
            return cls(steps=300, lr_img=lr, batch_real=64, augment="", redraw=1, factor=1, net=net)
        return cls(lr_img=float(ipc), net=net)

    def needs(self, problem: Problem) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def start(self, problem: Problem) -> State:
        """Images whose patches are real images made smaller, or noise; within the range of pixels.

        Raises:
            UserError: donors are asked for under a network that mixes images.
        """
        images = mixed(problem, self.factor) if self.init == "real" else initial(problem, "noise")
        return begun(problem, begin(in_range(images, problem.real.space)), self.net, self.donors)

    def step(self, problem: Problem, state: State, i: int) -> tuple[State, Log]:
        """One matching step under a random network."""
        key, k, space = problem.key.fold("step", i), problem.real.k, problem.real.space
        view = View.fresh(self.net, problem, problem.key.fold("net", i // self.redraw))
        index = real_index(problem, key.fold("real"), self.batch_real)
        real = problem.real.images[index]
        draws = draws_of(self.augment, key.fold("augment"), k)
        targets: list[torch.Tensor] = []

        def loss(own: torch.Tensor, part: slice) -> torch.Tensor:
            target = view.targets(real[part], draws[part], themselves, problem.real)
            if self.donors:
                targets.append(target)
            return discrepancy(target, view.features(decoded(own, self.factor), draws[part]), self.kernel)

        images = state.tensors["images"]
        together = view.together(self._shown(problem), problem.real)
        losses, gradient = slope(by_class(images, k), loss, together)
        if self.donors:
            back = way_back(state, per_pixel(space, images, gradient.flatten(0, 1)).view_as(gradient))
            ways = per_pixel(space, images, back.flatten(0, 1)).view_as(back)
            at, moving = felt(view, by_class(images, k), ways, draws, together, self.factor)
            parts = shares(torch.cat(targets), at, moving, self.kernel)
            state = credited(state, index, over_length(of_stored(parts, self.factor), back), i)
        pixels, pulled = in_pixels(space, images, gradient.flatten(0, 1))
        begun = State({**state.tensors, "images": pixels}, state.values)
        after = moved(begun, pulled, self.lr_img, self.momentum)
        images = in_range(out_of_pixels(space, after.tensors["images"]), space)
        return State({**after.tensors, "images": images}, after.values), {"loss": float(losses.sum())}

    def _shown(self, problem: Problem) -> int:
        """Decoded images of a class."""
        return problem.ipc * self.factor**2

    def work(self, problem: Problem) -> float:
        """One forward of the real batch, forward and backward of the decoded images."""
        real = per_class(problem, self.batch_real)
        return self.steps * problem.real.k * (real + 3.0 * self._shown(problem))

    def memory(self, problem: Problem) -> float:
        """The graph of the decoded images that go together, and the kernels' values for every pair of a class."""
        real, ours = per_class(problem, self.batch_real), self._shown(problem)
        pairs = problem.real.k * 2.0 * len(WIDTHS) * FLOAT * (real + ours) ** 2
        return matching_bytes(self.net, "train", problem, real, ours) + pairs

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """The images, with how they decode, and their donors where they were asked for."""
        decode = AS_THEY_ARE if self.factor == 1 else MultiFormation(self.factor)
        return replace(finished(problem, state.tensors["images"], decode=decode), donors=recorded(state))


def discrepancy(
    real: torch.Tensor, distilled: torch.Tensor, kernel: Literal["gaussian", "linear"] = "gaussian"
) -> torch.Tensor:
    """The squared maximum mean discrepancy [m] of each class's features [m, n, d] and [m, n', d], the biased estimate.

    The bandwidth is a number: no gradient flows through it. Equal features only have the discrepancy 0.
    """
    n = real.shape[1]
    both = torch.cat([real, distilled], 1)
    if kernel == "linear":
        values = both @ both.mT
    else:
        distances, scale = _apart(both)
        values = torch.stack([(-distances / (width * scale)).exp() for width in WIDTHS]).sum(0)
    theirs, between, ours = values[:, :n, :n], values[:, :n, n:], values[:, n:, n:]
    return theirs.mean((1, 2)) - 2 * between.mean((1, 2)) + ours.mean((1, 2))


def _apart(both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distances [m, n, n] of all pairs of features [m, n, d], and the bandwidth [m, 1, 1], a number."""
    squares = both.square().sum(2)
    distances = (squares[:, :, None] + squares[:, None] - 2 * both @ both.mT).clamp(min=0)
    count = both.shape[1]
    bandwidth = distances.detach().sum((1, 2)) / (count**2 - count)
    return distances, torch.where(bandwidth > 0, bandwidth, 1.0)[:, None, None]


def shares(
    real: torch.Tensor, at: torch.Tensor, moving: torch.Tensor, kernel: Literal["gaussian", "linear"]
) -> torch.Tensor:
    """What each real image, with features ``real`` [k, b, d], gave to the way of each distilled one of its class [k, n, b].

    ``at`` [k, n, d] are the features of the distilled images and ``moving`` their derivatives along the way. Given the bandwidth the gradient is that of
    the mean over real images i of mean k(y, y') - 2 mean k(psi_i, y), as ``dm``'s is of squared distances; a part is the derivative of its term.
    """
    b, n = real.shape[1], at.shape[1]
    both = torch.cat([real, at], 1)
    change = both @ moving.mT  # of k(x, y) by its second argument, for all x and the distilled y
    if kernel == "gaussian":
        distances, scale = _apart(both)
        slopes = torch.stack(
            [-2 / (width * scale) * (-distances / (width * scale)).exp() for width in WIDTHS]
        )
        change = slopes.sum(0)[:, :, b:] * ((at * moving).sum(2)[:, None] - change)
    theirs, ours = change[:, :b], change[:, b:]
    return 2 / (n * b) * (ours.mean(1)[:, :, None] - theirs.mT)
