"""Evaluation protocols as values: what one is, the paper's and ours. ``published`` holds those of other papers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError, at_least, one_of, unknown
from distillens.core.contracts import Net
from distillens.core.recipe import Recipe
from distillens.evaluation.teaching import Teaching

# What a study's scale shrinks of a protocol: the same in all analyses that look at its networks, or they would share none.
SCALES = ("protocol.recipe.steps", "protocol.passes", "protocol.moments", "protocol.steps_by_size")
Selection = Literal["last", "best_validation", "best_test"]
Labelling = Literal["own", "hard", "targets"]


@dataclass(frozen=True)
class Protocol:
    """How a distilled set is judged by training on it.

    **Budget.** The recipe's steps; or ``passes`` over the set, each of as many steps as its images make batches; or
    ``steps_by_size``: of these the one at the first of ``sizes`` that is at least the points of the set (the last for a
    larger one). ``batch_by_ipc`` are pairs: up to so many images a class, batches of so many.

    **Candidates.** The recipe is tried at each of ``rates`` (its own where empty) and looked at after each of ``moments``
    (its last step where empty), counted as the budget is. ``learned_rate`` takes the step size that a set brings
    along, where it has one. **Selection:** ``last``, the last look of a single candidate; ``best_validation``, for each
    replicate of each set the candidate with the highest mean accuracy on the validation split; ``best_test``, as some
    papers report: the highest accuracy on the test split that each network has at its looks. Only a published
    protocol may select so, and what it selects is printed beside ``last`` and nothing else: ``last`` counts.

    **Labels.** ``own``, what the set carries; ``hard``, the likeliest class of it; ``targets``, half the squared error
    against centred labels p - 1/k, where the set has not learned targets itself. ``teaching`` labels all sets anew before
    any training (``trials.taught``).

    ``nets`` networks look at each set and are averaged; ``net`` is theirs where it is not the field's ConvNet for such
    images. ``quirks`` say where the published figures are not made like this.
    """

    name: str
    source: str
    recipe: Recipe
    rates: tuple[float, ...] = ()
    moments: tuple[int, ...] = ()
    selection: Selection = "last"
    learned_rate: bool = False
    nets: int = 1
    passes: int = 0
    sizes: tuple[int, ...] = ()
    steps_by_size: tuple[int, ...] = ()
    batch_by_ipc: tuple[tuple[int, int], ...] = ()
    labels: Labelling = "own"
    teaching: Teaching | None = None
    net: Net | None = None
    quirks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least(1, "protocol", nets=self.nets)
        at_least(0, "protocol", passes=self.passes)
        one_of("selection", self.selection, ("last", "best_validation", "best_test"))
        one_of("labels", self.labels, ("own", "hard", "targets"))
        self._check_budget()
        self._check_candidates()
        if self.teaching is not None and self.labels != "own":
            raise UserError("a teacher's labels are taken as they are", got=f"labels={self.labels!r}")
        if self.teaching is not None and self.teaching.views and not self.recipe.augment:
            raise UserError(
                "labels a view need an augmentation to view through", fix="set views=0: one label an image"
            )

    def _check_budget(self) -> None:
        if len(self.sizes) != len(self.steps_by_size) or list(self.sizes) != sorted(set(self.sizes)):
            raise UserError(
                "sizes rise, and each has its steps",
                got=f"sizes {self.sizes}, steps_by_size {self.steps_by_size}",
            )
        if self.sizes and (self.passes or self.moments):
            raise UserError("steps by size go with neither passes nor moments")

    def _check_candidates(self) -> None:
        if self.selection == "last" and len(self.rates) + len(self.moments) > 0:
            raise UserError(
                "a protocol with candidates must say how it chooses", fix="selection='best_validation'"
            )
        if self.selection == "best_test" and not (self.source and self.moments and not self.rates):
            raise UserError(
                "best_test is for published protocols: it takes the best of several moments on the test split",
                got=f"source {self.source!r}, moments {self.moments}, rates {self.rates}",
                fix="selection='best_validation'",
            )
        if not self.moments:
            return
        if min(self.moments) < 1 or max(self.moments) != self.budget:
            raise UserError(
                "moments end with the training",
                got=f"moments {self.moments}",
                expected=f"the last at {self.budget} {'passes' if self.passes else 'steps'}",
            )
        if self.selection == "best_validation" and self.recipe.schedule != "constant":
            raise UserError(
                "moments stand for shorter trainings: that needs a constant schedule",
                got=f"schedule {self.recipe.schedule}",
            )

    @property
    def budget(self) -> int:
        """Passes, or steps where nobody counts passes: what ``moments`` are counted in."""
        return self.passes or self.recipe.steps

    def recipes(
        self, distilled: DistilledDataset | None = None, *, rate_of: DistilledDataset | None = None
    ) -> tuple[Recipe, ...]:
        """The candidates' recipes for a set, with the step size that the set ``rate_of`` learned (its own by default).

        Without a set: as many steps as a set of a single batch has.
        """
        recipe = self.recipe.but(steps=self.budget) if distilled is None else self._for(distilled)
        learned = rate_of or distilled
        if self.learned_rate and learned is not None and learned.recipe is not None:
            return (recipe.but(lr=learned.recipe.lr),)
        return tuple(recipe.but(lr=lr) for lr in self.rates) or (recipe,)

    def looks(self, recipe: Recipe) -> tuple[int, ...]:
        """The moments in steps of one of its recipes."""
        return tuple(moment * recipe.steps // self.budget for moment in self.moments)

    def _for(self, distilled: DistilledDataset) -> Recipe:
        batch, steps = self.recipe.batch, self.recipe.steps
        for ipc, smaller in reversed(self.batch_by_ipc):
            batch = smaller if distilled.ipc <= ipc else batch
        if self.passes:
            steps = self.passes * (math.ceil(len(distilled.dataset()) / batch) if batch else 1)
        if self.sizes:
            fitting = [
                n for size, n in zip(self.sizes, self.steps_by_size, strict=True) if len(distilled) <= size
            ]
            steps = (fitting or self.steps_by_size[-1:])[0]
        return self.recipe.but(batch=batch, steps=steps)


WDDL = Protocol(
    "wddl",
    "Yang et al. 2024: 300 full-batch steps of SGD 0.01, momentum 0.9, nothing else",
    Recipe(steps=300, lr=0.01, momentum=0.9),
)
NEUTRAL = Protocol(
    "neutral",
    "ours: learning rate and steps chosen on validation, the same grid for every set",
    Recipe(steps=1000, batch=256),
    rates=(0.003, 0.01, 0.03, 0.1),
    moments=(100, 300, 1000),
    selection="best_validation",
)


def find(name: str) -> Protocol:
    """The named protocol.

    Raises:
        UserError: there is none of that name; the nearest is suggested.
    """
    from distillens.evaluation.published import PROTOCOLS  # which are made of this module's class

    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]
