"""RTP, remember the past: back-propagation through training into shared bases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from distillens import augment
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError, at_least, positive
from distillens.core.contracts import Log, Problem, State
from distillens.core.dataset import Dataset
from distillens.core.decode import Bases
from distillens.core.labels import Hard
from distillens.core.recipe import Recipe
from distillens.distillers._pixels import (
    check_finite,
    clipped,
    fresh,
    moved,
    small,
    velocity_of,
)
from distillens.distillers._unrolled import Student, Unrolling
from distillens.nets.convnet import ConvNet
from distillens.unroll import Momentum, unroll


@dataclass(frozen=True)
class RTP(Unrolling):
    """BPTT with addressable memories: all images are combinations of a few small bases that the classes share.

    image = enlarge(coefficients @ bases). ``n_bases`` bases of 1/``downsample`` the side and as many rows of coefficients
    a class as fit hold together no more numbers than ``ipc`` images a class: (ipc D k - n_bases D') / (k n_bases) images
    a class, D and D' numbers an image and a base. Many more images are trained on than are stored.

    ``init="real"`` starts from the best approximation of a random real subset by so many bases (its singular
    vectors), ``noise`` from standard normal bases and coefficients of unit length.

    Source: Deng & Russakovsky 2022; ``models/compressor_bptt_standard.py``, ``tools/trainer.py``. Where we differ: each
    inner step draws its own augmentation (their code shares one seed), the real start is ours, and no flips of
    the bases are added.
    """

    paper: ClassVar[str] = "Deng & Russakovsky 2022"

    n_bases: int = 16
    downsample: int = 2
    inner_steps: int = 150
    inner_lr: float = 0.01
    inner_momentum: float = 0.9
    batch_syn: int = 10
    momentum: float = 0.5
    clip: float = 2.0
    coefficient_decay: float = 1e-4
    augment: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(
            0,
            "rtp",
            momentum=self.momentum,
            inner_momentum=self.inner_momentum,
            coefficient_decay=self.coefficient_decay,
        )
        at_least(
            1,
            "rtp",
            n_bases=self.n_bases,
            downsample=self.downsample,
            inner_steps=self.inner_steps,
            batch_syn=self.batch_syn,
        )
        positive("rtp", inner_lr=self.inner_lr, clip=self.clip)
        augment.parse(self.augment)

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> RTP:
        """The authors' loops and 16 bases of half the side; on digits' scale a short version of them.

        With few classes there are fewer bases: half of the storage is the coefficients'.
        """
        net = ConvNet.defaults(like)
        _, h, w = like.shape

        def fitting(wanted: int, downsample: int) -> int:
            base = max(1, round(h / downsample)) * max(1, round(w / downsample))
            return max(1, min(wanted, ipc * like.k * h * w // (2 * base)))

        if small(like):
            few = ipc < 5
            return cls(
                steps=60,
                n_bases=fitting(5 if few else 24, 1),
                downsample=1,
                inner_steps=20,
                inner_lr=0.1,
                batch_syn=3 if few else 10,
                batch_real=32,
                lr_img=3.0 if few else 10.0,
                init="real",
                mode="graph",
                net=net,
            )
        return cls(n_bases=fitting(16 * max(1, round(ipc**0.5)), 2), net=net)

    def side(self, problem: Problem) -> tuple[int, int]:
        """Height and width of a base."""
        _, h, w = problem.real.shape
        return max(1, round(h / self.downsample)), max(1, round(w / self.downsample))

    def per_class(self, problem: Problem) -> int:
        """Images a class that the storage of ``ipc`` plain images pays for.

        Raises:
            UserError: not even one.
        """
        (c, h, w), (small_h, small_w), k = problem.real.shape, self.side(problem), problem.real.k
        left = problem.ipc * c * h * w * k - self.n_bases * c * small_h * small_w
        count = left // (k * self.n_bases)
        if count < 1:
            raise UserError(
                f"rtp: {self.n_bases} bases of {c} x {small_h} x {small_w} leave no room for coefficients",
                got=f"the storage of {problem.ipc} images a class",
                fix="use fewer --set n_bases or a larger --set downsample",
            )
        return count

    def start(self, problem: Problem) -> State:
        """The initial bases [n_bases, c, h', w'] and coefficients [k * per_class, n_bases], class by class."""
        per_class = self.per_class(problem)
        begun = self._real(problem, per_class) if self.init == "real" else self._noise(problem, per_class)
        velocities = {velocity_of(name): torch.zeros_like(tensor) for name, tensor in begun.items()}
        return State({**begun, **velocities})

    def _noise(self, problem: Problem, per_class: int) -> dict[str, torch.Tensor]:
        key = problem.key.fold("init")
        bases = key.fold("bases").normal(self.n_bases, problem.real.shape[0], *self.side(problem))
        rows = key.fold("coefficients").normal(problem.real.k * per_class, self.n_bases)
        return {
            "bases": bases.to(problem.real.images),
            "coefficients": F.normalize(rows, dim=1).to(problem.real.images),
        }

    def _real(self, problem: Problem, per_class: int) -> dict[str, torch.Tensor]:
        """The best bases for a random real subset; an image is taken twice where a class has too few."""
        key = problem.key.fold("init")
        chosen = []
        for c, members in enumerate(problem.by_class):
            order = key.fold(c).permutation(len(members))
            chosen.append(members[order[torch.arange(per_class) % len(order)]])
        images = problem.real.images[torch.cat(chosen)]
        reduced = F.interpolate(images, size=self.side(problem), mode="area").flatten(1)
        u, s, v = torch.linalg.svd(reduced.double(), full_matrices=False)
        kept = min(self.n_bases, len(s))
        # Bases of an image's own scale, so that both kinds of tensor move at one rate.
        scale = reduced.double().norm(dim=1).mean()
        bases = torch.zeros(self.n_bases, reduced.shape[1], dtype=torch.float64, device=images.device)
        rows = torch.zeros(len(images), self.n_bases, dtype=torch.float64, device=images.device)
        bases[:kept], rows[:, :kept] = v[:kept] * scale, u[:, :kept] * s[:kept] / scale
        # Where there are more bases than directions the rest is random: from zero no gradient would ever move it.
        spare = key.fold("spare").normal(self.n_bases - kept, reduced.shape[1])
        bases[kept:] = F.normalize(spare.to(bases), dim=1) * scale
        return {
            "bases": bases.view(self.n_bases, images.shape[1], *self.side(problem)).to(images),
            "coefficients": rows.to(images),
        }

    def _labels(self, problem: Problem) -> Hard:
        index = torch.arange(problem.real.k).repeat_interleave(self.per_class(problem))
        return Hard(index.to(problem.real.device))

    def step(self, problem: Problem, state: State, i: int) -> tuple[State, Log]:
        """One training of a fresh network, and the way back."""
        key = problem.key.fold("step", i)
        params = fresh(self.net, problem, key.fold("net"))
        per_class = self.per_class(problem)
        student = Student(self.net, params, problem, key, per_class, self.batch_syn, self.augment)
        labels, decode = self._labels(problem), Bases(problem.real.shape[1:])

        def show(learned: Sequence[torch.Tensor], index: torch.Tensor | None) -> torch.Tensor:
            rows = learned[1] if index is None else learned[1][index]
            return decode.images({"bases": learned[0], "coefficients": rows})

        found = unroll(
            student.inner(show, lambda _: labels),
            student.outer(self.batch_real),
            student.start,
            [state.tensors["bases"], state.tensors["coefficients"]],
            torch.full(
                (self.inner_steps,), self.inner_lr, dtype=student.start.dtype, device=labels.index.device
            ),
            rule=Momentum(self.inner_momentum),
            mode=self.mode,
            states=self.states,
        )
        check_finite(found.value, "the loss after the inner training", "inner_lr or lr_img")
        (by_bases, by_rows), norm = clipped(found.gradients, self.clip)
        by_rows = by_rows + self.coefficient_decay * state.tensors["coefficients"]
        state = moved(state, by_bases, self.lr_img, self.momentum, "bases")
        state = moved(state, by_rows, self.lr_img, self.momentum, "coefficients")
        return state, {"loss": found.value, "norm": norm}

    def shown(self, problem: Problem) -> int:
        """Images of an inner step."""
        return problem.real.k * min(self.batch_syn, self.per_class(problem))

    def work(self, problem: Problem) -> float:
        """The unroll's and the real batch's."""
        return self.steps * self.passes(problem, self.inner_steps * self.shown(problem))

    def memory(self, problem: Problem) -> float:
        """The unroll's and the real batch's."""
        return self.bytes(problem, self.inner_steps)

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """Bases and coefficients, with the training they were made for."""
        real = problem.real
        return DistilledDataset(
            {"bases": state.tensors["bases"], "coefficients": state.tensors["coefficients"]},
            self._labels(problem),
            real.classes,
            real.space,
            decode=Bases(real.shape[1:]),
            recipe=Recipe(steps=300, lr=self.inner_lr, momentum=self.inner_momentum, augment=self.augment),
        )
