from __future__ import annotations

import pytest
import torch

from distillens.core.checks import UserError
from distillens.core.contracts import Problem
from distillens.core.decode import MultiFormation
from distillens.core.rng import Key
from distillens.core.space import Pixel, Standardised, Zca
from distillens.data.planted import planted
from distillens.distillers._formations import decoded, in_range, mixed

REAL = planted(Key(7), per_class=20, shape=(2, 8, 12)).train


def test_with_factor_one_images_are_real_ones() -> None:
    images = mixed(Problem(REAL, 3, Key(1)), 1)
    for c in range(3):
        own = REAL.images[REAL.by_class[c]]
        places = [int((own == image).flatten(1).all(1).nonzero()[0]) for image in images[3 * c : 3 * c + 3]]
        assert len(set(places)) == 3


@pytest.mark.parametrize("factor", [2, 3])
def test_each_patch_is_another_real_image_of_the_class_made_smaller(factor: int) -> None:
    """Means over blocks, found among all real images of the class, each at most once."""
    rows, columns = [[round(i * side / factor) for i in range(factor + 1)] for side in (8, 12)]
    ipc = 2
    images = mixed(Problem(REAL, ipc, Key(1)), factor)
    for c in range(3):
        own = REAL.images[REAL.by_class[c]]
        seen = []
        for point in range(ipc):
            for i in range(factor):
                for j in range(factor):
                    patch = images[ipc * c + point, :, rows[i] : rows[i + 1], columns[j] : columns[j + 1]]
                    shrunk = torch.nn.functional.adaptive_avg_pool2d(own, patch.shape[1:])
                    far = (shrunk - patch).flatten(1).norm(dim=1)
                    assert float(far.min()) < 1e-5
                    seen.append(int(far.argmin()))
        assert len(set(seen)) == min(ipc * factor**2, len(own))


def test_a_small_class_gives_its_images_as_evenly_as_can_be() -> None:
    few = planted(Key(7), per_class=3, shape=(1, 8, 8)).train
    assert mixed(Problem(few, 2, Key(1)), 2).shape == (6, 1, 8, 8)
    with pytest.raises(UserError, match="has 3 images, 4 were asked for"):
        mixed(Problem(few, 4, Key(1)), 2)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_a_class_decodes_as_the_whole_set_does(factor: int) -> None:
    own = Key(2).normal(3, 2, 1, 8, 12)
    whole = MultiFormation(factor).images({"images": own.flatten(0, 1)})
    classes = torch.arange(3).repeat_interleave(2).repeat(factor**2)
    found = decoded(own, factor)
    assert found.shape == (3, 2 * factor**2, 1, 8, 12)
    for c in range(3):
        assert torch.equal(found[c], whole[classes == c])


@pytest.mark.parametrize(
    "space",
    [Pixel(), Standardised((0.4, 0.5), (0.2, 0.3)), Zca.fit(REAL.space.to_pixels(REAL.images).clamp(0, 1))],
    ids=["pixel", "standardised", "zca"],
)
def test_pixels_are_brought_into_range_and_what_is_within_is_left_alone(space: Standardised) -> None:
    pixels = Key(3).uniform(4, 2, 8, 12, low=0.1, high=0.9)
    pixels[1, 0, 2, 3], pixels[2, 1, 7, 11] = -0.5, 1.7
    images = space.from_pixels(pixels)
    found = in_range(images, space)
    assert torch.equal(found[[0, 3]], images[[0, 3]])
    torch.testing.assert_close(space.to_pixels(found), pixels.clamp(0, 1), atol=1e-4, rtol=0)
