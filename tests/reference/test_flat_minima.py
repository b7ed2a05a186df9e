"""Training towards flat minima: adaptive GSAM (Kwon et al. 2021; Zhuang et al. 2022) against a slow twin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distillens import augment
from distillens.core.contracts import Buffers, Like, Mode, Params
from distillens.core.dataset import Dataset
from distillens.core.labels import Hard
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.space import Pixel
from distillens.engine.plan import Plan
from distillens.nets.mlp import MLP
from distillens.train import Training, train

N, K, STEPS = 12, 3, 6
NET = MLP(depth=1, width=7)
KEYS = Key(2).split(3)
EXACT = Plan("loop", 1, precision="float64")
STACKED = Plan("stacked", 8, precision="float64")
PLAIN = Recipe(steps=STEPS, lr=0.1, momentum=0.0)
RHO = 0.3
CLOSE = 1e-9


def data() -> Dataset:
    return Dataset(Key(1).normal(N, 1, 4, 5), Hard(torch.arange(N) % K), ("a", "b", "c"), Pixel())


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def module(key: Key) -> nn.Sequential:
    """The network as torch's own layers, in float64, as a model with this key begins."""
    built = nn.Sequential(nn.Flatten(), nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, K)).double()
    for own, value in zip(built.parameters(), NET.init(data(), key.fold("init"))[0].values(), strict=True):
        own.data.copy_(value)
    return built


def batch(recipe: Recipe, key: Key, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, labels and weights of a step: a permutation a pass cut in batches; flipped or not, image by image."""
    size = recipe.batch or N
    a_pass, place = divmod(step, -(-N // size))
    index = torch.arange(N)
    if recipe.batch:
        index = key.fold("batches", a_pass).permutation(N)[place * size : (place + 1) * size]
    x = data().images.double()[index]
    drawn = augment.draw(recipe.augment, key.fold("augment", step), len(x))
    if drawn is not None:
        flipped = drawn.numbers[:, 0] < 0.5
        x = torch.stack([image.flip(2) if turn else image for image, turn in zip(x, flipped, strict=True)])
    return x, data().labels.hard()[index], index


def long(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The length of all tensors together."""
    return sum((t * t).sum() for t in tensors).sqrt()  # type: ignore[union-attr, return-value]


def by_hand(recipe: Recipe, key: Key, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Sharpness with radius rho in units of each weight's size, the descent decomposed as GSAM does."""
    model = module(key)
    own = list(model.parameters())
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    if recipe.optimiser == "sgd":
        base: torch.optim.Optimizer = torch.optim.SGD(
            own, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay
        )
    else:
        base = kinds[recipe.optimiser](own, recipe.lr, weight_decay=recipe.weight_decay)
    for step in range(recipe.steps):
        x, y, index = batch(recipe, key, step)
        share = torch.ones(len(x)) if weights is None else weights[index]
        share = share.double() / share.double().sum()

        def slopes(
            x: torch.Tensor = x, y: torch.Tensor = y, share: torch.Tensor = share
        ) -> list[torch.Tensor]:
            loss = (F.cross_entropy(model(x), y, reduction="none") * share).sum()
            return list(torch.autograd.grad(loss, own))

        plain = slopes()
        # e = rho T^2 g / ||T g||, T = diag(|w|): equation 8 of Kwon et al.
        scaled = [w.detach().abs() * g for w, g in zip(own, plain, strict=True)]
        steps = [w.detach().abs() * s * recipe.rho / long(scaled) for w, s in zip(own, scaled, strict=True)]
        before = [w.detach().clone() for w in own]
        with torch.no_grad():
            for w, e in zip(own, steps, strict=True):
                w += e
        ahead = slopes()
        with torch.no_grad():
            for w, old in zip(own, before, strict=True):
                w.copy_(old)
        # The plain gradient along the perturbed one's direction, and what is left: algorithm 1 of Zhuang et al.
        direction = [a / long(ahead) for a in ahead]
        along = sum((g * d).sum() for g, d in zip(plain, direction, strict=True))
        across = [g - along * d for g, d in zip(plain, direction, strict=True)]
        for w, a, o in zip(own, ahead, across, strict=True):
            w.grad = a - recipe.gsam_alpha * o
        base.step()
    return nn.utils.parameters_to_vector(own).detach()


RECIPES = {
    "sam": PLAIN.but(rho=RHO),
    "gsam": PLAIN.but(rho=RHO, gsam_alpha=0.7),
    "momentum, decay": PLAIN.but(rho=RHO, gsam_alpha=0.7, momentum=0.9, weight_decay=0.05),
    "batches": PLAIN.but(rho=RHO, gsam_alpha=0.3, batch=5),
    "augmented batches": PLAIN.but(rho=RHO, gsam_alpha=0.3, batch=5, augment="flip"),
    "adam": PLAIN.but(rho=RHO, gsam_alpha=0.3, optimiser="adam", lr=0.01),
    "adamw": PLAIN.but(rho=RHO, gsam_alpha=0.3, optimiser="adamw", lr=0.01, weight_decay=0.5),
}


@pytest.mark.parametrize("plan", [EXACT, STACKED], ids=["loop", "stacked"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_training_is_the_slow_loop(recipe: Recipe, plan: Plan) -> None:
    found = train(Training(data(), NET, recipe, KEYS), plan).final
    for j, key in enumerate(KEYS):
        assert off(found[j], by_hand(recipe, key)) < CLOSE


@pytest.mark.parametrize("plan", [EXACT, STACKED], ids=["loop", "stacked"])
def test_example_weights_count_in_both_looks(plan: Plan) -> None:
    weights = Key(6).uniform(3, N)
    recipe = RECIPES["gsam"]
    found = train(Training(data(), NET, recipe, KEYS, weights=weights), plan).final
    for j, key in enumerate(KEYS):
        assert off(found[j], by_hand(recipe, key, weights[j])) < CLOSE


@pytest.mark.parametrize("plan", [EXACT, STACKED], ids=["loop", "stacked"])
def test_no_radius_is_plain_training(plan: Plan) -> None:
    plain = train(Training(data(), NET, PLAIN, KEYS), plan).final
    assert torch.equal(train(Training(data(), NET, PLAIN.but(rho=0.0), KEYS), plan).final, plain)
    near = train(Training(data(), NET, PLAIN.but(rho=1e-6, gsam_alpha=0.7), KEYS), plan).final
    assert off(near, plain) < 1e-6
    wide = train(Training(data(), NET, RECIPES["sam"], KEYS), plan).final
    decomposed = train(Training(data(), NET, RECIPES["gsam"], KEYS), plan).final
    assert off(wide, plain) > 1e-3
    assert off(decomposed, wide) > 1e-4


def test_a_look_at_two_places_counts_twice() -> None:
    plain = Training(data(), NET, PLAIN.but(batch=5), KEYS)
    assert replace(plain, recipe=plain.recipe.but(rho=RHO)).image_steps == 2 * plain.image_steps


def test_models_differ_in_name_by_their_radius() -> None:
    """The store must not hand out one for the other."""
    prints = {Training(data(), NET, recipe, KEYS).fingerprint for recipe in (PLAIN, *RECIPES.values())}
    assert len(prints) == 1 + len(RECIPES)


@dataclass(frozen=True)
class Averaging(MLP):
    """An MLP that remembers the mean of its logits."""

    mixes_examples: ClassVar[bool] = True

    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        params, _ = super().init(like, key)
        return params, {"mean": torch.zeros(like.k)}

    def logits(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        logits, _ = super().logits(params, {}, x, mode)
        return logits, {"mean": 0.5 * buffers["mean"] + logits.mean(0)}


@pytest.mark.parametrize("plan", [EXACT, STACKED], ids=["loop", "stacked"])
def test_buffers_keep_what_the_plain_look_saw(plan: Plan) -> None:
    """One step: both recipes look first at the same place."""
    found = [
        train(Training(data(), Averaging(depth=1, width=7), recipe.but(steps=1), KEYS), plan)
        for recipe in (PLAIN, RECIPES["gsam"])
    ]
    assert torch.equal(found[0].buffers["mean"], found[1].buffers["mean"])
    assert not torch.equal(found[0].final, found[1].final)
