from __future__ import annotations

import numpy as np
import pytest
import torch

from distillens.core.checks import UserError
from distillens.core.dataset import stratified
from distillens.core.rng import Key
from distillens.core.space import Pixel, Standardised
from distillens.data.tensors import cut, from_tensors, numbered, standardised


def some(
    n: int = 60, k: int = 3, shape: tuple[int, ...] = (1, 8, 12), seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """uint8 images, all different, and labels that take turns."""
    return Key(seed).fold("images").integers(256, n, *shape).to(torch.uint8), torch.arange(n) % k


def found_in(part: torch.Tensor, whole: torch.Tensor) -> list[int]:
    """For each image of ``part`` where it is in ``whole``."""
    return [int((whole == image).flatten(1).all(1).nonzero()) for image in part]


def test_uint8_images_are_divided_by_255() -> None:
    images, labels = some()
    splits = from_tensors(images, labels, val=(images, labels), test=(images, labels))
    assert splits.space == Pixel()
    assert torch.equal(splits.train.images, images.float() / 255)
    assert torch.equal(splits.train.labels.hard(), labels)
    assert splits.source == "memory"


def test_images_larger_than_a_block_are_converted_like_one_piece() -> None:
    images, labels = some(n=700, shape=(2, 9, 11))
    space = Standardised((0.4, 0.5), (0.2, 0.3))
    splits = from_tensors(images, labels, val=(images, labels), test=(images, labels), space=space)
    assert torch.equal(splits.train.images, space.from_pixels(images.float() / 255))


def test_an_image_larger_than_a_block_is_converted() -> None:
    images, labels = some(n=4, k=2, shape=(1, 200, 201))
    splits = from_tensors(images, labels, val=(images, labels), test=(images, labels))
    assert torch.equal(splits.train.images, images.float() / 255)


def test_float_images_are_pixels_and_become_float32() -> None:
    images, labels = some()
    splits = from_tensors((images / 255).double(), labels)
    assert splits.train.images.dtype == torch.float32
    found = found_in((splits.train.images * 255).round().to(torch.uint8), images)
    assert torch.equal(splits.train.labels.hard(), labels[torch.tensor(found)])


def test_float_images_with_a_space_are_taken_to_be_in_it() -> None:
    images = Key(0).normal(30, 1, 8, 12) * 3
    labels = torch.arange(30) % 3
    space = Standardised((0.5,), (0.2,))
    splits = from_tensors(images, labels, val=(images, labels), test=(images, labels), space=space)
    assert torch.equal(splits.train.images, images)
    assert splits.space == space


def test_images_without_a_channel_axis_get_one() -> None:
    images, labels = some(shape=(8, 12))
    assert from_tensors(images, labels).train.shape == (1, 8, 12)


def test_missing_splits_are_cut_10_and_20_percent_disjoint_and_complete() -> None:
    images, labels = some(n=90)
    splits = from_tensors(images, labels, key=Key(5))
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [63, 9, 18]
    found = [
        found_in((p.images * 255).round().to(torch.uint8), images)
        for p in (splits.train, splits.val, splits.test)
    ]
    assert sorted(i for where in found for i in where) == list(range(90))
    for part, where in zip((splits.train, splits.val, splits.test), found, strict=True):
        assert torch.equal(part.labels.hard(), labels[torch.tensor(where)])
        sizes = [len(index) for index in part.by_class]
        assert max(sizes) - min(sizes) <= 1
        assert where == sorted(where)


def test_the_cut_is_the_one_at_the_keys_split() -> None:
    images, labels = some()
    splits = from_tensors(images, labels, key=Key(7))
    val, test, train = stratified(labels, 3, [100, 200], Key(7, ("split",)).permutation(60))
    assert torch.equal(splits.train.images, images[train] / 255)
    assert torch.equal(splits.val.images, images[val] / 255)
    assert torch.equal(splits.test.images, images[test] / 255)


def test_same_key_same_split_other_key_other_split() -> None:
    images, labels = some()
    one, same, other = (from_tensors(images, labels, key=Key(seed)) for seed in (0, 0, 1))
    assert one.fingerprint == same.fingerprint
    assert one.val.fingerprint != other.val.fingerprint


@pytest.mark.parametrize(("given", "sizes"), [("val", (48, 6, 12)), ("test", (54, 6, 6))])
def test_only_what_is_missing_is_cut(given: str, sizes: tuple[int, int, int]) -> None:
    images, labels = some()
    extra = some(n=6, seed=1)
    splits = from_tensors(
        images, labels, val=extra if given == "val" else None, test=extra if given == "test" else None
    )
    assert (len(splits.train), len(splits.val), len(splits.test)) == sizes
    assert torch.equal(getattr(splits, given).images, extra[0] / 255)


def test_classes_are_numbered_over_all_splits_unless_named() -> None:
    images, labels = some()
    assert from_tensors(images, labels).train.classes == ("0", "1", "2")
    more = some(n=6, k=4)
    splits = from_tensors(images, labels, test=more)
    assert splits.train.classes == ("0", "1", "2", "3")
    assert from_tensors(images, labels * 2, classes="abcde").train.classes == tuple("abcde")


def test_labels_of_any_whole_kind_are_taken() -> None:
    images, labels = some()
    splits = from_tensors(images, labels.to(torch.uint8))
    assert splits.train.labels.hard().dtype == torch.int64


def test_nothing_given_is_changed_and_the_global_generator_is_left_alone() -> None:
    images, labels = some()
    kept, state = images.clone(), torch.get_rng_state()
    from_tensors(images, labels, space=Standardised((0.5,), (0.2,)))
    assert torch.equal(images, kept)
    assert torch.equal(state, torch.get_rng_state())


def test_standardised_constants_are_numpys_and_do_not_depend_on_order() -> None:
    images, _ = some(n=200, shape=(3, 9, 7))
    space = standardised(images, 255)
    pixels = images.numpy() / 255
    np.testing.assert_allclose(space.mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(space.std, pixels.std((0, 2, 3)), rtol=1e-12)
    assert standardised(images.flip(0), 255) == space


def test_standardised_constants_of_many_bright_images_do_not_overflow() -> None:
    images = torch.full((300, 1, 128, 128), 255, dtype=torch.uint8)
    images[0] = 0
    space = standardised(images, 255)
    share = 299 / 300
    assert space.mean[0] == pytest.approx(share, rel=1e-12)
    assert space.std[0] == pytest.approx((share * (1 - share)) ** 0.5, rel=1e-9)


def test_cut_takes_any_shares() -> None:
    images, labels = some()
    parts = cut(images, labels, {"val": 250}, Key(0))
    assert {name: len(part[1]) for name, part in parts.items()} == {"val": 15, "train": 45}


IMAGES, LABELS = some()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": IMAGES.float()},
            r"pixels in \[0, 1\]; got numbers from 0 to 255; divide by 255, or name their",
        ),
        ({"images": IMAGES / 255 - 0.5}, r"pixels in \[0, 1\]; got numbers from -0.5 to 0.5"),
        ({"images": IMAGES.long()}, r"train images do not fit; got torch.int64 .*expected uint8 or float"),
        ({"images": IMAGES[0, 0]}, r"train images do not fit; got torch.uint8 of shape \(8, 12\)"),
        ({"images": IMAGES[:50]}, r"every train image needs one label; got 50 images and 60 labels"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, r"there are no train images"),
        ({"labels": LABELS.float()}, r"train labels are not whole numbers, one an image; got torch.float32"),
        ({"labels": LABELS[:, None]}, r"train labels are not whole numbers, one an image; got .*\(60, 1\)"),
        ({"labels": LABELS + 1}, r"run from 0 without a gap; got 3 different labels, 1 to 3, but no 0"),
        ({"labels": LABELS * 2}, r"got 3 different labels, 0 to 4, but no 1; number the classes"),
        ({"labels": LABELS - 1}, r"got 3 different labels, -1 to 1, some below 0"),
        ({"labels": LABELS * 0}, r"class names must be two or more"),
        ({"classes": ("a", "b")}, r"a label is outside the classes; got labels 0 to 2; expected 0 to 1"),
        ({"test": (IMAGES[:, :, :7], LABELS)}, r"the test split differs from the training split"),
        ({"val": (IMAGES.long(), LABELS)}, r"the val images do not fit"),
        (
            {"images": IMAGES[:9], "labels": LABELS[:9]},
            r"too few images a class to cut a val split from; got 9 images",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"images": IMAGES, "labels": LABELS, **change}
    with pytest.raises(UserError, match=message):
        from_tensors(**given)  # type: ignore[arg-type]


def test_images_that_are_not_finite_are_refused() -> None:
    images = IMAGES / 255
    images[3, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        from_tensors(images, LABELS)


def test_a_channel_with_one_value_cannot_be_standardised() -> None:
    images, _ = some(shape=(2, 4, 4))
    images[:, 1] = 51
    with pytest.raises(UserError, match=r"channel 1 has one value in all training images.*got 0.2"):
        standardised(images, 255)


def test_label_numbers_that_are_no_classes_are_refused_at_once() -> None:
    with pytest.raises(UserError, match="0 to 1000000000000, but no 1"):
        numbered(torch.tensor([0, 10**12]))
