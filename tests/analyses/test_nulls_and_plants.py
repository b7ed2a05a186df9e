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
