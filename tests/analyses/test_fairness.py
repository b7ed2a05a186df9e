"""behaviour/fairness: its measures against twins and closed forms, its claims' nulls and plants."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, recall_score

from distillens.analyses.behaviour.accuracy import Accuracy
from distillens.analyses.behaviour.fairness import (
    Fairness,
    FairnessResult,
    brier,
    class_accuracy,
    expected_error,
    likelihood,
    reliability,
)
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.contracts import Sets
from distillens.core.dataset import Splits
from distillens.core.labels import Hard, Probabilities, Targets
from distillens.core.recipe import Recipe
from distillens.core.result import NETWORK, Claim
from distillens.core.rng import Key
from distillens.core.storage import read_tensors
from distillens.engine.plan import Plan
from distillens.evaluation.protocol import Protocol
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from tests.analyses.by_hand import subsets_at

KEY = Key(613, ("fairness",))
DRAWS, ALARMS, REPLICATES = 1000, 70, 5
PROTOCOL = Protocol("short", "", Recipe(steps=60, batch=50, lr=0.03))
NET = ConvNet(depth=2, width=8)
LOGITS = 2 * KEY.fold("logits").normal(3, 200, 6).double()
LABELS = KEY.fold("labels").integers(6, 200)


@pytest.fixture(scope="module")
def bank() -> dict[str, torch.Tensor]:
    return read_tensors(Path(__file__).parents[1] / "bank" / "judged.safetensors")[0]


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs(Plan())


def subsets(real: Splits, name: str, count: int = REPLICATES, ipc: int = 5) -> tuple[DistilledDataset, ...]:
    return subsets_at(KEY.fold(name), real, count, ipc)


def verdicts(claims: tuple[Claim, ...], name: str) -> dict[str, str]:
    return {claim.name: claim.verdict for claim in claims if claim.subject == name}


# --- the measures ------------------------------------------------------------------------------------------------


def probabilities(logits: torch.Tensor) -> np.ndarray:
    grown = np.exp(logits.numpy() - logits.numpy().max(1, keepdims=True))
    return np.asarray(grown / grown.sum(1, keepdims=True))


def test_calibration_error_is_summed_bin_by_bin() -> None:
    found = expected_error(reliability(LOGITS, LABELS, 15))
    for j, logits in enumerate(LOGITS):
        p, error = probabilities(logits), 0.0
        for b in range(15):
            inside = [i for i in range(200) if b / 15 < p[i].max() <= (b + 1) / 15]
            if inside:
                hits = np.mean([p[i].argmax() == int(LABELS[i]) for i in inside])
                error += len(inside) / 200 * abs(hits - np.mean([p[i].max() for i in inside]))
        assert abs(float(found[j]) - error) < 1e-12


def test_reliability_counts_every_image_once() -> None:
    bins = reliability(LOGITS, LABELS, 15)
    torch.testing.assert_close(bins[..., 0].sum(-1), torch.ones(3).double())
    torch.testing.assert_close(bins[..., 1].sum(-1), LOGITS.softmax(-1).amax(-1).mean(-1))
    torch.testing.assert_close(bins[..., 2].sum(-1), (LOGITS.argmax(-1) == LABELS).double().mean(-1))
    certain = torch.tensor([[[1e4, 0.0]]]).double()
    assert reliability(certain, torch.tensor([0]), 15)[0, -1].tolist() == [1, 1, 1]
    # On the edge of two bins the lower one counts.
    assert reliability(torch.zeros(1, 1, 2), torch.tensor([0]), 2)[0, :, 0].tolist() == [1, 0]


def test_calibration_error_in_closed_form() -> None:
    # Nine in ten sure of class 0, six in ten right.
    sure = torch.tensor([0.9, 0.1], dtype=torch.float64).log().expand(1, 10, 2)
    labels = torch.tensor([0] * 6 + [1] * 4)
    assert float(expected_error(reliability(sure, labels, 15))) == pytest.approx(0.3)
    assert float(brier(sure, labels)) == pytest.approx(0.6 * 2 * 0.01 + 0.4 * 2 * 0.81)
    assert float(likelihood(sure, labels)) == pytest.approx(-0.6 * np.log(0.9) - 0.4 * np.log(0.1))
    level = torch.tensor([0.6, 0.4], dtype=torch.float64).log().expand(1, 10, 2)
    assert float(expected_error(reliability(level, labels, 15))) == pytest.approx(0.0)
    # As many too sure by 0.3 as too unsure by 0.3: errors of two bins do not make up for each other.
    both, known = torch.cat([sure, level], 1), torch.cat([labels, torch.tensor([0] * 9 + [1])])
    assert float(expected_error(reliability(both, known, 15))) == pytest.approx(0.3)


def test_likelihood_score_and_class_accuracy_are_scikit_learns() -> None:
    found = likelihood(LOGITS, LABELS), brier(LOGITS, LABELS), class_accuracy(LOGITS, LABELS)
    for j, logits in enumerate(LOGITS):
        p = probabilities(logits)
        assert float(found[0][j]) == pytest.approx(log_loss(LABELS.numpy(), p, labels=range(6)))
        assert float(found[1][j]) == pytest.approx(((p - np.eye(6)[LABELS.numpy()]) ** 2).sum(1).mean())
        slow = recall_score(LABELS.numpy(), p.argmax(1), average=None, labels=range(6))
        np.testing.assert_allclose(found[2][j].numpy(), slow)


def test_it_reads_the_networks_of_accuracy_and_trains_no_other(digits: Splits, runs: Runs) -> None:
    sets = Sets({"a": subsets(digits, "a", 2)}, {"random_subset": subsets(digits, "base", 2)})
    analysis, accuracy = Fairness(PROTOCOL, NET), Accuracy(PROTOCOL, NET)
    result, known = analysis(sets, digits, runs, key=KEY), accuracy(sets, digits, runs, key=KEY)
    mine, theirs = (
        {i for t in one.trainings(sets, digits, key=KEY) for i in t.identities()}
        for one in (analysis, accuracy)
    )
    assert mine <= theirs
    weights = torch.tensor([len(members) for members in digits.test.by_class]).double()
    for name, values in known.values.items():
        torch.testing.assert_close(result.by_class[name] @ weights / weights.sum(), values)
    assert result.by_class["full data"].shape == (2, 1, 10)


def test_the_full_data_of_a_single_set_has_all_networks(digits: Splits, runs: Runs) -> None:
    twice = replace(PROTOCOL, nets=2)
    sets = Sets({"a": subsets(digits, "a", 1)}, {"random_subset": subsets(digits, "base", 1)})
    result = Fairness(twice, NET)(sets, digits, runs, key=KEY)
    assert result.by_class["full data"].shape == result.by_class["a"].shape == (1, 2, 10)
    assert {claim.estimate.unit for claim in result.claims()} == {NETWORK}
    assert result.notes()[-1] == "a: one set, the interval covers training only."


def test_a_class_without_test_images_has_no_accuracy(digits: Splits, runs: Runs) -> None:
    fewer = Splits(
        digits.train, digits.val, digits.test.take((digits.test.labels.hard() != 4).nonzero().flatten())
    )
    result = Fairness(PROTOCOL, NET)(Sets({"a": subsets(digits, "a", 2)}), fewer, runs, key=KEY)
    assert result.classes == tuple("012356789") and result.by_class["a"].shape == (2, 1, 9)
    assert result.claims() == ()


def test_regression_targets_are_said_to_be_no_probabilities(digits: Splits, runs: Runs) -> None:
    regressed = tuple(
        replace(one, labels=Targets(torch.eye(10)[one.labels.hard()] - 0.1))
        for one in subsets(digits, "t", 2)
    )
    notes = Fairness(PROTOCOL, NET)(Sets({"kip": regressed}), digits, runs, key=KEY).notes()
    assert any(note.startswith("kip: labels are regression targets") for note in notes)


def test_bins_are_needed() -> None:
    with pytest.raises(UserError, match="fairness: bins must be at least 1; got 0"):
        Fairness(bins=0)


# --- the claims --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ipc", [1, 10])
def test_random_subsets_are_less_fair_or_calibrated_no_more_often_than_stated(
    bank: dict[str, torch.Tensor], ipc: int
) -> None:
    found = {"wider class gap than random": 0, "worse calibrated than random": 0}
    for i in range(DRAWS):
        order = KEY.fold("null", ipc, i).permutation(60)
        parts = {"dm": order[:REPLICATES], "random_subset": order[REPLICATES : 2 * REPLICATES]}
        result = FairnessResult(
            "wddl",
            "ConvNet",
            ("dm",),
            ("random_subset",),
            tuple("0123456789"),
            450,
            (),
            {name: bank[f"by_class.{ipc}"][rows].double() for name, rows in parts.items()},
            {name: bank[f"reliability.{ipc}"][rows].double() for name, rows in parts.items()},
            {},
            {},
        )
        for claim in result.claims():
            found[claim.name] += claim.estimate.low > 0  # even without the margin
    assert max(found.values()) <= ALARMS


def test_a_relabelled_class_is_found(digits: Splits, runs: Runs) -> None:
    wrong = tuple(
        replace(one, labels=Hard(torch.where(one.labels.hard() == 3, 5, one.labels.hard())))
        for one in subsets(digits, "relabelled", ipc=10)
    )
    sets = Sets({"wrong": wrong}, {"random_subset": subsets(digits, "base", ipc=10)})
    result = Fairness(PROTOCOL, NET)(sets, digits, runs, key=KEY)
    assert verdicts(result.claims(), "wrong")["wider class gap than random"] == "supported"
    assert float(result.by_class["wrong"][..., 3].max()) == 0.0


def test_labels_smoothed_almost_flat_are_found(digits: Splits, runs: Runs) -> None:
    flat = tuple(
        replace(one, labels=Probabilities(0.05 + 0.5 * torch.eye(10)[one.labels.hard()]))
        for one in subsets(digits, "flat", ipc=10)
    )
    sets = Sets({"flat": flat}, {"random_subset": subsets(digits, "base", ipc=10)})
    result = Fairness(PROTOCOL, NET)(sets, digits, runs, key=KEY)
    assert verdicts(result.claims(), "flat")["worse calibrated than random"] == "supported"
