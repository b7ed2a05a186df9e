"""The feature map: nulls from the bank of judges' answers, plants end to end, its numbers against a slow twin."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from distillens.analyses.behaviour._judges import SEEN, UNSEEN, chance
from distillens.analyses.behaviour.feature_map import OFF, REAL, FeatureMap, FeatureMapResult
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.contracts import Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Hard
from distillens.core.recipe import Recipe
from distillens.core.result import Claim
from distillens.core.rng import Key
from distillens.core.storage import read_tensors
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.nets.mlp import MLP
from distillens.nets.resnet18 import ResNet18
from distillens.runs import Runs
from tests.analyses.by_hand import subsets_at

DRAWS, ALARMS, REPLICATES = 1000, 70, 5
SEED = Key(20251125, ("feature map",))
KEY = Key(99, ("feature map",))
SMALL = FeatureMap(ConvNet(2, 16), Recipe(steps=60, batch=256, lr=0.05), seeds=2, shown=100)


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs(Plan())


@pytest.fixture(scope="module")
def bank() -> dict[str, torch.Tensor]:
    tensors = read_tensors(Path(__file__).parents[1] / "bank" / "recognition.safetensors")[0]
    neighbours = tensors["neighbours"].long()
    labels = tensors["labels"].long()[: neighbours.shape[1]]  # the validation split stands first
    return {"neighbours": neighbours, "labels": labels, "far": tensors["far"].double()}


def subsets(real: Splits, name: str, count: int, ipc: int = 1) -> tuple[DistilledDataset, ...]:
    return subsets_at(KEY.fold(name), real, count, ipc)


def of_images(data: Dataset, at: torch.Tensor) -> DistilledDataset:
    """Real images in a distilled set's place."""
    return DistilledDataset({"images": data.images[at]}, data.labels.take(at), data.classes, data.space)


def stratified(labels: torch.Tensor, per_class: int, key: Key) -> torch.Tensor:
    order = key.permutation(len(labels))
    return torch.cat([order[labels[order] == c][:per_class] for c in range(10)])


def moved(one: DistilledDataset, size: float, key: Key) -> DistilledDataset:
    images = one.dataset().images
    return replace(one, stored={"images": images + size * key.normal(*images.shape)})


def supported(claims: list[Claim]) -> int:
    return sum(claim.verdict == "supported" for claim in claims)


def verdicts(result: FeatureMapResult) -> dict[tuple[str, str], str]:
    return {(claim.subject, claim.name): claim.verdict for claim in result.claims()}


def result_of(
    bank: dict[str, torch.Tensor], named: dict[str, list[tuple[torch.Tensor, torch.Tensor]]]
) -> FeatureMapResult:
    """The result with sets of the bank's images by name: for each replicate their places and the labels they carry."""
    found, far = bank["neighbours"], bank["far"].mean(0)
    empty = {REAL: torch.zeros(0, 2)}
    return FeatureMapResult(
        "ConvNet w32",
        5,
        tuple(name for name in named if name != UNSEEN),
        tuple("0123456789"),
        450,
        {
            name: tuple((found[:, at] == y[:, None]).double().mean((0, 2)) for at, y in many)
            for name, many in named.items()
        },
        {name: tuple(far[at] for at, _ in many) for name, many in named.items()},
        {
            name: tuple(float(chance(found[:, at].flatten(1)[None], y, 10)) for at, y in many)
            for name, many in named.items()
        },
        {name: tuple(y for _, y in many) for name, many in named.items()},
        "none",
        empty,
        {REAL: torch.zeros(0)},
    )


@pytest.mark.parametrize(("per_class", "replicates"), [(1, REPLICATES), (10, REPLICATES), (10, 1)])
def test_permuted_labels_and_real_images_support_nothing_more_often_than_stated(
    bank: dict[str, torch.Tensor], per_class: int, replicates: int
) -> None:
    labels = bank["labels"]
    claims: dict[tuple[str, str], list[Claim]] = {}
    beyond = 0
    for i in range(DRAWS):
        named: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"permuted": [], "real": [], UNSEEN: []}
        for r in range(replicates):
            place = SEED.fold(per_class, replicates, i, r)
            first, second = (stratified(labels, per_class, place.fold(name)) for name in ("first", "second"))
            shuffled = labels[first][place.fold("labels").permutation(len(first))]
            named["permuted"].append((first, shuffled))
            named["real"].append((first, labels[first]))
            named[UNSEEN].append((second, labels[second]))
        result = result_of(bank, named)
        for claim in result.claims():
            claims.setdefault((claim.subject, claim.name), []).append(claim)
        beyond += result.farther_than_real("real").low > 0
    assert all(len(many) == DRAWS for many in claims.values())
    assert supported(claims["permuted", "neighbours of its class"]) <= ALARMS
    assert supported(claims["real", "off the manifold"]) == 0
    # The margin is not what keeps the claim silent: the interval itself covers no difference often enough.
    assert beyond <= ALARMS
    assert supported(claims["real", "neighbours of its class"]) == DRAWS, "the positive control"


def test_images_twice_as_far_as_real_ones_are_found(bank: dict[str, torch.Tensor]) -> None:
    labels = bank["labels"]
    found = []
    for i in range(100):
        draws = {
            name: [stratified(labels, 10, SEED.fold(name, i, r)) for r in range(REPLICATES)]
            for name in ("real", UNSEEN)
        }
        result = result_of(bank, {name: [(at, labels[at]) for at in many] for name, many in draws.items()})
        far = {**result.far, "real": tuple(one + math.log(2) for one in result.far["real"])}
        found += [c for c in replace(result, far=far).claims() if c.name == "off the manifold"]
    assert supported(found) >= 90


def test_noise_is_off_the_manifold_and_unseen_real_images_are_on_it(digits: Splits, runs: Runs) -> None:
    labels = digits.test.labels.hard()
    noisy = tuple(moved(one, 3.0, KEY.fold("noise", r)) for r, one in enumerate(subsets(digits, "n", 3, 2)))
    # Their own nearest test images, so they lie nearer than any: the claim must be refused, not only not made.
    tests = tuple(of_images(digits.test, stratified(labels, 2, KEY.fold("test", r))) for r in range(3))
    sets = Sets(
        {"noise": noisy, "seen": subsets(digits, "s", 3, 2), "test": tests},
        {"random_subset": subsets(digits, "b", 3, 2)},
    )
    result = SMALL(sets, digits, runs, key=KEY)
    found = verdicts(result)
    assert found["noise", "off the manifold"] == "supported"
    assert found["seen", "off the manifold"] == "not supported"
    assert found["test", "off the manifold"] == "not supported"
    assert found["seen", "neighbours of its class"] == "supported"
    assert found["noise", "neighbours of its class"] != "supported"
    assert set(result.headline()) == {"noise", "seen", "test", UNSEEN}
    assert 0.8 < result.headline()[UNSEEN].value < 1.25
    assert [row[0] for row in result.tables()[0].rows] == ["noise", "seen", "test", SEEN, UNSEEN]


def test_a_single_set_rests_on_its_images(digits: Splits, runs: Runs) -> None:
    (one,) = subsets(digits, "one", 1, 5)
    result = SMALL(Sets({"noise": (moved(one, 3.0, KEY.fold("single")),)}), digits, runs, key=KEY)
    assert verdicts(result)["noise", "off the manifold"] == "supported"
    assert result.headline()["noise"].unit == "image of one replicate"
    assert "noise: one set, the interval is that over its images." in result.notes()


# ---- a slow twin ----


def slow(
    net: Any, population: Any, points: np.ndarray, y: list[int], real: Splits, k: int
) -> tuple[list[float], list[float], float]:
    """Neighbours of its class, log multiples and the chance share, image by image, in loops over numpy."""

    def seen(images: torch.Tensor, j: int) -> np.ndarray:
        params = population.shapes.unflatten(population.final[j])
        with torch.no_grad():
            found: np.ndarray = net.features(params, {}, images)[0].double().numpy()
        return found

    classes, of_val = real.test.labels.hard().tolist(), real.val.labels.hard().tolist()
    same, far, by_chance = [0.0] * len(y), [0.0] * len(y), 0.0
    for j in range(len(population)):
        among = seen(real.test.images, j)

        def ranked(point: np.ndarray, among: np.ndarray = among) -> list[tuple[float, int]]:
            return sorted(
                (math.sqrt(float(((point - other) ** 2).sum())), t) for t, other in enumerate(among)
            )

        usual: dict[int, list[float]] = {}
        for point, c in zip(seen(real.val.images, j), of_val, strict=True):
            usual.setdefault(c, []).append(ranked(point)[k - 1][0])
        for i, point in enumerate(seen(torch.from_numpy(points), j)):
            nearest = ranked(point)[:k]
            lengths = sorted(usual[y[i]])
            middle = lengths[(len(lengths) - 1) // 2]
            same[i] += sum(classes[t] == y[i] for _, t in nearest) / k / len(population)
            far[i] += math.log(nearest[-1][0] / middle) / len(population)
            by_chance += sum(y.count(classes[t]) / len(y) for _, t in nearest) / k / len(y) / len(population)
    return same, far, by_chance


def test_neighbours_and_distances_are_what_a_loop_over_all_images_gives(digits: Splits, runs: Runs) -> None:
    small = Splits(
        digits.train, digits.val.take(torch.arange(0, 269, 3)), digits.test.take(torch.arange(0, 450, 4))
    )
    # Of a class that is named more often than others chance is another number.
    points = of_images(digits.train, torch.arange(14))
    points = replace(points, labels=Hard(torch.tensor([0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 1])))
    for net in (ConvNet(2, 8), MLP(1, 16)):
        analysis = replace(SMALL, net=net, neighbours=3)
        sets = Sets({"a": (points,)})
        result = analysis(sets, small, runs, key=KEY)
        (population,) = runs.get(*analysis.trainings(sets, small, key=KEY))
        y = points.labels.hard().tolist()
        same, far, by_chance = slow(net, population, points.dataset().images.numpy(), y, small, 3)
        assert result.same["a"][0].tolist() == pytest.approx(same)
        assert result.far["a"][0].tolist() == pytest.approx(far, abs=1e-6)
        assert result.by_chance["a"][0] == pytest.approx(by_chance)
        assert result.of_its_class("a").value == pytest.approx(sum(same) / 14)
        assert result.multiple("a").value == pytest.approx(math.exp(sum(far) / 14))
        nines = result.tables()[2].rows[9][1]
        assert nines.value == pytest.approx(math.exp((far[11] + far[12]) / 2))  # type: ignore[union-attr]


def test_networks_with_running_statistics_show_their_features(digits: Splits, runs: Runs) -> None:
    analysis = replace(SMALL, net=ResNet18(width=4, norm="batch"), recipe=Recipe(steps=4, batch=64))
    result = analysis(Sets({"a": subsets(digits, "a", 2)}), digits, runs, key=KEY)
    assert all(bool(one.isfinite().all()) for one in result.far["a"])


# ---- the map ----


def test_the_map_holds_the_first_replicates_among_real_test_images(digits: Splits, runs: Runs) -> None:
    sets = Sets({"a": subsets(digits, "a", 2, 2), "b": subsets(digits, "b", 2)})
    first, second = (SMALL(sets, digits, Runs(Plan()), key=KEY) for _ in range(2))
    assert {name: tuple(one.shape) for name, one in first.places.items()} == {
        REAL: (100, 2),
        "a": (20, 2),
        "b": (10, 2),
    }
    assert first.place_labels["b"].tolist() == list(range(10))
    assert first.method == "t-SNE, perplexity 30" or first.method.startswith("UMAP")
    for name, places in first.places.items():
        assert torch.equal(places, second.places[name]), "the same map again"
    assert f"100 real test images, {first.method}" in next(iter(first.panels()))
    assert len(first.panels()) == 4  # all, one each, the numbers


def test_the_map_is_made_by_umap_where_it_is_installed(
    digits: Splits, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    class UMAP:
        def __init__(self, **settings: Any) -> None:
            asked.update(settings)

        def fit_transform(self, values: np.ndarray) -> np.ndarray:
            return values[:, :2]

    stand_in = ModuleType("umap")
    stand_in.UMAP = UMAP  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "umap", stand_in)
    result = SMALL(Sets({"a": subsets(digits, "a", 1)}), digits, runs, key=KEY)
    assert (asked["n_neighbors"], asked["random_state"]) == (5, 42)
    assert result.method == "UMAP, 5 neighbours"


def test_as_published_looks_at_the_512_features_of_a_resnet(like_cifar: Dataset) -> None:
    analysis = FeatureMap.as_published(like_cifar)
    net = analysis.net
    params, buffers = net.init(like_cifar, KEY)
    assert net.features(params, buffers, like_cifar.images[:2])[0].shape == (2, 512)
    assert (analysis.neighbours, analysis.shown, analysis.seeds) == (5, 10_000, 1)


def test_more_neighbours_than_there_are_real_images_are_refused(digits: Splits, runs: Runs) -> None:
    analysis = replace(SMALL, neighbours=451)
    with pytest.raises(
        UserError,
        match="feature_map: 451 neighbours were asked for; got 450 real test images; set neighbours to at",
    ):
        analysis(Sets({"a": subsets(digits, "a", 1)}), digits, runs, key=KEY)


@pytest.mark.parametrize("name", ["seeds", "neighbours", "shown"])
def test_counts_start_at_one(name: str) -> None:
    with pytest.raises(UserError, match=f"feature_map: {name} must be at least 1; got 0"):
        replace(SMALL, **{name: 0})


def test_the_margin_is_half_as_far_again() -> None:
    assert pytest.approx(1.5) == math.exp(OFF)
