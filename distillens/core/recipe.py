"""A training recipe: everything about training that is not the data, the network or the key."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from distillens.core.checks import UserError, at_least, one_of, positive

Schedule = Literal[
    "constant",
    "tenth_at_half",
    "fifth_at_4_and_5_sixths",
    "half_at_fifths",
    "cosine",
    "half_cosine",
    "warm_up_cosine",
]
OPTIMISERS = ("sgd", "adam", "adamw")
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
WARM_UP = 500  # steps, as FRePo's evaluation has (Zhou et al. 2022)


@dataclass(frozen=True)
class Recipe:
    """How one model is trained. The labels name the loss.

    ``steps`` are optimiser steps. ``batch`` is images a step, ``None`` the whole set at once;
    batches run through a fresh permutation each pass and the last short one is kept, as the
    field's loaders do. ``augment`` is a strategy of differentiable siamese augmentation
    ("color_crop_cutout_flip_scale_rotate"; "" is none). ``cutmix`` is the chance of a step to be mixed (Yun et
    al. 2019): a box of every image, and that share of its label, are another's.

    ``schedule`` says how the rate goes, step by step: ``tenth_at_half`` multiplies it by 0.1 from step ``steps // 2 + 1``
    and empties the momentum there, as the DC family's evaluation does; ``fifth_at_4_and_5_sixths`` by 0.2 from 4/6
    and again from 5/6 of the steps (IDC); ``half_at_fifths`` by 0.5 from each of the four inner fifths (NCFM).
    ``cosine`` ends at 0, ``half_cosine`` goes half of that way and ends at half the rate (RDED); ``warm_up_cosine``
    rises from 0 along a line over 500 steps (half of all where there are fewer than 1,000), then falls along a
    cosine (FRePo).

    ``rho`` above 0 looks for flat minima (adaptive sharpness-aware minimisation, Kwon et al. 2021): each step takes
    its gradient at the parameters moved by ``rho`` up the loss, at twice the cost. ``gsam_alpha`` takes away so
    much of what the plain gradient has at right angles to it (GSAM, Zhuang et al. 2022).
    """

    steps: int = 300
    batch: int | None = None
    optimiser: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Schedule = "constant"
    augment: str = ""
    cutmix: float = 0.0
    rho: float = 0.0
    gsam_alpha: float = 0.0

    def __post_init__(self) -> None:
        at_least(0, "recipe", steps=self.steps, momentum=self.momentum, weight_decay=self.weight_decay)
        at_least(0, "recipe", rho=self.rho, gsam_alpha=self.gsam_alpha)
        positive("recipe", lr=self.lr)
        if not 0 <= self.cutmix <= 1:
            raise UserError("recipe: cutmix is a probability", got=f"{self.cutmix!r}", expected="0 to 1")
        if self.gsam_alpha and not self.rho:
            raise UserError(
                "recipe: gsam_alpha does nothing without rho",
                got=f"{self.gsam_alpha!r}",
                fix="set rho=0.01, say",
            )
        if self.momentum >= 1:
            raise UserError("recipe: momentum must be below 1", got=f"{self.momentum!r}")
        if self.batch is not None:
            at_least(1, "recipe", batch=self.batch)
        one_of("optimiser", self.optimiser, OPTIMISERS)
        one_of("schedule", self.schedule, SCHEDULES)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        lr, steps = self.lr, self.steps
        match self.schedule:
            case "tenth_at_half":
                return 0.1 * lr if step > steps // 2 else lr
            case "fifth_at_4_and_5_sixths":
                return lr * 0.2 ** sum(step >= i * steps // 6 for i in (4, 5))
            case "half_at_fifths":
                return lr * 0.5 ** sum(step >= i * steps // 5 for i in (1, 2, 3, 4))
            case "cosine":
                return lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            case "half_cosine":
                return lr * 0.5 * (1 + math.cos(math.pi * step / steps / 2))
            case "warm_up_cosine":
                rising = min(WARM_UP, steps // 2)
                if step < rising:
                    return lr * step / rising
                return lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))
        return lr

    def empties_momentum(self, step: int) -> bool:
        """Whether the optimiser starts anew at a step."""
        return self.schedule == "tenth_at_half" and step == self.steps // 2 + 1

    def but(self, **changes: object) -> Recipe:
        """The same recipe with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]  # dataclasses checks the names
