"""Expert trajectories: networks trained on real data, kept after every pass, read where they lie."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from distillens.core.checks import UserError, at_least
from distillens.core.contracts import Net
from distillens.core.dataset import Dataset
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.storage import read_slice
from distillens.core.vector import Shapes
from distillens.engine.plan import Plan
from distillens.train import Training, chunks


@dataclass(frozen=True, eq=False)
class Experts:
    """Experts to train: one a key, for ``passes`` passes over the data, kept before the first and after each.

    The steps of ``recipe`` do not count. Experts that differ in ``passes`` alone are the same up to the shorter
    one's end: the store trains the longest once and serves all (``runs.Runs``).

    Raises:
        UserError: the schedule is not constant, so that a longer training is another one.
    """

    data: Dataset
    net: Net
    recipe: Recipe
    keys: tuple[Key, ...]
    passes: int

    def __post_init__(self) -> None:
        at_least(1, "experts", passes=self.passes, experts=len(self.keys))
        if self.recipe.schedule != "constant":
            raise UserError("experts need a constant schedule", got=self.recipe.schedule)

    @property
    def pass_steps(self) -> int:
        """Optimiser steps in a pass over the data."""
        return math.ceil(len(self.data) / (self.recipe.batch or len(self.data)))

    @cached_property
    def training(self) -> Training:
        """All of it as one training with a snapshot a pass."""
        moments = tuple(e * self.pass_steps for e in range(self.passes + 1))
        return Training(
            self.data, self.net, self.recipe.but(steps=moments[-1]), self.keys, snapshots=moments
        )

    @property
    def fingerprint(self) -> str:
        """A SHA-256 of what is trained and kept."""
        return self.training.fingerprint

    def lasting(self, passes: int) -> Experts:
        """The same experts over more or fewer passes."""
        return replace(self, passes=passes)

    def cut(self, plan: Plan) -> list[Experts]:
        """The experts in the chunks that the plan trains together."""
        return [replace(self, keys=part.keys) for part in chunks(self.training, plan)]


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Parameters [P] of trained experts after each pass, read one at a time.

    ``parts`` [experts, passes + 1, P] are files or tensors, ``sizes`` the experts in each. A file is memory-mapped: a
    look at one expert's pass reads P numbers, whatever the file holds; it travels to a worker by name.
    """

    net: Net
    shapes: Shapes
    passes: int
    parts: tuple[Path | torch.Tensor, ...]
    sizes: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.sizes)

    def at(self, expert: int, passes: int) -> torch.Tensor:
        """The parameters [P] of one expert after so many passes.

        Raises:
            UserError: there is no such expert or pass, or its file has gone.
        """
        if not (0 <= expert < len(self) and 0 <= passes <= self.passes):
            raise UserError(
                "there is no such stretch of an expert",
                got=f"expert {expert}, pass {passes}",
                expected=f"experts 0 to {len(self) - 1}, passes 0 to {self.passes}",
            )
        for part, size in zip(self.parts, self.sizes, strict=True):
            if expert < size:
                if isinstance(part, torch.Tensor):
                    return part[expert, passes]
                return read_slice(part, "snapshots", expert, passes)
            expert -= size
        raise AssertionError("sizes add up")
