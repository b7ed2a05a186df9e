"""Dataset distillation as first proposed: a few ordered steps with learned rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from distillens.core.artefact import DistilledDataset, Order
from distillens.core.checks import UserError, at_least, positive
from distillens.core.contracts import Log, Problem, State
from distillens.core.dataset import Dataset
from distillens.core.labels import Hard
from distillens.core.recipe import Recipe
from distillens.distillers._pixels import (
    adam_moved,
    check_finite,
    finished,
    fresh,
    initial,
    small,
    with_moments,
)
from distillens.distillers._unrolled import Student, Unrolling
from distillens.nets.convnet import ConvNet
from distillens.unroll import Momentum, Unrolled, unroll


@dataclass(frozen=True)
class Wang2018(Unrolling):
    """The set is a training: gradient steps in a fixed order, each on its own images at its own learned rate.

    ``per_step`` images a class make a step, so ``ipc / per_step`` steps are stored; they are walked through
    ``distill_epochs`` times, with another rate each time. min over images and rates of E_theta0 L(theta_T; T).
    Rates are softplus of a raw parameter: positive whatever the optimiser does. Whoever trains on the set replays
    the steps: it is not an unordered training set.

    Source: Wang et al. 2018, algorithm 1 with random initialisation ("unknown_init"); ``train_distilled_image.py``. Where
    we differ: the exact adjoint (their code keeps the graphs of all steps), PyTorch's initialisation where theirs is
    Xavier's, networks of the distillation literature, and a fresh real batch balanced over the classes.
    """

    paper: ClassVar[str] = "Wang et al. 2018"
    learns_lr: ClassVar[bool] = True

    steps: int = 20_000
    per_step: int = 1
    distill_epochs: int = 3
    lr_start: float = 0.02
    lr_img: float = 0.01
    decay_steps: int = 2000
    n_nets: int = 1
    batch_real: int = 102

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(
            1,
            "wang2018",
            per_step=self.per_step,
            distill_epochs=self.distill_epochs,
            decay_steps=self.decay_steps,
            n_nets=self.n_nets,
        )
        positive("wang2018", lr_start=self.lr_start)

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> Wang2018:
        """The authors' loops (a batch of 1,020 for their 1,024); on digits' scale a short version of them."""
        net = ConvNet.defaults(like)
        if small(like):
            return cls(
                steps=60,
                per_step=1 if ipc % 2 else 2,
                distill_epochs=10 if ipc < 5 else 4,
                lr_start=0.2,
                lr_img=0.1,
                batch_real=32,
                init="real",
                mode="graph",
                net=net,
            )
        rgb = like.shape[0] == 3
        return cls(lr_start=0.001 if rgb else 0.02, batch_real=max(1, 1020 // like.k), net=net)

    def order(self, problem: Problem) -> torch.Tensor:
        """The images of each step of the training [distill_epochs * ipc / per_step, k * per_step].

        Raises:
            UserError: the steps do not share the images out evenly.
        """
        if problem.ipc % self.per_step:
            raise UserError(
                "wang2018: the steps do not share the images out",
                got=f"{problem.ipc} images a class, {self.per_step} a step",
                fix="choose a per_step that divides the images a class",
            )
        every = torch.arange(problem.real.k * problem.ipc).view(problem.real.k, -1, self.per_step)
        return every.transpose(0, 1).flatten(1).repeat(self.distill_epochs, 1)

    def start(self, problem: Problem) -> State:
        """The initial images and raw rates."""
        count = len(self.order(problem))
        images = initial(problem, self.init)
        raw = torch.full((count,), self.lr_start, dtype=images.dtype, device=images.device).expm1().log()
        return with_moments({"images": images, "rates": raw})

    def step(self, problem: Problem, state: State, i: int) -> tuple[State, Log]:
        """The ordered steps from ``n_nets`` fresh networks, and the way back to images and rates."""
        key = problem.key.fold("step", i)
        order = self.order(problem).to(problem.real.device)
        rates = F.softplus(state.tensors["rates"])
        found = [
            self._unrolled(problem, state, key_of, order, rates)
            for key_of in (key.fold("net", j) for j in range(self.n_nets))
        ]
        loss = sum(one.value for one in found) / self.n_nets
        check_finite(loss, "the loss after the ordered steps", "lr_start or lr_img")
        by_images = torch.stack([one.gradients[0] for one in found]).mean(0)
        by_rates = torch.stack([one.rate_gradients for one in found]).mean(0)
        by_raw = by_rates * torch.sigmoid(state.tensors["rates"])
        lr = self.lr_img * 0.5 ** (i // self.decay_steps)
        state = adam_moved(state, by_images, lr, (0.5, 0.999), i)
        state = adam_moved(state, by_raw, lr, (0.5, 0.999), i, "rates")
        return state, {"loss": loss, "rate": float(F.softplus(state.tensors["rates"]).mean())}

    def _unrolled(
        self, problem: Problem, state: State, key: Any, order: torch.Tensor, rates: torch.Tensor
    ) -> Unrolled:
        params = fresh(self.net, problem, key)
        student = Student(self.net, params, problem, key, problem.ipc, problem.ipc)
        labels = Hard(problem.labels().to(order.device))
        shapes = student.shapes

        def inner(flat: torch.Tensor, learned: Sequence[torch.Tensor], t: int) -> torch.Tensor:
            logits = self.net.logits(shapes.unflatten(flat), {}, learned[0][order[t]], "train")[0]
            return labels.take(order[t]).loss(logits).mean()

        return unroll(
            inner,
            student.outer(self.batch_real),
            student.start,
            [state.tensors["images"]],
            rates,
            rule=Momentum(),
            mode=self.mode,
            states=self.states,
        )

    def shown(self, problem: Problem) -> int:
        """Images of an inner step."""
        return problem.real.k * self.per_step

    def work(self, problem: Problem) -> float:
        """The ordered steps' and the real batch's, for each network."""
        image_steps = self.distill_epochs * problem.real.k * problem.ipc
        return self.steps * self.n_nets * self.passes(problem, image_steps)

    def memory(self, problem: Problem) -> float:
        """The unroll's and the real batch's, of one network at a time."""
        count = self.distill_epochs * max(1, problem.ipc // self.per_step)
        return self.bytes(problem, count)

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """The images with their ordered steps and learned rates."""
        rates = F.softplus(state.tensors["rates"])
        recipe = Recipe(steps=len(rates), lr=float(rates.mean()), momentum=0.0)
        done = finished(problem, state.tensors["images"], recipe)
        return DistilledDataset(
            done.stored,
            done.labels,
            done.classes,
            done.space,
            recipe=recipe,
            order=Order(self.order(problem), rates),
        )
