"""The three whitenings of the real CIFAR-10: the standard deviations that are known of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distillens.core.dataset import Dataset
from distillens.core.rng import Key
from distillens.core.space import KINDS, Kind, Zca
from distillens.data import parquet

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "cifar10"
KNOWN: dict[Kind, float] = {"kornia": 0.254, "kip": 0.470, "frepo": 0.447}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not REAL.is_dir(), reason="the real CIFAR-10 is not beside the checkout"),
]


@pytest.fixture(scope="module")
def images() -> Dataset:
    """12,000 images, as the known figures are of."""
    return parquet.load(REAL, key=Key(0)).train.take(torch.arange(12_000))


@pytest.fixture(scope="module")
def white(images: Dataset) -> dict[Kind, Dataset]:
    return {kind: images.to_space(Zca.fit(images.exact_pixels(), kind)) for kind in KINDS}


def test_whitened_cifar_10_has_the_known_deviations(white: dict[Kind, Dataset]) -> None:
    found = {kind: float(data.images.std()) for kind, data in white.items()}
    assert found == pytest.approx(KNOWN, abs=0.002)


def test_the_kinds_are_correlated_as_is_known(white: dict[Kind, Dataset]) -> None:
    flat = torch.stack([white[kind].images.flatten() for kind in KINDS])
    correlations = torch.corrcoef(flat)
    assert float(correlations[0, 1]) == pytest.approx(0.885, abs=0.005)
    assert float(correlations[0, 2]) == pytest.approx(0.930, abs=0.005)
    assert float(correlations[1, 2]) == pytest.approx(0.968, abs=0.005)


def test_pixels_come_back_but_from_kip(images: Dataset, white: dict[Kind, Dataset]) -> None:
    pixels = images.take(torch.arange(500)).pixels()
    for kind, data in white.items():
        error = float((data.space.to_pixels(data.images[:500]) - pixels).abs().max())
        assert (error < 5e-6) == data.space.invertible, kind
