from __future__ import annotations

import pytest

import distillens
from distillens.core.dataset import Splits
from distillens.core.rng import Key
from distillens.data.planted import planted as make_planted


@pytest.fixture
def key() -> Key:
    return Key(0)


@pytest.fixture(scope="session")
def planted() -> Splits:
    """Three classes of 1 x 8 x 12 images around a known template each."""
    return make_planted(Key(7))


@pytest.fixture(scope="session")
def digits() -> Splits:
    """scikit-learn's real digits."""
    return distillens.load("digits")
