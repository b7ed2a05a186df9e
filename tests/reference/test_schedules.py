"""The rate of every schedule against torch's own schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from distillens.core.dataset import Dataset
from distillens.core.labels import Hard
from distillens.core.recipe import SCHEDULES, Recipe
from distillens.core.rng import Key
from distillens.core.space import Pixel
from distillens.engine.plan import Plan
from distillens.nets.mlp import MLP
from distillens.train import Training, train

LR = 0.01
NET = MLP(1, 4)
Scheduler = Callable[[torch.optim.Optimizer, int], Any]


def rates(make: Scheduler, steps: int) -> list[float]:
    """What an optimiser is told before each step, its scheduler moved on after each."""
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], LR)
    scheduler = make(optimiser, steps)
    found = []
    for _ in range(steps):
        found.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    return found


def milestones(share: float, *places: tuple[int, int]) -> Scheduler:
    def make(optimiser: torch.optim.Optimizer, steps: int) -> Any:
        at = [steps * top // bottom for top, bottom in places]
        return torch.optim.lr_scheduler.MultiStepLR(optimiser, at, share)

    return make


def warmed(optimiser: torch.optim.Optimizer, steps: int) -> Any:
    """A line from 0 over 500 steps, then torch's cosine over what is left."""
    rising = 500 if steps >= 1000 else steps // 2

    def factor(step: int) -> float:
        if step < rising:
            return step / rising
        return (1 + math.cos((step - rising) / (steps - rising) * math.pi)) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


TWINS: dict[str, Scheduler] = {
    "constant": lambda o, n: torch.optim.lr_scheduler.ConstantLR(o, 1.0),
    "tenth_at_half": lambda o, n: torch.optim.lr_scheduler.MultiStepLR(o, [n // 2 + 1], 0.1),
    "fifth_at_4_and_5_sixths": milestones(0.2, (2, 3), (5, 6)),
    "half_at_fifths": milestones(0.5, (1, 5), (2, 5), (3, 5), (4, 5)),
    "cosine": lambda o, n: torch.optim.lr_scheduler.CosineAnnealingLR(o, n),
    "half_cosine": lambda o, n: torch.optim.lr_scheduler.CosineAnnealingLR(o, 2 * n),
    "warm_up_cosine": warmed,
}


def our_rates(schedule: Any, steps: int) -> list[float]:
    """Read off the way of a network: how far each step goes, over the slope where it began."""
    images = torch.ones(1, 1, 1, 1)
    data = Dataset(images, Hard(torch.tensor([0])), ("a", "b"), Pixel())
    recipe = Recipe(steps, lr=LR, momentum=0.0, schedule=schedule)
    asked = Training(data, NET, recipe, (Key(0),), snapshots=tuple(range(steps + 1)))
    population = train(asked, Plan(precision="float64"))
    way = population.snapshots[0]
    found = []
    for before, after in pairwise(way):
        leaf = before.clone().requires_grad_()
        params = {n: p[0] for n, p in population.shapes.unflatten(leaf[None]).items()}
        logits, _ = NET.logits(params, {}, images.double(), "train")
        (slope,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([0])), leaf)
        found.append(float((before - after).norm() / slope.norm()))
    return found


def test_every_schedule_has_a_twin() -> None:
    assert sorted(TWINS) == sorted(SCHEDULES)


@pytest.mark.parametrize("steps", [2, 7, 30])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_is_torchs(schedule: Any, steps: int) -> None:
    assert our_rates(schedule, steps) == pytest.approx(rates(TWINS[schedule], steps), rel=1e-6, abs=1e-9)


def test_a_long_warm_up_takes_500_steps() -> None:
    found = our_rates("warm_up_cosine", 1200)
    assert found == pytest.approx(rates(warmed, 1200), rel=1e-6, abs=1e-9)
    assert found.index(max(found)) == 500
