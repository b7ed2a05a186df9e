"""Donors: slow twins, nulls and plants, what is said of sets without a record.

Nulls are 1,000 resampled draws of 5 replicates from the committed bank (tests/bank): at most 70 may be called supported.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distillens import pipeline, sessions
from distillens.analyses.pointwise.provenance import (
    PLACES,
    Provenance,
    ProvenanceResult,
    between,
    concentration,
    nearness,
    of_class,
    totals,
)
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.contracts import Sets
from distillens.core.dataset import Splits
from distillens.core.donors import Donors
from distillens.core.labels import Hard
from distillens.core.result import REPLICATE, Claim, Estimate
from distillens.core.rng import Key
from distillens.core.space import Pixel
from distillens.core.storage import read_tensors
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from tests.analyses.by_hand import subset, subsets_at

KEY = Key(99, ("provenance",))
SEED = Key(20251126)
NET = ConvNet(depth=2, width=8)
ASKED = Provenance(NET, views=1, top=3)
DRAWS, ALARMS, POOL, REPLICATES = 1000, 70, 40, 5


@pytest.fixture(scope="module")
def bank() -> dict[str, torch.Tensor]:
    return read_tensors(Path(__file__).parents[1] / "bank" / "provenance.safetensors")[0]


def ask(sets: Sets, real: Splits) -> ProvenanceResult:
    return ASKED(sets, real, Runs(Plan()), key=KEY)


def of(result: ProvenanceResult, name: str) -> Claim:
    (claim,) = (claim for claim in result.claims() if claim.name == name)
    return claim


def spearman(a: list[float], b: list[float]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


# ---- twins ----


def test_concentration_is_what_a_slow_count_gives() -> None:
    points, m = 3, 40
    parts = SEED.fold("parts").normal(2, points, m).double() + 0.3
    met = SEED.fold("met").integers(5, 2, m) + (torch.arange(m) > 2)
    parts = parts * (met > 0)[:, None]
    images = [i for i in range(m) if met[0, i] and met[1, i]]
    found = concentration(parts, met)
    few = {"hundredth": 1, "tenth": round(0.1 * len(images))}
    agree, curve = [], [0.0] * PLACES
    beyond: dict[str, list[float]] = {name: [] for name in few}
    rate = [[[float(parts[h, j, i] / met[h, i]) for i in images] for j in range(points)] for h in (0, 1)]
    for j in range(points):
        agree.append(spearman(rate[0][j], rate[1][j]))
    for named, counted in ((0, 1), (1, 0)):
        pull = sum(max(0.0, float(x)) for x in parts[counted].flatten())
        orders = [sorted(range(len(images)), key=lambda a: -rate[named][j][a]) for j in range(points)]
        for name, count in few.items():
            given = fair = 0.0
            for j, order in enumerate(orders):
                given += sum(float(parts[counted, j, images[a]]) for a in order[:count]) / pull
                batches = sum(float(met[counted, images[a]]) for a in order[:count])
                fair += batches / float(met[counted].sum()) / points
            beyond[name].append(given - fair)
        for j, order in enumerate(orders):
            for x in range(PLACES):
                last = round(x / (PLACES - 1) * len(images) + 1e-9)
                curve[x] += sum(float(parts[counted, j, images[a]]) for a in order[:last]) / pull / 2
    assert float(found["repeats"]) == pytest.approx(sum(agree) / points)
    for name, both in beyond.items():
        assert float(found[name]) == pytest.approx(sum(both) / 2)
    assert found["curve"].tolist()[::10] == pytest.approx(curve[::10], abs=0.02)
    assert float(found["curve"][-1]) == pytest.approx(curve[-1])
    effective = []
    for j in range(points):
        positive = [max(0.0, float(parts[:, j, i].sum())) for i in images]
        effective.append(sum(positive) ** 2 / sum(p**2 for p in positive))
    assert float(found["effective"]) == pytest.approx(sum(effective) / points)
    net = [float(parts[h].sum()) / sum(max(0.0, float(x)) for x in parts[h].flatten()) for h in (0, 1)]
    assert float(found["net"]) == pytest.approx(sum(net) / 2)
    counts = [float(met[:, i].sum()) for i in images]
    assert float(found["equal"]) == pytest.approx(sum(counts) ** 2 / sum(c**2 for c in counts))


def test_equal_shares_are_as_many_donors_as_there_are_images() -> None:
    found = concentration(torch.ones(2, 1, 30), torch.ones(2, 30, dtype=torch.int64))
    assert float(found["effective"]) == pytest.approx(30) == float(found["equal"])
    assert float(found["tenth"]) == pytest.approx(0)
    assert float(found["net"]) == pytest.approx(1)
    assert torch.allclose(found["curve"], torch.linspace(0, 1, PLACES, dtype=torch.float64), atol=0.02)


def test_nearness_counts_pairs() -> None:
    rates, far = SEED.fold("rates").normal(2, 20), SEED.fold("far").uniform(2, 20)
    found = nearness(rates, far)
    for j in range(2):
        for other in range(2):
            donors = rates[other].argsort(descending=True)[:2].tolist()
            rest = [i for i in range(20) if i not in donors]
            nearer = sum(float(far[j, a] < far[j, b]) for a in donors for b in rest) / (2 * 18)
            assert float(found[j, other]) == pytest.approx(nearer - 0.5)
    assert float(nearness(-far, far)[0, 0]) == pytest.approx(0.5)


def test_a_classs_donors_are_those_of_the_highest_rates_among_images_met_in_both_halves() -> None:
    points, m = 3, 30
    parts = SEED.fold("own parts").normal(2, points, m).double()
    met = SEED.fold("own met").integers(9, 2, m)
    far = SEED.fold("own far").uniform(points, m).double()
    images = [i for i in range(m) if met[0, i] and met[1, i]]
    assert len(images) < m - 3
    rates = [[float(parts[:, j, i].sum()) / float(met[:, i].sum()) for i in images] for j in range(points)]
    near = nearness(torch.tensor(rates), far[:, images])
    found = of_class(parts, met, {"pixels": far})
    own = [float(near[j, j]) for j in range(points)]
    others = [float(near[j, o]) for j in range(points) for o in range(points) if o != j]
    assert float(found["pixels"]) == pytest.approx(sum(own) / points)
    assert float(found["own pixels"]) == pytest.approx(sum(own) / points - sum(others) / len(others))
    assert "own pixels" not in of_class(parts[:, :1], met, {"pixels": far[:1]})


def test_totals_are_parts_a_batch_over_points_and_halves() -> None:
    parts, met = SEED.fold("sums").normal(2, 3, 20), SEED.fold("counts").integers(3, 2, 20)
    made = DistilledDataset(
        {"images": torch.zeros(6, 1, 2, 2)}, Hard(torch.tensor([0, 0, 0, 1, 1, 1])), ("a", "b"), Pixel()
    )
    one = with_record(made, parts, met)
    found = totals(one)
    for i in range(20):
        count = int(met[:, i].sum())
        expected = float(parts[:, :, i].sum()) / count if count else -torch.inf
        assert float(found[i]) == pytest.approx(expected, rel=1e-5)
    assert found.isinf().any() and found.isfinite().any()


def test_each_replicate_is_looked_at_with_its_own_points_and_record_in_pixels_and_every_view(
    digits: Splits,
) -> None:
    n = len(digits.train)
    sets = tuple(
        with_record(
            one,
            SEED.fold("view parts", r).normal(2, 2, n),
            SEED.fold("view met", r).integers(20, 2, n) + 1,
        )
        for r, one in enumerate(subsets_at(SEED.fold("view sets"), digits, 2, 2))
    )
    found = replace(ASKED, views=2)(Sets({"a": sets}), digits, Runs(Plan()), key=KEY)
    looks: list[Any] = [lambda images: images.flatten(1)]
    for v in range(2):
        params, buffers = NET.init(digits.train, KEY.fold("view", v))
        looks.append(lambda images, p=params, b=buffers: NET.features(p, b, images)[0].detach())
    record = sets[0].donors
    assert record is not None
    rates = record.parts.sum(0) / record.met.sum(0)
    for point, shown in enumerate(found.donors["a"]):
        members = digits.train.by_class[point // 2]
        best = members[rates[point % 2, members].argsort(descending=True)[: ASKED.top]]
        torch.testing.assert_close(shown, digits.train.pixels()[best])
    for r, one in enumerate(sets):
        assert one.donors is not None
        for c, members in enumerate(digits.train.by_class):
            points = one.dataset().images[one.labels.hard() == c]
            far = [
                torch.cdist(look(points).double(), look(digits.train.images[members]).double())
                for look in looks
            ]
            views = sum(f / f.mean() for f in far[1:])
            expected = of_class(
                one.donors.parts[:, :, members],
                one.donors.met[:, members],
                {"pixels": far[0], "features": torch.as_tensor(views)},
            )
            for part, value in expected.items():
                torch.testing.assert_close(found.figures["a"][part][r, c], value, rtol=1e-6, atol=1e-8)


def test_replicates_are_compared_within_classes_over_the_images_that_both_met(digits: Splits) -> None:
    n = len(digits.train)
    each = [SEED.fold("totals", r).normal(n).double() for r in range(2)]
    each[0][:7] = each[1][3:9] = -torch.inf
    found = between(each, digits.train)
    values = []
    for members in digits.train.by_class:
        both = [i for i in members.tolist() if each[0][i] > -torch.inf and each[1][i] > -torch.inf]
        values.append(spearman(each[0][both].tolist(), each[1][both].tolist()))
    assert float(found[0, 1]) == float(found[1, 0]) == pytest.approx(sum(values) / 10)


# ---- what is reported ----

PARTS = (
    "repeats",
    "hundredth",
    "tenth",
    "net",
    "effective",
    "equal",
    "pixels",
    "own pixels",
    "features",
    "own features",
)
COLUMNS = {
    "rank agreement of halves": "repeats",
    "a hundredth gives, beyond its share": "hundredth",
    "a tenth gives, beyond its share": "tenth",
    "left of the pull, less what holds back": "net",
    "effective number of donors": "effective",
    "the same if batches were shared equally": "equal",
    "in pixels": "pixels",
    "beyond donors of other points": "own pixels",
    "in features": "features",
    "beyond donors of other points, in features": "own features",
}
CLAIMS = {
    "donors repeat": ("repeats", 0.1),
    "few images give more than their share": ("tenth", 0.05),
    "donors look like the point (pixels)": ("pixels", 0.02),
    "donors look like the point (features)": ("features", 0.02),
    "donors look like their own point (pixels)": ("own pixels", 0.02),
    "donors look like their own point (features)": ("own features", 0.02),
}


@pytest.mark.parametrize("replicates", [1, 4])
def test_each_figure_is_reported_in_its_place_with_its_unit(replicates: int) -> None:
    figures = {name: SEED.fold(name).normal(replicates, 3).double() for name in PARTS}
    result = result_of(figures, torch.eye(replicates, dtype=torch.float64))

    def expected(name: str) -> Estimate:
        values = figures[name]
        if replicates == 1:
            return Estimate.mean(
                values[0].tolist(), "class (one set: the interval covers no other distillation)"
            )
        return Estimate.mean(values.mean(1).tolist(), REPLICATE)

    headline = list(result.headline().values())
    assert headline == [expected("repeats"), expected("tenth")]
    told = {
        column: cell
        for table in result.tables()
        for column, cell in zip(table.columns, table.rows[0], strict=True)
    }
    for column, name in COLUMNS.items():
        assert told[column] == expected(name), column
    claims = {claim.name: claim for claim in result.claims()}
    for title, (name, least) in CLAIMS.items():
        claim = claims.pop(title)
        assert claim.estimate == expected(name), title
        assert (claim.direction, claim.smallest_effect) == ("greater", least)
    assert list(claims) == ([] if replicates == 1 else ["replicates share donors"])


def test_what_replicates_share_has_the_error_of_leaving_one_out() -> None:
    count = 4
    pairs = SEED.fold("pairs").uniform(count, count).double()
    pairs = (pairs + pairs.T) / 2
    pairs.fill_diagonal_(1)

    def mean(among: list[int]) -> float:
        values = [float(pairs[a, b]) for a in among for b in among if a < b]
        return sum(values) / len(values)

    figures = {name: torch.zeros(count, 3, dtype=torch.float64) for name in PARTS}
    everyone = list(range(count))
    left_out = [mean([r for r in everyone if r != out]) for out in everyone]
    expected = Estimate.mean([count * mean(everyone) - (count - 1) * one for one in left_out], REPLICATE)
    found = result_of(figures, pairs).shared("a")
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx(
        (expected.value, expected.low, expected.high)
    )
    assert (found.n, found.unit) == (count, REPLICATE)
    claim = of(result_of(figures, pairs), "replicates share donors")
    assert (claim.estimate, claim.direction, claim.smallest_effect) == (found, "greater", 0.05)
    two = result_of({name: value[:2] for name, value in figures.items()}, pairs[:2, :2]).shared("a")
    assert two is not None
    assert two.value == pytest.approx(float(pairs[0, 1]))
    assert (two.low, two.high, two.n) == (-torch.inf, torch.inf, 1)


# ---- nulls ----


def shuffled(parts: torch.Tensor, met: torch.Tensor, real: Splits, key: Key) -> tuple[torch.Tensor, Any]:
    """A record whose halves were shuffled over the images of each class, each on its own."""
    parts, met = parts.clone(), met.clone()
    for h in range(2):
        for c, members in enumerate(real.train.by_class):
            order = members[key.fold(h, c).permutation(len(members))]
            parts[h][:, members], met[h][members] = parts[h][:, order], met[h][order]
    return parts, met


def result_of(figures: dict[str, torch.Tensor], agreement: torch.Tensor) -> ProvenanceResult:
    nothing: dict[str, Any] = {"a": torch.zeros(0)}
    return ProvenanceResult(("a",), (), (), {"a": figures}, {"a": agreement}, nothing, nothing, nothing)


def alarms(pool: list[dict[str, torch.Tensor]], agreement: torch.Tensor, key: Key) -> dict[str, int]:
    """How often each claim is supported in draws of replicates from a pool."""
    stacked = {part: torch.stack([one[part] for one in pool]) for part in pool[0]}
    counted: dict[str, int] = {}
    for draw in range(DRAWS):
        drawn = key.fold("draw", draw).permutation(len(pool))[:REPLICATES]
        result = result_of(
            {part: value[drawn] for part, value in stacked.items()}, agreement[drawn][:, drawn]
        )
        for claim in result.claims():
            counted[claim.name] = counted.get(claim.name, 0) + (claim.verdict == "supported")
    return counted


def figures_of(
    parts: torch.Tensor, met: torch.Tensor, one: DistilledDataset, real: Splits
) -> dict[str, torch.Tensor]:
    found = []
    for c, members in enumerate(real.train.by_class):
        points = one.dataset().images[one.labels.hard() == c].flatten(1)
        far = torch.cdist(points.double(), real.train.images[members].flatten(1).double())
        distances = {"pixels": far, "features": far.square()}
        found.append(of_class(parts[:, :, members], met[:, members], distances))
    return {part: torch.stack([each[part] for each in found]) for part in found[0]}


def test_a_record_that_was_shuffled_is_not_called_anything(
    bank: dict[str, torch.Tensor], digits: Splits
) -> None:
    key = SEED.fold("null")
    pool, totals = [], []
    for s in range(POOL):
        r = s % len(bank["parts"])
        parts, met = shuffled(
            bank["parts"][r].double(), bank["met"][r].long(), digits, key.fold("shuffle", s)
        )
        pool.append(figures_of(parts, met, subset(digits, key.fold("points", s), 2), digits))
        totals.append((parts.sum((0, 1)) / met.sum(0).clamp(min=1)).masked_fill(met.sum(0) == 0, -torch.inf))
    found = alarms(pool, between(totals, digits.train), key)
    assert len(found) == 7
    assert max(found.values()) <= ALARMS, found


def test_donors_are_not_a_points_own_where_its_record_is_anothers(
    bank: dict[str, torch.Tensor], digits: Splits
) -> None:
    """Real records, beside points that they have nothing to do with: what all donors have in common does not count."""
    key = SEED.fold("own null")
    pool = []
    for s in range(POOL):
        r = s % len(bank["parts"])
        points = subset(digits, key.fold("points", s), 2)
        pool.append(figures_of(bank["parts"][r].double(), bank["met"][r].long(), points, digits))
    found = alarms(pool, torch.eye(POOL, dtype=torch.float64), key)
    for space in ("pixels", "features"):
        assert found[f"donors look like their own point ({space})"] <= ALARMS, found


# ---- plants ----


def with_record(
    one: DistilledDataset, parts: torch.Tensor, met: torch.Tensor | None = None
) -> DistilledDataset:
    n = parts.shape[2]
    return replace(one, donors=Donors(parts, torch.full((2, n), 20) if met is None else met))


def test_donors_that_are_there_are_found(digits: Splits) -> None:
    """A tenth of each class gives half of the pull, the same to all replicates; noise lies over it."""
    n = len(digits.train)
    favoured = torch.zeros(n)
    for c, members in enumerate(digits.train.by_class):
        few = members[SEED.fold("favoured", c).permutation(len(members))[: len(members) // 10]]
        favoured[few] = 1.0
    sets = subsets_at(SEED.fold("plant"), digits, 3, 1)
    records = [0.1 + 0.8 * favoured + 0.02 * SEED.fold("noise", r).normal(2, 1, n) for r in range(len(sets))]
    found = ask(Sets({"a": tuple(map(with_record, sets, records))}), digits)
    for name in ("few images give more than their share", "replicates share donors"):
        assert of(found, name).verdict == "supported", of(found, name)
    ramp = torch.linspace(0.1, 1, n) + 0.02 * SEED.fold("ramp").normal(2, 1, n)
    again = ask(Sets({"a": tuple(with_record(one, ramp) for one in sets)}), digits)
    assert of(again, "donors repeat").verdict == "supported"


def test_donors_that_look_like_the_point_are_found(digits: Splits) -> None:
    sets = []
    for one in subsets_at(SEED.fold("alike"), digits, 3, 2):
        parts = torch.zeros(2, 2, len(digits.train))
        for c, members in enumerate(digits.train.by_class):
            points = one.dataset().images[one.labels.hard() == c].flatten(1)
            parts[:, :, members] = 1 / (1 + torch.cdist(points, digits.train.images[members].flatten(1)))
        sets.append(with_record(one, parts))
    found = ask(Sets({"a": tuple(sets)}), digits)
    for space in ("pixels", "features"):
        for name in (f"donors look like the point ({space})", f"donors look like their own point ({space})"):
            assert of(found, name).verdict == "supported", of(found, name)


def test_donors_of_real_distillations_repeat(
    digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "cores", lambda: 1)  # starting workers takes longer than the work
    settings = ["steps=40", "batch_real=32", "net.depth=1", "net.width=8", "donors=true"]
    made = [
        pipeline.distill("dm", digits, ipc=2, replicate=r, settings=settings, to=tmp_path / str(r))
        for r in range(2)
    ]
    sets = {"dm": tuple(DistilledDataset.load(tmp_path / str(r)) for r in range(2))}
    assert [one.fingerprint for one in sets["dm"]] == [one.fingerprint for one in made]
    found = pipeline.ask("pointwise/provenance", sets, digits, settings=["views=1"])
    assert isinstance(found, ProvenanceResult)
    assert of(found, "donors repeat").verdict == "supported"
    shared = found.shared("dm")
    assert shared is not None and shared.n == 1  # of two replicates one pair, with no interval
    # The strongest donors that are shown are those with the largest parts a batch.
    record = sets["dm"][0].donors
    assert record is not None
    rates = record.parts.sum(0) / record.met.sum(0).clamp(min=1)
    own = digits.train.by_class[4]
    best = own[rates[1, own].argmax()]
    torch.testing.assert_close(found.donors["dm"][9, 0], digits.train.pixels()[best])


# ---- what is said ----


def test_a_set_without_a_record_is_left_out_and_told_how_to_get_one(digits: Splits, tmp_path: Path) -> None:
    one = subset(digits, KEY, 1)
    parts = KEY.fold("some").uniform(2, 1, len(digits.train))
    found = ask(Sets({"with": (with_record(one, parts),), "without": (one,)}), digits)
    assert found.distilled == ("with",)
    both = ask(Sets({"one of two": (with_record(one, parts), one)}), digits)
    assert (both.distilled, both.silent) == ((), ("one of two",))
    assert "No record of donors: without. dm, m3d, ncfm, dc, dsa and idc keep one" in found.notes()[-1]
    none = ask(Sets({"without": (one,)}), digits)
    assert none.headline() == {} and none.claims() == () and none.tables() == ()
    assert "--set donors=true in distill" in none.notes()[0]
    assert ProvenanceResult.load(none.save(tmp_path)).notes() == none.notes()


def test_a_record_of_a_few_steps_is_left_out(digits: Splits) -> None:
    n = len(digits.train)

    def of_steps(images: int) -> DistilledDataset:
        met = torch.ones(2, n, dtype=torch.int64)
        met[1, digits.train.by_class[3][images:]] = 0
        return with_record(subset(digits, KEY, 1), KEY.fold("few").uniform(2, 1, n), met)

    assert ask(Sets({"a": (of_steps(10), of_steps(n))}), digits).distilled == ("a",)
    found = ask(Sets({"a": (of_steps(n), of_steps(9))}), digits)
    assert found.distilled == ()
    assert found.notes() == (
        "Too few steps: a. Of each class 10 images must be met in steps of even and of odd number.",
    )


def test_a_record_of_other_images_is_refused(digits: Splits) -> None:
    one = with_record(subset(digits, KEY, 1), torch.ones(2, 1, 5))
    with pytest.raises(UserError) as error:
        ask(Sets({"a": (one,)}), digits)
    assert str(error.value) == (
        f"provenance: the record of 'a' is of other training images; got 5 images; expected {len(digits.train)}; "
        "name the data it was made from with --data"
    )


@pytest.mark.parametrize(("field", "said"), [("views", "views"), ("top", "top")])
def test_settings_that_make_no_sense_are_refused(field: str, said: str) -> None:
    with pytest.raises(UserError, match=f"provenance: {said} must be at least 1; got 0"):
        # The field is known by name alone.
        replace(ASKED, **{field: 0})  # type: ignore[arg-type]
