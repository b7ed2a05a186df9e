"""One grid of learning rates for all that is compared, the rate chosen on validation."""

from __future__ import annotations

from distillens.core.recipe import Recipe
from distillens.evaluation.protocol import Protocol


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
