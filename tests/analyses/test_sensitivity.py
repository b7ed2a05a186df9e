"""Other ways of training: levels, twins, the null and the plant.

The null is 1,000 resampled draws of five pairs of random subsets from the committed bank (tests/bank/make_mixing.py): at most
70 may be called supported.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distillens.analyses.behaviour.accuracy import Accuracy
from distillens.analyses.behaviour.mixing import Mixing
from distillens.analyses.behaviour.sensitivity import (
    FULL,
    RANDOM,
    Sensitivity,
    SensitivityResult,
    relabelled,
)
from distillens.core.artefact import DistilledDataset, Order
from distillens.core.checks import UserError
from distillens.core.config import override
from distillens.core.contracts import Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Hard, Labels, Logits, Probabilities, Targets, Teacher
from distillens.core.recipe import Recipe
from distillens.core.result import Claim
from distillens.core.rng import Key
from distillens.core.storage import read_tensors
from distillens.engine.plan import Plan
from distillens.evaluation.protocol import Protocol
from distillens.nets.convnet import ConvNet
from distillens.nets.lenet import LeNet
from distillens.nets.mlp import MLP
from distillens.runs import Runs
from distillens.train import Training, networks, train
from tests.analyses.by_hand import subsets_at

KEY = Key(98, ("sensitivity",))
SEED = Key(20261125)
SHORT = Recipe(steps=20, lr=0.03)
TINY = ConvNet(depth=2, width=8)
RATES = tuple(("lr", f"x{times}") for times in ("0.1", "0.3", "3", "10"))
DRAWS, ALARMS, REPLICATES = 1000, 70, 5


def subsets(real: Splits, name: str, count: int = 2, ipc: int = 1) -> tuple[DistilledDataset, ...]:
    return subsets_at(KEY.fold(name), real, count, ipc)


def class_means(real: Splits, labels: Labels, scale: float = 1.0) -> DistilledDataset:
    images = torch.stack([real.train.images[members].mean(0) for members in real.train.by_class])
    return DistilledDataset({"images": scale * images}, labels, real.train.classes, real.space)


def result_of(own: torch.Tensor, random: torch.Tensor, smallest_effect: float = 0.01) -> SensitivityResult:
    """The result of accuracies [replicates, settings]; every setting is a rate."""
    settings = (("base", ""), *(("lr", f"x{i}") for i in range(1, own.shape[1])))
    values = {"dm": own[:, None], RANDOM: random[:, None], FULL: random[:1, None]}
    return SensitivityResult(("dm",), settings, values, smallest_effect)


# The claim


@pytest.fixture(scope="module")
def bank(digits: Splits) -> dict[str, torch.Tensor]:
    counts, _ = read_tensors(Path(__file__).parents[1] / "bank" / "sensitivity.safetensors")
    return {name: values.double() / len(digits.test) for name, values in counts.items()}


def narrow(bank: dict[str, torch.Tensor], ipc: int, place: Key, bound: float, lost: float = 0.0) -> Claim:
    """The claim of five pairs of random subsets, which of the two is the set's by chance; ``lost`` beside the base."""
    first, second = bank[f"null.{ipc}"], bank[f"random.{ipc}"]
    order = place.permutation(len(first))[:REPLICATES]
    flip = place.fold("flip").integers(2, REPLICATES).bool()[:, None]
    own, theirs = (torch.where(f, first[order], second[order]) for f in (flip, ~flip))
    own[:, 1:] -= lost
    (claim,) = result_of(own, theirs, bound).claims()
    return claim


@pytest.mark.parametrize("bound", [0.01, 0.0])  # as it stands, and the sharper null without a smallest effect
@pytest.mark.parametrize("ipc", [1, 10])
def test_a_random_subset_is_narrow_no_more_often_than_stated(
    bank: dict[str, torch.Tensor], ipc: int, bound: float
) -> None:
    claims = [narrow(bank, ipc, SEED.fold("narrow", ipc, i), bound) for i in range(DRAWS)]
    assert sum(claim.verdict == "supported" for claim in claims) <= ALARMS


@pytest.mark.parametrize("ipc", [1, 10])
def test_a_loss_of_the_smallest_effect_is_narrow_no_more_often_than_stated(
    bank: dict[str, torch.Tensor], ipc: int
) -> None:
    claims = [narrow(bank, ipc, SEED.fold("small", ipc, i), 0.01, lost=0.01) for i in range(DRAWS)]
    assert sum(claim.verdict == "supported" for claim in claims) <= ALARMS


def test_a_loss_of_a_tenth_is_found(bank: dict[str, torch.Tensor]) -> None:
    claims = [narrow(bank, 10, SEED.fold("lost", i), 0.01, lost=0.1) for i in range(200)]
    assert sum(claim.verdict == "supported" for claim in claims) >= 180


def test_a_set_tied_to_one_rate_is_found_and_a_random_subset_is_not(digits: Splits) -> None:
    # Regression on images of twice the length at three times the target: stable at the base's rate, not at three times it.
    tied = class_means(digits, Targets(3 * (torch.eye(10) - 0.1)), 2.0)
    sets = Sets(
        {"tied": (tied,) * 5, "null": subsets(digits, "null", 5)}, {RANDOM: subsets(digits, "base", 5)}
    )
    analysis = Sensitivity(RATES, (), Recipe(steps=60, lr=0.03), MLP(1, 32))
    result = analysis(sets, digits, Runs(Plan()), key=KEY)
    verdicts = {claim.subject: claim.verdict for claim in result.claims()}
    assert verdicts["tied"] == "supported"
    assert verdicts["null"] != "supported"
    base, fast = result.accuracy("tied", 0), result.accuracy("tied", 4)
    assert base is not None and fast is not None and base.low > fast.high + 0.3
    assert "Of the gain of tied over random most is taken by lr" in " ".join(result.notes())


# What is trained


def test_levels_are_counted_from_the_base() -> None:
    analysis = Sensitivity(recipe=Recipe(steps=300, lr=0.02))

    def at(factor: str, level: str, images: int = 100) -> Recipe:
        return analysis._recipe(factor, level, analysis.recipe, images)

    base = analysis.recipe
    assert at("optimiser", "adam lr=0.001") == base.but(optimiser="adam", lr=0.001)
    assert at("lr", "x0.1") == base.but(lr=0.002)
    assert at("lr", "0.5") == base.but(lr=0.5)
    assert at("batch", "x1/8") == base.but(batch=12)
    assert at("batch", "x1/8", 3) == base.but(batch=1)
    assert at("batch", "32") == base.but(batch=32)
    assert [at("steps", level).steps for level in ("x1/3", "x1.5", "x3")] == [100, 450, 900]
    assert at("augment", "flip") == base.but(augment="flip")
    assert at("weight_decay", "0.01 lr=0.3") == base.but(weight_decay=0.01, lr=0.3)


def test_widths_and_depths_go_as_far_as_network_and_images_let_them(digits: Splits) -> None:
    like = digits.train  # 8 x 8
    analysis = Sensitivity(net=ConvNet(2, 8))
    assert analysis._net("width", "x1/2", like) == ConvNet(2, 4)
    assert analysis._net("width", "x2", like) == ConvNet(2, 16)
    assert analysis._net("depth", "-1", like) == ConvNet(1, 8)
    assert analysis._net("depth", "+1", like) == ConvNet(3, 8)
    assert analysis._net("norm", "batch", like) == ConvNet(2, 8, "batch")
    assert Sensitivity(net=ConvNet(3, 8))._net("depth", "+1", like) is None
    assert Sensitivity(net=ConvNet(1, 8))._net("depth", "-1", like) is None
    assert Sensitivity(net=LeNet())._net("depth", "+1", like) is None
    with pytest.raises(UserError, match="too small for a ConvNet of depth 5"):
        analysis._net("depth", "5", like)


def test_what_does_not_fit_is_left_out_with_a_note(digits: Splits) -> None:
    one = class_means(digits, Hard(torch.arange(10)))
    ordered = replace(one, order=Order(torch.arange(10)[None], torch.tensor([0.02])))
    taught = replace(one, labels=Teacher("theirs", torch.zeros(2, 10, 10), 0))
    sets = Sets(
        {"wang2018": (ordered,), "theirs": (taught,), "means": (one,)}, {RANDOM: subsets(digits, "b", 1)}
    )
    analysis = Sensitivity((("depth", "+1"), ("depth", "-1")), (), SHORT, ConvNet(3, 4), full=1)
    result = analysis(sets, digits, Runs(Plan()), key=KEY)
    assert result.distilled == ("means",)
    assert result.settings == (("base", ""), ("depth", "-1"))
    assert "Not for wang2018, theirs: ordered steps" in result.notes()[-2]
    assert result.notes()[-1] == "Left out, for the network or the images do not allow it: depth +1."


LEVELS = (
    ("optimiser", "adam lr=0.001"),
    ("lr", "x3"),
    ("batch", "x1/2"),
    ("steps", "x1/2"),
    ("steps", "x2"),
    ("augment", "color_crop"),
    ("labels", "hard"),
    ("labels", "smoothed"),
    ("width", "x2"),
    ("depth", "-1"),
)


def test_every_cell_equals_a_training_written_out(digits: Splits) -> None:
    soft = class_means(digits, Logits(4 * torch.eye(10)))
    random = subsets(digits, "base", 2)
    store = Runs(Plan())
    analysis = Sensitivity(LEVELS, (), SHORT, TINY, nets=2, full=1)
    result = analysis(Sets({"soft": (soft, soft)}, {RANDOM: random}), digits, store, key=KEY)
    assert set(store.trained.values()) == {1}, "a model was trained twice"
    assert result.values["soft"].shape == (2, 2, 1 + len(LEVELS))
    written = [
        (SHORT, TINY),
        (Recipe(20, None, "adam", 0.001), TINY),
        (Recipe(20, lr=0.09), TINY),
        (Recipe(20, 5, lr=0.03), TINY),
        (Recipe(10, lr=0.03), TINY),
        (Recipe(40, lr=0.03), TINY),
        (Recipe(20, lr=0.03, augment="color_crop"), TINY),
        (SHORT, TINY),
        (SHORT, TINY),
        (SHORT, ConvNet(2, 16)),
        (SHORT, ConvNet(1, 8)),
    ]
    smooth = {"soft": 0.9 * (4 * torch.eye(10)).softmax(1) + 0.01, RANDOM: 0.9 * torch.eye(10) + 0.01}
    for r in range(2):
        for name, one in (("soft", soft), (RANDOM, random[r])):
            for i, (recipe, net) in enumerate(written):
                data = one.dataset()
                if i == 7:
                    data = Dataset(data.images, Hard(torch.arange(10)), data.classes, data.space)
                if i == 8:
                    data = Dataset(data.images, Probabilities(smooth[name]), data.classes, data.space)
                found = result.values[name][r, :, i]
                if i == 7 and name == RANDOM:
                    assert bool(found.isnan().all())  # hard they are
                    continue
                by_hand = train(Training(data, net, recipe, networks(KEY, r, 2)), store.plan)
                assert torch.equal(found, by_hand.accuracy(digits.test)), (name, LEVELS[i - 1])
    whole = train(Training(digits.train, TINY, SHORT.but(batch=128), networks(KEY, 0, 1)), store.plan)
    assert torch.equal(result.values[FULL][0, :, 3], whole.accuracy(digits.test))
    # Hard labels leave random as it is: the gain of the set made hard is over random at the base.
    gain = result.gain("soft", 7)
    expected = (result.values["soft"][..., 7] - result.values[RANDOM][..., 0]).mean()
    assert gain is not None and gain.value == pytest.approx(float(expected))


def test_hard_made_hard_is_no_setting(digits: Splits) -> None:
    sets = Sets({"a": subsets(digits, "a", 1)}, {RANDOM: subsets(digits, "b", 1)})
    result = Sensitivity((("labels", "hard"), ("lr", "x3")), (), SHORT, TINY, full=1)(
        sets, digits, Runs(Plan()), key=KEY
    )
    assert result.settings == (("base", ""), ("lr", "x3"))


def test_a_study_trains_none_of_it_twice(digits: Splits) -> None:
    store = Runs(Plan())
    sets = Sets({"a": subsets(digits, "a")}, {RANDOM: subsets(digits, "b")})
    Accuracy(Protocol("short", "", SHORT), TINY)(sets, digits, store, key=KEY)
    Mixing((0, 1), SHORT, TINY, efforts=(1 / 3, 1, 1.5))(sets, digits, store, key=KEY)
    before = sum(store.trained.values())
    analysis = Sensitivity((("steps", "x1/3"), ("steps", "x1.5")), (), SHORT, TINY, full=2)
    result = analysis(sets, digits, store, key=KEY)
    assert (
        sum(store.trained.values()) == before + 2
    )  # the full data's; the sets' are mixing's with nothing mixed in
    assert set(store.trained.values()) == {1}
    # At the base they are those of accuracy.
    accuracy = Accuracy(Protocol("short", "", SHORT), TINY)(sets, digits, store, key=KEY)
    assert torch.equal(result.values["a"][..., 0], accuracy.values["a"])
    assert torch.equal(result.values[FULL][:, 0, 0], accuracy.full)


@pytest.mark.parametrize(
    "labels", [Hard(torch.tensor([1, 0])), Targets(torch.tensor([[2.0, -1, -1], [-2, 4, -2]]))]
)
def test_smoothed_labels(labels: Labels) -> None:
    smoothed = relabelled(labels, "smoothed", 3)
    assert smoothed is not None
    (values,) = smoothed.tensors().values()
    if labels.kind == "hard":
        expected = [[1 / 30, 28 / 30, 1 / 30], [28 / 30, 1 / 30, 1 / 30]]
        assert relabelled(labels, "hard", 3) is None
    else:  # their means are 0
        expected = [[1.8, -0.9, -0.9], [-1.8, 3.6, -1.8]]
        made_hard = relabelled(labels, "hard", 3)
        assert made_hard is not None and made_hard.hard().tolist() == [0, 1] and made_hard.kind == "hard"
    torch.testing.assert_close(values, torch.tensor(expected))


# What is computed


def test_gains_losses_and_ranges_by_hand() -> None:
    generator = np.random.default_rng(5)
    own, random = generator.random((4, 2, 5)), generator.random((4, 2, 5))
    own[..., 3] = math.nan  # a level that leaves the set as it is
    settings = (("base", ""), ("lr", "x0.1"), ("lr", "x10"), ("labels", "hard"), ("width", "x2"))
    values = {"dm": torch.tensor(own), RANDOM: torch.tensor(random), FULL: torch.tensor(random[:3, :1])}
    result = SensitivityResult(("dm",), settings, values, 0.01)
    gain = (own - random).mean(1)

    def mean(estimate: object, expected: float) -> None:
        assert estimate is not None
        assert estimate.value == pytest.approx(expected)  # type: ignore[attr-defined]

    mean(result.accuracy("dm", 2), own[..., 2].mean())
    mean(result.change("dm", 4), (own[..., 4] - own[..., 0]).mean())
    mean(result.gain("dm", 1), gain[:, 1].mean())
    mean(result.lost("dm", "lr"), (gain[:, 0] - gain[:, 1:3].mean(1)).mean())
    mean(result.lost("dm", "width"), (gain[:, 0] - gain[:, 4]).mean())
    mean(result.lost("dm"), (gain[:, 0] - gain[:, [1, 2, 4]].mean(1)).mean())
    mean(result.span("dm", "lr"), np.ptp(own.mean(1)[:, :3], axis=1).mean())
    assert result.lost("dm", "labels") is None and result.change("dm", 3) is None
    assert result.headline()["dm"] == result.lost("dm") == result.claims()[0].estimate
    assert result.headline()["dm"].n == 4
    full = result.accuracy(FULL, 0)
    assert full is not None and (full.n, full.unit) == (3, "network")
    titles = [table.title for table in result.tables()]
    assert titles[1] == "Main effects: accuracy minus accuracy at the base"
    assert [row[:2] for row in result.tables()[1].rows] == list(settings[1:])


def test_without_a_random_subset_there_is_no_claim(digits: Splits) -> None:
    sets = Sets({"a": subsets(digits, "a", 2)})
    result = Sensitivity((("lr", "x3"),), (), SHORT, TINY, full=1)(sets, digits, Runs(Plan()), key=KEY)
    assert result.claims() == () and result.lost("a") is None
    assert result.headline()["a"] == result.accuracy("a", 0)


# Settings and mistakes


def test_factors_are_chosen_by_name(digits: Splits) -> None:
    analysis = override(Sensitivity.defaults(digits.train), ["factors=lr,steps"])
    sets = Sets({"a": subsets(digits, "a", 1)}, {RANDOM: subsets(digits, "b", 1)})
    recipes = {(t.recipe.steps, round(t.recipe.lr, 6)) for t in analysis.trainings(sets, digits, key=KEY)}
    assert recipes == {(450, 0.01), (300, 0.001), (300, 0.1)}


def test_defaults_do_not_mirror_digits(digits: Splits) -> None:
    small = dict(Sensitivity.defaults(digits.train).levels)
    assert "flip" not in small["augment"] and "flip" in dict(Sensitivity().levels)["augment"]
    assert set(small) == set(dict(Sensitivity().levels))
    assert len(small) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": (("rate", "x2"),)}, "unknown factor 'rate'"),
        ({"levels": (("labels", "soft"),)}, "unknown kind of label 'soft'"),
        ({"levels": (("lr", "fast"),)}, "setting 'lr' does not fit"),
        (
            {"levels": (("optimiser", "x2"),)},
            "optimiser has no number to start from; got 'sgd' at the base, level 'x2'",
        ),
        ({"levels": ()}, "levels must hold a level and none twice"),
        ({"levels": (("lr", "x2"), ("lr", "x2"))}, "levels must hold a level and none twice"),
        ({"factors": ("rate",)}, "unknown factor 'rate'"),
        ({"recipe": Recipe(schedule="cosine")}, "needs a constant schedule; got cosine"),
        ({"full": 0}, "full must be at least 1"),
        ({"smallest_effect": 0.0}, "smallest_effect must be above 0"),
    ],
)
def test_mistakes_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        replace(Sensitivity(), **changes)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_other_schedules_go_with_one_count_of_steps() -> None:
    analysis = Sensitivity(factors=("lr",), recipe=Recipe(schedule="cosine"))
    assert analysis.recipe.schedule == "cosine"
