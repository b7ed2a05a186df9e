"""representativeness/landscape: its measures against closed forms and twins, its claims' nulls and plants."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distillens.analyses.representativeness._trajectory import along, by_replicate
from distillens.analyses.representativeness.landscape import (
    OTHER,
    STABLE,
    Landscape,
    LandscapeResult,
    along_the_way,
    barrier,
    beside,
    leaning,
    likeness,
    plane,
    profile,
    surface,
)
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.contracts import RANDOM, Sets
from distillens.core.dataset import Splits
from distillens.core.recipe import Recipe
from distillens.core.result import NETWORK
from distillens.core.rng import Key
from distillens.core.storage import read_tensors
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.nets.mlp import MLP
from distillens.runs import Runs
from distillens.train import Population
from tests.analyses.by_hand import subsets_at

KEY = Key(421, ("landscape",))
DRAWS, ALARMS, REPLICATES = 1000, 70, 5
NET = ConvNet(depth=2, width=8)
SMALL = Landscape(
    NET,
    Recipe(steps=120, batch=256, lr=0.03),
    Recipe(steps=60, lr=0.03),
    moments=12,
    points=7,
    grid=5,
    images=200,
)


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs(Plan())


@pytest.fixture(scope="module")
def bank() -> dict[str, torch.Tensor]:
    """Barriers and leanings [trajectories, subsets]."""
    return read_tensors(Path(__file__).parents[1] / "bank" / "landscape.safetensors")[0]


@pytest.fixture(scope="module")
def base(digits: Splits) -> Sets:
    """Random subsets beside others."""
    return Sets(
        {"a": subsets_at(KEY.fold("a"), digits, REPLICATES, 10)},
        {RANDOM: subsets_at(KEY.fold("base"), digits, REPLICATES, 10)},
    )


@pytest.fixture(scope="module")
def result(digits: Splits, runs: Runs, base: Sets) -> LandscapeResult:
    return SMALL(base, digits, runs, key=KEY)


def verdicts(result: LandscapeResult, name: str = "a") -> dict[str, str]:
    return {claim.name: claim.verdict for claim in result.claims() if claim.subject == name}


# --- the measures ------------------------------------------------------------------------------------------------


def test_a_barrier_is_what_lies_above_the_straight_line() -> None:
    share = torch.linspace(0, 1, 11, dtype=torch.float64)
    # A ridge of height 4 h t (1 - t) on a slope: its top is h, whatever the slope.
    assert float(barrier(3 - 2 * share + 4 * 0.7 * share * (1 - share))) == pytest.approx(0.7)
    # A quadratic loss has no barrier between any two places, and a straight one neither.
    start, end = KEY.fold("ends").normal(2, 6).double()
    root = KEY.fold("root").normal(6, 6).double()
    places = torch.lerp(start, end, share[:, None]) @ root
    assert float(barrier(places.square().sum(1))) == 0.0
    assert float(barrier(5 * share)) == pytest.approx(0, abs=1e-12)
    assert barrier(torch.rand(2, 3, 11, generator=KEY.generator())).shape == (2, 3)


def test_a_profile_goes_through_the_networks_between(digits: Splits) -> None:
    population = untrained(digits, 2)
    test = digits.test.take(torch.arange(50))
    found = profile(population, population.final[0], population.final[1], test, 5)
    for i, share in enumerate((0, 0.25, 0.5, 0.75, 1)):
        flat = (1 - share) * population.final[0] + share * population.final[1]
        loss, error = by_hand(population, flat, test.images, test.labels.hard())
        assert float(found[0, i]) == pytest.approx(loss, rel=1e-5)
        assert float(found[1, i]) == pytest.approx(error)


def untrained(digits: Splits, count: int) -> Population:
    net = MLP(1, 5)
    sets = Sets({"a": subsets_at(KEY, digits, 1, 1)})
    (population,) = Runs(Plan()).get(along(net, Recipe(steps=0), 2, count, sets, digits, KEY))
    return population


def by_hand(
    population: Population, flat: torch.Tensor, images: torch.Tensor, labels: torch.Tensor
) -> tuple[float, float]:
    first, bias, last, shift = population.shapes.unflatten(flat).values()
    logits = F.linear(F.relu(F.linear(images.flatten(1), first, bias)), last, shift)
    hits = (logits.argmax(1) == labels).double().mean()
    return float(F.cross_entropy(logits, labels)), 1 - float(hits)


def test_the_plane_has_the_corners_where_they_belong() -> None:
    axes = torch.eye(5, dtype=torch.float64)
    start = KEY.fold("start").normal(5).double()
    ends = [start, start + 3 * axes[1], start + 2 * axes[1] - 4 * axes[3], start + axes[1] + 7 * axes[0]]
    found, corners = plane(ends)
    torch.testing.assert_close(found, torch.stack([axes[1], -axes[3]]))
    # The last lies outside of the plane: its foot.
    expected = torch.tensor([[0, 0], [3, 0], [2, 4], [1, 0]], dtype=torch.float64)
    torch.testing.assert_close(corners, expected, atol=1e-12, rtol=0)
    _, flat = plane([start, start + axes[0], start + 2 * axes[0]])
    torch.testing.assert_close(flat[:, 1], torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)


def test_the_surface_is_that_of_the_networks_at_its_places(digits: Splits) -> None:
    population = untrained(digits, 4)
    real, own = digits.val.take(torch.arange(40)), digits.train.take(torch.arange(30))
    values, ticks, corners = surface(population, list(population.final), real, own, 6)
    axes, known = plane(list(population.final))
    torch.testing.assert_close(corners, known)
    assert bool((ticks.amin(1) < corners.amin(0)).all()) and bool((ticks.amax(1) > corners.amax(0)).all())
    for row, column in ((0, 0), (2, 5), (5, 1)):
        flat = population.final[0] + ticks[0, column] * axes[0] + ticks[1, row] * axes[1]
        loss, error = by_hand(population, flat, real.images, real.labels.hard())
        mine, _ = by_hand(population, flat, own.images, own.labels.hard())
        np.testing.assert_allclose(values[:, row, column].numpy(), [loss, error, mine], rtol=1e-4)


def test_likeness_of_same_turned_and_unrelated_features() -> None:
    first = KEY.fold("first").normal(60, 20).double()
    turn, _ = torch.linalg.qr(KEY.fold("turn").normal(20, 20).double())
    assert float(likeness(first, first)) == pytest.approx(1)
    assert float(likeness(first, 3 * first @ turn + 5)) == pytest.approx(1)
    unrelated = [float(likeness(first, KEY.fold("other", i).normal(60, 200).double())) for i in range(40)]
    assert abs(float(np.mean(unrelated))) < 0.02
    # The plain estimator calls them alike.
    centred = first - first.mean(0)
    other = KEY.fold("other", 0).normal(60, 200).double()
    other = other - other.mean(0)
    norms = (centred.T @ centred).norm() * (other.T @ other).norm()
    assert float((other.T @ centred).norm().square() / norms) > 0.4
    assert float(likeness(torch.ones(10, 3), first[:10])) == 0.0


def test_likeness_equals_a_slow_twin_in_numpy() -> None:
    first, second = KEY.fold("a").normal(9, 4).double(), KEY.fold("b").normal(9, 3).double()
    second[:, 0] += first[:, 1]

    def centred(seen: np.ndarray) -> np.ndarray:
        """U-centred Gram matrix, entry by entry (Szekely and Rizzo 2014)."""
        n = len(seen)
        gram = seen @ seen.T
        out = np.zeros_like(gram)
        for i in range(n):
            for j in range(n):
                if i != j:
                    others = gram - np.diag(np.diag(gram))
                    out[i, j] = gram[i, j] - (others[i].sum() + others[:, j].sum()) / (n - 2)
                    out[i, j] += others.sum() / (n - 1) / (n - 2)
        return out

    a, b = centred(first.numpy()), centred(second.numpy())
    slow = (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())
    assert float(likeness(first, second)) == pytest.approx(slow, rel=1e-9)


def test_leaning_goes_from_the_early_to_the_full_model() -> None:
    def at(angle: float) -> torch.Tensor:
        return torch.tensor(math.cos(angle), dtype=torch.float64)

    assert float(leaning(at(0), at(0.4), at(0.4))) == pytest.approx(1)
    assert float(leaning(at(0.4), at(0), at(0.4))) == pytest.approx(-1)
    assert float(leaning(at(0.1), at(0.3), at(0.4))) == pytest.approx(0.5)
    # As far from both, and as alike: it leans to neither, wherever it is.
    assert float(leaning(at(0.9), at(0.9), at(0.4))) == pytest.approx(0)
    assert bool(leaning(at(0.2), at(0.2), at(0)).isnan())


def test_models_are_matched_in_validation_accuracy(
    digits: Splits, runs: Runs, base: Sets, result: LandscapeResult
) -> None:
    (population,) = runs.get(along(NET, SMALL.recipe, SMALL.moments, 5, base, digits, KEY))
    place = KEY.fold("landscape", "val")
    val = digits.val.take(place.permutation(len(digits.val))[:200])
    for r in range(REPLICATES):
        reached = [
            float(
                (population.logits(val, population.at(t))[r].argmax(1) == val.labels.hard()).double().mean()
            )
            for t in population.moments
        ]
        gaps = [abs(one - float(result.accuracy["a"][r, 0])) for one in reached]
        assert int(result.matched["a"][r, 0]) == population.moments[gaps.index(min(gaps))]


# --- nulls and plants --------------------------------------------------------------------------------------------


def put(
    result: LandscapeResult, *, error_barrier: torch.Tensor | None = None, lean: torch.Tensor | None = None
) -> LandscapeResult:
    """The result with other barriers to the fully trained model [replicates], or other leanings, of set a."""
    profiles, leanings = dict(result.profiles), dict(result.leanings)
    if error_barrier is not None:
        flat = torch.zeros(len(error_barrier), 1, 2, 2, 3, dtype=torch.float64)
        flat[:, 0, 1, 1, 1] = error_barrier
        profiles["a"] = flat
    if lean is not None:
        leanings["a"], leanings[RANDOM] = lean[:, 0, None], lean[:, 1, None]
    return replace(result, profiles=profiles, leanings=leanings)


def drawn(bank: dict[str, torch.Tensor], name: str, place: Key, count: int) -> torch.Tensor:
    """Values [replicates, count] of different subsets of different trajectories."""
    values = bank[name].double()
    rows = place.fold("trajectories").permutation(len(values))[:REPLICATES].tolist()
    return torch.stack(
        [values[r, place.fold("subsets", r).permutation(values.shape[1])[:count]] for r in rows]
    )


def test_models_of_another_start_are_in_another_basin(
    bank: dict[str, torch.Tensor], result: LandscapeResult
) -> None:
    found = [
        verdicts(put(result, error_barrier=drawn(bank, "other", KEY.fold("null", i), 1)[:, 0]))
        for i in range(DRAWS)
    ]
    assert sum(one["in the real basin"] == "supported" for one in found) <= ALARMS
    # On digits real subsets' models from the same start are in it.
    mine = [
        verdicts(put(result, error_barrier=drawn(bank, "own", KEY.fold("own", i), 1)[:, 0]))
        for i in range(100)
    ]
    assert sum(one["in the real basin"] == "supported" for one in mine) >= 90


def test_real_subsets_do_not_lean_more_than_each_other(
    bank: dict[str, torch.Tensor], result: LandscapeResult
) -> None:
    found = [verdicts(put(result, lean=drawn(bank, "leaning", KEY.fold("lean", i), 2))) for i in range(DRAWS)]
    assert sum(one["early features"] == "supported" for one in found) <= ALARMS


def test_moments_of_the_real_trajectory_are_in_its_basin_and_lean_to_the_early_model(
    digits: Splits, runs: Runs, base: Sets, result: LandscapeResult
) -> None:
    (population,) = runs.get(along(NET, SMALL.recipe, SMALL.moments, 5, base, digits, KEY))
    parts = by_replicate(population, base)
    place = KEY.fold("landscape")
    val = digits.val.take(place.fold("val").permutation(len(digits.val))[:200])
    test = digits.test.take(place.fold("test").permutation(len(digits.test))[:200])
    moment = population.moments[6]

    def stood_in(others: list[Population]) -> LandscapeResult:
        seen = [
            beside(other.at(moment), models, along_the_way(models, val), val, test, SMALL.points)
            for models, other in zip(parts, others, strict=True)
        ]
        profiles = {**result.profiles, "a": torch.stack([one.profiles for one in seen])}
        leanings = {**result.leanings, "a": torch.stack([one.leaning for one in seen])}
        return replace(result, profiles=profiles, leanings=leanings)

    planted = stood_in(parts)
    assert verdicts(planted) == {"in the real basin": "supported", "early features": "supported"}
    torch.testing.assert_close(planted.leanings["a"], torch.ones(5, 1).double(), atol=1e-3, rtol=0)
    # The same moments of other starts.
    assert verdicts(stood_in([*parts[1:], parts[0]]))["in the real basin"] == "not supported"


def test_all_real_images_end_in_the_real_basin(digits: Splits, runs: Runs, base: Sets) -> None:
    train = digits.train
    everything = DistilledDataset({"images": train.images}, train.labels, train.classes, train.space)
    sets = Sets({"all": (everything,) * REPLICATES}, base.baselines)
    found = SMALL(sets, digits, runs, key=KEY)
    assert verdicts(found, "all")["in the real basin"] == "supported"
    rows = found.tables()[0].rows
    assert [row[0] for row in rows] == ["all", RANDOM, OTHER]
    apart = rows[-1][3]
    assert not isinstance(apart, str | int) and apart.low > STABLE


def test_a_single_set_has_its_networks_as_units(digits: Splits, runs: Runs) -> None:
    sets = Sets({"a": subsets_at(KEY.fold("one"), digits, 1, 2)})
    short = replace(SMALL, recipe=Recipe(steps=10, batch=256), own=Recipe(steps=5), trajectories=3, moments=3)
    found = short(sets, digits, runs, key=KEY)
    assert found.alike["a"].shape == (1, 3, 3)
    assert [claim.name for claim in found.claims()] == ["in the real basin"]
    assert {claim.estimate.unit for claim in found.claims()} == {NETWORK}
    assert found.notes()[-1] == "a: one set, the interval covers training only."
    alone = replace(short, trajectories=1)(sets, digits, runs, key=KEY)
    assert [row[0] for row in alone.tables()[0].rows] == ["a"]


# --- messages ----------------------------------------------------------------------------------------------------


def test_networks_and_settings_that_cannot_be_are_refused(digits: Splits) -> None:
    sets = Sets({"a": subsets_at(KEY, digits, 1, 1)})
    analysis = Landscape(ConvNet(depth=2, width=4, norm="batch"), Recipe(steps=2, batch=256))
    with pytest.raises(
        UserError, match=r"cannot be followed through training; got ConvNet, which remembers norm0.mean"
    ):
        analysis.trainings(sets, digits, key=KEY)
    with pytest.raises(UserError, match="landscape: points must be at least 3; got 2"):
        Landscape(points=2)
