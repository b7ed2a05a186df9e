"""KIP, kernel inducing points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from distillens.core.artefact import DistilledDataset
from distillens.core.checks import at_least, one_of, positive
from distillens.core.contracts import Log, Problem, State
from distillens.core.dataset import Dataset
from distillens.core.labels import Targets
from distillens.distillers._donors import KERNELS
from distillens.distillers._kernel import centred, dual, flops_a_pass, ridged, share_right
from distillens.distillers._ntk import KEPT, Kernel, ntk
from distillens.distillers._pixels import (
    Init,
    adam_moved,
    check_finite,
    finished,
    initial,
    real_batch,
    small,
    with_moments,
)
from distillens.nets.convnet import ConvNet

PAIRS = 1 << 18  # pairs of images (times pixels) whose kernel is worked out together: what a cache holds
LAYER = 100.0  # floating-point operations of one pair (and pixel) in a layer, an arc cosine among them


@dataclass(frozen=True)
class KIP:
    """Ridge regression on the set, with the kernel of an infinitely wide network, is made to fit the real images.

    loss = mean over real images t of 1/2 || y_t - K_ts (K_ss + lambda I)^-1 y_s ||^2, lambda = ridge trace(K_ss) / n,
    with labels y that are centred one-hot. Nothing is trained: the gradient goes through kernel and solve, in float64.
    The log says how well the regression does on the step's real images.

    ``labels``: ``fixed``; ``learned`` by the same Adam as the pixels; or ``solved`` at the end, once the images stand:
    those that minimise the loss on all real images (label solve; with ``steps=0`` it is that method, on real images).
    ``batch_real`` is real images a class. ``kernel`` and ``depth`` are the network's (``_ntk.ntk``): ``fc`` or
    ``conv``, the latter without pooling.

    Source: Nguyen et al. 2021a (KIP, label solve), 2021b (learned labels, convolutions); ``KIP.ipynb`` (NTK
    parametrisation, weight variance 2, bias variance 0.01). Where we differ: the loss is the sum over classes, where
    theirs is the mean (Adam hardly sees a factor); real images pass by in pieces, so memory does not grow with the
    batch.
    """

    paper: ClassVar[str] = "Nguyen et al. 2021"
    family: ClassVar[str] = "kernel"
    selects: ClassVar[bool] = False
    soft_labels: ClassVar[bool] = True
    learns_lr: ClassVar[bool] = False
    needs_experts: ClassVar[bool] = False
    lacks: ClassVar[Mapping[str, str]] = KERNELS

    steps: int = 1000
    lr_img: float = 0.04
    batch_real: int = 500
    ridge: float = 1e-6
    labels: Literal["fixed", "learned", "solved"] = "fixed"
    kernel: Kernel = "fc"
    depth: int = 1
    init: Init = "real"

    def __post_init__(self) -> None:
        at_least(0, "kip", steps=self.steps, depth=self.depth)
        at_least(1, "kip", batch_real=self.batch_real)
        positive("kip", lr_img=self.lr_img, ridge=self.ridge)
        one_of("labels", self.labels, ("fixed", "learned", "solved"))
        one_of("kernel", self.kernel, ("fc", "conv"))
        one_of("init", self.init, ("real", "noise"))

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> KIP:
        """The authors' notebook's values; on digits' scale few small steps with learned labels."""
        if small(like):
            return cls(steps=50, lr_img=0.02, labels="learned")
        return cls(batch_real=max(1, 5000 // like.k))

    def needs(self, problem: Problem) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def start(self, problem: Problem) -> State:
        """The initial images, centred labels, empty moments."""
        images = initial(problem, self.init)
        labels = centred(problem.labels(), problem.real.k).to(images)
        if self.labels == "learned":
            return with_moments({"images": images, "labels": labels})
        return State({**with_moments({"images": images}).tensors, "labels": labels})

    def step(self, problem: Problem, state: State, i: int) -> tuple[State, Log]:
        """One step of Adam on a batch of real images."""
        real = real_batch(problem, problem.key.fold("step", i, "real"), self.batch_real)
        k, b = real.shape[:2]
        hard = torch.arange(k, device=real.device).repeat_interleave(b)
        targets = centred(hard, k)
        names = ["images", "labels"] if self.labels == "learned" else ["images"]
        leaves = {name: state.tensors[name].detach().requires_grad_() for name in names}
        support = leaves["images"].double()
        labels = leaves.get("labels", state.tensors["labels"]).double()
        weights = dual(self._gram(support), labels, self.ridge)
        # The solve is done once; real images pass by in pieces that only meet its result.
        images, solved = support.detach().requires_grad_(), weights.detach().requires_grad_()
        by_images, by_solved = torch.zeros_like(images), torch.zeros_like(solved)
        loss, right = 0.0, 0.0
        for some, wanted in self._pieces(real.flatten(0, 1), targets, len(images)):
            outputs = ntk(some, images, self.depth, self.kernel) @ solved
            part = 0.5 * (outputs - wanted).square().sum() / len(targets)
            for total, gradient in zip(
                (by_images, by_solved), torch.autograd.grad(part, (images, solved)), strict=True
            ):
                total += gradient
            loss += float(part.detach())
            right += share_right(outputs, wanted) * len(some) / len(targets)
        check_finite(loss, "the loss", "lr_img")
        gradients = torch.autograd.grad((weights, support), list(leaves.values()), (by_solved, by_images))
        for name, gradient in zip(names, gradients, strict=True):
            state = adam_moved(state, gradient, self.lr_img, (0.9, 0.999), i, name)
        return state, {"loss": loss, "accuracy": right}

    def outputs(self, support: torch.Tensor, labels: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """What the regression on a set (images [n, c, h, w], labels [n, k]) says of other images, [m, k], float64."""
        support = support.double()
        with torch.no_grad():
            weights = dual(self._gram(support), labels.double(), self.ridge)
            pieces = self._pieces(images, images, len(support))
            return torch.cat([ntk(some, support, self.depth, self.kernel) @ weights for some, _ in pieces])

    def solved(self, real: Dataset, images: torch.Tensor) -> torch.Tensor:
        """The labels [n, k] of least loss on all real images for images [n, c, h, w], float64; the shortest such.

        Least squares in A = K_ts (K_ss + lambda I)^-1, whose products with itself and the targets are added up piece
        by piece.
        """
        support = images.double()
        n = len(support)
        squares = support.new_zeros(n, n)
        across = support.new_zeros(n, real.k)
        with torch.no_grad():
            gram = ridged(self._gram(support), self.ridge)
            for some, wanted in self._pieces(real.images, centred(real.labels.hard(), real.k), n):
                a = torch.linalg.solve(gram, ntk(some, support, self.depth, self.kernel).mT).mT
                squares += a.mT @ a
                across += a.mT @ wanted
            best: torch.Tensor = torch.linalg.pinv(squares, hermitian=True) @ across
        return best

    def _gram(self, support: torch.Tensor) -> torch.Tensor:
        return ntk(support, None, self.depth, self.kernel)

    def _pieces(
        self, images: torch.Tensor, beside: torch.Tensor, n: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Images, float64, and what belongs to them, as many at a time as have ``PAIRS`` numbers with n others."""
        size = max(1, PAIRS // (n * self._pixels(images[0])))
        for some, own in zip(torch.split(images, size), torch.split(beside, size), strict=True):
            yield some.double(), own

    def _pixels(self, image: torch.Tensor) -> int:
        """Numbers that a pair of images keeps a layer."""
        return image[0].numel() if self.kernel == "conv" else 1

    def work(self, problem: Problem) -> float:
        """Kernel and solve, there and back, by operations, in passes of the field's network for such images."""
        n = problem.real.k * problem.ipc
        b = problem.real.k * min(self.batch_real, min(map(len, problem.by_class)))
        image = problem.real.images[0]
        pair = 2 * image.numel() + self._pixels(image) * (self.depth + 1) * LAYER
        flops = 3 * (n * (n + b) * pair + n**3)
        return self.steps * flops / flops_a_pass(ConvNet.defaults(problem.real), problem.real)

    def memory(self, problem: Problem) -> float:
        """The kernel of the set with itself, a piece of that with real images, and the solve, all in float64."""
        n = problem.real.k * problem.ipc
        pixels = self._pixels(problem.real.images[0])
        piece = max(PAIRS, n * pixels)
        return 8.0 * ((n * n * pixels + piece) * (self.depth + 1) * KEPT + 4 * n * n)

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """The images with their labels, which are regression targets: networks take half the squared error."""
        images, labels = state.tensors["images"], state.tensors["labels"]
        if self.labels == "solved":
            labels = self.solved(problem.real, images).to(labels)
        return finished(problem, images, labels=Targets(labels))
