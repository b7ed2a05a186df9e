"""Scikit-learn's handwritten digits: 1,797 real images of 8 x 8 that need no download."""

from __future__ import annotations

import torch

from distillens.core.dataset import Splits
from distillens.core.rng import Key
from distillens.data.tensors import cut, from_tensors, standardised

TOP = 16  # the brightest level in scikit-learn's files


def load(*, key: Key) -> Splits:
    """The digits [n, 1, 8, 8], classes "0" .. "9": 60 % train, 15 % val, 25 % test of each class.

    The cut is drawn at ``key.fold("split")``. The space is standardised with the mean and the
    standard deviation of the training split.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    levels = torch.from_numpy(bunch.images).to(torch.uint8)[:, None]
    levels_of = cut(levels, torch.from_numpy(bunch.target).long(), {"val": 150, "test": 250}, key)
    space = standardised(levels_of["train"][0], TOP)
    parts = {
        name: (space.from_pixels(images.float() / TOP), labels)
        for name, (images, labels) in levels_of.items()
    }
    return from_tensors(*parts["train"], val=parts["val"], test=parts["test"], space=space)
