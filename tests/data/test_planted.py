from __future__ import annotations

import pytest
import torch

from distillens.core.checks import UserError
from distillens.core.rng import Key
from distillens.data.planted import planted, templates


def nearest(images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return torch.cdist(images.flatten(1), truth.flatten(1)).argmin(1)


def test_shapes_classes_and_balance() -> None:
    splits = planted(Key(0), classes=4, per_class=7, shape=(2, 5, 9))
    for part in (splits.train, splits.val, splits.test):
        assert part.images.shape == (28, 2, 5, 9)
        assert part.images.dtype == torch.float32
        assert [len(index) for index in part.by_class] == [7, 7, 7, 7]
    assert splits.train.classes == ("0", "1", "2", "3")


def test_without_noise_every_image_is_its_template() -> None:
    splits = planted(Key(1), noise=0.0, signal=2.0)
    truth = templates(Key(1))
    assert torch.equal(splits.train.images, 2 * truth[splits.train.labels.hard()])


def test_templates_have_mean_0_and_mean_square_1() -> None:
    truth = templates(Key(2), classes=5, shape=(3, 8, 12))
    assert truth.shape == (5, 3, 8, 12)
    assert float(truth.mean((1, 2, 3)).abs().max()) < 1e-6
    assert float((truth.square().mean((1, 2, 3)) - 1).abs().max()) < 1e-5


def test_templates_are_smooth_and_differ() -> None:
    truth = templates(Key(2), classes=5, shape=(1, 16, 16))
    step = truth.diff(dim=-1).square().mean() + truth.diff(dim=-2).square().mean()
    assert float(step) < 0.2  # 4 for white noise
    apart = torch.cdist(truth.flatten(1), truth.flatten(1)).square() / 256
    assert float(apart[~torch.eye(5, dtype=torch.bool)].min()) > 0.3


def test_the_classes_are_found_again_in_the_test_split() -> None:
    splits = planted(Key(0))
    assert torch.equal(nearest(splits.test.images, templates(Key(0))), splits.test.labels.hard())


def test_the_signal_is_all_that_tells_the_classes_apart() -> None:
    null, full = planted(Key(0), signal=0.0), planted(Key(0), signal=1.0)
    labels = full.train.labels.hard()
    assert torch.allclose(full.train.images - null.train.images, templates(Key(0))[labels], atol=1e-5)
    truth = templates(Key(0))
    big = planted(Key(0), signal=0.0, per_class=400).test
    right = float((nearest(big.images, truth) == big.labels.hard()).float().mean())
    assert abs(right - 1 / 3) < 4 * (2 / 9 / 1200) ** 0.5
    assert float(big.images.std()) == pytest.approx(0.3, rel=0.02)


def test_a_larger_set_continues_a_smaller_one_and_more_classes_keep_the_first_templates() -> None:
    small, large = planted(Key(0), per_class=5), planted(Key(0), per_class=9)
    assert torch.equal(large.val.images[:15], small.val.images)
    assert torch.equal(templates(Key(0), classes=5)[:3], templates(Key(0), classes=3))


def test_no_image_is_in_two_splits() -> None:
    splits = planted(Key(0))
    images = torch.cat([splits.train.images, splits.val.images, splits.test.images])
    assert len(torch.unique(images.flatten(1), dim=0)) == len(images) == 360


def test_same_key_same_data_other_key_other_data() -> None:
    assert planted(Key(0)).fingerprint == planted(Key(0)).fingerprint
    assert planted(Key(0)).fingerprint != planted(Key(1)).fingerprint


def test_pixels_hardly_leave_their_range() -> None:
    pixels = planted(Key(0)).train.pixels()
    assert float(((pixels < 0) | (pixels > 1)).float().mean()) < 1e-3


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    planted(Key(0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 1}, "planted data: classes must be at least 2; got 1"),
        ({"per_class": 0}, "planted data: per_class must be at least 1"),
        ({"noise": -0.1}, "planted data: noise must be at least 0"),
        ({"signal": float("nan")}, "planted data: signal must be at least 0; got nan"),
        ({"shape": (1, 1, 8)}, "planted data: height must be at least 2"),
        ({"shape": (0, 8, 8)}, "planted data: channels must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        planted(Key(0), **change)  # type: ignore[arg-type]
