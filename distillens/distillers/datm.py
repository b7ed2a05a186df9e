"""DATM, difficulty-aligned trajectory matching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError, at_least, positive
from distillens.core.contracts import Log, Problem, State
from distillens.core.dataset import Dataset, check_per_class
from distillens.core.labels import Logits
from distillens.core.recipe import Recipe
from distillens.distillers._pixels import begin, moved, small, velocity_of
from distillens.distillers._trajectory import Matching, Rows, quick, row, scale
from distillens.experts import Trajectories
from distillens.nets.convnet import ConvNet

LOOKS = 1000  # real images of a class that are looked at for some that an expert gets right

# The authors' rows by images a class (their ``configs``). Without a first maximum nothing grows.
_LARGE = {"min_start_epoch": 40, "max_start_epoch": 60, "lr_img": 50.0, "lr_y": 10.0, "expansion_end": 0}
ROWS: Rows = {
    "cifar10": {
        1: {"max_start_epoch": 4, "lr_y": 5.0, "lr_lr": 1e-7, "expansion_end": 0},
        10: {"first_max_start_epoch": 10},
        50: {
            "max_start_epoch": 40,
            "first_max_start_epoch": 20,
            "lr_img": 1000.0,
            "expansion_end": 2000,
        },
        500: {**_LARGE, "syn_steps": 40, "batch_syn": 1000},
        1000: {**_LARGE, "syn_steps": 100, "batch_syn": 1000},
    },
    "cifar100": {
        1: {"syn_steps": 40, "expert_epochs": 3, "lr_img": 1000.0, "lr_y": 10.0},
        10: {
            "max_start_epoch": 50,
            "first_max_start_epoch": 30,
            "lr_img": 1000.0,
            "lr_y": 10.0,
            "expansion_end": 2000,
            "batch_syn": 1000,
        },
        50: {
            **_LARGE,
            "min_start_epoch": 20,
            "max_start_epoch": 70,
            "lr_img": 1000.0,
            "batch_syn": 1000,
        },
        100: {**_LARGE, "min_start_epoch": 30, "max_start_epoch": 70, "batch_syn": 1000},
    },
    "tiny": {
        1: {
            "syn_steps": 40,
            "first_max_start_epoch": 15,
            "lr_img": 1e4,
            "lr_y": 10.0,
            "lr_lr": 1e-4,
            "expansion_end": 2000,
        },
        10: {
            **_LARGE,
            "syn_steps": 40,
            "min_start_epoch": 10,
            "max_start_epoch": 50,
            "lr_img": 100.0,
            "lr_lr": 1e-4,
            "batch_syn": 500,
        },
        50: {
            **_LARGE,
            "syn_steps": 20,
            "max_start_epoch": 70,
            "lr_img": 100.0,
            "lr_lr": 1e-4,
            "batch_syn": 1000,
        },
    },
}


@dataclass(frozen=True)
class DATM(Matching):
    """MTT on flat experts, from start epochs as hard as the set is large, with learned soft labels.

    The start epoch is drawn in [T-, T(i)): T(i) grows linearly from ``first_max_start_epoch`` to ``max_start_epoch`` (T+)
    over ``expansion_end`` steps (0 is no growth). Labels are logits y and are learned: the student's loss is
    -sum softmax(y) log softmax(f). Images start from real ones that an expert gets right, labels from the mean logits
    of the experts that do. A step whose matching loss is above ``threshold`` is skipped.

    Source: Guo et al. 2024, equations 3 to 5; ``distill/DATM.py``. Where we differ: "right" is said by the experts' last
    kept pass; of each class at most 1,000 random images are looked at, and where too few are right, those on which
    the experts give the class most probability fill up, with the mean logits of all experts and their own class
    raised above the others (their code divides by zero there).
    """

    paper: ClassVar[str] = "Guo et al. 2024"
    soft_labels: ClassVar[bool] = True

    rho: float = 0.01
    gsam_alpha: float = 0.3
    min_start_epoch: int = 0
    first_max_start_epoch: int = 10
    expansion_end: int = 1000
    lr_y: float = 2.0
    momentum_y: float = 0.9
    threshold: float = 1.0
    mode: Literal["graph", "adjoint"] = "adjoint"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(
            0,
            "datm",
            rho=self.rho,
            gsam_alpha=self.gsam_alpha,
            min_start_epoch=self.min_start_epoch,
            expansion_end=self.expansion_end,
            lr_y=self.lr_y,
            momentum_y=self.momentum_y,
        )
        positive("datm", threshold=self.threshold)
        first = self.first_max_start_epoch if self.expansion_end else self.max_start_epoch
        if not self.min_start_epoch < first <= self.max_start_epoch:
            raise UserError(
                "datm: start epochs do not ascend",
                got=f"min {self.min_start_epoch}, first max {first}, max {self.max_start_epoch}",
                expected="min_start_epoch < first_max_start_epoch <= max_start_epoch",
            )

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> DATM:
        """The authors' rows by data and images a class; on digits' scale a short version."""
        net = ConvNet.defaults(like)
        if small(like):
            first = 1 if ipc < 5 else 4
            return cls(
                first_max_start_epoch=first, expansion_end=30, lr_y=1.0, mode="graph", net=net, **quick(ipc)
            )
        # Experts by FTD's columns.
        alpha = 0.3 if scale(like) == "cifar10" and ipc < 30 else 1.0
        return cls(
            gsam_alpha=alpha,
            **{"steps": 10_000, "syn_steps": 80, "lr_start": 0.01, "net": net, **row(like, ipc, ROWS)},
        )

    @property
    def way(self) -> Literal["graph", "adjoint"]:
        """As set."""
        return self.mode

    @property
    def expert_recipe(self) -> Recipe:
        """FTD's."""
        return self.plain_experts.but(rho=self.rho, gsam_alpha=self.gsam_alpha if self.rho else 0.0)

    def last_start(self, i: int) -> int:
        """T(i): one more than the latest start epoch at step i."""
        if i >= self.expansion_end:
            return self.max_start_epoch
        grown = (self.max_start_epoch - self.first_max_start_epoch) * i / self.expansion_end
        return self.first_max_start_epoch + int(grown)

    def start(self, problem: Problem) -> State:
        """Images that experts get right, the logits they give them, the step size.

        Raises:
            UserError: a class has fewer images than were asked for, or the experts do not fit.
        """
        state = self.begun(problem)
        images, logits = self._understood(problem)
        if self.init == "noise":
            images = state.tensors["images"]
        return State(
            {
                **begin(images).tensors,
                "logits": logits,
                velocity_of("logits"): torch.zeros_like(logits),
            },
            state.values,
        )

    def _understood(self, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        """Real images [k * ipc, c, h, w] that experts get right, with their mean logits [k * ipc, k]."""
        if self.init == "real":
            check_per_class(problem.real, problem.ipc)
        images, labels = [], []
        for c, members in enumerate(problem.by_class):
            order = members[problem.key.fold("understood", c).permutation(len(members))][:LOOKS]
            right, seen = torch.zeros(0, dtype=torch.bool), 0
            logits = problem.real.images.new_zeros(0, 0, 0)
            block = 2 * problem.ipc
            while int(right.sum()) < problem.ipc and seen < len(order):
                shown = problem.real.images[order[seen : seen + block]]
                said = self._say(problem, shown)
                logits = torch.cat([logits, said], 1) if seen else said
                right = (logits.argmax(-1) == c).any(0)
                seen += len(shown)
            # Those that an expert gets right come first, in random order; then the likeliest.
            likely = logits.softmax(-1)[..., c].mean(0)
            rank = torch.where(right, 2.0, likely).argsort(descending=True, stable=True)[: problem.ipc]
            hits = (logits[:, rank].argmax(-1) == c) | ~right[rank]
            share = hits.to(logits)[..., None]
            mean = (logits[:, rank] * share).sum(0) / share.sum(0)
            mean[~right[rank], c] = mean[~right[rank]].amax(1) + 1
            images.append(problem.real.images[order[rank]])
            # With few real images and an init of noise, the rows are repeated.
            labels.append(mean[torch.arange(problem.ipc) % len(mean)])
        return torch.cat(images), torch.cat(labels)

    def _say(self, problem: Problem, images: torch.Tensor) -> torch.Tensor:
        """Every expert's logits [experts, n, k] after the last kept pass."""
        experts: Trajectories = problem.inputs["experts"]
        last = self.max_start_epoch - 1 + self.expert_epochs
        with torch.no_grad():
            return torch.stack(
                [
                    self.net.logits(experts.shapes.unflatten(experts.at(e, last).to(images)), {}, images)[0]
                    for e in range(len(experts))
                ]
            )

    def step(self, problem: Problem, state: State, i: int) -> tuple[State, Log]:
        """One stretch of one expert is matched."""
        key = problem.key.fold("step", i)
        stretch = self.stretch(problem, key, self.min_start_epoch, self.last_start(i))
        learned = [state.tensors["images"], state.tensors["logits"]]
        rate = float(state.values["rate"])
        found = self.matched(problem, key, stretch, rate, learned, lambda learned: Logits(learned[1]))
        if found.value > self.threshold:
            return state, {"loss": found.value, "rate": rate, "skipped": 1.0}
        state, log = self.after(state, found)
        state = moved(state, found.gradients[1], self.lr_y, self.momentum_y, "logits")
        return state, {**log, "skipped": 0.0}

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """The images with their learned logits and step size."""
        return self.set_of(problem, state.tensors["images"], state, Logits(state.tensors["logits"]))
