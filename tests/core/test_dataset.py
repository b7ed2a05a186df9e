"""Datasets are checked at birth, carry their units, and are named by a fingerprint."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from distillens import load
from distillens.core.checks import UserError
from distillens.core.dataset import Dataset, Splits, check_per_class, stratified
from distillens.core.labels import Hard, Labels, Logits, Probabilities, Teacher
from distillens.core.rng import Key
from distillens.core.space import Pixel, Space, Standardised, Zca

CLASSES = ("cat", "dog", "owl")
GREY = Standardised((0.5,), (0.25,))


def dataset(n: int = 6, **changes: Any) -> Dataset:
    """Images [n, 1, 2, 3] whose classes take turns."""
    parts: dict[str, Any] = {
        "images": Key(1).fold("images").uniform(n, 1, 2, 3),
        "labels": Hard(torch.arange(n) % 3),
        "classes": CLASSES,
        "space": Pixel(),
    }
    return Dataset(**{**parts, **changes})


def broken(index: tuple[int | slice, ...], value: float) -> torch.Tensor:
    images = torch.zeros(6, 1, 2, 3)
    images[index] = value
    return images


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": torch.zeros(6, 2, 3)},
            r"images do not fit; got torch.float32 of shape \(6, 2, 3\); expected float numbers of shape "
            r"\[n, channels, height, width\]; whole numbers 0..255 become float with images / 255",
        ),
        (
            {"images": torch.zeros(6, 1, 2, 3, dtype=torch.uint8)},
            r"images do not fit; got torch.uint8 of shape \(6, 1, 2, 3\)",
        ),
        ({"classes": ("cat",)}, r"class names must be two or more, all different; got \('cat',\)"),
        ({"classes": ("cat", "dog", "cat")}, "class names must be two or more, all different"),
        ({"labels": Hard(torch.tensor([0, 1]))}, "every image needs one label; got 6 images and 2 labels"),
        ({"classes": ("cat", "dog")}, "a label is outside the classes; got labels 0 to 2; expected 0 to 1"),
        (
            {"labels": Probabilities(torch.ones(6, 3))},
            "probability labels are not distributions",
        ),
        (
            {"images": broken((4, 0, 1, 2), math.nan)},
            "1 images hold numbers that are not finite; got image 4, the first",
        ),
        (
            {"images": broken((2,), math.inf)},
            "1 images hold numbers that are not finite; got image 2, the first",
        ),
        (
            {"images": broken((slice(1, 6, 2), 0, 0, 0), -math.inf)},
            "3 images hold numbers that are not finite; got image 1, the first",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataset(**changes)


def test_shape_classes_and_length() -> None:
    data = dataset()
    assert (len(data), data.shape, data.k, data.device.type) == (6, (1, 2, 3), 3, "cpu")
    assert [index.tolist() for index in data.by_class] == [[0, 3], [1, 4], [2, 5]]


def test_by_class_names_a_class_without_images() -> None:
    data = dataset(labels=Hard(torch.tensor([2, 0, 2, 2, 0, 2])))
    assert [index.tolist() for index in data.by_class] == [[1, 4], [], [0, 2, 3, 5]]


def test_a_dataset_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        dataset().images = torch.zeros(1)  # type: ignore[misc]


def test_equal_parts_have_equal_fingerprints() -> None:
    data = dataset()
    strided = data.images.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not strided.is_contiguous()
    assert dataset(images=strided).fingerprint == data.fingerprint
    assert dataset(images=data.images.clone().requires_grad_()).fingerprint == data.fingerprint


def _nudged() -> torch.Tensor:
    images = dataset().images.clone()
    images[5, 0, 1, 2] = torch.nextafter(images[5, 0, 1, 2], torch.tensor(2.0))
    return images


@pytest.mark.parametrize(
    "changes",
    [
        {"images": _nudged()},
        {"images": dataset().images.double()},
        {"images": dataset().images.reshape(6, 1, 3, 2)},
        {"labels": Hard(torch.tensor([0, 1, 2, 0, 1, 1]))},
        {"labels": Probabilities(torch.eye(3)[torch.arange(6) % 3])},
        {"labels": Logits(torch.eye(3)[torch.arange(6) % 3])},
        {"classes": ("cat", "dog", "fox")},
        {"classes": ("dog", "cat", "owl")},
        {"classes": (*CLASSES, "fox")},
        {"space": GREY},
        {"space": Standardised((0.5,), (0.26,))},
    ],
    ids=str,
)
def test_the_fingerprint_changes_with_any_part(changes: dict[str, Any]) -> None:
    assert dataset(**changes).fingerprint != dataset().fingerprint


def test_kinds_of_label_with_the_same_numbers_have_their_own_fingerprints() -> None:
    values = torch.eye(3)[torch.arange(6) % 3]
    prints = {dataset(labels=make(values)).fingerprint for make in (Probabilities, Logits)}
    assert len(prints) == 2


def test_the_temperature_of_a_teacher_changes_the_fingerprint() -> None:
    views = torch.zeros(2, 6, 3)
    prints = {dataset(labels=Teacher("r", views, 0, t)).fingerprint for t in (1.0, 2.0)}
    assert len(prints) == 2


def test_constants_of_a_space_change_the_fingerprint() -> None:
    assert dataset(space=GREY).fingerprint != dataset(space=Standardised((0.5,), (0.26,))).fingerprint


def test_take_gives_images_with_their_labels_in_order() -> None:
    data = dataset()
    taken = data.take(torch.tensor([4, 0, 4]))
    assert torch.equal(taken.images, torch.stack([data.images[4], data.images[0], data.images[4]]))
    assert taken.labels.hard().tolist() == [1, 0, 1]
    assert (taken.classes, taken.space) == (data.classes, data.space)


def test_joined_puts_the_others_behind() -> None:
    data = dataset()
    joined = data.joined(data.take(torch.tensor([5])), data.take(torch.tensor([1, 2])))
    assert torch.equal(joined.images, data.images[torch.tensor([0, 1, 2, 3, 4, 5, 5, 1, 2])])
    assert joined.labels.hard().tolist() == [0, 1, 2, 0, 1, 2, 2, 1, 2]


@pytest.mark.parametrize(
    ("space", "got"),
    [
        (Pixel(), "standardised and pixel"),
        (Standardised((0.4,), (0.25,)), "two sets of constants"),
    ],
)
def test_two_spaces_are_not_mixed(space: Space, got: str) -> None:
    with pytest.raises(
        UserError,
        match=f"images of two spaces cannot be mixed; got {got}; bring them into one space with to_space",
    ):
        dataset(space=GREY).joined(dataset(space=space))


@pytest.mark.parametrize(
    ("other", "got"),
    [
        (dataset(classes=("cat", "dog", "fox")), r"\(1, 2, 3\), 3 classes and \(1, 2, 3\), 3 classes"),
        (dataset(images=torch.zeros(6, 1, 3, 3)), r"\(1, 2, 3\), 3 classes and \(1, 3, 3\), 3 classes"),
    ],
)
def test_other_classes_or_shapes_are_not_joined(other: Dataset, got: str) -> None:
    with pytest.raises(UserError, match=f"these datasets do not fit together; got {got}"):
        dataset().joined(other)


def test_to_space_changes_the_units_and_nothing_else() -> None:
    data = dataset()
    moved = data.to_space(GREY)
    torch.testing.assert_close(moved.images, (data.images - 0.5) / 0.25)
    torch.testing.assert_close(moved.pixels(), data.images)
    torch.testing.assert_close(moved.to_space(Pixel()).images, data.images)
    assert moved.space == GREY
    assert moved.labels.hard().tolist() == data.labels.hard().tolist()


def test_many_images_move_as_few_do(monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset()
    whole = data.to_space(GREY).images
    monkeypatch.setattr("distillens.core.dataset.ROWS", 2)
    assert torch.equal(data.to_space(GREY).images, whole)
    assert [len(part) for part in data.exact_pixels()][:-1] == [2] * ((len(data) - 1) // 2)
    assert torch.equal(torch.cat(list(data.exact_pixels())), data.pixels())


def test_images_that_have_lost_their_pixels_stay_where_they_are() -> None:
    data = dataset()
    white = data.to_space(Zca.fit(data.exact_pixels(), "kip"))
    assert white.to_space(white.space) is white
    assert white.pixels().shape == data.images.shape  # a likeness, to look at
    with pytest.raises(UserError, match="images cannot be brought out of the space zca-kip"):
        white.to_space(Pixel())


def test_to_the_same_space_is_the_same_data() -> None:
    data = dataset(space=GREY)
    assert data.to_space(Standardised((0.5,), (0.25,))) is data


def test_datasets_of_two_spaces_join_after_to_space() -> None:
    data = dataset()
    joined = data.joined(data.to_space(GREY).to_space(Pixel()))
    torch.testing.assert_close(joined.images[:6], joined.images[6:])


def test_to_moves_images_and_labels() -> None:
    moved = dataset().to("cpu")
    assert torch.equal(moved.images, dataset().images)
    assert moved.fingerprint == dataset().fingerprint


SPLIT_FAULTS: dict[str, tuple[Callable[[], Dataset], str]] = {
    "classes": (
        lambda: dataset(classes=("cat", "dog", "fox")),
        r"the {name} split differs from the training split; got \(1, 2, 3\), 3 classes; expected \(1, 2, 3\), 3",
    ),
    "shape": (
        lambda: dataset(images=torch.zeros(6, 3, 2, 3)),
        r"the {name} split differs from the training split; got \(3, 2, 3\), 3 classes",
    ),
    "space": (lambda: dataset(space=GREY), "the {name} split is in another space than the training split"),
    "empty": (lambda: dataset(0), "the {name} split is empty"),
    "soft": (
        lambda: dataset(labels=Probabilities(torch.eye(3)[torch.arange(6) % 3])),
        "real data carries hard labels; got probabilities in {name}",
    ),
}


@pytest.mark.parametrize("name", ["val", "test"])
@pytest.mark.parametrize("fault", SPLIT_FAULTS)
def test_splits_that_differ_are_refused(name: str, fault: str) -> None:
    make, message = SPLIT_FAULTS[fault]
    parts = {"train": dataset(), "val": dataset(), "test": dataset(), name: make()}
    with pytest.raises(UserError, match=message.format(name=name)):
        Splits(**parts)


def test_an_empty_training_split_is_refused() -> None:
    with pytest.raises(UserError, match="the train split is empty"):
        Splits(dataset(0), dataset(), dataset())


def test_splits_have_a_space_and_a_fingerprint() -> None:
    small, large = dataset(3), dataset(6)
    splits = Splits(large, small, small, "here")
    assert (splits.space, splits.source) == (Pixel(), "here")
    assert splits.fingerprint == Splits(large, small, small, "elsewhere").fingerprint
    assert splits.fingerprint != Splits(small, large, small).fingerprint
    assert Splits(large, large, small).fingerprint != Splits(large, small, large).fingerprint
    assert Splits(large, small, large).fingerprint != splits.fingerprint


def test_splits_change_units_together() -> None:
    splits = Splits(dataset(6), dataset(3), dataset(9), "here")
    moved = splits.to_space(GREY)
    assert (moved.space, moved.source) == (GREY, "here")
    assert [len(part) for part in (moved.train, moved.val, moved.test)] == [6, 3, 9]
    torch.testing.assert_close(moved.test.pixels(), splits.test.images)
    assert splits.to("cpu").fingerprint == splits.fingerprint
    assert splits.to("cpu").source == "here"


def cats(n: int) -> Dataset:
    """``n`` cats, 20 dogs, 20 owls."""
    labels: Labels = Hard(torch.tensor([0] * n + [1] * 20 + [2] * 20))
    return dataset(images=torch.zeros(n + 40, 1, 2, 3), labels=labels)


def test_a_class_that_is_too_small_is_named_with_its_size() -> None:
    with pytest.raises(
        UserError,
        match="class 'cat' has 14 images, 99 were asked for; ask for at most 14 images per class",
    ):
        check_per_class(cats(14), 99)


def test_a_class_without_images_is_named() -> None:
    with pytest.raises(
        UserError, match="class 'cat' has 0 images, 1 were asked for; ask for at most 0 views"
    ):
        check_per_class(cats(0), 1, "views")


def test_as_many_as_the_smallest_class_are_allowed() -> None:
    check_per_class(cats(14), 14)
    with pytest.raises(UserError, match="class 'cat' has 14 images, 15 were asked for"):
        check_per_class(cats(14), 15)


@pytest.mark.parametrize("wanted", [0, -3])
def test_fewer_than_one_image_is_refused(wanted: int) -> None:
    with pytest.raises(UserError, match=f"images per class must be at least 1; got {wanted}"):
        check_per_class(cats(14), wanted)


SIZES = (10, 7, 1, 33)


@pytest.mark.parametrize("counts", [(200,), (100, 250), (500, 500), (333, 333, 333), (0,), (1000,)])
def test_stratified_is_a_partition_with_every_class_shared_out(counts: tuple[int, ...]) -> None:
    labels = torch.tensor([c for c, size in enumerate(SIZES) for _ in range(size)])
    labels = labels[Key(2).permutation(len(labels))]
    parts = stratified(labels, len(SIZES), counts, Key(3).permutation(len(labels)))
    assert len(parts) == len(counts) + 1
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    assert all(part.tolist() == sorted(part.tolist()) for part in parts)
    for c, size in enumerate(SIZES):
        shares = [*counts, 1000 - sum(counts)]
        for part, share in zip(parts, shares, strict=True):
            held = int((labels[part] == c).sum())
            # every earlier part is rounded by at most a half, the last one takes what remains
            slack = 0.5 * (len(counts) if part is parts[-1] else 1)
            assert abs(held - size * share / 1000) <= slack


def test_stratified_follows_the_order_within_a_class() -> None:
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    first, second = stratified(labels, 2, (500,), torch.tensor([6, 7, 4, 5, 2, 3, 0, 1]))
    assert first.tolist() == [4, 5, 6, 7]
    assert second.tolist() == [0, 1, 2, 3]
    other, _ = stratified(labels, 2, (500,), torch.tensor([0, 3, 6, 5, 2, 1, 4, 7]))
    assert other.tolist() == [0, 3, 5, 6]


def test_images_drawn_of_each_class_are_its_own_and_begin_with_the_same() -> None:
    data = load("digits").train
    few, more = data.drawn(3, Key(4)), data.drawn(5, Key(4))
    labels = data.labels.hard()
    assert labels[few].tolist() == [c for c in range(10) for _ in range(3)]
    assert len(set(more.tolist())) == 50
    assert torch.equal(few.view(10, 3), more.view(10, 5)[:, :3])
    assert not torch.equal(few, data.drawn(3, Key(5)))
    # Each class as many as asked for, or all there are.
    counts = [2, 0, 10_000, *[1] * 7]
    assert torch.bincount(labels[data.drawn(counts, Key(4))], minlength=10).tolist() == [
        2, 0, int((labels == 2).sum()), *[1] * 7,
    ]  # fmt: skip
