"""DC, dataset condensation by gradient matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from distillens import cost, kernels
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError, at_least, one_of, positive
from distillens.core.contracts import Log, Net, Params, Problem, State, logits_of_many
from distillens.core.dataset import Dataset
from distillens.core.rng import Key
from distillens.core.vector import Shapes
from distillens.distillers._pixels import (
    Init,
    begin,
    classes_together,
    finished,
    fresh,
    initial,
    moved,
    real_batch,
    small,
)
from distillens.nets.convnet import ConvNet

# Matching steps and training passes between them, by images a class (``get_loops`` of the authors' code).
LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}


@dataclass(frozen=True)
class DC:
    """Distilled images are moved so that they give a network the gradients that real images give.

    min_S  E_theta0  sum_t sum_c  Dist(grad L(T_c; theta_t), grad L(S_c; theta_t)),
    theta_{t+1} trained on S. Dist sums 1 - cosine over the output units of every weight; biases and norm
    weights take no part.

    One step of ours is one outer iteration of theirs: a fresh network, ``outer_loop`` matching steps,
    ``inner_loop`` passes of training on S after each but the last.

    Source: Zhao, Mopuri & Bilen 2021, algorithm 1, equation 9; ``main.py``, ``match_loss``. Where we differ: the
    gradient is taken by as many classes at a time as a cache holds (the loss is a sum, so it is the same), which
    bounds memory.
    """

    paper: ClassVar[str] = "Zhao et al. 2021"
    family: ClassVar[str] = "gradient"
    selects: ClassVar[bool] = False
    soft_labels: ClassVar[bool] = False
    learns_lr: ClassVar[bool] = False
    needs_experts: ClassVar[bool] = False

    steps: int = 1000
    outer_loop: int = 1
    inner_loop: int = 1
    lr_img: float = 0.1
    momentum: float = 0.5
    lr_net: float = 0.01
    batch_real: int = 256
    batch_train: int = 256
    init: Init = "noise"
    net: Net = field(default_factory=ConvNet)

    def __post_init__(self) -> None:
        at_least(0, "dc", steps=self.steps, momentum=self.momentum, inner_loop=self.inner_loop)
        positive("dc", lr_img=self.lr_img, lr_net=self.lr_net)
        at_least(
            1, "dc", outer_loop=self.outer_loop, batch_real=self.batch_real, batch_train=self.batch_train
        )
        one_of("init", self.init, ("real", "noise"))

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> DC:
        """The authors' loops (the nearest row of their table); on digits' scale a short version of them."""
        net = ConvNet.defaults(like)
        if small(like):
            if ipc == 1:
                return cls(steps=150, lr_img=1.0, batch_real=64, init="real", net=net)
            return cls(steps=20, outer_loop=5, inner_loop=10, lr_img=1.0, lr_net=0.2, init="real", net=net)
        outer, inner = LOOPS[min(LOOPS, key=lambda known: abs(known - ipc))]
        return cls(outer_loop=outer, inner_loop=inner, net=net)

    def needs(self, problem: Problem) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def start(self, problem: Problem) -> State:
        """The initial images."""
        return begin(initial(problem, self.init))

    def step(self, problem: Problem, state: State, i: int) -> tuple[State, Log]:
        """One outer iteration: a fresh network is matched and trained in turn."""
        key = problem.key.fold("step", i)
        params = fresh(self.net, problem, key.fold("net"))
        total = 0.0
        for turn in range(self.outer_loop):
            place = key.fold("turn", turn)
            real = real_batch(problem, place.fold("real"), self.batch_real)
            loss, gradient = self._match(problem, params, real, state.tensors["images"])
            state = moved(state, gradient, self.lr_img, self.momentum)
            total += loss
            if turn < self.outer_loop - 1:
                params = self._train(problem, params, state.tensors["images"], place.fold("train"))
        return state, {"loss": total / self.outer_loop}

    def _match(
        self, problem: Problem, params: Params, real: torch.Tensor, images: torch.Tensor
    ) -> tuple[float, torch.Tensor]:
        """The distance and its gradient in the images, as many classes at a time as a cache holds.

        A class's gradient is that of a network of its own: the classes are a population with the same parameters.
        """
        k, n = problem.real.k, problem.ipc
        own = images.reshape(k, n, *images.shape[1:])

        def gradients(x: torch.Tensor, first: int, keep: bool) -> list[torch.Tensor]:
            m = len(x)
            leaves = {
                name: p.detach().expand(m, *p.shape).clone().requires_grad_() for name, p in params.items()
            }
            logits, _ = logits_of_many(self.net, leaves, {}, x, "train")
            labels = torch.arange(first, first + m, device=x.device).repeat_interleave(x.shape[1])
            loss = m * F.cross_entropy(logits.flatten(0, 1), labels)
            weights = [p for name, p in leaves.items() if params[name].ndim > 1]
            return [g.flatten(0, 1) for g in torch.autograd.grad(loss, weights, create_graph=keep)]

        total, pieces, targets = 0.0, [], []
        with kernels.for_targets():
            together = classes_together(real.shape[1], problem.real)
            for first in range(0, k, together):
                targets.append(gradients(real[first : first + together], first, keep=False))
        target = [torch.cat(parts) for parts in zip(*targets, strict=True)]
        together = classes_together(n, problem.real)
        for first in range(0, k, together):
            leaf = own[first : first + together].detach().requires_grad_()
            rows = [t.reshape(k, -1, *t.shape[1:])[first : first + together].flatten(0, 1) for t in target]
            loss = distance(rows, gradients(leaf, first, keep=True))
            pieces.append(torch.autograd.grad(loss, leaf)[0].flatten(0, 1))
            total += float(loss.detach())
        return total, torch.cat(pieces)

    def _train(self, problem: Problem, params: Params, images: torch.Tensor, key: Key) -> Params:
        """``inner_loop`` passes of plain SGD on the distilled images."""
        labels = problem.labels().to(images.device)
        shapes = Shapes.of(params)
        flat = shapes.flatten(params)
        for a_pass in range(self.inner_loop):
            for index in torch.split(key.fold(a_pass).permutation(len(images)), self.batch_train):
                leaf = flat.detach().requires_grad_()
                logits = self.net.logits(shapes.unflatten(leaf), {}, images[index], "train")[0]
                (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels[index]), leaf)
                flat = flat - self.lr_net * gradient
        if not bool(torch.isfinite(flat).all()):
            raise UserError("dc: the inner network diverged", fix="set a smaller lr_net")
        return shapes.unflatten(flat)

    def work(self, problem: Problem) -> float:
        """Per matching step 2.9 real and 7.8 distilled passes, per training step 2.9."""
        k, ipc = problem.real.k, problem.ipc
        real = min(self.batch_real, min(map(len, problem.by_class)))
        matching = self.outer_loop * k * (2.9 * real + 7.8 * ipc)
        training = (self.outer_loop - 1) * self.inner_loop * k * ipc * 2.9
        return self.steps * (matching + training)

    def memory(self, problem: Problem) -> float:
        """That of the classes that are taken together: second order for the distilled images, first for the real."""
        one, like = cost.cost(self.net, problem.real), problem.real
        real = min(self.batch_real, min(map(len, problem.by_class)))
        ours, theirs = (min(like.k, classes_together(n, like)) for n in (problem.ipc, real))
        return max(ours * one.step(problem.ipc), theirs * real * one.first)

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """The images."""
        return finished(problem, state.tensors["images"])


def distance(
    first: Sequence[torch.Tensor], second: Sequence[torch.Tensor], eps: float = 1e-6
) -> torch.Tensor:
    """Sum over weights and their output units of 1 - cosine (equation 9); rows are output units."""
    total = first[0].new_zeros(())
    for a, b in zip(first, second, strict=True):
        a, b = a.flatten(1), b.flatten(1)
        cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + eps)
        total = total + (1 - cosine).sum()
    return total
