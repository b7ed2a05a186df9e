"""representativeness/clock: its instruments against twins and closed forms, its claims' nulls and plants."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score

from distillens.analyses.representativeness._beside import SEEN, UNSEEN, seen, unseen
from distillens.analyses.representativeness._instruments import fallen, highest, smooth
from distillens.analyses.representativeness._trajectory import along, by_replicate
from distillens.analyses.representativeness.clock import Clock, ClockResult
from distillens.analyses.representativeness.recognition_curve import RecognitionCurve
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.contracts import Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Hard, Labels, Probabilities, Targets, Teacher
from distillens.core.recipe import Recipe
from distillens.core.result import NETWORK, Claim
from distillens.core.rng import Key
from distillens.core.storage import read_tensors
from distillens.core.vector import Shapes
from distillens.curvature import quadratic_forms
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Training, networks
from tests.analyses.by_hand import subsets_at

KEY = Key(1125, ("clock",))
DRAWS, ALARMS, REPLICATES = 1000, 70, 5
NET = ConvNet(2, 8)
SHORT = Recipe(steps=120, batch=256, lr=0.03)
OWN = Recipe(steps=60, lr=0.05)
TINY = Clock(NET, SHORT, OWN, moments=16, trajectories=4, looks=10, probes=2, tested=200)


@pytest.fixture(scope="module")
def bank() -> dict[str, torch.Tensor]:
    return read_tensors(Path(__file__).parents[1] / "bank" / "clock.safetensors")[0]


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs(Plan())


def result_of(
    ages: dict[str, torch.Tensor], points: tuple[torch.Tensor, ...], moments: tuple[int, ...] = (0, 8, 300)
) -> ClockResult:
    """The result with given ages of sets [replicates, 1, 4] and of the points of "other", one [1, 3, n] a replicate."""
    t = len(moments)
    return ClockResult(
        ("other",),
        ("a", "b"),
        moments,
        {name: torch.zeros(*own.shape, t) for name, own in ages.items()},
        ages,
        {name: own[..., None].expand(-1, -1, -1, 2) for name, own in ages.items()},
        dict.fromkeys(ages, points),
        {name: tuple(torch.arange(one.shape[-1]) % 2 for one in points) for name in ages},
    )


def drawn(
    bank: dict[str, torch.Tensor], place: Key, kind: str = "unseen"
) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, ...]]:
    """Five trajectories, real images of a kind along each and others of both kinds beside them; the points of one set."""
    who = place.fold("who").permutation(len(bank["points"]))[:REPLICATES]
    ages = {}
    for one, beside in (("unseen", UNSEEN), ("seen", SEEN)):
        own = bank[f"ages.{one}"][who].double()
        pair = place.fold("pair", one).integers(own.shape[1], REPLICATES)
        first = place.fold("first", one).integers(2, REPLICATES)
        at = torch.arange(REPLICATES)
        if one == kind:
            ages["other"] = own[at, pair, first][:, None]
        ages[beside] = own[at, pair, 1 - first][:, None]
    return ages, tuple(bank["points"][j].double()[None] for j in who.tolist())


def shuffled(points: torch.Tensor, place: Key) -> torch.Tensor:
    """Ages [1, 3, n] with each instrument's shuffled over the points."""
    rows = [row[place.fold(i).permutation(len(row))] for i, row in enumerate(points[0])]
    return torch.stack(rows)[None]


def supported(claims: list[Claim]) -> int:
    return sum(claim.verdict == "supported" for claim in claims)


@pytest.mark.parametrize("kind", ["unseen", "seen"])
def test_other_real_images_and_shuffled_points_support_nothing_more_often_than_stated(
    bank: dict[str, torch.Tensor], kind: str
) -> None:
    found: dict[str, list[Claim]] = {}
    for i in range(DRAWS):
        place = KEY.fold("null", i)
        ages, points = drawn(bank, place, kind)
        mixed = tuple(shuffled(one, place.fold("shuffle", r)) for r, one in enumerate(points))
        for claim in result_of(ages, mixed).claims():
            found.setdefault(claim.name, []).append(claim)
    assert all(len(many) == DRAWS for many in found.values())
    assert {name: supported(many) <= ALARMS for name, many in found.items()} == dict.fromkeys(
        ("holds early training", "instruments agree"), True
    )


def test_sets_of_half_the_age_and_real_points_are_found(bank: dict[str, torch.Tensor]) -> None:
    younger, agree = [], []
    for i in range(100):
        # Training images are the younger ones of real images: half of their age is half or less beside both.
        ages, points = drawn(bank, KEY.fold("plant", i), "seen")
        ages["other"] = ages["other"].clamp(max=math.log1p(300)) - math.log(2)
        claims = {claim.name: claim for claim in result_of(ages, points).claims()}
        younger.append(claims["holds early training"])
        agree.append(claims["instruments agree"])
    assert supported(younger) >= 95
    assert supported(agree) >= 95


def early_only(real: Splits, sets: Sets, runs: Runs) -> tuple[DistilledDataset, ...]:
    """For each replicate 50 images under labels that its real model gives them early, and at the end no more."""
    (population,) = runs.get(along(TINY.net, TINY.recipe, TINY.moments, TINY.trajectories, sets, real, KEY))
    found = []
    for own in by_replicate(population, sets):
        accuracy = [
            float((own.logits(real.val, own.at(t)).argmax(-1) == real.val.labels.hard()).double().mean())
            for t in own.moments
        ]
        early = next(t for t, a in zip(own.moments, accuracy, strict=True) if a > 0.4)
        then, now = own.logits(real.train, own.at(early)).argmax(-1)[0], own.predictions(real.train)[0]
        at = (then != now).nonzero().flatten()[:50]
        images = real.train.images[at]
        found.append(DistilledDataset({"images": images}, Hard(then[at]), real.train.classes, real.space))
    return tuple(found)


def test_what_only_an_early_model_has_right_is_early_and_a_large_real_subset_is_late(
    digits: Splits, runs: Runs
) -> None:
    base = {"random_subset": subsets_at(KEY.fold("base"), digits, 4, 5)}
    sets = Sets({"early": early_only(digits, Sets({"a": base["random_subset"]}), runs)}, base)
    early = TINY(sets, digits, runs, key=KEY)
    large = TINY(Sets({"large": subsets_at(KEY.fold("large"), digits, 4, 40)}), digits, runs, key=KEY)
    verdict = {
        claim.subject: claim.verdict
        for result in (early, large)
        for claim in result.claims()
        if claim.name == "holds early training"
    }
    assert verdict["early"] == "supported"
    assert verdict["large"] != "supported"
    assert early.overall("early").value < 0.5 * early.overall("random_subset").value
    for instrument in ("agreement", "recognition", "curvature"):
        assert early.age("early", instrument).value < 0.5 * large.age("large", instrument).value, instrument


# ---- instruments by twins ----


@pytest.mark.parametrize("kind", ["hard", "probabilities", "targets"])
def test_quadratic_forms_are_those_of_the_exact_hessian(digits: Splits, kind: str) -> None:
    net = ConvNet(1, 2)
    params, _ = net.init(digits.train, KEY)
    shapes = Shapes.of(params)
    flat = shapes.flatten(params).double() + 0.1 * KEY.fold("away").normal(shapes.size).double()
    hard = digits.train.labels.hard()[:3]
    soft = KEY.fold("soft").normal(3, 10).double().softmax(-1)
    labels: Labels = {"hard": Hard(hard), "probabilities": Probabilities(soft), "targets": Targets(soft)}[
        kind
    ]
    data = Dataset(digits.train.images[:3].double(), labels, digits.train.classes, digits.space)
    probes = KEY.fold("probes").normal(2, shapes.size).double()
    found = quadratic_forms(net, shapes, flat, data, probes)
    for i in range(3):

        def loss(p: torch.Tensor, i: int = i) -> torch.Tensor:
            logits, _ = net.logits(shapes.unflatten(p), {}, data.images[i : i + 1])
            return labels.take(torch.tensor([i])).loss(logits).sum()

        hessian = torch.autograd.functional.hessian(loss, flat)
        wanted = (probes @ hessian * probes).sum(1)  # type: ignore[operator]
        assert torch.allclose(found[:, i], wanted, rtol=1e-8, atol=1e-10)


def test_quadratic_forms_in_pieces_are_those_of_the_whole(
    digits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, _ = NET.init(digits.train, KEY)
    shapes = Shapes.of(params)
    data, probes = digits.val.take(torch.arange(7)), KEY.normal(2, shapes.size).sign()
    whole = quadratic_forms(NET, shapes, shapes.flatten(params), data, probes)
    monkeypatch.setattr("distillens.curvature.TOGETHER", 130)
    parts = quadratic_forms(NET, shapes, shapes.flatten(params), data, probes)
    assert torch.allclose(whole, parts, rtol=1e-3, atol=1e-2)


def test_readings_are_what_plain_loops_give(digits: Splits, runs: Runs) -> None:
    analysis = replace(TINY, recipe=SHORT.but(steps=12), moments=3, looks=3, trajectories=2, tested=450)
    sets = Sets({"a": subsets_at(KEY.fold("plain"), digits, 1, 2)})
    result = analysis(sets, digits, runs, key=KEY)
    everything = analysis.trainings(sets, digits, key=KEY)
    trajectories, models, *_ = runs.get(*everything)
    data, test = sets.distilled["a"][0].dataset(), digits.test
    shapes = trajectories.shapes
    probes = torch.stack([(KEY.fold("probe", 0, q).uniform(shapes.size) - 0.5).sign() for q in range(2)])

    def gradient(flat: torch.Tensor, of: Dataset) -> np.ndarray:
        leaf = flat.clone().requires_grad_()
        logits, _ = NET.logits(shapes.unflatten(leaf), {}, of.images)
        (found,) = torch.autograd.grad(F.cross_entropy(logits, of.labels.hard()), leaf)
        return found.double().numpy()

    for j in range(2):
        own = models.predictions(test)[j].numpy()
        for t, moment in enumerate(result.moments):
            flat = trajectories.at(moment)[j]
            theirs = trajectories.logits(test, flat[None])[0].argmax(-1).numpy()
            kappa = cohen_kappa_score(own, theirs)
            answered = trajectories.logits(data, flat[None])[0].argmax(-1)
            share = float((answered == data.labels.hard()).double().mean())
            a, b = gradient(flat, data), gradient(flat, test)
            cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            trace = float(quadratic_forms(NET, shapes, flat, data, probes).mean())
            found = result.readings["a"][0, j, :, t].tolist()
            assert found == pytest.approx([kappa, (share - 0.1) / 0.9, cosine, trace], rel=1e-3, abs=1e-4)


def test_a_class_is_read_on_its_own_images(digits: Splits, runs: Runs) -> None:
    # A set of two classes alone: their mean reading is the whole's, and the other classes read nothing.
    analysis = replace(TINY, trajectories=2)
    (plain,) = subsets_at(KEY.fold("plain"), digits, 1, 4)
    at = (plain.dataset().labels.hard() < 2).nonzero().flatten()
    part = plain.dataset().take(at)
    two = DistilledDataset({"images": part.images}, part.labels, part.classes, part.space)
    result = analysis(Sets({"a": (two,)}), digits, runs, key=KEY)
    assert result.class_ages["a"].shape == (1, 2, 4, 10)
    assert bool(result.class_ages["a"][..., 1:3, 2:].isinf().all())
    assert bool(result.class_ages["a"][..., 1, :2].isfinite().all())
    assert result.point_ages["a"][0].shape == (2, 3, 8)
    assert result.headline()["a"].unit == NETWORK


def test_highest_is_the_top_of_the_parabola_through_three() -> None:
    moments = (0, 1, 4, 9, 30)
    x = np.log1p(np.array(moments, float))
    readings = np.array([[0.1, 0.5, 0.9, 0.7, 0.2], [0.9, 0.5, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4, 0.5]])
    found = highest(torch.from_numpy(readings), moments)
    a, b, _ = np.polyfit(x[1:4], readings[0, 1:4], 2)
    assert float(found[0]) == pytest.approx(-b / 2 / a)
    assert float(found[1]) == 0.0
    assert math.isinf(float(found[2]))
    tied = highest(torch.tensor([[0.1, 0.5, 0.5, 0.2, 0.1]]).double(), moments)
    assert x[1] < float(tied[0]) < x[2]
    assert math.isinf(float(highest(torch.tensor([[0.1, 0.2]]), (0, 5))[0]))


def test_fallen_is_read_after_the_greatest() -> None:
    moments = (0, 1, 3, 7)
    readings = torch.tensor([[0.0, 0.8, 0.6, 0.2], [1.0, 0.9, 0.8, 0.7], [1.0, 0.0, 1.0, 0.9]]).double()
    found = fallen(readings, 0.5, moments)
    assert float(found[0]) == pytest.approx(math.log(4) + 0.5 * math.log(2))
    assert math.isinf(float(found[1]))
    assert float(found[2]) == pytest.approx(0.5 * math.log(2))


def test_readings_are_smoothed_over_neighbours() -> None:
    assert smooth(torch.tensor([4.0, 0.0, 8.0])).tolist() == [3.0, 3.0, 6.0]


def test_points_are_ranked_as_scipy_ranks_them() -> None:
    ages = KEY.fold("ranks").integers(5, 2, 1, 3, 20).double()
    result = result_of(dict.fromkeys(("other", UNSEEN, SEEN), torch.ones(2, 1, 4)), tuple(ages))
    wanted = [float(spearmanr(one[0, 0], one[0, 2]).statistic) for one in ages]
    assert result.alike("other", "recognition", "curvature").value == pytest.approx(sum(wanted) / 2)
    flat = result_of(result.ages, tuple(torch.ones_like(ages)))
    assert flat.alike("other").value == 0.0


# ---- what is not reached, what is refused ----


def test_what_is_not_reached_counts_as_the_last_moment_and_is_said() -> None:
    never = torch.tensor([[[1.0, 2.0, 3.0, math.inf]], [[1.0, 2.0, 3.0, 4.0]]]).double()
    unseen_ages = torch.full((2, 1, 4), math.inf).double()
    ages = {"other": never, UNSEEN: unseen_ages, SEEN: never + math.log(2)}
    result = result_of(ages, (torch.ones(1, 3, 4),) * 2)
    last = math.log1p(300)
    assert result.younger("other").value == pytest.approx((6 + last) / 8 + 10 / 8 - last)
    assert result.younger("other", "curvature").value == pytest.approx((4 - last) / 2)
    assert result.age("other", "curvature").high == math.inf
    assert result.overall("other").high == result.of_class("other", 0).high == math.inf
    # Half the age of the training images, up to the last moment: the contrast that says less.
    claim = result.claims()[0]
    assert claim.estimate == result.younger("other", kind=SEEN)
    assert claim.estimate.value == pytest.approx(-math.log(2) * 7 / 8)
    late = result.tables()[3]
    assert late.rows == (
        ("other", "0 of 2", "0 of 2", "0 of 2", "1 of 2"),
        (UNSEEN, *["2 of 2"] * 4),
        (SEEN, "0 of 2", "0 of 2", "0 of 2", "1 of 2"),
    )
    assert result.apart("other", "recognition", "agreement").value == pytest.approx(1.0)
    for draw in result.panels().values():
        draw(Figure().add_subplot())


def test_a_teachers_views_and_soft_labels_have_ages(digits: Splits, runs: Runs) -> None:
    analysis = replace(TINY, recipe=SHORT.but(steps=12), moments=3, looks=3, trajectories=2)
    (plain,) = subsets_at(KEY.fold("plain"), digits, 1, 2)
    views = 5 * F.one_hot(plain.dataset().labels.hard(), 10).float().expand(2, -1, -1)
    taught = replace(plain, labels=Teacher("none", views, 0))
    soft = replace(plain, labels=Probabilities(views[0].softmax(-1)))
    result = analysis(Sets({"taught": (taught,), "soft": (soft,)}), digits, runs, key=KEY)
    # The mean of two equal views is the soft label: gradients and curvature are the same.
    assert torch.allclose(result.readings["taught"][:, :, 1:], result.readings["soft"][:, :, 1:], rtol=1e-4)


def test_it_trains_the_models_of_the_sets_from_their_trajectories_beginnings(digits: Splits) -> None:
    sets = Sets({"a": subsets_at(KEY.fold("a"), digits, 2, 3)})
    trajectories, first, second, *beside = TINY.trainings(sets, digits, key=KEY)
    assert trajectories.keys == (*first.keys, *second.keys)
    assert first.keys == networks(KEY, 0, 2)
    real = [*unseen(sets, digits, KEY), *seen(sets, digits, KEY)]
    assert [t.data.fingerprint for t in beside] == [d.fingerprint for d in real]
    shared = RecognitionCurve(NET, SHORT, moments=16, trajectories=4).trainings(sets, digits, key=KEY)
    assert isinstance(trajectories, Training)
    assert shared[0].fingerprint == trajectories.fingerprint


def test_a_network_that_remembers_more_than_its_parameters_is_refused(digits: Splits, runs: Runs) -> None:
    sets = Sets({"a": subsets_at(KEY.fold("a"), digits, 1, 1)})
    with pytest.raises(UserError, match="cannot be followed through training"):
        replace(TINY, net=ConvNet(2, 8, norm="batch"))(sets, digits, runs, key=KEY)


def test_too_few_looks_are_refused() -> None:
    with pytest.raises(UserError, match="clock: looks must be at least 2; got 1"):
        Clock(looks=1)
