"""Recipes hold the training's numbers and refuse those that make no sense."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from distillens.core.checks import UserError, at_least, one_of, positive, unknown
from distillens.core.config import describe, restore
from distillens.core.recipe import OPTIMISERS, SCHEDULES, Recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -1}, "recipe: steps must be at least 0; got -1"),
        ({"momentum": -0.1}, "recipe: momentum must be at least 0; got -0.1"),
        ({"momentum": 1.0}, "recipe: momentum must be below 1; got 1.0"),
        ({"momentum": float("nan")}, "recipe: momentum must be at least 0; got nan"),
        ({"weight_decay": -1e-9}, "recipe: weight_decay must be at least 0; got -1e-09"),
        ({"lr": 0.0}, "recipe: lr must be above 0; got 0.0"),
        ({"lr": -1.0}, "recipe: lr must be above 0; got -1.0"),
        ({"lr": float("inf")}, "recipe: lr must be above 0; got inf"),
        ({"batch": 0}, "recipe: batch must be at least 1; got 0"),
        ({"rho": -0.01}, "recipe: rho must be at least 0; got -0.01"),
        ({"rho": float("nan")}, "recipe: rho must be at least 0; got nan"),
        ({"rho": 0.01, "gsam_alpha": -0.3}, "recipe: gsam_alpha must be at least 0; got -0.3"),
        (
            {"gsam_alpha": 0.3},
            "recipe: gsam_alpha does nothing without rho; got 0.3; set rho=0.01, say",
        ),
        ({"optimiser": "sdg"}, "unknown optimiser 'sdg'; Did you mean 'sgd'? Known: adam, adamw, sgd"),
        (
            {"schedule": "cosin"},
            "unknown schedule 'cosin'; Did you mean 'cosine'? Known: constant, cosine, "
            "fifth_at_4_and_5_sixths, half_at_fifths, half_cosine, tenth_at_half, warm_up_cosine",
        ),
    ],
)
def test_numbers_without_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        Recipe(**changes)
    assert str(error.value) == message


def test_the_borders_of_the_ranges_are_allowed() -> None:
    Recipe(steps=0, batch=1, momentum=0.0, weight_decay=0.0, lr=1e-12)
    Recipe(momentum=0.999, batch=None)
    Recipe(rho=0.0, gsam_alpha=0.0)
    Recipe(rho=1e-12, gsam_alpha=5.0)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_recipe_survives_json(optimiser: Any, schedule: Any) -> None:
    recipe = Recipe(3, 4, optimiser, 0.1, 0.2, 0.3, schedule, "flip", 0.4, 0.5)
    assert restore(describe(recipe)) == recipe


def test_but_changes_what_is_named_and_checks_it() -> None:
    recipe = Recipe(steps=5, augment="flip")
    changed = recipe.but(lr=0.5, batch=8)
    assert (changed.lr, changed.batch, changed.steps, changed.augment) == (0.5, 8, 5, "flip")
    assert changed.but(lr=recipe.lr, batch=recipe.batch) == recipe
    with pytest.raises(UserError, match="recipe: lr must be above 0"):
        recipe.but(lr=0)
    with pytest.raises(TypeError):
        recipe.but(rate=1)


def test_a_recipe_is_a_frozen_value() -> None:
    assert hash(Recipe(lr=0.3)) == hash(Recipe(lr=0.3))
    with pytest.raises(FrozenInstanceError):
        Recipe().lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({}, "wrong"),
        ({"got": "2"}, "wrong; got 2"),
        ({"expected": "3", "fix": "do this"}, "wrong; expected 3; do this"),
        ({"got": "2", "expected": "3", "fix": "do this"}, "wrong; got 2; expected 3; do this"),
    ],
)
def test_an_error_says_what_got_expected_and_what_to_do(parts: dict[str, str], text: str) -> None:
    assert str(UserError("wrong", **parts)) == text


def test_unknown_suggests_a_near_name_only() -> None:
    assert str(unknown("net", "convnt", ["mlp", "convnet"])) == (
        "unknown net 'convnt'; Did you mean 'convnet'? Known: convnet, mlp"
    )
    assert str(unknown("net", "zzz", ["mlp", "convnet"])) == "unknown net 'zzz'; Known: convnet, mlp"
    assert str(unknown("net", "zzz", [])) == "unknown net 'zzz'; Known: (nothing)"


def test_checks_name_their_owner_and_number() -> None:
    positive("dm", lr=0.1)
    at_least(1, "dm", batch=1)
    one_of("init", "real", ("real", "noise"))
    with pytest.raises(UserError, match="dm: b must be above 0; got 0"):
        positive("dm", a=1, b=0)
    with pytest.raises(UserError, match=r"dm: a must be at least 0.5; got nan"):
        at_least(0.5, "dm", a=float("nan"))
    with pytest.raises(UserError, match="unknown init 'rea'; Did you mean 'real'"):
        one_of("init", "rea", ("real", "noise"))
