"""Estimators against retraining: the scores are what they say, noise is not trusted, an exact estimator is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr

from distillens.analyses.pointwise._jackknife import pseudo_values
from distillens.analyses.pointwise.estimators import (
    ESTIMATORS,
    TRUSTED,
    Estimators,
    EstimatorsResult,
    Truth,
    agreement,
    ceiling,
)
from distillens.core.artefact import Order
from distillens.core.checks import UserError
from distillens.core.contracts import Sets
from distillens.core.dataset import Splits
from distillens.core.ranks import rank_correlation
from distillens.core.recipe import Recipe
from distillens.core.result import Estimate
from distillens.core.rng import Key
from distillens.engine.plan import Plan
from distillens.nets.mlp import MLP
from distillens.runs import Runs
from tests.analyses.by_hand import subset

KEY = Key(41, ("estimators",))
DRAWS, ALARMS = 1000, 70
CONVEX = Estimators(
    MLP(0),
    Recipe(steps=200, lr=0.5, weight_decay=1e-2),
    inits=2,
    subsets=32,
    images=60,
    estimators=("gauss_newton", "gradient_dot", "exact"),
)


def simulated(place: Key, true: torch.Tensor, noise: float, inits: int = 3, subsets: int = 64) -> Truth:
    """Subsets whose losses are minus the sum of their points' true scores [P, n], with noise of each initialisation."""
    points, n = true.shape
    members = torch.stack(
        [(place.fold("half", i).permutation(points) < points // 2).float() for i in range(subsets)]
    )
    losses = -(members.double() @ true) + noise * place.fold("noise").normal(inits, subsets, n).double()
    single = true + noise * place.fold("single").normal(inits, points, n).double()
    return Truth(members, losses, losses, single)


def test_the_score_is_the_rank_correlation_over_subsets() -> None:
    true = KEY.fold("true").normal(30, 7).double()
    truth = simulated(KEY, true, 2.0)
    scores = KEY.fold("scores").normal(30, 7).double()
    chosen = torch.arange(32, 64)
    expected = [
        spearmanr(truth.members[32:] @ scores[:, z].float(), -truth.test[:, 32:, z].mean(0)).statistic
        for z in range(7)
    ]
    assert truth.lds(scores, chosen, truth.test) == pytest.approx(sum(expected) / 7, abs=1e-6)
    leave_one_out = [spearmanr(scores[:, z], truth.single[:2, :, z].mean(0)).statistic for z in range(7)]
    found = truth.loo(scores.expand(3, -1, -1), torch.arange(2), torch.arange(7))
    assert found == pytest.approx(sum(leave_one_out) / 7)


def test_pseudo_values_of_a_mean_are_the_values() -> None:
    values = KEY.fold("values").normal(12).double()
    found = pseudo_values(lambda i: float(values[i].mean()), torch.arange(12).tensor_split(12))
    assert found == pytest.approx(values.tolist())


def test_rank_correlation_with_something_constant_is_nothing() -> None:
    varied = KEY.fold("varied").normal(3, 8)
    assert rank_correlation(varied, -varied).tolist() == pytest.approx([-1.0] * 3)


def test_the_ceiling_is_what_the_true_scores_reach() -> None:
    true = KEY.fold("true scores").normal(60, 200).double()
    truth = simulated(KEY.fold("ceiling"), true, 1.5, inits=4, subsets=400)
    ceilings = truth.ceilings(torch.arange(400))
    assert ceilings["lds"].value == pytest.approx(truth.lds(true, torch.arange(400), truth.test), abs=0.02)
    assert ceilings["loo"].value == pytest.approx(
        truth.loo(true.expand(4, -1, -1), torch.arange(4), torch.arange(200)), abs=0.02
    )


def test_a_ceiling_is_the_root_of_the_reliability_of_a_mean() -> None:
    # One initialisation of variance 1 + 1 agrees with another at 1/2; the mean of three has the reliability 1 / (1 + 1/3).
    assert ceiling(0.5, 3) == pytest.approx(math.sqrt(0.75))
    assert ceiling(-0.1, 3) == 0.0 and ceiling(1.0, 3) == 1.0
    one = KEY.fold("one").normal(3, 5, 9)
    pairs = [spearmanr(one[a, i], one[b, i]).statistic for a, b in ((0, 1), (0, 2), (1, 2)) for i in range(5)]
    assert agreement(one) == pytest.approx(sum(pairs) / 15)


def test_the_interval_of_a_ceiling_covers_it() -> None:
    true = KEY.fold("covered").normal(12, 60).double()
    many = simulated(KEY.fold("many"), true, 2.0, inits=20, subsets=200)
    # What 20 initialisations say of the ceiling of three.
    expected = {
        "loo": ceiling(agreement(many.single.transpose(1, 2)), 3),
        "lds": ceiling(agreement(many.test.transpose(1, 2)), 3),
    }
    hits = dict.fromkeys(expected, 0)
    for i in range(100):
        found = simulated(KEY.fold("again", i), true, 2.0).ceilings(torch.arange(32, 64))
        for name, estimate in found.items():
            assert 0 <= estimate.low < estimate.value < estimate.high <= 1
            hits[name] += estimate.low <= expected[name] <= estimate.high
    assert min(hits.values()) >= 88


def test_few_initialisations_say_little_of_the_ceiling() -> None:
    true = KEY.fold("few").normal(8, 20).double()
    pair = simulated(KEY, true, 1.0, inits=2).ceilings(torch.arange(64))
    assert all(e.value > 0 and math.isinf(e.low) and math.isinf(e.high) for e in pair.values())
    assert simulated(KEY, true, 1.0, inits=1).ceilings(torch.arange(64)) == {}
    rows = result_of({"trak": Estimate.mean([0.1, 0.2], "block")}).tables()[0].rows
    assert rows[-1] == ("ceiling", "unknown", "unknown", "", "1,000 and 20")


def repeated(scores: torch.Tensor, true: torch.Tensor, times: int) -> Iterator[Estimate]:
    for i in range(times):
        place = KEY.fold("repeat", i)
        noise = 0.3 * place.fold("estimator").normal(3, *scores.shape).double()
        yield simulated(place, true, 1.5).lds_estimate(scores + noise, torch.arange(32, 64))


def test_the_interval_of_a_score_covers_it() -> None:
    true = KEY.fold("cover").normal(20, 40).double()
    scores = true + KEY.fold("wrong").normal(20, 40).double()
    found = list(repeated(scores, true, 100))
    expected = sum(e.value for e in repeated(scores, true, 100)) / 100
    assert sum(e.low <= expected <= e.high for e in found) >= 88


def test_scores_of_noise_are_not_trusted() -> None:
    true = KEY.fold("null").normal(10, 30).double()
    truth = simulated(KEY.fold("null truth"), true, 1.0)
    alarms = 0
    for i in range(DRAWS):
        shuffled = true[KEY.fold("shuffle", i).permutation(10)].expand(3, -1, -1)
        estimate = truth.lds_estimate(shuffled, torch.arange(32, 64))
        alarms += result_of({"trak": estimate}).claims()[0].verdict == "supported"
    assert alarms <= ALARMS


def result_of(lds: dict[str, Estimate]) -> EstimatorsResult:
    best = max(lds, key=lambda each: lds[each].value)
    return EstimatorsResult(
        ("a",),
        {"a": lds},
        {"a": lds},
        {"a": {}},
        {"a": dict.fromkeys(lds, 1)},
        {"a": {}},
        {"a": {}},
        {"a": best},
        {"a": {}},
        {"a": {"lds": 1000, "loo": 20}},
        30,
    )


def test_an_influence_function_of_a_convex_network_is_trusted(digits: Splits) -> None:
    one = subset(digits, KEY.fold("convex"), ipc=2)
    result = CONVEX(Sets({"a": (one,)}), digits, Runs(Plan()), key=KEY)
    assert [claim.verdict for claim in result.claims()] == ["supported"]
    lds = result.lds["a"]
    assert lds["gauss_newton"].value > max(0.8, lds["gradient_dot"].value)
    # The Hessian of softmax regression is the Gauss-Newton matrix; weight decay is the damping of one, in the other.
    assert lds["exact"].value == pytest.approx(lds["gauss_newton"].value, abs=0.01)
    assert result.loo["a"]["gauss_newton"].value > result.loo["a"]["gradient_dot"].value + 0.2
    assert result.damping["a"]["gauss_newton"] in ("0.001", "0.01", "0.1")
    assert result.passes["a"]["gradient_dot"] == 20 + 120
    # 21 networks and 32 of 200 steps on whole batches of 20 images, from each initialisation.
    assert result.retraining["a"] == {"loo": 21 * 20 * 200, "lds": 32 * 20 * 200}


def test_what_is_out_of_reach_is_said(digits: Splits) -> None:
    one = subset(digits, KEY.fold("reach"))
    short = replace(CONVEX, recipe=Recipe(steps=10), subsets=16, estimators=("unrolled", "tracin", "trak"))
    steps = torch.arange(10).expand(3, 10)
    ordered = replace(one, order=Order(steps, torch.full((3,), 0.05)))
    result = short(Sets({"a": (one,), "b": (ordered,)}), digits, Runs(Plan()), key=KEY)
    assert set(result.lds["a"]) == {"unrolled", "tracin", "trak"}
    assert set(result.lds["b"]) == {"trak"}
    assert any(
        "was not tried on b: its training is a list of ordered steps" in note for note in result.notes()
    )
    with pytest.raises(UserError, match=r"unknown estimator 'trakk'; Did you mean 'trak'"):
        Estimators(estimators=("trakk",))
    assert TRUSTED < 1
    assert set(CONVEX.estimators) < set(ESTIMATORS)
