"""behaviour/robustness: its accuracies against slow twins, its claims' nulls and plants."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import hadamard

from distillens import load
from distillens.analyses.behaviour.accuracy import Accuracy
from distillens.analyses.behaviour.robustness import Robustness, RobustnessResult, _lost
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.contracts import Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.recipe import Recipe
from distillens.core.result import NETWORK
from distillens.core.rng import Key
from distillens.core.storage import read_tensors
from distillens.corruptions import corrupt
from distillens.engine.plan import Plan
from distillens.evaluation.protocol import Protocol
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import networks, on
from tests.analyses.by_hand import subsets_at

KEY = Key(614, ("robustness",))
DRAWS, ALARMS, REPLICATES = 1000, 70, 5
PROTOCOL = Protocol("short", "", Recipe(steps=40, batch=50, lr=0.03))
NET = ConvNet(depth=2, width=8)
SMALL = Robustness(PROTOCOL, NET, ("contrast", "gaussian_noise"), (2, 5), (4 / 255, 16 / 255), 4, 60)


@pytest.fixture(scope="module")
def bank() -> dict[str, torch.Tensor]:
    return read_tensors(Path(__file__).parents[1] / "bank" / "judged.safetensors")[0]


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs(Plan())


def subsets(real: Splits, name: str, count: int = REPLICATES, ipc: int = 5) -> tuple[DistilledDataset, ...]:
    return subsets_at(KEY.fold(name), real, count, ipc)


# --- the figures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["standardised", "zca"])
def test_accuracies_are_those_of_one_network_and_image_at_a_time(space: str, runs: Runs) -> None:
    real = load("digits", space=space)
    sets = Sets({"a": subsets(real, "a", 2)}, {"random_subset": subsets(real, "base", 2)})
    result = SMALL(sets, real, runs, key=KEY)
    for r, one in enumerate(sets.distilled["a"]):
        (population,) = runs.get(on(one, NET, PROTOCOL.recipe, networks(KEY, r, 1)))
        params = {name: value[0] for name, value in population.shapes.unflatten(population.final).items()}

        def logits(pixels: torch.Tensor, params: dict[str, torch.Tensor] = params) -> torch.Tensor:
            return NET.logits(params, {}, real.space.from_pixels(pixels))[0]

        labels = real.test.labels.hard()
        pixels = real.test.pixels().clamp(0, 1)
        for c, name in enumerate(SMALL.corruptions):
            for s, severity in enumerate(SMALL.severities):
                shown = corrupt(pixels, name, severity, KEY.fold("corruption", name, severity))
                hits = (logits(shown).argmax(1) == labels).double().mean()
                assert abs(float(result.corrupted["a"][r, 0, c, s] - hits)) < 2.5 / len(labels)
        chosen = KEY.fold("attacked").permutation(len(labels))[:60].sort().values
        victims, named = pixels[chosen], labels[chosen]
        start = KEY.fold("pgd").uniform(60, 1, 8, 8, low=-1.0)

        def slope(x: torch.Tensor, named: torch.Tensor = named) -> torch.Tensor:
            at = x.clone().requires_grad_()
            F.cross_entropy(logits(at), named, reduction="sum").backward()
            assert at.grad is not None
            return at.grad

        for e, eps in enumerate(SMALL.eps):
            quick = (victims + eps * slope(victims).sign()).clamp(0, 1)
            places = [(victims + eps * start).clamp(0, 1)]
            for _ in range(4):
                moved = places[-1] + 2.5 * eps / 4 * slope(places[-1]).sign()
                places.append((victims + (moved - victims).clamp(-eps, eps)).clamp(0, 1))
            worst = torch.stack([F.cross_entropy(logits(x), named, reduction="none") for x in places]).argmax(
                0
            )
            fooled = torch.stack(places)[worst, torch.arange(60)]
            for place, shown in ((e, quick), (len(SMALL.eps) + e, fooled)):
                hits = (logits(shown).argmax(1) == named).double().mean()
                # Slopes that round to either side of nothing may turn an image or two.
                assert abs(float(result.attacked["a"][r, 0, place] - hits)) < 2.5 / 60
        clean = (logits(victims).argmax(1) == named).double().mean()
        assert abs(float(result.untouched["a"][r, 0] - clean)) < 1.5 / 60


def test_it_reads_the_networks_of_accuracy_and_trains_no_other(digits: Splits, runs: Runs) -> None:
    sets = Sets({"a": subsets(digits, "a", 2)}, {"random_subset": subsets(digits, "base", 2)})
    accuracy = Accuracy(PROTOCOL, NET)
    result, known = SMALL(sets, digits, runs, key=KEY), accuracy(sets, digits, runs, key=KEY)
    mine, theirs = (
        {i for t in one.trainings(sets, digits, key=KEY) for i in t.identities()} for one in (SMALL, accuracy)
    )
    assert mine <= theirs
    for name, values in known.values.items():
        torch.testing.assert_close(result.clean[name], values)
    torch.testing.assert_close(result.clean["full data"][:, 0], known.full)


def test_attacks_hurt_more_the_larger_they_are(digits: Splits, runs: Runs) -> None:
    sets = Sets({"a": subsets(digits, "a", 2)}, {"random_subset": subsets(digits, "base", 2)})
    result = SMALL(sets, digits, runs, key=KEY)
    assert result.attacks == ("FGSM 4/255", "FGSM 16/255", "PGD-4 4/255", "PGD-4 16/255")
    for name in result.names:
        accuracy = result.attacked[name].mean((0, 1)).tolist()
        assert accuracy[1] < accuracy[0] and accuracy[3] < accuracy[2]
        assert accuracy[2] <= accuracy[0] + 1 / 60 and accuracy[3] <= accuracy[1] + 1 / 60


def test_other_sets_beside_it_change_nothing_for_a_set(digits: Splits, runs: Runs) -> None:
    sets = Sets({"a": subsets(digits, "a", 2)}, {"random_subset": subsets(digits, "base", 2)})
    alone = SMALL(Sets({"a": sets.distilled["a"]}), digits, runs, key=KEY)
    beside = SMALL(sets, digits, runs, key=KEY)
    torch.testing.assert_close(alone.corrupted["a"], beside.corrupted["a"], atol=1.5 / 450, rtol=0)
    torch.testing.assert_close(alone.attacked["a"], beside.attacked["a"], atol=1.5 / 60, rtol=0)
    assert alone.claims() == ()


def test_a_single_set_is_judged_over_networks(digits: Splits, runs: Runs) -> None:
    twice = replace(SMALL, protocol=replace(PROTOCOL, nets=2))
    sets = Sets({"a": subsets(digits, "a", 1)}, {"random_subset": subsets(digits, "base", 1)})
    result = twice(sets, digits, runs, key=KEY)
    assert result.clean["full data"].shape == result.clean["a"].shape == (1, 2)
    assert {claim.estimate.unit for claim in result.claims()} == {NETWORK}
    assert result.notes()[-1] == "a: one set, the interval covers training only."


def test_what_is_lost_is_a_share_of_what_there_was() -> None:
    found = _lost(torch.tensor([0.4, 0.0, 0.0]), torch.tensor([0.8, 0.5, 0.0]))
    assert found.tolist() == pytest.approx([0.5, 1.0, 0.0])


def test_spaces_that_lose_pixels_are_said_to(runs: Runs) -> None:
    real = load("digits", space="zca-kip")
    result = SMALL(Sets({"a": subsets(real, "a", 2)}), real, runs, key=KEY)
    assert any("likenesses with the average brightness" in note for note in result.notes())


def test_settings_that_do_not_fit_are_named() -> None:
    with pytest.raises(UserError, match=r"unknown corruption 'fog'"):
        Robustness(corruptions=("fog",))
    with pytest.raises(
        UserError, match=r"robustness: a severity is one of five; got \(0,\); expected 1 to 5"
    ):
        Robustness(severities=(0,))
    with pytest.raises(
        UserError, match="robustness needs a corruption, a severity and an eps; got 11, 0 and 2"
    ):
        Robustness(severities=())
    with pytest.raises(UserError, match="robustness: eps must be above 0"):
        Robustness(eps=(0.0,))
    with pytest.raises(UserError, match="robustness: steps must be at least 1"):
        Robustness(steps=0)


# --- the claims --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ipc", [1, 10])
def test_random_subsets_are_more_fragile_no_more_often_than_stated(
    bank: dict[str, torch.Tensor], ipc: int
) -> None:
    found = {"fragile under corruption": 0, "fragile under attack": 0}
    for i in range(DRAWS):
        order = KEY.fold("null", ipc, i).permutation(60)
        parts = {"dm": order[:REPLICATES], "random_subset": order[REPLICATES : 2 * REPLICATES]}
        values = [
            {name: bank[f"{what}.{ipc}"][rows].double() for name, rows in parts.items()}
            for what in ("clean", "corrupted", "untouched", "attacked")
        ]
        result = RobustnessResult(
            "wddl", "ConvNet", ("dm",), ("random_subset",), (), (), (), (450, 200), True, *values
        )
        for claim in result.claims():
            found[claim.name] += claim.estimate.low > 0  # even without the margin
    assert max(found.values()) <= ALARMS


def fine_patterns() -> torch.Tensor:
    """Ten patterns [10, 1, 8, 8] of -1 and 1 that change sign with nearly every pixel across."""
    waves = torch.from_numpy(hadamard(8)).float()
    waves = waves[(waves[:, 1:] != waves[:, :-1]).sum(1).argsort()]
    return torch.stack([waves[i][:, None] * waves[j][None] for i in range(3, 8) for j in (6, 7)])[:, None]


def marked(data: Dataset, strength: float, order: torch.Tensor | None = None) -> Dataset:
    """Images of less contrast with their class's pattern on top; in another order they are told by that alone."""
    pixels = 0.1 + 0.8 * data.pixels().clamp(0, 1)
    pixels = pixels if order is None else pixels[order]
    images = data.space.from_pixels(pixels + strength * fine_patterns()[data.labels.hard()])
    return Dataset(images, data.labels, data.classes, data.space)


def test_a_set_of_fine_cues_is_fragile(digits: Splits) -> None:
    def made(name: str, strength: float, shuffled: bool) -> tuple[DistilledDataset, ...]:
        found = []
        for r, one in enumerate(subsets(digits, name, ipc=20)):
            data = one.dataset()
            own = marked(data, strength, KEY.fold("order", r).permutation(len(data)) if shuffled else None)
            found.append(DistilledDataset({"images": own.images}, own.labels, own.classes, own.space))
        return tuple(found)

    sets = Sets({"fine": made("fine", 0.1, True)}, {"random_subset": made("base", 0.0, False)})
    real = Splits(digits.train, digits.val, marked(digits.test, 0.1))
    analysis = Robustness(
        Protocol("short", "", Recipe(steps=150, batch=50, lr=0.03)),
        NET,
        ("gaussian_noise", "gaussian_blur", "pixelate"),
        (3,),
        (8 / 255,),
        steps=5,
        attacked=60,
    )
    result = analysis(sets, real, Runs(Plan()), key=KEY)
    verdicts = {claim.name: claim.verdict for claim in result.claims()}
    assert verdicts == {"fragile under corruption": "supported", "fragile under attack": "supported"}
    assert float(result.clean["fine"].mean()) > 0.5, "it has something to lose"
