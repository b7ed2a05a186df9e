"""One grid of learning rates for all that is compared, the rate chosen on validation."""

from __future__ import annotations

from dataclasses import replace

from distillens.core.contracts import Net
from distillens.core.dataset import Splits
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.evaluation.protocol import Protocol
from distillens.evaluation.trials import of_full
from distillens.train import Training


def on_grid(recipe: Recipe, rates: tuple[float, ...], models: int, *, learned: bool = False) -> Protocol:
    """A recipe tried at each rate; with ``learned`` at the step size that a set brings along, where it does."""
    return Protocol(
        "grid",
        "ours: the rate is chosen on validation, from the same grid for every set",
        recipe,
        rates,
        selection="best_validation",
        learned_rate=learned,
        nets=models,
    )


def full_on_grid(grid: Protocol, net: Net, real: Splits, replicates: int, key: Key) -> list[list[Training]]:
    """The full training data at each rate: the candidates of each network that ``of_full`` trains."""
    by_rate = [
        of_full(replace(grid, recipe=one, rates=(), selection="last"), net, real, replicates, key)
        for one in grid.recipes()
    ]
    return [list(each) for each in zip(*by_rate, strict=True)]
