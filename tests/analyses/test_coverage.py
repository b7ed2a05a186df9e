"""Coverage: nulls and plants from a bank of distances and end to end, its figures against slow twins, what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from sklearn.cluster import KMeans

from distillens.analyses.representativeness._trajectory import along, by_replicate
from distillens.analyses.representativeness.coverage import (
    FIGURES,
    SEEN,
    UNSEEN,
    Coverage,
    CoverageResult,
    _el2n,
    _View,
    cmi,
    measured,
    vendi,
)
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.contracts import Sets
from distillens.core.dataset import Splits
from distillens.core.decode import MultiFormation
from distillens.core.labels import Hard, Probabilities
from distillens.core.recipe import Recipe
from distillens.core.result import Claim
from distillens.core.rng import Key
from distillens.core.storage import read_tensors
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.nets.resnet18 import ResNet18
from distillens.runs import Runs
from tests.analyses.by_hand import class_means, subsets_at

SPLITS = ("val", "train")
DRAWS, ALARMS, REPLICATES, PAIRS = 1000, 70, 5, 60
SEED = Key(20261125, ("coverage",))
KEY = Key(53, ("coverage",))
TINY = Coverage(ConvNet(2, 8), Recipe(steps=60, batch=256, lr=0.05), moments=6)
K = 5  # neighbours


class Bank:
    """Distances between test images of each class and those of a split, "val" or "train", as five networks see them."""

    def __init__(self) -> None:
        tensors = read_tensors(Path(__file__).parents[1] / "bank" / "coverage.safetensors")[0]
        self.scores = [tensors[f"scores.{c}"].double() for c in range(10)]
        self.among = [square(tensors[f"among.{c}"], len(one)) for c, one in enumerate(self.scores)]
        self.across, self.within = {}, {}
        for split in SPLITS:
            self.across[split] = [tensors[f"across.{split}.{c}"].double() for c in range(10)]
            self.within[split] = [
                square(tensors[f"within.{split}.{c}"], one.shape[2])
                for c, one in enumerate(self.across[split])
            ]
        self._pairs: dict[tuple[str, int], list[list[tuple[torch.Tensor, torch.Tensor]]]] = {}

    def measured(self, split: str, j: int, c: int, members: torch.Tensor) -> torch.Tensor:
        """The figures of some images of a class, as network j sees them."""
        own = self.within[split][c][j][members][:, members]
        across = self.across[split][c][j][:, members]
        return measured(self.among[c][j], across, own, self.scores[c], K)

    def pairs(self, split: str, ipc: int) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        """So many pairs for each network."""
        if (split, ipc) not in self._pairs:
            self._pairs[split, ipc] = [
                [self.pair(split, j, ipc, SEED.fold("pair", split, ipc, j, i)) for i in range(PAIRS)]
                for j in range(REPLICATES)
            ]
        return self._pairs[split, ipc]

    def pair(self, split: str, j: int, ipc: int, place: Key) -> tuple[torch.Tensor, torch.Tensor]:
        """Two random sets of other images each, [figures, classes]."""
        found = []
        for c, one in enumerate(self.within[split]):
            order = place.fold(c).permutation(one.shape[1])
            found.append([self.measured(split, j, c, part) for part in (order[:ipc], order[ipc : 2 * ipc])])
        first, second = zip(*found, strict=True)
        return torch.stack(first, 1), torch.stack(second, 1)


def square(upper: torch.Tensor, n: int) -> torch.Tensor:
    whole = torch.zeros(len(upper), n, n, dtype=torch.float64)
    rows, columns = torch.triu_indices(n, n, offset=1)
    whole[:, rows, columns] = upper.double()
    return whole + whole.transpose(1, 2)


@pytest.fixture(scope="module")
def bank() -> Bank:
    return Bank()


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs(Plan())


def claims_of(*figures: list[torch.Tensor]) -> dict[str, Claim]:
    """The claims about a set by figures [figures, classes] of its replicates, of unseen and of training images beside it."""

    def table(many: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        # CMI: no claim is about it.
        return {"a": torch.stack([torch.cat([one, torch.zeros(1, 10)]) for one in many], 1)[:, :, None]}

    own, unseen, seen = map(table, figures)
    names = tuple("0123456789")
    result = CoverageResult(("a",), names, K, 30, own, {UNSEEN: unseen, SEEN: seen}, {"a": (100, 100)})
    return {claim.name: claim for claim in result.claims()}


def verdicts(result: CoverageResult) -> dict[tuple[str, str], str]:
    return {(claim.subject, claim.name): claim.verdict for claim in result.claims()}


def alarms(bank: Bank, split: str, ipc: int, besides: tuple[str, str]) -> dict[str, int]:
    """How often each claim about random real images of a split is supported beside others of these two splits."""
    pairs = {one: bank.pairs(one, ipc) for one in SPLITS}
    found: dict[str, int] = {}
    for i in range(DRAWS):
        at = list(enumerate(SEED.fold("null", ipc, i).integers(PAIRS, REPLICATES).tolist()))
        own = [pairs[split][j][p][0] for j, p in at]
        beside = [[pairs[one][j][p][1] for j, p in at] for one in besides]
        for name, claim in claims_of(own, *beside).items():
            found[name] = found.get(name, 0) + (claim.verdict == "supported")
    return found


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("ipc", [1, 10])
def test_real_images_are_told_from_others_no_more_often_than_stated(bank: Bank, ipc: int, split: str) -> None:
    found = alarms(bank, split, ipc, SPLITS)
    assert ("closer together than real" in found) == (ipc > 1)
    assert max(found.values()) <= ALARMS, found


def test_beside_unseen_images_alone_training_images_would_pass_for_special(bank: Bank) -> None:
    found = alarms(bank, "train", 10, ("val", "val"))
    assert max(found.values()) > 2 * ALARMS, found


def planted(bank: Bank, kind: str, split: str, ipc: int = 8) -> dict[str, Claim]:
    """The claims about chosen images of a split, beside random ones of both, with one network a replicate."""
    figures: tuple[list[torch.Tensor], ...] = ([], [], [])
    for j in range(REPLICATES):
        rows = []
        for c, across in enumerate(bank.across[split]):
            n = across.shape[2]
            if kind == "repeated":
                pick = SEED.fold("repeated", split, j, c).integers(n, 1).expand(ipc)
            elif kind == "easy":
                nearest = across[j].topk(K, dim=0, largest=False).indices
                pick = bank.scores[c][nearest].mean(0).argsort()[:ipc]
            else:
                pick = greedy(bank.among[c][j], across[j], ipc)
            others = [
                bank.measured(one, j, c, SEED.fold("beside", one, j, c).permutation(n)[:ipc])
                for one in SPLITS
            ]
            rows.append((bank.measured(split, j, c, pick), *others))
        for many, of_classes in zip(figures, zip(*rows, strict=True), strict=True):
            many.append(torch.stack(of_classes, 1))
    return claims_of(*figures)


def greedy(among: torch.Tensor, across: torch.Tensor, count: int) -> torch.Tensor:
    """Images that one after another cover the most real images not yet covered."""
    radii = among.sort(1).values[:, K]
    inside = across < radii[:, None]
    left, picked = torch.ones(len(radii), dtype=torch.bool), []
    for _ in range(count):
        gain = (inside & left[:, None]).sum(0)
        gain[picked] = -1
        picked.append(int(gain.argmax()))
        left &= ~inside[:, picked[-1]]
    return torch.tensor(picked)


@pytest.mark.parametrize("split", SPLITS)
def test_plants_among_real_images_are_found(bank: Bank, split: str) -> None:
    repeated = planted(bank, "repeated", split)
    assert repeated["covers less than real"].verdict == "supported"
    assert repeated["covers more than real"].verdict == "not supported"
    assert repeated["closer together than real"].verdict == "supported"
    assert planted(bank, "greedy", split)["covers more than real"].verdict == "supported"
    assert planted(bank, "easy", split)["among easy images"].verdict == "supported"


def made(real: Splits, images: torch.Tensor) -> DistilledDataset:
    """A set with as many images of each class, in the order of the classes."""
    labels = Hard(torch.arange(10).repeat_interleave(len(images) // 10))
    return DistilledDataset({"images": images}, labels, real.train.classes, real.space)


def centres(real: Splits, seed: int) -> DistilledDataset:
    """Five k-means centres of each class."""
    flat = real.train.images.flatten(1).numpy()
    found = [
        KMeans(5, n_init=1, random_state=seed).fit(flat[m.numpy()]).cluster_centers_
        for m in real.train.by_class
    ]
    return made(real, torch.from_numpy(np.concatenate(found)).float().view(-1, *real.train.shape))


def repeated(real: Splits, key: Key) -> DistilledDataset:
    """The mean image of each class, five times, with a little noise."""
    means = class_means(real).dataset().images.repeat_interleave(5, 0)
    return made(real, means + 0.05 * key.normal(*means.shape))


def test_centres_and_repeated_images_are_told_apart_end_to_end(digits: Splits, runs: Runs) -> None:
    sets = Sets(
        {
            "centres": tuple(centres(digits, r) for r in range(5)),
            "repeated": tuple(repeated(digits, KEY.fold("repeated", r)) for r in range(5)),
        },
        {"random_subset": subsets_at(KEY.fold("random"), digits, 5, 5)},
    )
    result = TINY(sets, digits, runs, key=KEY)
    found = verdicts(result)
    assert found["centres", "covers more than real"] == "supported"
    assert found["repeated", "covers less than real"] == "supported"
    assert found["repeated", "closer together than real"] == "supported"
    effective = result.figure("repeated", "effective images")
    assert effective is not None and effective.value < 1.5
    cmis = [result.figure(name, "CMI") for name in ("repeated", UNSEEN)]
    assert cmis[0] is not None and cmis[1] is not None and cmis[0].value < cmis[1].value / 5


def twin(real: np.ndarray, own: np.ndarray, scores: np.ndarray, k: int) -> list[float]:
    """All figures but CMI, image by image."""
    nearest_real, radii, pairs = [], [], []
    for i, one in enumerate(real):
        others = sorted(math.dist(one, other) for j, other in enumerate(real) if j != i)
        nearest_real.append(others[0])
        radii.append(others[k - 1])
        pairs += others
    scale = float(np.mean(nearest_real))
    inside = [[math.dist(x, y) < radius for y in own] for x, radius in zip(real, radii, strict=True)]
    covered = float(np.mean([any(row) for row in inside]))
    dense = sum(map(sum, inside)) / (k * len(own))
    radius = max(min(math.dist(x, y) for y in own) for x in real) / scale
    spacing = np.mean([min(math.dist(x, y) for j, y in enumerate(own) if j != i) for i, x in enumerate(own)])
    width = sorted(pairs)[(len(pairs) - 1) // 2]  # the lower median, as torch's
    kernel = [[math.exp(-(math.dist(x, y) ** 2) / (2 * width**2)) for y in own] for x in own]
    spectrum = np.linalg.eigvals(np.array(kernel) / len(own)).real
    effective = math.exp(-sum(v * math.log(v) for v in spectrum if v > 1e-12))
    hard = []
    for y in own:
        order = sorted(range(len(real)), key=lambda i: math.dist(real[i], y))
        hard.append(np.mean(scores[order[:k]]))
    return [covered, dense, radius, float(spacing / scale), effective, float(np.mean(hard))]


def test_figures_equal_a_slow_twin() -> None:
    rng = np.random.default_rng(3)
    for n, k in ((7, 1), (12, 3), (2, 5)):
        real, own, scores = rng.normal(size=(20, 4)), 1.3 * rng.normal(size=(n, 4)), rng.uniform(size=20)
        first, second = torch.from_numpy(real), torch.from_numpy(own)
        distances = (torch.cdist(first, first), torch.cdist(first, second), torch.cdist(second, second))
        found = measured(*distances, torch.from_numpy(scores), k)
        assert found.tolist() == pytest.approx(twin(real, own, scores, k), abs=1e-6)


def test_coverage_of_one_distribution_is_what_order_statistics_say() -> None:
    # Naeem et al. 2020, lemma 2: of a real image's N - 1 + n others the k nearest are all real by chance.
    n, own, k = 45, 10, 5
    expected = 1 - math.prod((n - 1 - i) / (n - 1 + own - i) for i in range(k))
    found = []
    for i in range(200):
        points = SEED.fold("order", i).normal(n + own, 6).double()
        d = torch.cdist(points, points)
        found.append(measured(d[:n, :n], d[:n, n:], d[n:, n:], torch.zeros(n), k)[:2])
    assert torch.stack(found).mean(0).tolist() == pytest.approx([expected, 1.0], abs=0.03)


def test_the_order_of_images_changes_nothing() -> None:
    points = SEED.fold("shuffle").normal(30, 5).double()
    scores = SEED.fold("scores").uniform(20).double()
    order, own = SEED.fold("by").permutation(20), 20 + SEED.fold("own").permutation(10)

    def of(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        d = torch.cdist(points, points)
        return measured(d[first][:, first], d[first][:, second], d[second][:, second], scores[first], 3)

    whole = of(torch.arange(20), torch.arange(20, 30))
    assert torch.allclose(of(order, own), whole, atol=1e-6)


def test_effective_images_at_their_ends() -> None:
    assert float(vendi(torch.ones(6, 6, dtype=torch.float64))) == pytest.approx(1)
    assert float(vendi(torch.eye(6, dtype=torch.float64))) == pytest.approx(6)
    pairs = torch.block_diag(*[torch.ones(2, 2)] * 3).double()
    assert float(vendi(pairs)) == pytest.approx(3)


def test_cmi_equals_a_slow_twin_and_is_zero_for_one_image() -> None:
    points = 3 * SEED.fold("cmi").normal(8, 5).double()
    shares = np.exp(points.numpy()) / np.exp(points.numpy()).sum(1, keepdims=True)
    middle = shares.mean(0)
    assert float(cmi(points)) == pytest.approx(np.mean([entropy(p, middle) for p in shares]))
    assert float(cmi(points + SEED.fold("constant").normal(8, 1))) == pytest.approx(float(cmi(points)))
    assert float(cmi(points[:1])) == pytest.approx(0, abs=1e-12)
    assert cmi(points[:0]).isnan()


def test_el2n_equals_a_slow_twin(digits: Splits, runs: Runs) -> None:
    sets = Sets({"a": subsets_at(KEY.fold("el2n"), digits, 2, 1)})
    (networks,) = runs.get(along(TINY.net, TINY.recipe, TINY.moments, 3, sets, digits, KEY))
    flat = networks.at(networks.moments[2])
    few = digits.test.take(torch.arange(12))
    found = _el2n(networks, flat, few)
    assert len(networks) == 4  # two for each of the two replicates
    for i, label in enumerate(few.labels.hard().tolist()):
        lengths = []
        for one in flat:
            params = networks.shapes.unflatten(one)
            logits = networks.net.logits(params, {}, few.images[i : i + 1])[0][0].numpy().astype(float)
            shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            shares[label] -= 1
            lengths.append(np.sqrt((shares**2).sum()))
        assert float(found[i]) == pytest.approx(np.mean(lengths), abs=1e-5)


def test_one_image_a_class_covers_and_has_no_redundancy(digits: Splits, runs: Runs) -> None:
    sets = Sets({"a": subsets_at(KEY.fold("one"), digits, 2, 1)})
    result = TINY(sets, digits, runs, key=KEY)
    assert result.figure("a", "spacing") is None and result.figure("a", "effective images") is None
    assert {claim.name for claim in result.claims()} == {
        "covers less than real",
        "covers more than real",
        "among easy images",
    }
    divergence = result.figure("a", "CMI")
    assert divergence is not None and divergence.value == pytest.approx(0, abs=1e-9)
    assert any("CMI is zero by definition" in note for note in result.notes())


def test_decoded_sets_stand_beside_as_many_real_images_as_they_hold(digits: Splits, runs: Runs) -> None:
    (whole,) = subsets_at(KEY.fold("four"), digits, 1, 2)
    (plain,) = subsets_at(KEY.fold("eight"), digits, 1, 8)
    four = replace(whole, decode=MultiFormation(2))
    assert len(four.dataset()) == 80
    result = TINY(Sets({"four": (four,), "plain": (plain,)}), digits, runs, key=KEY)
    assert result.counts == {"four": (80, 80), "plain": (80, 80)}
    for kind in (UNSEEN, SEEN):
        assert torch.equal(result.beside[kind]["four"], result.beside[kind]["plain"])
    # What stands beside a set is drawn where its name says.
    (networks,) = runs.get(*TINY.trainings(Sets({"plain": (plain,)}), digits, key=KEY))
    view = _View(networks, digits.test, torch.zeros(len(digits.test)), K)
    for kind, split in {"unseen": digits.val, "seen": digits.train}.items():
        drawn = view.measured(split.take(split.drawn(8, KEY.fold(kind, 0))))
        assert torch.equal(result.beside[f"real, {kind}"]["plain"][0, 0], drawn[0])
    assert result.values["four"].shape == (len(FIGURES), 1, 5, 10)
    spread = result.figure("four", "coverage")
    assert spread is not None and spread.unit.startswith("network")


def test_images_that_the_validation_split_cannot_match_are_thinned(digits: Splits, runs: Runs) -> None:
    most = min(map(len, digits.val.by_class))
    sets = Sets({"large": subsets_at(KEY.fold("large"), digits, 1, most + 4)})
    result = TINY(sets, digits, runs, key=KEY)
    seen = sum(min(most + 4, len(members)) for members in digits.val.by_class)
    assert result.counts["large"] == (10 * (most + 4), seen)
    assert any(f"large ({seen} of {10 * (most + 4)})" in note for note in result.notes())


def test_a_class_that_no_label_names_is_covered_by_nothing(digits: Splits, runs: Runs) -> None:
    (one,) = subsets_at(KEY.fold("bare"), digits, 1, 2)
    shares = torch.eye(10)[one.labels.hard()]
    shares[shares[:, 3] == 1] = torch.eye(10)[4] * 0.6 + torch.eye(10)[3] * 0.4
    soft = replace(one, labels=Probabilities(shares))
    result = TINY(Sets({"soft": (soft,)}), digits, runs, key=KEY)
    values = result.values["soft"][:, 0]
    assert bool((values[0, :, 3] == 0).all()) and bool(values[1:, :, 3].isnan().all())
    assert not values[:, :, 4].isnan().any()
    assert result.figure("soft", "radius") is not None
    assert any("soft (no image of 3)" in note for note in result.notes())


def test_a_set_with_fewer_replicates_than_the_others_is_measured(digits: Splits, runs: Runs) -> None:
    sets = Sets(
        {"a": subsets_at(KEY.fold("many"), digits, 3, 2)},
        {"herding": subsets_at(KEY.fold("few"), digits, 1, 2)},
    )
    result = TINY(sets, digits, runs, key=KEY)
    assert result.values["a"].shape[1:3] == (3, 2)
    assert result.values["herding"].shape[1:3] == (1, 2)
    (networks,) = runs.get(*TINY.trainings(sets, digits, key=KEY))
    assert [len(one) for one in by_replicate(networks, sets)] == [2, 2, 2]


def test_what_does_not_fit_is_refused(digits: Splits, runs: Runs) -> None:
    sets = Sets({"a": subsets_at(KEY.fold("refused"), digits, 1, 1)})
    fewest = min(map(len, digits.test.by_class))
    with pytest.raises(
        UserError, match=f"coverage: {fewest} neighbours .* set neighbours to at most {fewest - 1}"
    ):
        replace(TINY, neighbours=fewest)(sets, digits, runs, key=KEY)
    without = replace(digits, val=digits.val.take((digits.val.labels.hard() != 7).nonzero().flatten()))
    with pytest.raises(UserError, match="none of class '7' there; make the validation split larger"):
        TINY(sets, without, runs, key=KEY)
    with pytest.raises(UserError, match="cannot be followed through training; got ResNet18"):
        replace(TINY, net=ResNet18(width=4, norm="batch"))(sets, digits, runs, key=KEY)
    with pytest.raises(UserError, match="coverage: early is a share"):
        replace(TINY, early=0.0)
    with pytest.raises(UserError, match="coverage: neighbours must be at least 1"):
        replace(TINY, neighbours=0)
