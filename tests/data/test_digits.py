from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits

from distillens.core.dataset import Dataset, Splits
from distillens.core.rng import Key
from distillens.data import digits


def levels(data: Dataset) -> np.ndarray:
    """The images as scikit-learn holds them, a row an image, its label last."""
    whole = (data.pixels() * 16).round().int().flatten(1)
    return torch.cat([whole, data.labels.hard()[:, None].int()], 1).numpy()


def rows(array: np.ndarray) -> list[bytes]:
    return sorted(row.tobytes() for row in np.ascontiguousarray(array))


def parts(splits: Splits) -> tuple[Dataset, Dataset, Dataset]:
    return splits.train, splits.val, splits.test


def test_the_splits_are_disjoint_and_together_all_of_scikit_learns_digits() -> None:
    splits = digits.load(key=Key(0))
    bunch = load_digits()
    real = np.concatenate([bunch.images.reshape(-1, 64), bunch.target[:, None]], 1).astype(np.int32)
    assert len(real) == 1797
    assert rows(np.concatenate([levels(part) for part in parts(splits)])) == rows(real)


def test_every_class_is_cut_60_15_25_within_one_image() -> None:
    splits = digits.load(key=Key(3))
    sizes = [[len(index) for index in part.by_class] for part in parts(splits)]
    for c, total in enumerate(np.bincount(load_digits().target)):
        for part, share in zip(sizes, (0.60, 0.15, 0.25), strict=True):
            assert abs(part[c] - share * total) <= 1


def test_pixels_are_the_levels_over_16_and_classes_are_figures() -> None:
    splits = digits.load(key=Key(0))
    assert splits.train.shape == (1, 8, 8)
    assert splits.train.images.dtype == torch.float32
    assert splits.train.classes == tuple("0123456789")
    pixels = torch.cat([part.pixels() for part in parts(splits)])
    assert torch.allclose(pixels * 16, (pixels * 16).round(), atol=1e-4)
    assert abs(float(pixels.min())) < 1e-6
    assert abs(float(pixels.max()) - 1) < 1e-6


def test_the_space_has_the_mean_and_std_of_the_training_split() -> None:
    splits = digits.load(key=Key(0))
    train = levels(splits.train)[:, :-1] / 16
    space = splits.space.describe()
    np.testing.assert_allclose(space["mean"], [train.mean()], rtol=1e-12)
    np.testing.assert_allclose(space["std"], [train.std()], rtol=1e-12)
    assert abs(float(splits.train.images.mean())) < 1e-6
    assert abs(float(splits.train.images.std(correction=0)) - 1) < 1e-5
    assert abs(float(splits.test.images.mean())) > 1e-4  # not fitted on it


def test_same_key_same_split_other_key_other_split() -> None:
    one, same, other = (digits.load(key=Key(seed)) for seed in (1, 1, 2))
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != other.fingerprint
    assert rows(levels(one.test)) != rows(levels(other.test))


def test_the_global_generators_are_left_alone() -> None:
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    digits.load(key=Key(0))
    assert torch.equal(before, torch.get_rng_state())
    assert (numpys == np.random.get_state()[1]).all()  # type: ignore[index]
