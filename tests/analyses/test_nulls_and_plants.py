"""Each claim: a null that it must not support at more than the stated rate, a plant that it must find.

Nulls are 1,000 resampled draws of five replicates from the committed bank of trained models (tests/bank) or
from noise where the claim is about noise: at most 70 may be called supported.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import nct, t

from distillens.analyses.behaviour.accuracy import AccuracyResult
from distillens.analyses.representativeness.early_agreement import EarlyAgreementResult, Pools
from distillens.core.result import Claim
from distillens.core.rng import Key
from distillens.core.storage import read_tensors

DRAWS, ALARMS, REPLICATES = 1000, 70, 5
SEED = Key(20241123)


@pytest.fixture(scope="module")
def bank() -> dict[str, torch.Tensor]:
    return read_tensors(Path(__file__).parents[1] / "bank" / "digits.safetensors")[0]


def supported(claims: list[Claim]) -> int:
    return sum(claim.verdict == "supported" for claim in claims)


def accuracy_claim(own: torch.Tensor, other: torch.Tensor, against: str, name: str) -> Claim:
    result = AccuracyResult(
        "wddl", "", "ConvNet", ("dm",), (), {"dm": own[:, None], against: other[:, None]}, own, {}, {"dm": ""}
    )
    (claim,) = (c for c in result.claims() if c.name == name)
    return claim


@pytest.mark.parametrize("ipc", [1, 10])
def test_a_random_subset_beats_random_no_more_often_than_stated(
    bank: dict[str, torch.Tensor], ipc: int
) -> None:
    values = bank[f"accuracy.{ipc}"]
    claims = []
    for i in range(DRAWS):
        order = SEED.fold("random", ipc, i).permutation(len(values))
        first, second = values[order[:REPLICATES], 0], values[order[REPLICATES : 2 * REPLICATES], 0]
        claims.append(accuracy_claim(first, second, "random_subset", "beats random"))
    assert supported(claims) <= ALARMS


@pytest.mark.parametrize("ipc", [1, 10])
def test_a_set_beats_itself_no_more_often_than_stated(bank: dict[str, torch.Tensor], ipc: int) -> None:
    values = bank[f"accuracy.{ipc}"]
    claims = []
    for i in range(DRAWS):
        chosen = values[SEED.fold("start", ipc, i).permutation(len(values))[:REPLICATES]]
        flip = SEED.fold("flip", ipc, i).integers(2, REPLICATES)
        rows = torch.arange(REPLICATES)
        claims.append(
            accuracy_claim(chosen[rows, flip], chosen[rows, 1 - flip], "dm, its start", "beats its start")
        )
    assert supported(claims) <= ALARMS


@pytest.mark.parametrize("ipc", [1, 10])
def test_a_gain_that_five_pairs_can_see_is_found(bank: dict[str, torch.Tensor], ipc: int) -> None:
    values = bank[f"accuracy.{ipc}"]
    # The gain at which a two-sided t test of five pairs finds a difference 97 times in 100 (noncentral t).
    bound = float(t.ppf(0.975, REPLICATES - 1))
    shift = float(brentq(lambda d: nct.sf(bound, REPLICATES - 1, d) - 0.97, 0.1, 20))
    gain = shift / REPLICATES**0.5 * 2**0.5 * values.std()
    found = []
    for i in range(200):
        order = SEED.fold("gain", ipc, i).permutation(len(values))
        own = values[order[:REPLICATES], 0] + gain
        other = values[order[REPLICATES : 2 * REPLICATES], 0]
        found.append(accuracy_claim(own, other, "random_subset", "beats random"))
    assert supported(found) >= 180


def agreement_claims(bank: dict[str, torch.Tensor], place: Key, planted_at: float | None) -> list[Claim]:
    """The claim with five real models in the place of a distilled set's models.

    Random subset models, or early-stopped models planted at one accuracy, as the replicates of a method have.
    """
    subset, early = bank["subset"], bank["early"]
    order_s, order_e = place.fold("s").permutation(len(subset)), place.fold("e").permutation(len(early))
    own_s, pool_s = order_s[:REPLICATES], order_s[REPLICATES : REPLICATES + 64]
    own_e, pool_e = order_e[:REPLICATES], order_e[REPLICATES : REPLICATES + 16]
    pools = Pools(
        early[pool_e],
        bank["early_accuracy"][pool_e],
        tuple(bank["moments"].tolist()),
        subset[pool_s],
        bank["subset_accuracy"][pool_s],
    )
    if planted_at is None:
        predicted, accuracy = subset[own_s], bank["subset_accuracy"][own_s]
    else:
        nearest = (bank["early_accuracy"][own_e] - planted_at).abs().argmin(1)
        predicted, accuracy = early[own_e, nearest], bank["early_accuracy"][own_e, nearest]
    rows = [pools.compare(p[None], a[None], 0.02) for p, a in zip(predicted, accuracy, strict=True)]
    with_early, with_subset, moments = (torch.stack(column) for column in zip(*rows, strict=True))
    result = EarlyAgreementResult(
        ("dm",),
        {"dm": accuracy},
        {"dm": with_early},
        {"dm": with_subset},
        {"dm": moments},
        *pools.own(0.02),
        0.02,
    )
    return list(result.claims())


def test_the_papers_contrast_is_not_zero_for_real_subset_models(bank: dict[str, torch.Tensor]) -> None:
    # What docs/representativeness.md says: about 0.02 where subset models reach 0.7 to 0.93.
    accuracy = bank["subset_accuracy"]
    moments = tuple(bank["moments"].tolist())
    pools = Pools(bank["early"], bank["early_accuracy"], moments, bank["subset"], accuracy)
    early, subset = pools.own(0.02)
    gaps = (early.nanmean(1) - subset.nanmean(1))[(accuracy >= 0.7) & (accuracy < 0.93)]
    gaps = gaps[~gaps.isnan()]
    assert len(gaps) > 60
    assert 0.015 < float(gaps.mean()) < 0.025
    assert float(gaps.mean() / gaps.std() * len(gaps) ** 0.5) > 5


def test_held_out_subset_models_do_not_look_early_stopped(bank: dict[str, torch.Tensor]) -> None:
    claims = [c for i in range(DRAWS) for c in agreement_claims(bank, SEED.fold("early null", i), None)]
    assert len(claims) > 0.9 * DRAWS
    assert supported(claims) <= ALARMS


def test_held_out_early_stopped_models_look_early_stopped(bank: dict[str, torch.Tensor]) -> None:
    claims = [c for i in range(100) for c in agreement_claims(bank, SEED.fold("early plant", i), 0.87)]
    assert len(claims) > 90
    assert supported(claims) >= 0.8 * len(claims)
