"""Recognition: nulls from the bank of judges' answers, plants end to end, its figures against counting by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from distillens.analyses.behaviour._judges import SEEN, TEST, UNSEEN, chance, difference
from distillens.analyses.behaviour.feature_map import FeatureMap
from distillens.analyses.behaviour.recognition import PAPER, Recognition, RecognitionResult
from distillens.core.artefact import DistilledDataset, Provenance
from distillens.core.checks import UserError
from distillens.core.config import describe
from distillens.core.contracts import Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Hard
from distillens.core.recipe import Recipe
from distillens.core.result import Claim
from distillens.core.rng import Key
from distillens.core.storage import read_tensors
from distillens.engine.plan import Plan
from distillens.nets import labels_of
from distillens.nets.convnet import ConvNet
from distillens.nets.lenet import LeNet
from distillens.nets.mlp import MLP
from distillens.nets.vit import ViT
from distillens.runs import Runs
from distillens.train import Population
from tests.analyses.by_hand import class_means, subsets_at

DRAWS, ALARMS, REPLICATES = 1000, 70, 5
SEED = Key(20251125, ("recognition",))
KEY = Key(99, ("recognition",))
SHORT = Recipe(steps=60, batch=256, lr=0.05)
DISTANCES = (1, 0, 2, 2, 3, 3)  # of the bank's judges from the field's network


@pytest.fixture(scope="module")
def bank() -> dict[str, torch.Tensor]:
    tensors = read_tensors(Path(__file__).parents[1] / "bank" / "recognition.safetensors")[0]
    return {name: tensors[name].long() for name in ("judges", "harder", "labels")}


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs(Plan())


def subsets(real: Splits, name: str, count: int, ipc: int = 1) -> tuple[DistilledDataset, ...]:
    return subsets_at(KEY.fold(name), real, count, ipc)


def supported(claims: list[Claim]) -> int:
    return sum(claim.verdict == "supported" for claim in claims)


def verdicts(result: RecognitionResult) -> dict[tuple[str, str], str]:
    return {(claim.subject, claim.name): claim.verdict for claim in result.claims()}


def stratified(labels: torch.Tensor, per_class: int, key: Key) -> torch.Tensor:
    order = key.permutation(len(labels))
    return torch.cat([order[labels[order] == c][:per_class] for c in range(10)])


def result_of(
    bank: dict[str, torch.Tensor],
    named: dict[str, list[tuple[torch.Tensor, torch.Tensor]]],
    noisy: torch.Tensor | None = None,
) -> RecognitionResult:
    """The result with sets of the bank's images by name: for each replicate their places and the labels they carry.

    ``noisy`` are the judges' answers to the images of the set "real" where they are not the plain ones.
    """
    judges, everything = bank["judges"], torch.cat([bank["judges"][None], bank["harder"]])
    sets = tuple(name for name in named if name != UNSEEN)
    return RecognitionResult(
        tuple("abcdef"),
        sets,
        tuple("0123456789"),
        {
            name: tuple(
                ((judges if noisy is None or name != "real" else noisy)[..., at] == y).double().mean(1)
                for at, y in many
            )
            for name, many in named.items()
        },
        {name: tuple(y for _, y in many) for name, many in named.items()},
        {
            name: torch.stack([chance(judges[..., at], y, 10) for at, y in many])
            for name, many in named.items()
        },
        torch.full((6, 3), 0.97),
        dict.fromkeys(sets, DISTANCES),
        (),
        2,
        (("real", "again"),),
        papers=False,
        harder=tuple((everything[..., at] == y).double().mean(2) for at, y in named[UNSEEN]),
    )


@pytest.mark.parametrize(("per_class", "replicates"), [(1, REPLICATES), (10, REPLICATES), (10, 1)])
def test_permuted_labels_and_real_images_support_nothing_more_often_than_stated(
    bank: dict[str, torch.Tensor], per_class: int, replicates: int
) -> None:
    labels = bank["labels"]
    claims: dict[tuple[str, str], list[Claim]] = {}
    for i in range(DRAWS):
        named: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for r, name in itertools.product(range(replicates), ("permuted", "real", "again", UNSEEN)):
            place = SEED.fold(per_class, replicates, i, r)
            at = stratified(labels, per_class, place.fold(name))
            y = labels[at]
            if name == "permuted":
                y = y[place.fold("labels").permutation(len(y))]
            named.setdefault(name, []).append((at, y))
        for claim in result_of(bank, named).claims():
            claims.setdefault((claim.subject, claim.name), []).append(claim)
    assert all(len(many) == DRAWS for many in claims.values())
    assert supported(claims["permuted", "recognised"]) <= ALARMS
    for name in ("clearer than real", "recognition falls with distance", "recognised better than again"):
        assert supported(claims["real", name]) <= ALARMS, name
    assert supported(claims["real", "recognised"]) == DRAWS, (
        "real images are recognised: the positive control"
    )


def test_images_that_no_judge_misses_are_clearer_than_real(bank: dict[str, torch.Tensor]) -> None:
    labels = bank["labels"]
    clear = (bank["judges"] == labels).all(1).all(0)
    found = []
    for i in range(100):
        named: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"real": [], "again": [], UNSEEN: []}
        for r in range(REPLICATES):
            at = stratified(torch.where(clear, labels, -1), 10, SEED.fold("clear", i, r))
            other, third = (stratified(labels, 10, SEED.fold(name, i, r)) for name in ("other", "third"))
            named["real"].append((at, labels[at]))
            named["again"].append((other, labels[other]))
            named[UNSEEN].append((third, labels[third]))
        result = result_of(bank, named)
        found.append({claim.name: claim for claim in result.claims() if claim.subject == "real"})
    assert supported([each["clearer than real"] for each in found]) >= 90
    assert supported([each["recognised better than again"] for each in found]) >= 90


def test_class_means_are_clearer_than_unseen_real_images(digits: Splits, runs: Runs) -> None:
    sets = Sets({"means": (class_means(digits),) * 5}, {})
    analysis = Recognition((ConvNet(2, 16),), SHORT, seeds=2)
    result = analysis(sets, digits, runs, key=KEY)
    assert verdicts(result)["means", "recognised"] == "supported"
    assert all(bool((one == 1).all()) for one in result.hits["means"])
    assert result.headline()["means"].low < 1.0, "ten images cannot make certainty"
    assert 0.5 < result.headline()[UNSEEN].value <= 1.0


def test_recognition_of_a_single_set_rests_on_its_images(digits: Splits, runs: Runs) -> None:
    analysis = Recognition((ConvNet(2, 16),), SHORT, seeds=2)
    result = analysis(Sets({"means": (class_means(digits),)}), digits, runs, key=KEY)
    recognised = result.headline()["means"]
    assert (recognised.n, recognised.unit) == (10, "image of one replicate")
    assert 0.6 < recognised.low < 0.8 and recognised.high == 1.0
    assert verdicts(result)["means", "recognised"] == "supported"
    assert "means: one set, the interval is that over its images." in result.notes()


def test_judges_never_see_the_real_images_they_are_compared_on(digits: Splits) -> None:
    analysis = Recognition((ConvNet(2, 8), MLP()), SHORT, seeds=1)
    sets = Sets({"null": subsets(digits, "n", 1)})
    seen = {
        image.numpy().tobytes() for t in analysis.trainings(sets, digits, key=KEY) for image in t.data.images
    }
    unseen = {image.numpy().tobytes() for image in digits.val.images}
    assert len(seen & unseen) == 0


# ---- distance ----


@pytest.mark.parametrize("amount", ["one", "many"])
@pytest.mark.parametrize("replicates", [REPLICATES, 1])
def test_real_images_under_noise_do_not_fall_with_distance_more_often_than_stated(
    bank: dict[str, torch.Tensor], amount: str, replicates: int
) -> None:
    # Judges bear noise differently well: against plain real images the claim would be made of any damage.
    labels, steps = bank["labels"], bank["harder"][:6]
    alarms = plain = 0
    for i in range(DRAWS):
        place = SEED.fold("noise", amount, replicates, i)
        if amount == "one":  # the same noise for all images, of one of the amounts or between two
            first = int(place.integers(5, 1))
            of_each = first + place.fold("between").integers(2, len(labels))
        else:
            of_each = place.integers(6, len(labels))
        noisy = steps[of_each, :, :, torch.arange(len(labels))].permute(1, 2, 0)
        named: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"real": [], UNSEEN: []}
        for r, name in itertools.product(range(replicates), named):
            at = stratified(labels, 10, place.fold(name, r))
            named[name].append((at, labels[at]))
        result = result_of(bank, named, noisy)
        estimate = result.falls("real")
        assert estimate is not None
        alarms += estimate.low > 0
        own, real = (result.near_minus_far(result.hits[name], DISTANCES) for name in ("real", UNSEEN))
        plain += difference(own, real).low > 0
    assert alarms <= ALARMS
    assert plain > ALARMS, "what the noise is there for"


def test_real_images_are_made_as_hard_as_the_set(bank: dict[str, torch.Tensor]) -> None:
    labels = bank["labels"]
    at = stratified(labels, 10, SEED.fold("hard"))
    named = {name: [(at, labels[at])] for name in ("real", UNSEEN)}
    for a in range(5):
        result = result_of(bank, named, bank["harder"][a])
        (control,) = result.as_hard_as("real")
        assert float(control.mean()) == pytest.approx(result.recognised("real").value)
        assert torch.allclose(control, result.hits["real"][0])
        assert result.falls("real").value == pytest.approx(0)  # type: ignore[union-attr]
    assert not any("little room" in note for note in result.notes())
    clear = replace(result, hits={**result.hits, "real": (torch.ones(6, 100),)})
    assert any(note.startswith("Recognised better than real images are: real.") for note in clear.notes())
    assert torch.equal(clear.as_hard_as("real")[0], result.harder[0][0])
    lost = replace(result, hits={**result.hits, "real": (torch.zeros(6, 100),)})
    assert torch.equal(lost.as_hard_as("real")[0], result.harder[0][-1])


def fitted_to(judges: list[Population], labels: torch.Tensor, key: Key) -> torch.Tensor:
    """Noise that these judges take for the classes ``labels``: 60 steps down their loss."""
    x = (0.5 * key.normal(len(labels), 1, 8, 8)).requires_grad_()
    for _ in range(60):
        loss = torch.zeros(())
        for population in judges:
            for flat in population.final:
                logits, _ = population.net.logits(population.shapes.unflatten(flat), {}, x)
                loss = loss + F.cross_entropy(logits, labels)
        (gradient,) = torch.autograd.grad(loss, x)
        x = (
            (x - 0.3 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None])
            .detach()
            .requires_grad_()
        )
    return x.detach()


def test_noise_fitted_to_the_near_judges_falls_with_distance_and_real_images_do_not(
    digits: Splits, runs: Runs
) -> None:
    analysis = Recognition((ConvNet(2, 8), ConvNet(2, 16), MLP(), ViT(4, 1, 16, 2)), SHORT, seeds=2)
    near = runs.get(*analysis.trainings(Sets({"a": subsets(digits, "a", 1)}), digits, key=KEY)[:2])
    labels = torch.arange(10).repeat_interleave(2)
    noise = tuple(
        DistilledDataset(
            {"images": fitted_to(near, labels, KEY.fold("noise", r))},
            Hard(labels),
            digits.train.classes,
            digits.space,
        )
        for r in range(3)
    )
    sets = Sets(
        {"noise": noise, "real": subsets(digits, "real", 3, 2)}, {"random_subset": subsets(digits, "b", 3, 2)}
    )
    result = analysis(sets, digits, runs, key=KEY)
    found = verdicts(result)
    assert result.distances["noise"] == (1, 1, 3, 3)
    assert found["noise", "recognition falls with distance"] == "supported"
    assert found["real", "recognition falls with distance"] != "supported"
    assert {"near", "far", "near - far, real as hard", "fall"} < set(result.tables()[2].columns)


def test_distance_is_that_from_the_network_which_made_the_set(digits: Splits, runs: Runs) -> None:
    analysis = Recognition((ConvNet(2, 8), LeNet(), MLP(1, 16)), SHORT.but(steps=5), seeds=1)
    (plain,) = subsets(digits, "plain", 1)
    said = Provenance("x", {"net": describe(MLP(1, 16))}, 1, KEY, "digits", "")
    sets = Sets({"theirs": (replace(plain, provenance=said),), "unknown": (plain,)})
    result = analysis(sets, digits, runs, key=KEY)
    assert result.distances == {"theirs": (3, 3, 0), "unknown": (1, 2, 3)}
    assert result.assumed == ("unknown",)
    assert any("Not known on which network: unknown." in note for note in result.notes())


def test_without_far_judges_nothing_is_said_of_distance(digits: Splits, runs: Runs) -> None:
    analysis = Recognition((ConvNet(2, 8), ConvNet(2, 16)), SHORT.but(steps=5), seeds=1)
    result = analysis(Sets({"a": subsets(digits, "a", 2)}), digits, runs, key=KEY)
    assert result.falls("a") is None
    assert {name for _, name in verdicts(result)} == {"recognised", "clearer than real"}
    assert len(result.tables()) == 2


# ---- figures by hand ----


def test_shares_chance_and_classes_are_what_counting_gives(digits: Splits, runs: Runs) -> None:
    analysis = Recognition((ConvNet(2, 8), MLP(1, 16)), SHORT, seeds=2)
    sets = Sets({"a": subsets(digits, "a", 2, 3)}, {"random_subset": subsets(digits, "b", 2, 3)})
    result = analysis(sets, digits, runs, key=KEY)
    judges = runs.get(*analysis.trainings(sets, digits, key=KEY))
    right: dict[int, list[float]] = {c: [] for c in range(10)}
    every, expected = [], []
    for one in sets.distilled["a"]:
        data = one.dataset()
        y = data.labels.hard().tolist()
        hits, by_chance = 0.0, 0.0
        of_class = dict.fromkeys(range(10), 0.0)
        for judge in judges:
            for answers in judge.predictions(data).tolist():
                for i, answer in enumerate(answers):
                    hits += (answer == y[i]) / len(y) / 4
                    of_class[y[i]] += (answer == y[i]) / 3 / 4
                    # Every label is as likely to land on this image as every other.
                    by_chance += sum(answer == label for label in y) / len(y) / len(y) / 4
        every.append(hits)
        expected.append(by_chance)
        for c in range(10):
            right[c].append(of_class[c])
    assert result.recognised("a").value == pytest.approx(sum(every) / 2)
    gain = sum(every) / 2 - sum(expected) / 2
    assert result.above_chance("a").value == pytest.approx(gain)
    by_class = result.tables()[1]
    assert by_class.columns == ("class", "a", SEEN, UNSEEN, TEST)
    for c, row in enumerate(by_class.rows):
        assert row[0] == digits.train.classes[c]
        assert row[1].value == pytest.approx(sum(right[c]) / 2)  # type: ignore[union-attr]
    tested = result.tables()[0].rows[-1]
    assert tested[0] == TEST
    assert tested[1].value == pytest.approx(float(judges[0].accuracy(digits.test).mean()))  # type: ignore[union-attr]


def test_chance_is_the_mean_over_all_permutations() -> None:
    predicted = torch.tensor([[[0, 0, 2, 1], [1, 1, 1, 1]]])
    labels = torch.tensor([0, 0, 1, 2])
    shares = [
        float((predicted == labels[list(order)]).double().mean())
        for order in itertools.permutations(range(4))
    ]
    assert float(chance(predicted, labels, 3)) == pytest.approx(sum(shares) / len(shares))


def test_a_judge_that_learned_nothing_is_called_weak(digits: Splits, runs: Runs) -> None:
    analysis = Recognition((ConvNet(2, 16), MLP(1, 16)), SHORT, lengths=(1.0, 0.01), seeds=1)
    first, second = analysis.trainings(Sets({"a": subsets(digits, "a", 1)}), digits, key=KEY)
    assert (first.steps, second.steps) == (60, 1)
    result = analysis(Sets({"a": subsets(digits, "a", 2)}), digits, runs, key=KEY)
    assert result.notes()[0] == "Weak judges, read with care: MLP w16."
    assert result.tables()[0].columns == ("images", "ConvNet w16", "MLP w16 (weak)", "all judges")


# ---- the paper's figure ----


def bars(result: RecognitionResult, caption: str) -> dict[str, list[float]]:
    """The heights of the bars of each set, group by group, and under "names" is what stands below."""
    ax = Figure().add_subplot()
    result.panels()[caption](ax)
    found: dict[str, list[float]] = {}
    groups = len(ax.get_xticklabels())
    legend = ax.get_legend()
    assert legend is not None
    names = [text.get_text() for text in legend.get_texts()]
    for i, name in enumerate(names):
        found[name] = [bar.get_height() for bar in ax.patches[i * groups : (i + 1) * groups]]  # type: ignore[attr-defined]
    found["names"] = [text.get_text() for text in ax.get_xticklabels()]  # type: ignore[misc]
    return found


def test_the_published_labelling_differs_by_its_swapped_labels_alone() -> None:
    shares = {"mtt": (0.9, 0.8, 0.7, 0.6), UNSEEN: (0.5, 0.4, 0.3, 0.2)}
    hits = {
        name: tuple(torch.tensor(values, dtype=torch.float64)[:, None].expand(4, 10) for _ in range(2))
        for name, values in shares.items()
    }
    result = RecognitionResult(
        labels_of(PAPER),
        ("mtt",),
        tuple("0123456789"),
        hits,
        {name: (torch.arange(10),) * 2 for name in shares},
        {name: torch.full((2, 4), 0.1) for name in shares},
        torch.full((4, 1), 0.9),
        {"mtt": (1, 0, 2, 2)},
        (),
        2,
        (),
        papers=True,
        harder=(torch.ones(1, 4, 10),) * 2,
    )
    captions = list(result.panels())
    corrected, published = bars(result, captions[0]), bars(result, captions[1])
    assert "as the published notebook labels" in captions[1]
    assert corrected["names"] == ["ConvNet\nw16", "ConvNet\nw128", "ResNet-18\nw64", "ResNet-34\nw64"]
    assert published["names"] == ["ConvNet-Tiny", "ConvNet", "ResNet-18", "ResNet-32"]
    for name in shares:
        assert corrected[name] == pytest.approx(shares[name])
        tiny, conv, res18, res34 = corrected[name]
        assert published[name] == [res18, conv, tiny, res34]
    assert len(replace(result, papers=False).panels()) == 2


def test_as_published_is_the_papers_protocol(digits: Splits, like_cifar: Dataset) -> None:
    assert Recognition.as_published(like_cifar).judges == PAPER
    analysis = Recognition.as_published(digits.train)
    assert [type(judge) for judge in analysis.judges] == [type(judge) for judge in PAPER]
    sets = Sets({"a": subsets(digits, "a", 1)})
    trainings = analysis.trainings(sets, digits, key=KEY)
    passes = -(-len(digits.train) // 256)
    assert [t.steps for t in trainings] == [20 * passes, 40 * passes, 40 * passes, 40 * passes]
    assert all(
        (t.recipe.batch, t.recipe.optimiser, t.recipe.lr, t.recipe.momentum) == (256, "sgd", 0.01, 0.9)
        for t in trainings
    )
    assert [len(t.keys) for t in trainings] == [1, 1, 1, 1]
    sizes = [sum(p.numel() for p in net.init(_Cifar(), KEY)[0].values()) for net in PAPER]
    assert sizes == [7_754, 320_010, 11_173_962, 21_282_122]


class _Cifar:
    shape = (3, 32, 32)
    k = 10


def test_the_feature_map_asks_for_a_judges_training(digits: Splits) -> None:
    sets = Sets({"a": subsets(digits, "a", 1)})
    pairs: list[tuple[Recognition, FeatureMap]] = [
        (Recognition.defaults(digits.train), FeatureMap.defaults(digits.train)),
        (Recognition.as_published(digits.train), FeatureMap.as_published(digits.train)),
    ]
    for recognition, on_map in pairs:
        known = {i for t in recognition.trainings(sets, digits, key=KEY) for i in t.identities()}
        (asked,) = on_map.trainings(sets, digits, key=KEY)
        assert set(asked.identities()) < known


def test_judges_are_named_for_a_reader() -> None:
    nets: tuple[Net, ...] = (*PAPER, LeNet(), ViT(4), ConvNet(2), ConvNet(3, norm="batch"))
    assert labels_of(PAPER) == ("ConvNet w16", "ConvNet w128", "ResNet-18 w64", "ResNet-34 w64")
    assert labels_of(nets)[1] == "ConvNet w128 (3, 128, group, average)"
    assert labels_of(nets)[4:6] == ("LeNet w6", "ViT w192")
    assert len(set(labels_of(nets))) == len(nets)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": (0.5,)}, "recognition: every judge needs a length; got 1 lengths for 6 judges"),
        ({"lengths": (0.5, 1, 1, 1, 1, 2.0)}, "recognition: lengths are shares of the recipe's steps"),
        ({"pairs": (("dm", "dm"),)}, r"recognition: a pair names two different sets; got \('dm', 'dm'\)"),
        ({"judges": ()}, "recognition: judges must be at least 1; got 0"),
        ({"seeds": 0}, "recognition: seeds must be at least 1; got 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recognition(**settings)  # type: ignore[arg-type]
