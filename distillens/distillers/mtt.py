"""MTT, matching training trajectories."""

from __future__ import annotations

import math
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
from distillens.core.rng import Key
from distillens.distillers._pixels import Init, begin, finished, initial, moved, refuse_buffers, small
from distillens.nets.convnet import ConvNet
from distillens.train import Population, Training
from distillens.unroll import unroll


@dataclass(frozen=True)
class MTT:
    """A network trained on the distilled set is led along the way of networks trained on real data.

    From an expert's parameters after t <= T+ passes a student takes N steps of SGD on the distilled set:
    loss = ||student_{t+N} - expert_{t+M}||^2 / ||expert_t - expert_{t+M}||^2. Images and step size are learned.

    The experts are trainings of the real data, kept after each of their first T+ + M passes only.
    The learned step size stays positive: a step of its SGD never takes off more than half of it.

    Source: Cazenavette et al. 2022, equation 2, algorithm 1; ``distill.py``, ``buffer.py``. Where we differ: the
    exact adjoint stands in for the full graph on large images (the same gradient in constant memory), experts stop
    where they are last used, the learned step size is kept with the set.
    """

    paper: ClassVar[str] = "Cazenavette et al. 2022"
    family: ClassVar[str] = "trajectory"
    selects: ClassVar[bool] = False
    soft_labels: ClassVar[bool] = False
    learns_lr: ClassVar[bool] = True
    needs_experts: ClassVar[bool] = True

    steps: int = 5000
    syn_steps: int = 30
    expert_epochs: int = 2
    max_start_epoch: int = 20
    lr_img: float = 100.0
    lr_lr: float = 1e-5
    lr_start: float = 0.001
    momentum: float = 0.5
    batch_syn: int | None = None
    experts: int = 100
    expert_lr: float = 0.01
    expert_batch: int = 256
    augment: str = "color_crop_cutout_flip_scale_rotate"
    init: Init = "real"
    mode: Literal["graph", "adjoint"] = "adjoint"
    net: Net = field(default_factory=ConvNet)

    def __post_init__(self) -> None:
        at_least(0, "mtt", steps=self.steps, momentum=self.momentum, lr_lr=self.lr_lr)
        at_least(
            1,
            "mtt",
            syn_steps=self.syn_steps,
            expert_epochs=self.expert_epochs,
            max_start_epoch=self.max_start_epoch,
            experts=self.experts,
            expert_batch=self.expert_batch,
        )
        positive("mtt", lr_img=self.lr_img, lr_start=self.lr_start, expert_lr=self.expert_lr)
        one_of("init", self.init, ("real", "noise"))
        one_of("mode", self.mode, ("graph", "adjoint"))
        augment.parse(self.augment)

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> MTT:
        """The authors' CIFAR-10 rows by images a class (1, 10, 50); on digits' scale a short version."""
        net = ConvNet.defaults(like)
        if small(like):
            # Few images match the start of training, more match further on (as DATM finds at larger scale).
            early = ipc < 5
            return cls(
                steps=60,
                syn_steps=20,
                max_start_epoch=4 if early else 8,
                lr_img=50.0,
                lr_lr=1e-4,
                lr_start=0.05 if early else 0.1,
                experts=4,
                expert_lr=0.05 if early else 0.1,
                expert_batch=64,
                augment="",
                mode="graph",
                net=net,
            )
        if ipc < 5:
            return cls(syn_steps=50, max_start_epoch=2, lr_img=100.0, lr_lr=1e-7, lr_start=0.01, net=net)
        if ipc < 30:
            return cls(net=net)
        return cls(max_start_epoch=40, lr_img=1000.0, net=net)

    def needs(self, problem: Problem) -> Mapping[str, Any]:
        """The experts' parameters after each of their first passes over the real data."""
        a_pass = math.ceil(len(problem.real) / self.expert_batch)
        # The last start is at pass max_start_epoch - 1: ``np.random.randint`` excludes its bound.
        moments = tuple(e * a_pass for e in range(self.max_start_epoch + self.expert_epochs))
        recipe = Recipe(
            steps=moments[-1],
            batch=self.expert_batch,
            lr=self.expert_lr,
            momentum=0.0,
            augment=self.augment,
        )
        keys = problem.key.fold("experts").split(self.experts)
        return {"experts": Training(problem.real, self.net, recipe, keys, snapshots=moments)}

    def start(self, problem: Problem) -> State:
        """The initial images and step size."""
        state = begin(initial(problem, self.init), rate=self.lr_start, rate_velocity=0.0)
        state.tensors["labels"] = problem.labels().to(state.tensors["images"].device)
        return state

    def step(self, problem: Problem, state: State, i: int) -> tuple[State, Log]:
        """One stretch of one expert is matched."""
        key = problem.key.fold("step", i)
        experts: Population = problem.inputs["experts"]
        refuse_buffers(self.net, experts.buffers)
        expert = int(key.fold("expert").integers(len(experts), 1))
        start_epoch = int(key.fold("start").integers(self.max_start_epoch, 1))
        theta = experts.snapshots[expert, start_epoch].to(problem.real.images)
        target = experts.snapshots[expert, start_epoch + self.expert_epochs].to(theta)
        batches = self._batches(len(state.tensors["images"]), key)
        labels = state.tensors["labels"]
        scale = (theta - target).square().sum()

        def inner(flat: torch.Tensor, learned: Sequence[torch.Tensor], t: int) -> torch.Tensor:
            index = batches[t]
            shown = learned[0] if index is None else learned[0][index]
            shown = augment.apply(shown, augment.draw(self.augment, key.fold("augment", t), len(shown)))
            logits = self.net.logits(experts.shapes.unflatten(flat), {}, shown, "train")[0]
            return F.cross_entropy(logits, labels if index is None else labels[index])

        rate = float(state.values["rate"])
        found = unroll(
            inner,
            lambda flat: (flat - target).square().sum() / scale,
            theta,
            [state.tensors["images"]],
            rate,
            steps=self.syn_steps,
            momentum=0.0,
            mode=self.mode,
        )
        if not math.isfinite(found.value + found.rate_gradient):
            raise UserError(
                "mtt: the matching loss is not finite",
                got=f"loss {found.value}, step size {rate:.4g}",
                fix="the last good state is kept; start again with --force and a smaller lr_lr, lr_start or lr_img",
            )
        state = moved(state, found.gradients[0], self.lr_img, self.momentum)
        velocity = self.momentum * float(state.values["rate_velocity"]) + found.rate_gradient
        new_rate = max(rate - self.lr_lr * velocity, rate / 2)
        values = {**state.values, "rate": new_rate, "rate_velocity": velocity}
        return State(state.tensors, values), {"loss": found.value, "rate": new_rate}

    def _batches(self, n: int, key: Key) -> list[torch.Tensor | None]:
        """The images of each inner step: a permutation cut in chunks, then the next one."""
        if self.batch_syn is None or self.batch_syn >= n:
            return [None] * self.syn_steps
        batches: list[torch.Tensor | None] = []
        while len(batches) < self.syn_steps:
            batches += torch.split(key.fold("batches", len(batches)).permutation(n), self.batch_syn)
        return batches[: self.syn_steps]

    def work(self, problem: Problem) -> float:
        """8.8 passes an image and inner step with the full graph, 11.7 with the adjoint."""
        n = problem.real.k * problem.ipc
        each = 8.8 if self.mode == "graph" else 11.7
        return self.steps * self.syn_steps * min(n, self.batch_syn or n) * each

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """The images, with the learned step size in the recipe they were made for."""
        recipe = Recipe(
            steps=1000,
            batch=256,
            lr=float(state.values["rate"]),
            weight_decay=5e-4,
            schedule="tenth_at_half",
            augment=self.augment,
        )
        return finished(problem, state.tensors["images"], recipe)
