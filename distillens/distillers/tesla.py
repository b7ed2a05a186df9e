"""TESLA, trajectory matching in constant memory by an approximate gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from distillens.core.artefact import DistilledDataset
from distillens.core.contracts import Log, Problem, State
from distillens.core.dataset import Dataset
from distillens.core.labels import Probabilities
from distillens.core.recipe import Recipe
from distillens.distillers._pixels import small
from distillens.distillers._trajectory import MTT_ROWS, Matching, Rows, Stretch, quick, row
from distillens.experts import Trajectories
from distillens.nets.convnet import ConvNet

# The authors' own rows: CIFAR-10 at 1 (MTT's beside it), CIFAR-100 at 50, ImageNet-1K at 1, 64 px.
ROWS: Rows = {
    "cifar10": {
        **MTT_ROWS["cifar10"],
        1: {"syn_steps": 50, "max_start_epoch": 5, "lr_img": 1000.0, "lr_lr": 1e-7, "lr_start": 0.01},
    },
    "tiny": {
        **MTT_ROWS["tiny"],
        1: {
            "syn_steps": 10,
            "expert_epochs": 3,
            "max_start_epoch": 10,
            "lr_img": 1e4,
            "lr_lr": 1e-4,
            "lr_start": 0.01,
            "batch_syn": 100,
        },
    },
}


@dataclass(frozen=True)
class TESLA(Matching):
    """MTT's loss with a gradient that needs one step's graph only, and is not the exact one.

    theta_{t+N} = theta_t - beta sum_i g_i. The loss's gradient at the end is pulled back through each g_i as it stands,
    as if g_i did not depend on what earlier steps saw. Equal to MTT at one inner step; ``docs/methods.md`` has the
    cosine to the exact gradient against the number of steps. MTT's own adjoint has the exact gradient in constant
    memory at about the same cost: prefer it, and use this for fidelity.

    ``teacher_label``: the labels are what the expert's target network says of the present images, at each step
    anew; the set keeps the last ones.

    Source: Cui et al. 2023, equations 7 to 11; ``distill.py``. Where we differ: the gradient's factor 2, which the code
    loses (``2 * tuple``), is there, so ``lr_img`` means what it means for MTT.
    """

    paper: ClassVar[str] = "Cui et al. 2023"

    teacher_label: bool = False

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> TESLA:
        """The authors' iterations and rows, MTT's where they have none; on digits' scale a short version."""
        net = ConvNet.defaults(like)
        if small(like):
            shorter = {"syn_steps": 10, "lr_start": 0.2, "lr_img": 20.0} if ipc >= 5 else {}
            return cls(net=net, **{**quick(ipc), **shorter})
        return cls(steps=10_000, net=net, **row(like, ipc, ROWS))

    @property
    def way(self) -> Literal["tesla"]:
        """TESLA's rule."""
        return "tesla"

    @property
    def expert_recipe(self) -> Recipe:
        """Plain SGD, MTT's."""
        return self.plain_experts

    def start(self, problem: Problem) -> State:
        """The initial images and step size; with ``teacher_label`` the one-hot labels."""
        state = self.begun(problem)
        if not self.teacher_label:
            return state
        one_hot = torch.nn.functional.one_hot(problem.labels(), problem.real.k)
        return State({**state.tensors, "labels": one_hot.to(state.tensors["images"])}, state.values)

    def step(self, problem: Problem, state: State, i: int) -> tuple[State, Log]:
        """One stretch of one expert is matched."""
        key = problem.key.fold("step", i)
        stretch = self.stretch(problem, key, 0, self.max_start_epoch)
        images, rate = state.tensors["images"], float(state.values["rate"])
        if not self.teacher_label:
            return self.after(state, self.matched(problem, key, stretch, rate, [images]))
        labels = self._teacher(problem, stretch, images)
        found = self.matched(problem, key, stretch, rate, [images], lambda _: Probabilities(labels))
        state, log = self.after(state, found)
        return State({**state.tensors, "labels": labels}, state.values), log

    def _teacher(self, problem: Problem, stretch: Stretch, images: torch.Tensor) -> torch.Tensor:
        """What the network at the end of the stretch says of the images, [k * ipc, k]."""
        experts: Trajectories = problem.inputs["experts"]
        with torch.no_grad():
            logits, _ = self.net.logits(experts.shapes.unflatten(stretch.target), {}, images)
        return logits.softmax(1)

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """The images, with the learned step size."""
        labels = Probabilities(state.tensors["labels"]) if self.teacher_label else None
        return self.set_of(problem, state.tensors["images"], state, labels)
