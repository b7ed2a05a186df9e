"""Evaluation protocols as values, with the published ones by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError, at_least, unknown
from distillens.core.recipe import Recipe

Selection = Literal["last", "best_validation"]


@dataclass(frozen=True)
class Protocol:
    """How a distilled set is judged by training on it.

    The recipe, tried at each of ``rates`` (its own where empty) and looked at after each of ``moments`` (its last
    step where empty). With several candidates ``best_validation`` takes, for each replicate of each set, the one
    with the highest mean accuracy on the validation split; the test split chooses nothing. ``nets`` networks look at
    each set and are averaged. ``learned_rate`` takes the step size that a set brings along, where it has one.
    """

    name: str
    source: str
    recipe: Recipe
    rates: tuple[float, ...] = ()
    moments: tuple[int, ...] = ()
    selection: Selection = "last"
    learned_rate: bool = False
    nets: int = 1

    def __post_init__(self) -> None:
        at_least(1, "protocol", nets=self.nets)
        if self.selection == "last" and len(self.rates) + len(self.moments) > 0:
            raise UserError(
                "a protocol with candidates must say how it chooses", fix="selection='best_validation'"
            )
        if self.moments and (self.recipe.schedule != "constant" or max(self.moments) != self.recipe.steps):
            raise UserError(
                "moments need a constant schedule that ends at the last of them",
                got=f"schedule {self.recipe.schedule}, moments {self.moments}, {self.recipe.steps} steps",
            )

    def recipes(self, distilled: DistilledDataset | None = None) -> tuple[Recipe, ...]:
        """The candidates' recipes, for a set with its learned step size where the protocol honours it."""
        own = distilled.recipe if distilled is not None else None
        if self.learned_rate and own is not None:
            return (self.recipe.but(lr=own.lr),)
        return tuple(self.recipe.but(lr=lr) for lr in self.rates) or (self.recipe,)


WDDL = Protocol(
    "wddl",
    "Yang et al. 2024: 300 full-batch steps of SGD 0.01, momentum 0.9, nothing else",
    Recipe(steps=300, lr=0.01, momentum=0.9),
)
DSA = Protocol(
    "dsa",
    "Zhao & Bilen 2021: 1,000 passes, SGD 0.01, momentum 0.9, decay 5e-4, a tenth from half-time, augmentation",
    # A pass over at most 256 images is one step.
    Recipe(
        steps=1000,
        batch=256,
        weight_decay=5e-4,
        schedule="tenth_at_half",
        augment="color_crop_cutout_flip_scale_rotate",
    ),
)
NEUTRAL = Protocol(
    "neutral",
    "ours: learning rate and steps chosen on validation, the same grid for every set",
    Recipe(steps=1000, batch=256),
    rates=(0.003, 0.01, 0.03, 0.1),
    moments=(100, 300, 1000),
    selection="best_validation",
)

PROTOCOLS = {protocol.name: protocol for protocol in (WDDL, DSA, NEUTRAL)}


def find(name: str) -> Protocol:
    """The named protocol.

    Raises:
        UserError: there is none of that name; the nearest is suggested.
    """
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]
