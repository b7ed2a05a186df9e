"""Real images mixed in: draws, the two readings, nulls and plants.

Nulls are 1,000 resampled draws of five replicates from the committed banks (tests/bank): at most 70 may be called supported.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distillens.analyses.behaviour._lengths import lengths
from distillens.analyses.behaviour.accuracy import Accuracy
from distillens.analyses.behaviour.mixing import Mixing, MixingResult
from distillens.core.artefact import DistilledDataset, Order
from distillens.core.checks import UserError
from distillens.core.contracts import Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Hard, Labels, Logits, Targets, Teacher
from distillens.core.recipe import Recipe
from distillens.core.result import Claim, Estimate, Result
from distillens.core.rng import Key
from distillens.core.storage import read_tensors
from distillens.engine.plan import Plan
from distillens.evaluation.protocol import Protocol
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Training, networks, on, train
from tests.analyses.by_hand import class_means, subset, subsets_at

KEY = Key(99, ("end to end",))
SHORT = Recipe(steps=60, lr=0.03)
TINY = ConvNet(depth=2, width=8)
DRAWS, ALARMS, REPLICATES = 1000, 70, 5
SEED = Key(20241123)
BANK = Path(__file__).parents[1] / "bank"
HURTS = ("real data hurts", "real data hurts at a tuned count")


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs(Plan())


@pytest.fixture(scope="module")
def bank() -> dict[str, torch.Tensor]:
    return read_tensors(BANK / "digits.safetensors")[0]


@pytest.fixture(scope="module")
def pairs(digits: Splits) -> dict[str, torch.Tensor]:
    counts, _ = read_tensors(BANK / "mixing.safetensors")
    return {name: values.double() / len(digits.test) for name, values in counts.items()}


def subsets(real: Splits, name: str, count: int = 3, ipc: int = 1) -> tuple[DistilledDataset, ...]:
    return subsets_at(KEY.fold(name), real, count, ipc)


def verdicts(result: Result) -> dict[tuple[str, str], str]:
    return {(claim.subject, claim.name): claim.verdict for claim in result.claims()}


def claims_of(
    fixed: torch.Tensor, amounts: tuple[int, ...], at: int, beside: torch.Tensor | None = None
) -> dict[str, Claim]:
    """The claims about accuracies [replicates, amounts] at both readings, with those of the random subset beside."""
    curves = {"dm": fixed[:, None]} | ({} if beside is None else {"random_subset": beside[:, None]})
    result = MixingResult(("dm",), amounts, at, curves, curves)
    return {claim.name: claim for claim in result.claims()}


def alarms(claims: list[Claim]) -> int:
    return sum(claim.verdict == "supported" for claim in claims)


# The claims


@pytest.mark.parametrize("ipc", [1, 10])
def test_mixing_does_not_hurt_real_subsets_more_often_than_stated(
    bank: dict[str, torch.Tensor], ipc: int
) -> None:
    values = bank[f"mixing.{ipc}"]
    claims = []
    for i in range(DRAWS):
        rows = values[SEED.fold("mixing", ipc, i).permutation(len(values))[:REPLICATES]]
        found = claims_of(rows, (0, ipc), ipc)
        assert {name for name in found if name in HURTS} == set(HURTS)
        claims.append(found[HURTS[0]])
    assert alarms(claims) <= ALARMS


def test_mixing_that_changes_nothing_hurts_no_more_often_than_stated(bank: dict[str, torch.Tensor]) -> None:
    # The sharper null: two measurements of one set in the place of "without" and "with". Both readings see the same numbers.
    values = bank["accuracy.10"]
    claims: dict[str, list[Claim]] = {name: [] for name in HURTS}
    for i in range(DRAWS):
        rows = values[SEED.fold("nothing", i).permutation(len(values))[:REPLICATES]]
        for name, claim in claims_of(rows, (0, 10), 10).items():
            claims[name].append(claim)
    for name in HURTS:
        assert alarms(claims[name]) <= ALARMS


@pytest.mark.parametrize("ipc", [1, 10])
def test_tuned_mixing_does_not_hurt_real_subsets_more_often_than_stated(
    pairs: dict[str, torch.Tensor], ipc: int
) -> None:
    values = pairs[f"tuned.null.{ipc}"]
    claims = []
    for i in range(DRAWS):
        rows = values[SEED.fold("tuned", ipc, i).permutation(len(values))[:REPLICATES]]
        claims.append(claims_of(rows, (0, 1, 10, 50), ipc)[HURTS[1]])
    assert alarms(claims) <= ALARMS


@pytest.mark.parametrize("ipc", [1, 10])
def test_the_same_set_twice_recovers_no_more_often_than_stated(
    bank: dict[str, torch.Tensor], ipc: int
) -> None:
    values = bank[f"accuracy.{ipc}"]
    claims = []
    for i in range(DRAWS):
        chosen = values[SEED.fold("recovers", ipc, i).permutation(len(values))[:REPLICATES]]
        flip = SEED.fold("recovers", "flip", ipc, i).integers(2, REPLICATES)
        rows = torch.arange(REPLICATES)
        twice = torch.stack([chosen[:, 0], chosen[rows, flip], chosen[rows, 1 - flip]], 1)
        claims.append(claims_of(twice, (0, ipc, 50), ipc)["recovers"])
    assert alarms(claims) <= ALARMS


@pytest.mark.parametrize("ipc", [1, 10])
def test_random_subsets_recover(pairs: dict[str, torch.Tensor], ipc: int) -> None:
    values = pairs[f"fixed.null.{ipc}"]
    claims = []
    for i in range(200):
        rows = values[SEED.fold("recovery", ipc, i).permutation(len(values))[:REPLICATES]]
        claims.append(claims_of(rows, (0, 1, 10, 50), ipc)["recovers"])
    assert alarms(claims) >= 160


def leads(pairs: dict[str, torch.Tensor], ipc: int, place: Key, shift: float) -> dict[str, Claim]:
    """The claims of five pairs of random subsets, which of the two is the set's by chance, with a lead planted in it."""
    first, second = pairs[f"fixed.null.{ipc}"], pairs[f"fixed.random.{ipc}"]
    order = place.permutation(len(first))[:REPLICATES]
    flip = place.fold("flip").integers(2, REPLICATES).bool()[:, None]
    own, theirs = (torch.where(f, first[order], second[order]) for f in (flip, ~flip))
    return claims_of(own + shift, (0, 1, 10, 50), ipc, theirs)


@pytest.mark.parametrize("ipc", [1, 10])
@pytest.mark.parametrize("side", [-1, 1])
def test_a_set_that_leads_by_the_margin_converges_no_more_often_than_stated(
    pairs: dict[str, torch.Tensor], ipc: int, side: int
) -> None:
    found = [leads(pairs, ipc, SEED.fold("lead", ipc, i), side * 0.02)["converges"] for i in range(DRAWS)]
    assert alarms(found) <= ALARMS


@pytest.mark.parametrize("ipc", [1, 10])
def test_another_random_subset_converges(pairs: dict[str, torch.Tensor], ipc: int) -> None:
    found = [leads(pairs, ipc, SEED.fold("alike", i), 0.0)["converges"] for i in range(200)]
    assert alarms(found) >= 180


def test_good_sets_without_real_images_are_not_called_the_same(bank: dict[str, torch.Tensor]) -> None:
    # A tenth above random subsets is five times the margin.
    values = bank["accuracy.1"]
    found = []
    for i in range(DRAWS):
        order = SEED.fold("good", i).permutation(len(values))
        own, theirs = values[order[:REPLICATES]], values[order[REPLICATES : 2 * REPLICATES]]
        found.append(claims_of(own + 0.1, (0, 1), 1, theirs)["converges"])
    assert alarms(found) <= ALARMS


def test_mislabelled_real_images_hurt(digits: Splits, runs: Runs) -> None:
    wrong = Dataset(
        digits.train.images, Hard((digits.train.labels.hard() + 1) % 10), digits.train.classes, digits.space
    )
    poisoned = Splits(wrong, digits.val, digits.test)
    sets = Sets({"means": (class_means(digits),) * 4})
    result = Mixing((0, 5), SHORT, TINY, efforts=(1, 1.5))(sets, poisoned, runs, key=KEY)
    for name in HURTS:
        assert verdicts(result)["means", name] == "supported"


def test_real_images_help_a_random_subset(digits: Splits, runs: Runs) -> None:
    sets = Sets({"null": subsets(digits, "m", 4)}, {"random_subset": subsets(digits, "base", 4)})
    result = Mixing((0, 1, 5), SHORT, TINY, efforts=(1, 1.5))(sets, digits, runs, key=KEY)
    for name in HURTS:
        assert verdicts(result)["null", name] != "supported"
    assert verdicts(result)["null", "recovers"] == "supported"
    # The positive control is in the table: the random subset's own row.
    (drops,) = (t for t in result.tables() if t.title == "Drop and recovery after 60 steps")
    random = {row[0]: row for row in drops.rows}["random_subset"]
    assert random[1] == result.change("random_subset", 1)
    assert random[2] == result.change("random_subset", 5, 1)
    assert isinstance(random[2], Estimate) and random[2].low > 0


def test_a_difference_of_amounts_is_that_of_the_means() -> None:
    curves = torch.tensor([[[0.80, 0.70, 0.90]], [[0.82, 0.76, 0.90]], [[0.78, 0.76, 0.93]]]).double()
    random = torch.tensor([[[0.40, 0.50, 0.89]], [[0.41, 0.50, 0.91]]]).double()
    result = MixingResult(("dm",), (0, 10, 50), 10, {"dm": curves, "random_subset": random})
    assert result.change("dm", 10).value == pytest.approx(-0.06)
    assert result.change("dm", 50, 10).value == pytest.approx(0.17)
    lead = result.lead("dm")
    assert lead is not None and lead.value == pytest.approx(0.0, abs=1e-7) and lead.n == 2
    # t of two pairs, 0.01 and -0.01: 12.706 * sd / sqrt(2), sd = 0.01 * sqrt(2)
    assert lead.high == pytest.approx(0.12706, abs=1e-4)
    assert result.lead("random_subset") is None
    assert [claim.name for claim in result.claims()] == ["real data hurts", "recovers", "converges"]
    assert "confounded" in result.notes()[1]


# What is trained


def test_mixed_images_are_nested_shared_and_never_the_baselines(digits: Splits) -> None:
    sets = Sets({"a": subsets(digits, "a", 2)}, {"random_subset": subsets(digits, "base", 2)})
    grid = Mixing((0, 2, 6), SHORT, TINY)._grid(sets, digits, KEY)

    def training(name: str, r: int, column: int) -> Training:
        (one,) = {id(t): t for t, _ in grid[name][r][column].values()}.values()
        return one

    def added(name: str, r: int, column: int) -> list[bytes]:
        return [image.numpy().tobytes() for image in training(name, r, column).data.images[10:]]

    for r in range(2):
        own = {image.numpy().tobytes() for image in sets.random[r].dataset().images}
        assert added("a", r, 2) == added("random_subset", r, 2)
        assert set(added("a", r, 1)) < set(added("a", r, 2))
        assert not own & set(added("a", r, 2))
        assert len(added("a", r, 2)) == 60
    assert added("a", 0, 2) != added("a", 1, 2)
    assert training("a", 0, 1).keys == training("random_subset", 0, 1).keys


def test_both_readings_equal_trainings_of_their_own_length(digits: Splits, runs: Runs) -> None:
    # The twin: each count trained apart, the best on validation taken by hand.
    recipe = Recipe(steps=30, batch=16, lr=0.03)
    sets = Sets({"a": subsets(digits, "a", 2)}, {"random_subset": subsets(digits, "base", 2)})
    analysis = Mixing((0, 2), recipe, TINY, nets=2, efforts=(1 / 3, 1, 2))
    result = analysis(sets, digits, runs, key=KEY)
    for r, one in enumerate(sets.distilled["a"]):
        taken = {image.numpy().tobytes() for image in sets.random[r].dataset().images}
        index = []
        for c, members in enumerate(digits.train.by_class):
            order = members[KEY.fold("added", r).fold(c).permutation(len(members))]
            free = [int(i) for i in order if digits.train.images[i].numpy().tobytes() not in taken]
            index += free[:2]
        added = digits.train.take(torch.tensor(index))
        for column, data in enumerate((one.dataset(), one.dataset().joined(added))):
            test, val = {}, {}
            for steps in (10, 30, 60):
                batch = 16 if len(data) > 16 else None
                population = train(
                    Training(data, TINY, recipe.but(steps=steps, batch=batch), networks(KEY, r, 2)), runs.plan
                )
                test[steps], val[steps] = (
                    population.accuracy(digits.test),
                    population.accuracy(digits.val).mean(),
                )
            best = max(test, key=lambda steps: float(val[steps]))
            assert torch.equal(result.curves["a"][r, :, column], test[30])
            assert torch.equal(result.tuned["a"][r, :, column], test[best])
            assert int(result.chosen["a"][r, column]) == best


def test_the_set_alone_at_the_fixed_count_is_the_model_of_accuracy(digits: Splits) -> None:
    runs = Runs(Plan())
    sets = Sets({"a": subsets(digits, "a", 2)}, {"random_subset": subsets(digits, "base", 2)})
    accuracy = Accuracy(Protocol("short", "", SHORT), TINY)(sets, digits, runs, key=KEY)
    for efforts in ((), (1 / 3, 1, 2)):
        result = Mixing((0, 1), SHORT, TINY, efforts=efforts)(sets, digits, runs, key=KEY)
        for name in ("a", "random_subset"):
            assert torch.equal(result.curves[name][..., 0], accuracy.values[name])
    assert set(runs.trained.values()) == {1}, "a model was trained twice"


def test_a_training_is_not_made_again_for_its_moments(digits: Splits) -> None:
    one = on(subset(digits, KEY), TINY, SHORT, KEY.split(1))
    longer = lengths(one, (20, 60, 90))
    assert len({id(training) for training, _ in longer.values()}) == 1
    assert {n: moment for n, (_, moment) in longer.items()} == {20: 20, 60: 60, 90: 90}
    shorter = lengths(one, (20, 60))
    assert shorter[60][0].fingerprint == one.fingerprint and shorter[60][1] is None
    assert shorter[20][0].steps == 20


def test_the_tuned_count_is_chosen_on_validation_and_never_on_test(digits: Splits, runs: Runs) -> None:
    sets = Sets({"a": subsets(digits, "a", 2)}, {"random_subset": subsets(digits, "base", 2)})
    analysis = Mixing((0, 2), SHORT, TINY)
    honest = analysis(sets, digits, runs, key=KEY)
    order = KEY.fold("shuffle").permutation(len(digits.test))
    labels = Hard(digits.test.labels.hard()[order])
    shuffled = Dataset(digits.test.images, labels, digits.test.classes, digits.space)
    permuted = analysis(sets, Splits(digits.train, digits.val, shuffled), runs, key=KEY)
    for name in honest.chosen:
        assert torch.equal(permuted.chosen[name], honest.chosen[name])
    assert permuted.tuned["a"].mean() < honest.tuned["a"].mean()


def test_batches_are_never_smaller_than_the_set(digits: Splits) -> None:
    analysis = Mixing((0, 1, 8), SHORT.but(batch=15), TINY, efforts=())
    grid = analysis._grid(Sets({"a": subsets(digits, "a", 1, ipc=2)}), digits, KEY)
    batches = [next(iter(at.values()))[0].recipe.batch for at in grid["a"][0]]
    assert batches == [None, 20, 20]  # a batch of the whole set is no batch


def test_as_published_is_the_papers_protocol(digits: Splits, like_cifar: Dataset) -> None:
    published = Mixing.as_published(like_cifar)
    assert (published.recipe, published.net, published.nets) == (
        Recipe(300, None, "sgd", 0.01, 0.9),
        ConvNet(),
        1,
    )
    assert published.efforts == ()
    assert published.real_per_class == Mixing().real_per_class == (0, 2, 10, 50, 250)
    assert Mixing.as_published(digits.train).real_per_class == (0, 2, 10, 50)  # 250 of 104 there are not


@pytest.mark.parametrize("labels", [Logits(5 * torch.eye(10)), Targets(2 * torch.eye(10) - 0.2)])
def test_soft_labels_mix_with_real_hard_ones(labels: Labels, digits: Splits, runs: Runs) -> None:
    soft = replace(class_means(digits), labels=labels)
    grid = Mixing((0, 2), SHORT, TINY)._grid(Sets({"soft": (soft,)}), digits, KEY)
    mixed = grid["soft"][0][1][SHORT.steps][0].data
    assert len(mixed) == 30 and mixed.labels.hard()[10:].bincount().tolist() == [2] * 10
    (values,) = mixed.labels.tensors().values()
    if labels.kind == "targets":  # as long as the distilled ones
        assert mixed.labels.kind == "targets"
        torch.testing.assert_close(values[10:], values[mixed.labels.hard()[10:]])
    else:
        assert bool((values[10:].amax(1) == 1).all())
    result = Mixing((0, 2), SHORT, TINY)(Sets({"soft": (soft,)}), digits, runs, key=KEY)
    assert result.curves["soft"].shape == result.tuned["soft"].shape == (1, 1, 2)


def test_ordered_steps_are_left_out_with_a_note(digits: Splits, runs: Runs) -> None:
    one = class_means(digits)
    ordered = replace(one, order=Order(torch.arange(10)[None], torch.tensor([0.02])))
    sets = Sets({"wang2018": (ordered,), "a": (one,)})
    result = Mixing((0, 1), SHORT, TINY, efforts=())(sets, digits, runs, key=KEY)
    assert result.distilled == tuple(result.curves) == ("a",)
    assert result.notes()[-1] == "Not for wang2018: real images have no place among ordered steps."


def test_a_single_set_is_mixed_with_several_networks_and_says_so(digits: Splits, runs: Runs) -> None:
    analysis = Mixing((0, 2), SHORT, TINY, nets=3)
    result = analysis(Sets({"a": subsets(digits, "a", 1)}), digits, runs, key=KEY)
    change = result.change("a", 2)
    assert change.n == 3
    assert "covers training only" in change.unit
    assert change.low > -1


# Mistakes


def test_a_teachers_labels_do_not_mix(digits: Splits, runs: Runs) -> None:
    taught = replace(class_means(digits), labels=Teacher("theirs", torch.zeros(2, 10, 10), 0))
    with pytest.raises(UserError, match="teacher labels cannot stand beside real hard labels"):
        Mixing((0, 2), SHORT, TINY)(Sets({"t": (taught,)}), digits, runs, key=KEY)


def test_too_many_real_images_are_refused(digits: Splits, runs: Runs) -> None:
    with pytest.raises(
        UserError, match=r"class '.' has \d+ images beside the baseline's, 500 were asked for"
    ):
        Mixing((0, 500), SHORT, TINY)(Sets({"a": subsets(digits, "a", 1)}), digits, runs, key=KEY)


def test_moments_need_a_constant_schedule() -> None:
    falling = Recipe(schedule="cosine")
    with pytest.raises(
        UserError, match="moments of one training, which needs a constant schedule; got cosine"
    ):
        Mixing(recipe=falling)
    assert Mixing(recipe=falling, efforts=()).recipe == falling


def test_efforts_and_margin_are_above_zero() -> None:
    with pytest.raises(UserError, match="effort 1 must be above 0"):
        Mixing(efforts=(1, 0))
    with pytest.raises(UserError, match="margin must be above 0"):
        Mixing(margin=0)
