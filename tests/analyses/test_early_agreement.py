"""Early agreement: nulls and plants from the bank of real models, its three agreements against slow twins, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score

from distillens.analyses.representativeness._pools import KINDS, Pools, agreements, among_themselves, compact
from distillens.analyses.representativeness.early_agreement import EarlyAgreement, EarlyAgreementResult
from distillens.core.checks import UserError
from distillens.core.contracts import Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.recipe import Recipe
from distillens.core.result import Claim
from distillens.core.rng import Key
from distillens.core.storage import read_tensors
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from tests.analyses.by_hand import subsets_at

DRAWS, ALARMS, REPLICATES = 1000, 70, 5
SEED = Key(20241123)
KEY = Key(77, ("early agreement",))
TINY = EarlyAgreement(
    ConvNet(2, 8),
    Recipe(steps=60, lr=0.03),
    early=3,
    early_recipe=Recipe(steps=30, batch=256, lr=0.03),
    subset=8,
    subset_recipe=Recipe(steps=60, batch=64, lr=0.03),
    least_per_class=1,
    most_per_class=20,
    tolerance=0.1,
)


@pytest.fixture(scope="module")
def bank() -> dict[str, torch.Tensor]:
    return read_tensors(Path(__file__).parents[1] / "bank" / "digits.safetensors")[0]


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs(Plan())


def pools_of(bank: dict[str, torch.Tensor], e: torch.Tensor, s: torch.Tensor) -> Pools:
    return Pools(
        bank["early"][e],
        bank["early_accuracy"][e],
        tuple(bank["moments"].tolist()),
        bank["subset"][s],
        bank["subset_accuracy"][s],
        bank["labels"],
        10,
    )


def result_of(
    own: tuple[torch.Tensor, torch.Tensor],
    accuracy: torch.Tensor,
    early: torch.Tensor,
    subset: torch.Tensor,
    pools: Pools,
) -> EarlyAgreementResult:
    """What the analysis makes of one set whose replicates agree so with each pool, [kinds, replicates, models]."""
    moments = {"dm": torch.ones(early.shape[1:])}
    return EarlyAgreementResult(
        ("dm",), 10, {"dm": accuracy}, {"dm": early}, {"dm": subset}, moments, *own, 0.02, pools.ranges
    )


def of_one_set(pools: Pools, predicted: torch.Tensor, accuracy: torch.Tensor) -> EarlyAgreementResult:
    """The same from the classes [replicates, n] that each replicate's one network names."""
    rows = [pools.compare(p[None], a[None], 0.02)[:2] for p, a in zip(predicted, accuracy, strict=True)]
    early, subset = (torch.stack(many, 1) for many in zip(*rows, strict=True))
    return result_of(pools.own(0.02), accuracy, early, subset, pools)


class Draws:
    """Five real models in a distilled set's place against pools of others: all agreements once, then rows of them.

    Random subset models, or early-stopped models planted at one accuracy, as the replicates of a method have.
    """

    def __init__(self, bank: dict[str, torch.Tensor], planted_at: float | None) -> None:
        self.subset, self.early = len(bank["subset"]), len(bank["early"])
        self.pools = pools_of(bank, torch.arange(self.early), torch.arange(self.subset))
        self.planted = planted_at is not None
        self.among = [table[:1] for table in self._against(bank["subset"], bank["subset_accuracy"])]
        if planted_at is None:
            self.accuracy, self.own = bank["subset_accuracy"], self.among
        else:
            at = (bank["early_accuracy"] - planted_at).abs().argmin(1)
            rows = torch.arange(self.early)
            self.accuracy = bank["early_accuracy"][rows, at]
            self.own = [table[:1] for table in self._against(bank["early"][rows, at], self.accuracy)]

    def _against(self, predicted: torch.Tensor, accuracy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        early, _ = self.pools.with_early(predicted, accuracy, 0.02)
        return early, self.pools.with_subset(predicted, accuracy, 0.02)

    def claims(self, place: Key) -> list[Claim]:
        order_s, order_e = place.fold("s").permutation(self.subset), place.fold("e").permutation(self.early)
        s, e = order_s[REPLICATES : REPLICATES + 64], order_e[REPLICATES : REPLICATES + 16]
        own = (order_e if self.planted else order_s)[:REPLICATES]
        among = among_themselves(self.among[0][:, s][..., e], self.among[1][:, s][..., s])
        early, subset = self.own[0][:, own][..., e], self.own[1][:, own][..., s]
        return list(result_of(among, self.accuracy[own], early, subset, self.pools).claims())


def supported(claims: list[Claim]) -> int:
    return sum(claim.verdict == "supported" for claim in claims)


def test_the_papers_contrast_is_not_zero_for_real_subset_models(bank: dict[str, torch.Tensor]) -> None:
    # What docs/representativeness.md says: about 0.02 where subset models reach 0.7 to 0.93.
    accuracy = bank["subset_accuracy"]
    pools = pools_of(bank, torch.arange(len(bank["early"])), torch.arange(len(accuracy)))
    early, subset = (table[0] for table in pools.own(0.02))
    gaps = (early.nanmean(1) - subset.nanmean(1))[(accuracy >= 0.7) & (accuracy < 0.93)]
    gaps = gaps[~gaps.isnan()]
    assert len(gaps) > 60
    assert 0.015 < float(gaps.mean()) < 0.025
    assert float(gaps.mean() / gaps.std() * len(gaps) ** 0.5) > 5


def test_held_out_subset_models_do_not_look_early_stopped(bank: dict[str, torch.Tensor]) -> None:
    draws = Draws(bank, None)
    found = [c for i in range(DRAWS) for c in draws.claims(SEED.fold("early null", i))]
    assert len(found) > 0.9 * DRAWS
    assert supported(found) <= ALARMS


def test_held_out_early_stopped_models_look_early_stopped(bank: dict[str, torch.Tensor]) -> None:
    draws = Draws(bank, 0.87)
    found = [c for i in range(100) for c in draws.claims(SEED.fold("early plant", i))]
    assert len(found) > 90
    assert supported(found) >= 0.8 * len(found)


def test_the_tables_of_the_bank_give_what_the_models_themselves_give(bank: dict[str, torch.Tensor]) -> None:
    place = SEED.fold("early null", 3)
    s, e = place.fold("s").permutation(160), place.fold("e").permutation(24)
    pools = pools_of(bank, e[5:21], s[5:69])
    slow = of_one_set(pools, bank["subset"][s[:5]], bank["subset_accuracy"][s[:5]])
    (quick,) = Draws(bank, None).claims(place)
    assert quick.estimate == slow.claims()[0].estimate


def test_early_stopped_models_lean_to_their_like_however_it_is_counted(bank: dict[str, torch.Tensor]) -> None:
    own, others = torch.arange(5), torch.arange(5, len(bank["early"]))
    pools = pools_of(bank, others, torch.arange(len(bank["subset"])))
    nearest = (bank["early_accuracy"][own] - 0.87).abs().argmin(1)
    result = of_one_set(pools, bank["early"][own, nearest], bank["early_accuracy"][own, nearest])
    for kind in range(len(KINDS)):
        excess = result.excess("dm", kind)
        assert excess is not None and excess.value > 0
    # At equal accuracy chance takes about the same from both pools: kappa only stretches the gap.
    raw, kappa = result.gap("dm"), result.gap("dm", 1)
    assert raw is not None and kappa is not None
    assert kappa.value == pytest.approx(raw.value / 0.9, abs=0.01)


def test_agreements_equal_slow_twins() -> None:
    rng = np.random.default_rng(5)
    for k in (2, 3, 10):
        labels = rng.integers(0, k, 200)
        mine, theirs = rng.integers(0, k, 200), rng.integers(0, k, (4, 200))
        mine[:120], theirs[:, 60:180] = labels[:120], labels[60:180]
        found = agreements(*map(torch.from_numpy, (mine, theirs, labels)), k)
        for j, other in enumerate(theirs):
            both, alike = 0, 0
            for a, b, y in zip(mine, other, labels, strict=True):
                both += a != y and b != y
                alike += a != y and b != y and a == b
            twin = [float(np.mean(mine == other)), cohen_kappa_score(mine, other), alike / both]
            assert found[:, j].tolist() == pytest.approx(twin, abs=1e-12)


def test_agreements_at_their_ends() -> None:
    labels = torch.arange(10).repeat(30)
    right, shifted = labels.clone(), (labels + 1) % 10
    constant = torch.zeros(300, dtype=torch.int64)
    raw, kappa, errors = agreements(right, torch.stack([right, shifted, constant]), labels, 10).unbind()
    assert raw.tolist() == pytest.approx([1.0, 0.0, 0.1])
    assert kappa.tolist() == pytest.approx([1.0, -1 / 9, 0.0])
    assert errors.isnan().all()  # one of the two is never wrong
    raw, kappa, errors = agreements(constant, torch.stack([constant, shifted]), labels, 10).unbind()
    assert raw[0] == 1
    assert kappa[0].isnan()  # two models that name one class alone
    assert errors[0] == 1
    assert float(errors[1]) == pytest.approx(1 / 9)  # nines: shifted says 0 there


def test_independent_models_of_equal_accuracy_agree_as_the_formula_says() -> None:
    n, k, a = 200_000, 10, 0.7
    labels = torch.arange(k).repeat(n // k)

    def model(key: Key) -> torch.Tensor:
        wrong = (labels + 1 + key.fold("class").integers(k - 1, n)) % k
        return torch.where(key.fold("right").uniform(n) < a, labels, wrong)

    raw, kappa, errors = agreements(model(KEY.fold(0)), model(KEY.fold(1))[None], labels, k)[:, 0].tolist()
    chance = a**2 + (1 - a) ** 2 / (k - 1)
    assert raw == pytest.approx(chance, abs=0.005)
    assert kappa == pytest.approx((chance - 1 / k) / (1 - 1 / k), abs=0.005)
    assert errors == pytest.approx(1 / (k - 1), abs=0.01)


def test_typed_in_moments_equal_a_slow_twin(bank: dict[str, torch.Tensor]) -> None:
    pools = pools_of(bank, torch.arange(6), torch.arange(100))
    moment = pools.moments[20]
    nets = [bank["subset"][100:102], bank["subset"][102:104]]
    found = pools.typed_in(nets, moment)
    labels = bank["labels"].numpy()
    subset, early = bank["subset"][:100].numpy(), bank["early"][:6, 20].numpy()
    for r, two in enumerate(nets):
        rows, with_early = [], []
        for one in two.numpy():
            floor = int(np.floor(100 * np.mean(one == labels) + 1e-9))
            bins = [int(np.floor(100 * np.mean(other == labels) + 0.5 + 1e-9)) for other in subset]
            rows.append(
                [
                    np.mean(o == one) if b in (floor, floor + 1) else np.nan
                    for o, b in zip(subset, bins, strict=True)
                ]
            )
            with_early.append([np.mean(other == one) for other in early])
        both = np.array(rows)
        twin = np.where(np.isnan(both).all(0), np.nan, np.nansum(both, 0) / (~np.isnan(both)).sum(0).clip(1))
        np.testing.assert_allclose(found["subset"][r].numpy(), twin, atol=1e-12)
        np.testing.assert_allclose(found["early"][r].numpy(), np.mean(with_early, 0), atol=1e-12)
        assert float(found["accuracy"][r]) == pytest.approx(np.mean(two.numpy() == labels))
    assert not found["subset"].isnan().all()
    np.testing.assert_allclose(found["early accuracy"].numpy(), (early == labels).mean(1), atol=1e-12)


def test_whole_percents_are_not_lost_to_rounding() -> None:
    labels = torch.zeros(100, dtype=torch.int64)
    mine = (torch.arange(100) >= 57).long()  # accuracy 0.57: int(0.57 * 100) is 56
    others = torch.stack([(torch.arange(100) >= right).long() for right in (56, 57, 58, 59)])
    early = mine.expand(2, 1, -1)
    pools = Pools(early, torch.full((2, 1), 0.5), (3,), others, torch.full((4,), 0.5), labels, 2)
    assert pools.typed_in([mine[None]], 3)["subset"].isnan().tolist() == [[True, False, False, True]]


def test_pools_are_held_in_few_bytes(bank: dict[str, torch.Tensor]) -> None:
    assert compact(torch.tensor([0, 255]), 256).dtype == torch.uint8
    assert compact(torch.tensor([0, 999]), 1000).tolist() == [0, 999]
    small = pools_of(bank, torch.arange(4), torch.arange(20))
    wide = replace(small, early=small.early.long(), subset=small.subset.long(), labels=small.labels.long())
    for first, second in zip(small.own(0.02), wide.own(0.02), strict=True):
        assert torch.equal(first.nan_to_num(-9), second.nan_to_num(-9))


def test_the_published_protocol(like_cifar: Dataset) -> None:
    analysis = EarlyAgreement.as_published(like_cifar)
    assert (analysis.early, analysis.subset, analysis.tolerance) == (30, 520, 0.01)
    assert (analysis.least_per_class, analysis.most_per_class) == (25, 250)
    assert analysis.looks == tuple(range(1, 197))
    # The paper's indices count from zero.
    assert {name: moment - 1 for name, moment in analysis.fixed} == {
        "bptt": 130,
        "dm": 40,
        "dc": 35,
        "mtt": 90,
    }
    assert set(dict(analysis.fixed).values()) <= set(analysis.looks)


def test_the_default_looks_after_every_early_update(digits: Splits) -> None:
    looks = EarlyAgreement.defaults(digits.train).looks
    assert looks[:10] == tuple(range(1, 11))
    assert looks[-1] == 150 and len(looks) <= 64


def test_the_authors_matching_stands_in_a_table_of_its_own(digits: Splits, runs: Runs) -> None:
    analysis = replace(TINY, fixed=(("a", 30), ("random_subset", 31), ("absent", 5)))
    sets = Sets(
        {"a": subsets_at(KEY.fold("a"), digits, 2, 3)},
        {"random_subset": subsets_at(KEY.fold("b"), digits, 2, 3)},
    )
    result = analysis(sets, digits, runs, key=KEY)
    table = result.tables()[-1]
    assert "typed in by the authors" in table.title and "no claim" in table.title
    (row,) = table.rows
    assert row[:2] == ("a", 30)
    apart, early, own = row[4], row[3], row[2]
    assert not isinstance(apart, str | int) and not isinstance(early, str | int)
    assert not isinstance(own, str | int)
    assert apart.value == pytest.approx(early.value - own.value)
    assert "end before a moment typed in by the authors: random_subset after 31" in result.notes()[1]
    plain = replace(TINY, fixed=())(sets, digits, runs, key=KEY)
    assert plain.claims() == result.claims()
    assert len(plain.tables()) == len(result.tables()) - 1


def test_what_no_pool_matches_is_refused_with_numbers(digits: Splits, runs: Runs) -> None:
    analysis = replace(
        TINY, recipe=Recipe(steps=1, lr=1e-6), least_per_class=20, most_per_class=30, tolerance=0.001
    )
    sets = Sets({"untrained": subsets_at(KEY.fold("u"), digits, 2, 1)})
    result = analysis(sets, digits, runs, key=KEY)
    assert result.gap("untrained") is None
    assert result.claims() == () and result.headline() == {}
    note = result.notes()[-1]
    low, high = result.ranges[1]
    assert "No comparison for untrained: its models reach 0." in note
    assert f"subset-trained ones {low:.3f} to {high:.3f}" in note
    assert "lower least_per_class" in note and "raise most_per_class" not in note


def test_each_way_out_of_the_pools_is_named(bank: dict[str, torch.Tensor]) -> None:
    pools = pools_of(bank, torch.arange(4), torch.arange(20))
    result = of_one_set(pools, bank["subset"][30:31], torch.tensor([0.5]))
    apart = {"dm": torch.tensor([0.5])}

    def note(early: tuple[float, float], subset: tuple[float, float]) -> str:
        empty = {"dm": torch.full_like(result.with_early["dm"], torch.nan)}
        return replace(result, accuracy=apart, with_early=empty, ranges=(early, subset)).notes()[-1]

    assert note((0.1, 0.4), (0.1, 0.4)).endswith("raise early_recipe.steps and raise most_per_class.")
    assert note((0.6, 0.9), (0.6, 0.9)).endswith("raise moments and lower least_per_class.")
    assert note((0.1, 0.9), (0.1, 0.9)).endswith("raise early and subset (more models) or tolerance.")


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="most_per_class is below least_per_class"):
        replace(TINY, least_per_class=5, most_per_class=4)
    with pytest.raises(UserError, match="the fixed moment of dm must be at least 1; got 0"):
        replace(TINY, fixed=(("dm", 0),))
