"""behaviour/pixels: its figures against twins and closed forms, its claims' nulls and plants."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distillens import load
from distillens.analyses.behaviour.pixels import (
    IMAGE,
    REAL,
    TOLERANCE,
    UNSEEN,
    Pixels,
    PixelsResult,
    _density,
    _distance,
    _levels,
    _outside,
    _Power,
)
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.contracts import Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Hard
from distillens.core.result import Claim
from distillens.core.rng import Key
from distillens.core.space import Pixel
from distillens.core.storage import read_tensors
from distillens.engine.plan import Plan
from distillens.runs import Runs
from tests.analyses.by_hand import subsets_at

KEY = Key(612, ("pixels",))
DRAWS, ALARMS, REPLICATES = 1000, 70, 5


@pytest.fixture(scope="module")
def bank() -> dict[str, torch.Tensor]:
    return read_tensors(Path(__file__).parents[1] / "bank" / "judged.safetensors")[0]


def subsets(real: Splits, name: str, count: int = REPLICATES, ipc: int = 10) -> tuple[DistilledDataset, ...]:
    return subsets_at(KEY.fold(name), real, count, ipc)


def in_pixels(sets: tuple[DistilledDataset, ...], change: object) -> tuple[DistilledDataset, ...]:
    """The sets with their pixels changed by a function of pixels and replicate."""
    return tuple(
        replace(one, stored={"images": one.space.from_pixels(change(one.dataset().pixels(), r))})  # type: ignore[operator]
        for r, one in enumerate(sets)
    )


def ask(real: Splits, sets: Sets, analysis: Pixels | None = None) -> PixelsResult:
    return (analysis or Pixels())(sets, real, Runs(Plan()), key=KEY)


def verdicts(result: PixelsResult, name: str) -> dict[str, str]:
    return {claim.name: claim.verdict for claim in result.claims() if claim.subject == name}


# --- the figures -------------------------------------------------------------------------------------------------


def test_the_distance_is_the_area_between_the_distribution_functions(digits: Splits) -> None:
    own = subsets(digits, "area", 1)[0].dataset().pixels() + 0.03
    real = np.sort(digits.train.pixels().double().flatten().numpy())
    ours = np.sort(own.double().flatten().numpy())
    places = np.sort(np.concatenate([real, ours]))
    below = [np.searchsorted(x, places[:-1], side="right") / len(x) for x in (real, ours)]
    area = float((np.abs(below[0] - below[1]) * np.diff(places)).sum())
    assert abs(float(_distance(own, _levels(digits.train))[0]) - area) < 5e-5


def test_a_shift_is_its_own_distance_in_each_channel() -> None:
    images = KEY.fold("colours").uniform(40, 3, 6, 6)
    data = Dataset(images, Hard(torch.arange(40) % 2), ("a", "b"), Pixel())
    shift = torch.tensor([0.0, 0.1, -0.25])[:, None, None]
    found = _distance(images + shift, _levels(data))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.1, 0.25]).double(), atol=6e-5, rtol=0)


def test_power_is_a_slow_fourier_sum() -> None:
    image = KEY.fold("fourier").uniform(5, 6).double().numpy()
    centred = image - image.mean()
    power = np.zeros((5, 6))
    for u in range(5):
        for v in range(6):
            waves = [
                centred[y, x] * np.exp(-2j * np.pi * (u * y / 5 + v * x / 6))
                for y in range(5)
                for x in range(6)
            ]
            power[u, v] = abs(sum(waves)) ** 2 / 30
    found = _Power.of([torch.from_numpy(image)[None, None]])
    np.testing.assert_allclose(found.power.numpy(), power, atol=1e-12)
    # Frequencies above half the side run backwards.
    speed = [[np.hypot(min(u, 5 - u) / 5, min(v, 6 - v) / 6) for v in range(6)] for u in range(5)]
    np.testing.assert_allclose(found.speed.numpy(), speed, atol=1e-7)
    # Parseval: all power is the variance, summed.
    np.testing.assert_allclose(power.sum(), (centred**2).sum())


def test_a_wave_lies_in_its_own_ring() -> None:
    x = torch.arange(16) / 16
    for cycles in (1, 3, 6):
        wave = 0.5 + 0.2 * torch.cos(2 * torch.pi * cycles * x).expand(16, 16)[None, None]
        found = _Power.of([wave])
        assert int(found.spectrum.argmax()) == cycles - 1
        assert float(found.fine) == pytest.approx(float(cycles > 4), abs=1e-6)


def test_noise_has_a_flat_spectrum() -> None:
    noise = _Power.of([KEY.fold("noise").normal(400, 1, 16, 16)])
    spread = noise.spectrum.log10()
    assert float(spread.max() - spread.min()) < 0.03
    share = float((noise.speed > 0.25).sum() / (noise.speed > 0).sum())
    assert abs(float(noise.fine) - share) < 0.01


def test_pieces_are_as_good_as_the_whole() -> None:
    images = KEY.fold("pieces").uniform(7, 2, 8, 8)
    torch.testing.assert_close(_Power.of(torch.split(images, 3)).power, _Power.of([images]).power)


def test_a_density_holds_everything_once() -> None:
    grid = torch.linspace(-0.5, 1.5, 500)
    values = KEY.fold("density").uniform(20000)
    density = _density(values, grid)
    assert float(density.sum() * (grid[1] - grid[0])) == pytest.approx(1.0, abs=1e-6)
    inside = (grid > 0.1) & (grid < 0.9)
    assert abs(float(density[inside].mean()) - 1) < 0.02


def test_rounding_never_counts_as_outside() -> None:
    images = torch.tensor([0.0, 1.0, 1 + TOLERANCE / 2, -TOLERANCE / 2, -0.01, 1.01]).view(1, 1, 2, 3)
    (found,) = _outside((images,), TOLERANCE)
    assert found.tolist() == pytest.approx([2 / 6])


@pytest.mark.parametrize("space", ["pixel", "standardised", "zca"])
def test_figures_are_in_natural_units_whatever_the_space(space: str, digits: Splits) -> None:
    real = load("digits", space=space)
    result = ask(real, Sets({"a": subsets(real, "natural", 2)}, {"random_subset": subsets(real, "base", 2)}))
    reference = ask(
        digits, Sets({"a": subsets(digits, "natural", 2)}, {"random_subset": subsets(digits, "base", 2)})
    )
    for name in ("distances", "power", "fine"):
        for one, other in zip(getattr(result, name).values(), getattr(reference, name).values(), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    assert result.share_outside("a").high == 0.0


# --- the claims --------------------------------------------------------------------------------------------------


def drawn(bank: dict[str, torch.Tensor], ipc: int, order: torch.Tensor) -> list[Claim]:
    """The claims with five random subsets in a set's place and five others beside it."""
    parts = {"dm": order[:REPLICATES], "random_subset": order[REPLICATES : 2 * REPLICATES]}
    inside = (torch.zeros(10 * ipc),) * REPLICATES
    result = PixelsResult(
        ("dm",),
        ("random_subset",),
        TOLERANCE,
        True,
        dict.fromkeys(parts, inside),
        {name: torch.tensor([[0.0, 1.0]]).expand(REPLICATES, 2) for name in parts},
        {name: bank[f"distances.{ipc}"][rows].double() for name, rows in parts.items()},
        torch.zeros(0),
        {},
        torch.arange(1, 5) / 8,
        {name: bank[f"power.{ipc}"][rows] for name, rows in parts.items()} | {REAL: bank["power.real"]},
        {},
        {},
    )
    return list(result.claims())


@pytest.mark.parametrize("ipc", [1, 10])
def test_random_subsets_are_other_than_real_no_more_often_than_stated(
    bank: dict[str, torch.Tensor], ipc: int
) -> None:
    found: dict[str, int] = {}
    for i in range(DRAWS):
        for claim in drawn(bank, ipc, KEY.fold("null", ipc, i).permutation(60)):
            found[claim.name] = found.get(claim.name, 0) + (claim.verdict == "supported")
    assert found["leaves the valid range"] == 0
    assert found["other pixel values than real"] <= ALARMS
    assert found["other spectrum than real"] <= ALARMS


def test_a_random_subset_stays_in_the_valid_range(digits: Splits) -> None:
    result = ask(digits, Sets({"null": subsets(digits, "null")}, {"random_subset": subsets(digits, "base")}))
    share = result.share_outside("null")
    assert (share.value, share.low, share.high) == (0.0, 0.0, 0.0)
    assert verdicts(result, "null")["leaves the valid range"] == "not supported"
    assert result.share_outside(UNSEEN).value == 0.0


def test_what_is_planted_is_found(digits: Splits) -> None:
    own = subsets(digits, "plant")
    planted = {
        "contrast": in_pixels(own, lambda x, r: 0.5 + 2 * (x - 0.5)),
        "brighter": in_pixels(own, lambda x, r: 0.05 + 0.95 * x),
        "noisy": in_pixels(own, lambda x, r: (x + 0.1 * KEY.fold("noise", r).normal(*x.shape)).clamp(0, 1)),
    }
    result = ask(digits, Sets(planted, {"random_subset": subsets(digits, "base")}))
    assert verdicts(result, "contrast")["leaves the valid range"] == "supported"
    assert verdicts(result, "brighter")["other pixel values than real"] == "supported"
    assert verdicts(result, "brighter")["leaves the valid range"] == "not supported"
    assert verdicts(result, "noisy")["other spectrum than real"] == "supported"
    half = digits.train.pixels()
    wrong = float(((half < 0.25 - TOLERANCE / 2) | (half > 0.75 + TOLERANCE / 2)).double().mean())
    assert abs(result.share_outside("contrast").value - wrong) < 0.02


def test_a_single_set_rests_on_its_images(digits: Splits) -> None:
    wide = in_pixels(subsets(digits, "single", 1), lambda x, r: 0.5 + 2 * (x - 0.5))
    result = ask(digits, Sets({"one": wide}, {"random_subset": subsets(digits, "base", 1)}))
    share = result.share_outside("one")
    assert (share.n, share.unit) == (100, IMAGE) and 0.01 < share.low < share.high
    assert verdicts(result, "one") == {
        "leaves the valid range": "supported",
        "other pixel values than real": "inconclusive",
        "other spectrum than real": "inconclusive",
    }
    assert "one: one set. The interval of its share outside covers its images" in result.notes()[-1]


def test_where_pixels_are_lost_nothing_is_claimed_of_their_range() -> None:
    real = load("digits", space="zca-kip")
    result = ask(real, Sets({"a": subsets(real, "kip", 3)}, {"random_subset": subsets(real, "base", 3)}))
    assert "leaves the valid range" not in verdicts(result, "a")
    assert "These are likenesses".lower() in " ".join(result.notes()).lower()
    assert result.headline()["a"] == result.distance("a")


# --- the paper's figure ------------------------------------------------------------------------------------------


def test_the_papers_single_images_stand_beside_the_whole_sets(digits: Splits) -> None:
    own, other = subsets(digits, "first", 2), subsets(digits, "second", 2)
    result = ask(digits, Sets({"dm": own, "mtt": other}), Pixels.as_published(digits.train))
    assert list(result.alone) == ["test image 3", "dm, image 9 of class 0", "mtt, image 8 of class 0"]
    torch.testing.assert_close(result.alone["test image 3"], digits.test.pixels()[3].flatten())
    torch.testing.assert_close(result.alone["dm, image 9 of class 0"], own[0].dataset().pixels()[9].flatten())
    torch.testing.assert_close(
        result.alone["mtt, image 8 of class 0"], other[0].dataset().pixels()[8].flatten()
    )
    captions = list(result.panels())
    assert len(captions) == 3 and captions[2].startswith("As published: kernel density of single images")
    assert len(ask(digits, Sets({"dm": own})).panels()) == 2


def test_a_smaller_class_gives_its_last_image(digits: Splits) -> None:
    result = ask(digits, Sets({"dm": subsets(digits, "small", 1, ipc=1)}), Pixels.as_published(digits.train))
    assert list(result.alone)[1] == "dm, image 0 of class 0"


def test_single_images_that_are_not_there_are_named(digits: Splits) -> None:
    with pytest.raises(
        UserError, match=r"single images are drawn beside one of the test split; got .* name both"
    ):
        Pixels(singles=(1,))
    with pytest.raises(UserError, match="there is no such test image; got 9999; expected 0 to 449"):
        ask(digits, Sets({"dm": subsets(digits, "gone", 1)}), Pixels(single_test=9999, singles=(0,)))
    with pytest.raises(UserError, match="pixels: tolerance must be above 0"):
        Pixels(tolerance=0.0)
