from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import distillens
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Hard
from distillens.core.rng import Key
from distillens.core.space import Pixel
from distillens.data.planted import planted as make_planted
from distillens.engine.workers import pinned_threads


@pytest.fixture(scope="session")
def like_cifar() -> Dataset:
    """Black images of CIFAR-10's shape, 300 a class: what settings are chosen by."""
    labels = Hard(torch.arange(10).repeat(300))
    return Dataset(torch.zeros(3000, 3, 32, 32), labels, tuple("0123456789"), Pixel())


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny work is slower on two threads than on one, much slower where the cores are shared."""
    with pinned_threads(1):
        yield


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


@pytest.fixture(scope="module")
def small_cluster() -> Iterator[Any]:
    """Ray, connected to a cluster of its own of two cores on this machine."""
    ray = pytest.importorskip("ray")
    ray.init(
        "local",
        num_cpus=2,
        object_store_memory=200 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield ray
    ray.shutdown()
