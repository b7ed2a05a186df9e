"""One training looked at after several counts of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from distillens.core.checks import UserError
from distillens.core.recipe import Recipe
from distillens.evaluation.trials import Judged
from distillens.runs import Runs
from distillens.train import Training

# For each count of steps the training that gives its models, and the moment in it (None: its end).
Lengths = dict[int, tuple[Training, int | None]]


def lengths(training: Training, counts: Sequence[int]) -> Lengths:
    """The models of a training after each of several counts of steps, for as little work as can be.

    Moments of one training that is as long as the longest. Where that is as long as ``training`` itself the shorter
    ones are trained apart: ``training`` is then what others have asked for, and is not trained a second time for its moments.
    """
    longest = max(counts)
    if longest <= training.recipe.steps:
        return {n: (replace(training, recipe=training.recipe.but(steps=n)), None) for n in counts}
    one = replace(training, recipe=training.recipe.but(steps=longest), snapshots=tuple(sorted(counts)))
    return {n: (one, n) for n in counts}


def after(runs: Runs, training: Training, moment: int | None) -> Judged:
    """The models of a training at a moment of it (None: its end)."""
    (population,) = runs.get(training)
    return Judged(population, population.final if moment is None else population.at(moment))


def check_schedule(owner: str, recipe: Recipe, counts: Sequence[int]) -> None:
    """Refuse several counts of steps with a schedule that depends on their number.

    Raises:
        UserError: so it is.
    """
    if len(set(counts)) > 1 and recipe.schedule != "constant":
        raise UserError(
            f"{owner}: several counts of steps are moments of one training, which needs a constant schedule",
            got=recipe.schedule,
            fix="set recipe.schedule=constant, or ask for one count of steps",
        )
