"""FRePo, feature regression with a pool of networks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from distillens import cost, kernels
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import at_least, one_of, positive
from distillens.core.contracts import Buffers, Log, Net, Params, Problem, State
from distillens.core.dataset import Dataset
from distillens.core.labels import Targets
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.vector import Shapes
from distillens.distillers._donors import KERNELS
from distillens.distillers._kernel import centred, dual, flops_a_pass, lamb_moved, share_right
from distillens.distillers._pixels import (
    Init,
    check_finite,
    classes_together,
    finished,
    initial,
    real_batch,
    small,
    with_moments,
)
from distillens.nets.convnet import ConvNet
from distillens.unroll import Adam

# Updates of the authors' evaluation by size of the set.
UPDATES = {10: 1000, 100: 2000, 500: 5000, 1000: 10_000, 2000: 40_000}


@dataclass(frozen=True)
class FRePo:
    """Ridge regression on the set, in the features of networks that are being trained on it, is made to fit real images.

    loss = mean over real images t of 1/2 || y_t - K_tp (K_pp + lambda I)^-1 y_p ||^2 - mean over the set's labels of
    min(top1 - top2, 1 / k), with K the products of the last hidden layer and lambda = ridge trace(K_pp) / n. The
    gradient reaches images and labels through features and solve only; both are learned by LAMB at a rate that falls
    to a tenth along a cosine.

    A step draws one network of the ``pool``; afterwards the network takes one step of Adam on the set (half the
    squared error, at most ``batch_train`` images), or, once it has the age ``max_age``, is made anew. The first
    networks are all fresh, but count as of ages spread over [0, max_age), so that they do not end together.
    ``batch_real`` is real images a class. With ``flip`` the regression sees every image mirrored as well.

    Source: Zhou et al. 2022; ``lib/datadistillation/frepo.py``. Where we differ: the network is
    the field's ConvNet with its own norm (theirs has widths 128, 256, 512 and batch norm before the convolutions); real
    batches are balanced over the classes; the solve is in float64; a network ends at ``max_age``, theirs an update
    later.
    """

    paper: ClassVar[str] = "Zhou et al. 2022"
    family: ClassVar[str] = "kernel"
    selects: ClassVar[bool] = False
    soft_labels: ClassVar[bool] = True
    learns_lr: ClassVar[bool] = False
    needs_experts: ClassVar[bool] = False
    lacks: ClassVar[Mapping[str, str]] = KERNELS

    steps: int = 500_000
    lr: float = 0.0003
    lr_net: float = 0.0003
    pool: int = 10
    max_age: int = 100
    batch_real: int = 102
    batch_train: int = 500
    ridge: float = 1e-6
    flip: bool = True
    init: Init = "real"
    net: Net = field(default_factory=ConvNet)

    def __post_init__(self) -> None:
        at_least(0, "frepo", steps=self.steps)
        at_least(
            1,
            "frepo",
            pool=self.pool,
            max_age=self.max_age,
            batch_real=self.batch_real,
            batch_train=self.batch_train,
        )
        positive("frepo", lr=self.lr, lr_net=self.lr_net, ridge=self.ridge)
        one_of("init", self.init, ("real", "noise"))

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> FRePo:
        """The authors' values, without flips of grey images; on digits' scale few, larger steps."""
        net = ConvNet.defaults(like)
        if small(like):
            quick = cls(steps=300, lr=0.01, lr_net=0.003, batch_real=32, flip=False, net=net)
            # As many images as features interpolate with huge weights: only a real ridge makes a set of use there.
            return quick if ipc < 5 else replace(quick, steps=150, lr=0.006, ridge=0.1)
        many = like.k >= 100 and ipc > 1  # they mirror sets of 100 classes and more at one image a class only
        return cls(batch_real=max(1, 1024 // like.k), flip=like.shape[0] > 1 and not many, net=net)

    def needs(self, problem: Problem) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def start(self, problem: Problem) -> State:
        """The initial images and labels, and the pool."""
        k = problem.real.k
        images = initial(problem, self.init)
        labels = (centred(problem.labels(), k) / math.sqrt(k / 10)).to(images)
        tensors = with_moments({"images": images, "labels": labels}).tensors
        for j in range(self.pool):
            tensors |= self._fresh(problem, j, problem.key.fold("pool", j))
        return State(
            {
                **tensors,
                "ages": torch.arange(self.pool) * self.max_age // self.pool,
                "updates": torch.zeros(self.pool, dtype=torch.int64),
            }
        )

    def step(self, problem: Problem, state: State, i: int) -> tuple[State, Log]:
        """One step of images and labels under a network of the pool, one of the network on the set."""
        key = problem.key.fold("step", i)
        j = int(key.fold("which").integers(self.pool, 1))
        shapes = Shapes.of(self.net.init(problem.real, problem.key)[0])
        params, buffers = _network(shapes, state, j)
        images = state.tensors["images"].detach().requires_grad_()
        labels = state.tensors["labels"].detach().requires_grad_()
        targets, features = self._real(problem, params, buffers, key.fold("real"))
        shown = torch.cat([images, images.flip(-1)]) if self.flip else images
        ours = self.net.features(params, buffers, shown)[0].double()
        wanted = labels.double().repeat(2, 1) if self.flip else labels.double()
        outputs = features @ ours.mT @ dual(ours @ ours.mT, wanted, self.ridge)
        fit = 0.5 * (outputs - targets).square().sum(-1).mean()
        apart = margin(labels)
        loss = fit - apart
        check_finite(loss.detach(), "the loss", "lr or lr_net")
        gradients = torch.autograd.grad(loss, (images, labels))
        rate = self.rate(i)
        for name, gradient in zip(("images", "labels"), gradients, strict=True):
            state = lamb_moved(state, gradient, rate, i, name)
        log = {
            "loss": float(loss.detach()),
            "fit": float(fit.detach()),
            "margin": float(apart.detach()),
            "accuracy": share_right(outputs, targets),
        }
        return self._grown(problem, state, j, shapes, key), log

    def rate(self, i: int) -> float:
        """LAMB's rate at step i: from ``lr`` along half a cosine to a tenth of it."""
        return self.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / self.steps)))

    def _real(
        self, problem: Problem, params: Params, buffers: Buffers, key: Key
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Targets [k * b, k] and features [k * b, d] of a real batch, float64."""
        real = real_batch(problem, key, self.batch_real)
        k, b = real.shape[:2]
        with torch.no_grad(), kernels.for_targets():
            features = torch.cat(
                [
                    self.net.features(params, buffers, some.flatten(0, 1))[0]
                    for some in torch.split(real, classes_together(b, problem.real))
                ]
            )
        hard = torch.arange(k, device=real.device).repeat_interleave(b)
        return centred(hard, k), features.double()

    def _fresh(self, problem: Problem, j: int, key: Key) -> dict[str, torch.Tensor]:
        """A new network's tensors at place j of the pool: parameters [P], Adam's moments, buffers."""
        params, buffers = self.net.init(problem.real, key)
        flat = Shapes.of(params).flatten(params).to(problem.real.images)
        name = f"net{j}"
        remembered = {f"{name}.buffer.{n}": b.to(problem.real.device) for n, b in buffers.items()}
        return {**with_moments({name: flat}).tensors, **remembered}

    def _grown(self, problem: Problem, state: State, j: int, shapes: Shapes, key: Key) -> State:
        """The state after network j has taken a step on the set, or has been made anew."""
        ages, updates = state.tensors["ages"].clone(), state.tensors["updates"].clone()
        if int(ages[j]) >= self.max_age:
            ages[j], updates[j] = 0, 0
            changed = self._fresh(problem, j, key.fold("net"))
        else:
            changed = self._trained(state, j, shapes, key.fold("train"))
            ages[j] += 1
            updates[j] += 1
        return State({**state.tensors, **changed, "ages": ages, "updates": updates}, state.values)

    def _trained(self, state: State, j: int, shapes: Shapes, key: Key) -> dict[str, torch.Tensor]:
        """Network j's tensors after one step of Adam on the set."""
        images, labels = state.tensors["images"], state.tensors["labels"]
        if len(images) > self.batch_train:
            index = key.permutation(len(images))[: self.batch_train]
            images, labels = images[index], labels[index]
        _, buffers = _network(shapes, state, j)
        name = f"net{j}"
        now = tuple(state.tensors[n] for n in (name, f"{name}.first", f"{name}.second"))
        leaf = now[0].detach().requires_grad_()
        logits, new = self.net.logits(shapes.unflatten(leaf), buffers, images, "train")
        (gradient,) = torch.autograd.grad(Targets(labels).loss(logits).mean(), leaf)
        check_finite(gradient, "the gradient of a network in the pool", "lr_net")
        rate = gradient.new_tensor(self.lr_net)
        after = Adam().step(now, gradient, rate, int(state.tensors["updates"][j]))
        remembered = {f"{name}.buffer.{n}": b.detach() for n, b in new.items()}
        return {**dict(zip((name, f"{name}.first", f"{name}.second"), after, strict=True)), **remembered}

    def _shown(self, problem: Problem) -> int:
        """Images that the regression stands on."""
        return problem.real.k * problem.ipc * (2 if self.flip else 1)

    def _real_images(self, problem: Problem) -> int:
        return problem.real.k * min(self.batch_real, min(map(len, problem.by_class)))

    def work(self, problem: Problem) -> float:
        """The real batch forward, the set there and back, a training step, the solve there and back."""
        n, trained = self._shown(problem), min(self.batch_train, problem.real.k * problem.ipc)
        solve = 3.0 * n**3 / flops_a_pass(self.net, problem.real)
        return self.steps * (self._real_images(problem) + 3.0 * n + 2.93 * trained + solve)

    def memory(self, problem: Problem) -> float:
        """The set's graph (or a training step's), real images without one, kernels and solve in float64, the pool."""
        one = cost.cost(self.net, problem.real)
        n, real = self._shown(problem), self._real_images(problem)
        k = problem.real.k
        passing = min(k, classes_together(max(1, real // k), problem.real)) * (real // k)
        pool = 3 * cost.FLOAT * one.parameters * (self.pool + 1)
        return n * one.first + passing * one.first / 3 + 8.0 * (4 * n * n + n * real) + pool

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """The images with their learned targets, and the training they were made for."""
        n = problem.real.k * problem.ipc
        recipe = Recipe(
            steps=UPDATES[min(UPDATES, key=lambda size: abs(math.log(size / n)))],
            batch=self.batch_train,
            optimiser="adam",
            lr=self.lr_net,
            momentum=0.0,
            schedule="cosine",
            augment="flip" if self.flip else "",
        )
        return finished(problem, state.tensors["images"], recipe, Targets(state.tensors["labels"]))


def _network(shapes: Shapes, state: State, j: int) -> tuple[Params, Buffers]:
    """Network j of the pool."""
    prefix = f"net{j}.buffer."
    buffers = {n.removeprefix(prefix): b for n, b in state.tensors.items() if n.startswith(prefix)}
    return shapes.unflatten(state.tensors[f"net{j}"]), buffers


def margin(labels: torch.Tensor) -> torch.Tensor:
    """How far the largest entry of labels [n, k] stands above the next, 1 / k at most, on average."""
    top = labels.topk(2, dim=-1).values
    return (top[..., 0] - top[..., 1]).clamp(max=1 / labels.shape[-1]).mean()
