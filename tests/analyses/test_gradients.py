"""representativeness/gradients: its measures against twins and closed forms, its claims' nulls and plants."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distillens.analyses.representativeness.gradients import (
    EARLY,
    LATE,
    SIZES,
    UNSEEN,
    WHOLE,
    Gradients,
    GradientsResult,
    Scale,
    layers_of,
    products,
    rows,
)
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.contracts import RANDOM, Sets
from distillens.core.dataset import Splits
from distillens.core.labels import Hard, Probabilities
from distillens.core.recipe import Recipe
from distillens.core.result import NETWORK, REPLICATE
from distillens.core.rng import Key
from distillens.core.storage import read_tensors
from distillens.core.vector import Shapes
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.nets.mlp import MLP
from distillens.runs import Runs
from tests.analyses.by_hand import class_means, subsets_at
from tests.bank.make_gradients import BESIDE, REFERENCE, SEEN

KEY = Key(733, ("gradients",))
DRAWS, ALARMS, REPLICATES = 1000, 70, 5
NET = ConvNet(depth=2, width=8)
SMALL = Gradients(NET, Recipe(steps=150, batch=256, lr=0.03), moments=16, looks=8, sample=43)


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs(Plan())


@pytest.fixture(scope="module")
def bank() -> torch.Tensor:
    """Inner products [trajectories, looks, 1, q, q]."""
    upper = read_tensors(Path(__file__).parents[1] / "bank" / "gradients.safetensors")[0]["upper"]
    q = REFERENCE + BESIDE + SEEN
    table = torch.zeros(*upper.shape[:2], 1, q, q, dtype=torch.float64)
    i, j = torch.triu_indices(q, q)
    table[..., i, j] = table[..., j, i] = upper.double()[:, :, None]
    return table


def verdicts(result: GradientsResult, name: str) -> dict[str, str]:
    return {claim.name: claim.verdict for claim in result.claims() if claim.subject == name}


# --- the measures ------------------------------------------------------------------------------------------------


def test_rows_hold_one_image_of_each_class_and_no_image_twice(digits: Splits) -> None:
    dealt = rows(digits.val, 1000, KEY)
    assert len(dealt) == min(map(len, digits.val.by_class))
    assert all(row.labels.hard().tolist() == list(range(10)) for row in dealt)
    flat = torch.cat([row.images for row in dealt]).flatten(1)
    known = digits.val.images.flatten(1)
    found = (flat[:, None] == known).all(2).double().argmax(1)
    assert len(set(found.tolist())) == len(flat)
    assert len(rows(digits.val, 3, KEY)) == 3


def test_products_are_those_of_plain_autograd_layer_by_layer(digits: Splits) -> None:
    net = MLP(1, 6)
    params, _ = net.init(digits.train, KEY.fold("init"))
    shapes = Shapes.of(params)
    layers = layers_of(shapes)
    many = [digits.train.take(torch.arange(i, i + 5)) for i in (0, 5, 10)]
    found = products(net, shapes, layers, shapes.flatten(params).double(), many)
    first, last = list(params)[:2], list(params)[2:]
    leaves = {name: value.double().requires_grad_() for name, value in params.items()}
    slow: dict[str, list[torch.Tensor]] = {"first": [], "last": []}
    for data in many:
        hidden = F.relu(F.linear(data.images.double().flatten(1), *(leaves[name] for name in first)))
        loss = F.cross_entropy(F.linear(hidden, *(leaves[name] for name in last)), data.labels.hard())
        for kind, names in (("first", first), ("last", last)):
            parts = torch.autograd.grad(loss, [leaves[name] for name in names], retain_graph=True)
            slow[kind].append(torch.cat([part.flatten() for part in parts]))
    by_layer = [torch.stack(one) @ torch.stack(one).T for one in slow.values()]
    torch.testing.assert_close(found[0], by_layer[0] + by_layer[1])
    torch.testing.assert_close(found[1:], torch.stack(by_layer))


def planted_scale(key: Key, real: torch.Tensor, b: int = 60, beside: int = 60) -> Scale:
    """Rows of k = 2 images around the gradient ``real`` [P]; each image has variance 1 in each direction."""
    p = len(real)
    drawn = real + key.normal(b + beside, p).double() / math.sqrt(2)
    return Scale((drawn @ drawn.T)[None, None, None], b, beside, 2)


def test_squares_are_free_of_the_samples_noise() -> None:
    # |g|^2 = 4, one image's variance T = 400: of 120 images the plain square is 4 + 400 / 120 = 7.3.
    real = torch.zeros(400, dtype=torch.float64)
    real[0] = 2.0
    whole = torch.eye(120, dtype=torch.float64)[60:].mean(0, keepdim=True)
    found = torch.stack([planted_scale(KEY.fold(i), real).measured(whole)[0, 0, 0] for i in range(40)])
    cosine, ratio, level = found.unbind(-1)
    expected = 4 / (4 + 400 / 120)
    assert float(cosine.mean()) == pytest.approx(math.sqrt(expected), rel=0.02)
    assert float(ratio.mean()) == pytest.approx(math.sqrt(1 / expected), rel=0.02)
    assert float(level.exp().mean()) == pytest.approx(120, rel=0.08)


def test_the_closed_form_is_that_of_drawn_subsets() -> None:
    real = torch.zeros(400, dtype=torch.float64)
    real[0] = 2.0
    scale = planted_scale(KEY.fold("closed"), real, b=600, beside=600)
    for wanted in (5, 20, 80):
        found = scale.measured(scale.subsets(wanted, 50, KEY.fold(wanted)))[0, 0, :, 0]
        n = 2 * wanted
        assert float(found[:, 0].mean()) == pytest.approx(math.sqrt(4 / (4 + 400 / n)), rel=0.05)
        assert float(found[:, 2].exp().mean()) == pytest.approx(n, rel=0.15)


def test_random_subsets_count_as_their_number_on_average() -> None:
    # In few directions the closed form alone strays: the mean of -log(chi^2 / 3) of three of them is above 0.
    real = torch.zeros(4, dtype=torch.float64)
    real[0] = 2.0
    scale = planted_scale(KEY.fold("stray"), real, b=600, beside=600)
    own = [scale.subsets(20, 1, KEY.fold("own", i)) for i in range(100)]
    plain = torch.stack([scale.measured(one)[..., 2] for one in own]).mean() - math.log(40)
    judged = [scale.judged(one, 40, 20, KEY.fold("drawn", i))[..., 2] for i, one in enumerate(own)]
    assert float(plain) > 0.25
    assert abs(float(torch.stack(judged).mean()) - math.log(40)) < 0.15


def test_measures_equal_a_slow_twin_in_numpy() -> None:
    vectors = KEY.fold("twin").normal(9, 12).double() + 1
    weights = torch.zeros(1, 9, dtype=torch.float64)
    weights[0, 6:8] = 0.5
    found = Scale((vectors @ vectors.T)[None, None, None], 6, 3, 4).measured(weights)[0, 0, 0, 0]
    r, d = vectors[:6].numpy(), vectors[6:8].mean(0).numpy()
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    length = np.mean([r[i] @ r[j] for i, j in pairs])
    square = np.mean([(d @ r[i]) * (d @ r[j]) for i, j in pairs])
    variance = 4 * (np.mean([x @ x for x in r]) - length)
    share = square / (d @ d) / length
    expected = [
        np.mean([d @ x for x in r]) / np.sqrt(d @ d * length),
        np.sqrt(d @ d / length),
        np.log(share / (1 - share) * variance / length),
    ]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_what_lies_outside_of_the_scale_is_its_end_and_said_in_words() -> None:
    real = torch.zeros(50, dtype=torch.float64)
    real[0] = 5.0
    scale = planted_scale(KEY.fold("ends"), real, 40, 20)
    q = scale.table.shape[-1]
    upside_down = -scale.subsets(20, 1, KEY)
    everything = torch.full((1, q), 1 / q, dtype=torch.float64)  # holds the reference itself
    assert float(scale.judged(upside_down, 40, 4, KEY)[..., 2]) == 0.0
    assert float(scale.judged(everything, 40, 4, KEY)[..., 2]) == pytest.approx(math.log(80))
    nothing = Scale(-scale.table, 40, 20, 2)
    assert bool(nothing.measured(everything).isnan().all())
    values = torch.zeros(2, 1, 2, 1, 3)
    values[:, :, 1, 0, 2] = math.log(80)
    said = result_of({"a": values}, (True, False), (False, True), 80).tables()[0].rows[0]
    assert said[2:4] == ("below 1", "above 80")
    lost = result_of({"a": values * torch.nan}, (True, False), (False, True), 80)
    assert lost.tables()[0].rows[0][2:4] == ("not measured", "not measured")
    assert lost.claims() == () and lost.headline() == {}


def result_of(
    values: dict[str, torch.Tensor],
    early: tuple[bool, ...],
    late: tuple[bool, ...],
    most: int,
    size: int = 50,
) -> GradientsResult:
    distilled = tuple(name for name in values if name != RANDOM)
    sizes = dict.fromkeys(values, size)
    checked = torch.zeros(*next(iter(values.values())).shape[:3], 0)
    phases = {EARLY: early, LATE: late}
    moments = tuple(range(len(early)))
    bounds = (0.0, math.log(most))
    return GradientsResult(distilled, moments, (WHOLE,), sizes, bounds, values, (), checked, phases)


# --- nulls and plants --------------------------------------------------------------------------------------------


POOL = 400  # random subsets of which each draw has 20 of its own, as the default has, to set its scale


def drawn_results(
    bank: torch.Tensor, place: Key, rows_of: int, said: int, seen: bool, count: int
) -> list[GradientsResult]:
    """Sets of ``rows_of`` random rows in each replicate that say they have ``said``: unseen rows, or two sets of seen ones."""
    names = ("a", RANDOM) if seen else ("a",)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for r in range(REPLICATES):
        scale = Scale(bank[r : r + 1], REFERENCE, BESIDE, 10)
        beside = scale.subsets(said, POOL, place.fold("pool", r))
        strays = scale.measured(beside)[0, :, :, 0, 2].clamp(*scale.bounds) - math.log(10 * said)
        picks = torch.stack([place.fold("picks", r, i).permutation(POOL)[:20] for i in range(count)])
        for name, values in found.items():
            weights = torch.zeros(count, bank.shape[-1], dtype=bank.dtype)
            first, most = (REFERENCE + BESIDE, SEEN) if seen else (REFERENCE, BESIDE)
            for i, own in enumerate(weights):
                own[first + place.fold(name, r, i).permutation(most)[:rows_of]] = 1 / rows_of
            levels = scale.measured(weights)[0, :, :, 0]
            levels[..., 2] = (levels[..., 2] - strays[:, picks].mean(-1)).clamp(*scale.bounds)
            values.append(levels)  # [looks, count, 3]
    early = (True, True, False, False, False)
    late = tuple(not e for e in early)
    stacked = {name: torch.stack(values)[:, None, :, :, None] for name, values in found.items()}
    return [
        result_of({n: v[:, :, :, i] for n, v in stacked.items()}, early, late, 10 * REFERENCE, 10 * said)
        for i in range(count)
    ]


def supported(results: list[GradientsResult], claim: str) -> int:
    return sum(verdicts(result, "a")[claim] == "supported" for result in results)


def test_unseen_real_images_are_worth_their_number(bank: torch.Tensor) -> None:
    found = drawn_results(bank, KEY.fold("null"), 5, 5, False, DRAWS)
    assert supported(found, "worth more than its number") <= ALARMS


def test_training_images_are_worth_their_number_early_and_do_not_turn_away_from_each_other(
    bank: torch.Tensor,
) -> None:
    found = drawn_results(bank, KEY.fold("null, seen"), 5, 5, True, DRAWS)
    assert supported(found, "worth more than its number") <= ALARMS
    assert supported(found, "turns away") <= ALARMS


def test_a_larger_real_subset_than_it_says_is_found(bank: torch.Tensor) -> None:
    found = drawn_results(bank, KEY.fold("plant"), 12, 4, False, 100)
    assert supported(found, "worth more than its number") >= 90


def relabelled(sets: tuple[DistilledDataset, ...], share: float) -> tuple[DistilledDataset, ...]:
    """The same images whose labels give ``share`` to all other classes together."""
    found = []
    for one in sets:
        data = one.dataset()
        soft = F.one_hot(data.labels.hard(), 10) * (1 - share / 0.9) + share / 9
        found.append(DistilledDataset({"images": data.images}, Probabilities(soft), data.classes, data.space))
    return tuple(found)


def permuted(sets: tuple[DistilledDataset, ...]) -> tuple[DistilledDataset, ...]:
    found = []
    for r, one in enumerate(sets):
        data = one.dataset()
        labels = Hard(data.labels.hard()[KEY.fold("permuted", r).permutation(len(data))])
        found.append(DistilledDataset({"images": data.images}, labels, data.classes, data.space))
    return tuple(found)


def test_plants_and_controls_on_real_digits(digits: Splits, runs: Runs) -> None:
    base = subsets_at(KEY.fold("base"), digits, REPLICATES, 10)
    other = subsets_at(KEY.fold("other"), digits, REPLICATES, 10)
    sets = Sets(
        {
            "means": (class_means(digits),) * REPLICATES,
            "soft": relabelled(other, 1 / 3),
            "permuted": permuted(other),
        },
        {RANDOM: base},
    )
    result = SMALL(sets, digits, runs, key=KEY)
    assert verdicts(result, "means")["worth more than its number"] == "supported"
    assert verdicts(result, "permuted")["worth more than its number"] == "not supported"
    assert verdicts(result, "soft")["turns away"] == "supported"
    by_chance = result.worth("permuted", EARLY)
    assert by_chance is not None and by_chance.value < 5
    # Unseen images count as their number, and so do subsets of other sizes.
    unseen = result.worth(UNSEEN, EARLY)
    assert unseen is not None and unseen.low < 100 < unseen.high
    early = result.checked[:, :, list(result.phases[EARLY])].nanmean((0, 1, 2)).exp()
    drawn = [10 * n for n in SIZES if n <= 26]
    assert list(result.drawn) == drawn
    np.testing.assert_allclose(early.numpy(), drawn, rtol=0.25)
    assert {claim.estimate.unit for claim in result.claims()} == {REPLICATE}


def test_a_single_set_has_its_trajectories_as_units(digits: Splits, runs: Runs) -> None:
    sets = Sets({"a": subsets_at(KEY.fold("one"), digits, 1, 40)})
    analysis = Gradients(NET, Recipe(steps=10, batch=256), moments=4, trajectories=3, looks=3, sample=20)
    result = analysis(sets, digits, runs, key=KEY)
    assert result.values["a"].shape == (1, 3, 3, 6, 3)
    assert [claim.name for claim in result.claims()] == ["worth more than its number"]
    assert {claim.estimate.unit for claim in result.claims()} == {NETWORK}
    # The set has more images than the 200 test images looked at, and than the validation images.
    assert result.sizes == {"a": 400, UNSEEN: 200}
    assert any(note.startswith("a: more images than can be told apart") for note in result.notes())
    assert any(note.startswith("One replicate") for note in result.notes())


# --- messages ----------------------------------------------------------------------------------------------------


def test_phases_that_overlap_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"the early phase ends before the late one begins; got early 0.5, late 0.5"
    ):
        Gradients(early=0.5)
