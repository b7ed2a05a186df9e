"""Curvature along real training: its claims on random subsets and on easy images, crossings, errors, what the work was."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distillens.analyses.representativeness.curvature import ALIKE, EARLY, REAL, Curvature, CurvatureResult
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.contracts import Sets
from distillens.core.dataset import Splits
from distillens.core.labels import Hard
from distillens.core.recipe import Recipe
from distillens.core.result import Claim
from distillens.core.rng import Key
from distillens.core.storage import read_tensors
from distillens.curvature import Curved, signs
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from tests.analyses.by_hand import class_means, subsets_at

KEY = Key(73, ("curvature",))
DRAWS, ALARMS, REPLICATES = 1000, 70, 5
SHORT = Curvature(
    ConvNet(2, 8), Recipe(steps=200, batch=256, lr=0.02), moments=10, trajectories=4, looks=10, most=12, top=0
)


@pytest.fixture(scope="module")
def bank() -> dict[str, torch.Tensor]:
    return read_tensors(Path(__file__).parents[1] / "bank" / "curvature.safetensors")[0]


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs(Plan())


def made(traces: Mapping[str, torch.Tensor], moments: tuple[int, ...], **parts: object) -> CurvatureResult:
    """A result of given traces [replicates, trajectories, moments]."""
    nothing = {name: torch.zeros_like(value) for name, value in traces.items()}
    names = tuple(name for name in traces if name not in (REAL, ALIKE, "random_subset"))
    plain = CurvatureResult(
        names,
        dict.fromkeys(names, ALIKE),
        moments,
        traces,
        nothing,
        {name: value.long() for name, value in nothing.items()},
        dict.fromkeys(traces, 100),
        3500,
        1000,
        0.05,
        40,
        (),
        {},
        {},
    )
    return replace(plain, **parts)  # type: ignore[arg-type]


def supported(claims: list[Claim]) -> int:
    return sum(claim.verdict == "supported" for claim in claims)


@pytest.mark.parametrize("ipc", [1, 10])
@pytest.mark.parametrize("name", ["rises above real", "curvature collapses"])
def test_random_training_subsets_neither_rise_nor_collapse(
    bank: dict[str, torch.Tensor], ipc: int, name: str
) -> None:
    subsets, real = bank[f"subsets.{ipc}"].double(), bank[f"real.{ipc}"].double()
    found = []
    for i in range(DRAWS):
        place = KEY.fold("null", ipc, i)
        rows = place.fold("replicates").permutation(len(subsets))[:REPLICATES].tolist()
        pairs = [place.fold("pair", r).permutation(subsets.shape[1])[:2].tolist() for r in rows]
        traces = {
            REAL: real[rows][:, None],
            ALIKE: torch.stack([subsets[r, b] for r, (_, b) in zip(rows, pairs, strict=True)])[:, None],
            "dm": torch.stack([subsets[r, a] for r, (a, _) in zip(rows, pairs, strict=True)])[:, None],
        }
        found += [c for c in made(traces, tuple(bank["moments"].tolist())).claims() if c.name == name]
    assert len(found) == DRAWS
    assert supported(found) <= ALARMS


def nearest_to_their_mean(real: Splits, count: int) -> DistilledDataset:
    """Of each class the training images nearest to its mean."""
    y = real.train.labels.hard()
    picks = []
    for c in range(10):
        own = (y == c).nonzero().flatten()
        away = (real.train.images[own] - real.train.images[own].mean(0)).flatten(1).square().sum(1)
        picks.append(own[away.argsort()[:count]])
    index = torch.cat(picks)
    return DistilledDataset(
        {"images": real.train.images[index]}, Hard(y[index]), real.train.classes, real.space
    )


def test_easy_images_collapse_and_class_means_rise(digits: Splits, runs: Runs) -> None:
    easy = nearest_to_their_mean(digits, 5)
    found = SHORT(Sets({"easy": (easy,) * 4}), digits, runs, key=KEY)
    verdicts = {c.name: c.verdict for c in found.claims()}
    assert verdicts["curvature collapses"] == "supported"
    means = SHORT(Sets({"means": (class_means(digits),) * 4}), digits, runs, key=KEY)
    assert means.ratio("means", True).low > 1
    assert means.ratio("means", False).value < 0.5
    # It is above the real trace at first and falls below it for good before the end.
    assert bool(means.crossing("means").isfinite().all())


def test_levels_are_means_over_updates() -> None:
    moments = (0, 10, 30, 60, 100)
    real = torch.tensor([[[0.0, 1.0, 3.0, 6.0, 2.0]]], dtype=torch.float64)
    own = torch.tensor([[[4.0, 4.0, 8.0, 1.0, 1.0]]], dtype=torch.float64)
    found = made({REAL: real, ALIKE: real, "dm": own}, moments)
    assert found.peak == 3 and EARLY * 60 == 40
    # Widths of the trapezoid rule at 0, 10, 30: 5, 15, 25; late is from 80 on: the last moment alone.
    assert float(found.level("dm", True)) == pytest.approx((5 * 4 + 15 * 4 + 25 * 8) / 45)
    assert float(found.level("dm", False)) == 1.0
    assert found.ratio("dm", False).value == 0.5
    early = (280 / 45 - 90 / 45) / (280 / 45 + 90 / 45)
    assert found.contrast("dm", True).value == pytest.approx(early)
    assert found.contrast("dm", False).value == pytest.approx(-1 / 3)


def test_a_crossing_is_the_last_fall_below_real() -> None:
    moments = (0, 9, 99)
    zero = torch.zeros(1, 3, 3, dtype=torch.float64)
    own = torch.tensor([[[1.0, -1.0, -1.0], [-1.0, 1.0, 2.0], [-1.0, -2.0, -1.0]]], dtype=torch.float64)
    found = made({REAL: zero, ALIKE: zero, "dm": own}, moments).crossing("dm")[0]
    assert float(found[0]) == pytest.approx(math.log(10) / 2)
    assert math.isinf(float(found[1])) and float(found[2]) == 0.0


def test_a_point_is_as_well_known_as_it_says(digits: Splits, runs: Runs) -> None:
    """Beside many probes of all images at single moments: off by no more than the stated errors lead to expect."""
    sets = Sets({"a": subsets_at(KEY.fold("known"), digits, 1, 2)})
    asked = replace(SHORT, moments=60, looks=60, trajectories=1, error=0.1, most=60, images=16)
    found = asked(sets, digits, runs, key=KEY)
    (population,) = runs.get(*asked.trainings(sets, digits, key=KEY))
    for name, data in ((REAL, digits.train), ("a", sets.distilled["a"][0].dataset())):
        for i in (30, 40, len(found.moments) - 1):
            flat = population.at(found.moments[i])[0]
            curved = Curved(population.net, population.shapes, flat, data)
            probes = KEY.fold("many", name, i).uniform(100, len(flat))
            forms = torch.tensor([curved.form(signs(probe)) for probe in probes], dtype=torch.float64)
            error = math.hypot(float(forms.std()) / 10, float(found.errors[name][0, 0, i]))
            assert abs(float(found.traces[name][0, 0, i] - forms.mean())) < 3 * error
            assert float(found.errors[name][0, 0, i]) <= 0.1 * float(found.traces[name][0, 0, i])


def test_the_work_is_counted(digits: Splits, runs: Runs) -> None:
    sets = Sets({"a": subsets_at(KEY.fold("work"), digits, 2, 1)})
    found = replace(SHORT, moments=4, trajectories=2, most=8)(sets, digits, runs, key=KEY)
    assert found.published == 35 * 2 * len(found.moments) * (1078 + 10 + 10)
    probes = {name: int(value.sum()) for name, value in found.measurements.items()}
    assert found.products == {REAL: 128 * probes[REAL], ALIKE: 10 * probes[ALIKE], "a": 10 * probes["a"]}
    assert f"{sum(found.products.values()):,} example-products" in found.notes()[0]


def test_a_set_is_compared_with_as_many_real_images(digits: Splits, runs: Runs) -> None:
    """Whatever the other sets show; sets of one size share them."""
    few = subsets_at(KEY.fold("few"), digits, 2, 1)
    many = subsets_at(KEY.fold("many"), digits, 2, 3)
    asked = replace(SHORT, moments=4, trajectories=2, most=6)
    found = asked(Sets({"few": few, "many": many, "again": few}), digits, runs, key=KEY)
    assert found.compared == {"few": ALIKE, "many": f"{ALIKE} (30)", "again": ALIKE}
    probes = {name: int(value.sum()) for name, value in found.measurements.items()}
    sizes = {REAL: 128, ALIKE: 10, f"{ALIKE} (30)": 30, "few": 10, "many": 30, "again": 10}
    assert found.products == {name: size * probes[name] for name, size in sizes.items()}
    alone = asked(Sets({"many": many}), digits, runs, key=KEY)
    for early in (True, False):
        assert found.contrast("many", early) == alone.contrast("many", early)


def test_a_large_set_is_never_met_at_once(digits: Splits, runs: Runs) -> None:
    """Its graph would fill the memory; its trace is that of all its images, within its error."""
    sets = Sets({"a": subsets_at(KEY.fold("large"), digits, 1, 20)})
    asked = replace(SHORT, moments=4, trajectories=1, most=40, error=0.03, top=2)
    whole = replace(asked, images=200)(sets, digits, runs, key=KEY)
    parts = replace(asked, sample=50, images=40)(sets, digits, runs, key=KEY)
    assert parts.products == {name: 40 * int(value.sum()) for name, value in parts.measurements.items()}
    assert whole.eigenvalues["a"].shape == parts.eigenvalues["a"].shape
    off = (parts.traces["a"] - whole.traces["a"])[..., -1].abs()
    assert bool((off < 3 * (parts.errors["a"] ** 2 + whole.errors["a"] ** 2).sqrt()[..., -1]).all())


def test_probes_are_common_to_sets_and_moments(digits: Splits, runs: Runs) -> None:
    """Two equal sets have equal traces; a replicate has probes of its own."""
    (one,) = subsets_at(KEY.fold("common"), digits, 1, 1)
    found = replace(SHORT, trajectories=2)(Sets({"a": (one, one), "b": (one, one)}), digits, runs, key=KEY)
    assert torch.equal(found.traces["a"], found.traces["b"])
    assert not torch.allclose(found.traces["a"][0, 0, -1], found.traces["a"][1, 0, -1])


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"curvature.*most"):
        Curvature(most=2)
    with pytest.raises(UserError, match=r"curvature.*error"):
        Curvature(error=0.0)
    with pytest.raises(UserError, match=r"curvature.*looks"):
        Curvature(looks=1)
