"""Distilled sets: what they decode to, what they cost, and files that are whole, safe and stable."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distillens.core.artefact import DistilledDataset, Order, Provenance, Storage
from distillens.core.checks import UserError
from distillens.core.decode import Bases, Decode, MultiFormation, Pixels
from distillens.core.donors import Donors
from distillens.core.labels import Hard, Labels, Logits, Probabilities, Targets, Teacher
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.space import Pixel, Space, Standardised, Zca
from distillens.core.storage import read_tensors, write_tensors

KEY = Key(21)
N, K = 6, 3
CLASSES = ("cat", "dog", "owl")
SHAPE = (1, 4, 6)

LABELS: dict[str, Callable[[], Labels]] = {
    "hard": lambda: Hard(torch.arange(N) % K),
    "probabilities": lambda: Probabilities(KEY.fold("p").normal(N, K).softmax(-1)),
    "logits": lambda: Logits(KEY.fold("l").normal(N, K)),
    "targets": lambda: Targets(KEY.fold("t").normal(N, K)),
    "teacher": lambda: Teacher("abc", KEY.fold("v").normal(2, N, K), 3, 2.5, 1234),
}
STORED: dict[str, tuple[Decode, Callable[[], dict[str, torch.Tensor]]]] = {
    "pixels": (Pixels(), lambda: {"images": KEY.fold("i").uniform(N, *SHAPE)}),
    "multi_formation": (MultiFormation(2), lambda: {"images": KEY.fold("i").uniform(N, *SHAPE)}),
    "bases": (
        Bases((4, 6)),
        lambda: {"bases": KEY.fold("b").uniform(4, 1, 2, 3), "coefficients": KEY.fold("c").normal(N, 4)},
    ),
}
SPACES: dict[str, Space] = {
    "pixel": Pixel(),
    "standardised": Standardised((0.5,), (0.25,)),
    "zca": Zca.fit(KEY.fold("real").uniform(40, *SHAPE)),
    "zca-kip": Zca.fit(KEY.fold("real").uniform(40, *SHAPE), "kip"),
    "zca-frepo": Zca.fit(KEY.fold("real").uniform(40, *SHAPE), "frepo"),
}
ORDER = Order(torch.tensor([[0, 5], [2, -1], [4, 1]]), torch.tensor([0.1, 0.2, 0.4]))
CHOSEN = torch.tensor([7, 0, 300, 12, 5, 7])
DONORS = Donors(torch.arange(32.0).view(2, 2, 8) - 9, torch.arange(16).view(2, 8))
RECIPE = Recipe(steps=7, lr=0.0123, batch=2, schedule="cosine", augment="flip")
PROVENANCE = Provenance(
    "dm",
    {"steps": 3, "net": {"width": 8}},
    2,
    Key(4).fold("set", 1),
    "digits",
    "f00d",
    {"experts": "beef"},
    {"threads": 2},
    {"torch": "2"},
)


def distilled(labels: str = "hard", decode: str = "pixels", **changes: Any) -> DistilledDataset:
    """Six points of three classes."""
    how, stored = STORED[decode]
    return DistilledDataset(
        **{
            "stored": stored(),
            "labels": LABELS[labels](),
            "classes": CLASSES,
            "space": Pixel(),
            "decode": how,
            "provenance": PROVENANCE,
            **changes,
        }
    )


def assert_same(a: DistilledDataset, b: DistilledDataset) -> None:
    assert a.stored.keys() == b.stored.keys()
    assert all(torch.equal(a.stored[name], b.stored[name]) for name in a.stored)
    assert all(a.stored[name].dtype == b.stored[name].dtype for name in a.stored)
    assert type(a.labels) is type(b.labels)
    assert a.labels.settings() == b.labels.settings()
    assert all(torch.equal(t, b.labels.tensors()[name]) for name, t in a.labels.tensors().items())
    assert (a.classes, a.decode, a.recipe, a.provenance) == (b.classes, b.decode, b.recipe, b.provenance)
    assert a.space.describe() == b.space.describe()
    assert (a.order is None) == (b.order is None)
    if a.order is not None and b.order is not None:
        assert torch.equal(a.order.steps, b.order.steps)
        assert torch.equal(a.order.lr, b.order.lr)
    assert (a.chosen is None) == (b.chosen is None)
    if a.chosen is not None and b.chosen is not None:
        assert torch.equal(a.chosen, b.chosen)
    assert (a.donors is None) == (b.donors is None)
    if a.donors is not None and b.donors is not None:
        assert torch.equal(a.donors.parts, b.donors.parts)
        assert torch.equal(a.donors.met, b.donors.met)
    assert torch.equal(a.dataset().images, b.dataset().images)
    assert a.dataset().fingerprint == b.dataset().fingerprint
    assert a.fingerprint == b.fingerprint


@pytest.mark.parametrize("decode", STORED)
@pytest.mark.parametrize("labels", LABELS)
def test_every_decoded_image_carries_the_label_of_its_point(labels: str, decode: str) -> None:
    one = distilled(labels, decode)
    data = one.dataset()
    origin = one.decode.origin(one.stored)
    assert (len(one), one.ipc, data.shape, data.classes) == (N, N / K, SHAPE, CLASSES)
    assert torch.equal(data.images, one.decode.images(one.stored))
    expected = one.labels.take(origin)
    assert all(torch.equal(t, expected.tensors()[n]) for n, t in data.labels.tensors().items())


def test_points_and_labels_must_agree() -> None:
    with pytest.raises(UserError, match="every stored point needs one label; got 6 points, 2 labels"):
        DistilledDataset(STORED["pixels"][1](), Hard(torch.tensor([0, 1])), CLASSES, Pixel())


def test_decoded_images_are_checked_as_data() -> None:
    with pytest.raises(UserError, match="1 images hold numbers that are not finite; got image 2, the first"):
        images = torch.zeros(N, *SHAPE)
        images[2] = float("inf")
        distilled(stored={"images": images})


@pytest.mark.parametrize(("named", "got"), [(6, "6"), (-2, "-2")])
def test_an_order_names_images_that_are_there(named: int, got: str) -> None:
    order = Order(torch.tensor([[0, -1], [named, 1]]), torch.ones(2))
    with pytest.raises(
        UserError,
        match=f"an ordered step names an image that is not there; got {got}; expected 0 to 5, or -1 for none",
    ):
        distilled(order=order)


def test_an_order_may_name_every_decoded_image() -> None:
    order = Order(torch.arange(4 * N).reshape(-1, 1), torch.ones(4 * N))
    assert distilled(decode="multi_formation", order=order).order is order


@pytest.mark.parametrize(
    ("steps", "lr", "got"),
    [
        ((3,), (3,), r"steps \(3,\), rates \(3,\)"),
        ((3, 2), (2,), r"steps \(3, 2\), rates \(2,\)"),
        ((3, 2), (3, 1), r"steps \(3, 2\), rates \(3, 1\)"),
    ],
)
def test_an_order_has_one_row_and_one_rate_a_step(
    steps: tuple[int, ...], lr: tuple[int, ...], got: str
) -> None:
    with pytest.raises(
        UserError, match=f"ordered steps need one row of images and one rate a step; got {got}"
    ):
        Order(torch.zeros(steps, dtype=torch.int64), torch.ones(lr))


@pytest.mark.parametrize(
    ("labels", "decode", "expected"),
    [
        ("hard", "pixels", Storage(144, 144 * 32, 0, 6)),
        ("hard", "multi_formation", Storage(144, 144 * 32, 0, 24)),
        ("hard", "bases", Storage(4 * 6 + 6 * 4, 48 * 32, 0, 6)),
        ("probabilities", "pixels", Storage(144 + 18, 162 * 32, 0, 6)),
        ("logits", "bases", Storage(48 + 18, 66 * 32, 0, 6)),
        ("targets", "multi_formation", Storage(144 + 18, 162 * 32, 0, 24)),
        ("teacher", "pixels", Storage(144 + 36, 180 * 32, 1234, 6)),
    ],
)
def test_storage_counts_what_is_kept(labels: str, decode: str, expected: Storage) -> None:
    assert distilled(labels, decode).storage() == expected


def test_storage_counts_ordered_rates_and_the_width_of_a_number() -> None:
    assert distilled(order=ORDER).storage() == Storage(147, 147 * 32, 0, 6)
    halves = {"images": STORED["pixels"][1]()["images"].half()}
    assert distilled(stored=halves).storage() == Storage(144, 144 * 16, 0, 6)


@pytest.mark.parametrize("decode", STORED)
@pytest.mark.parametrize("labels", LABELS)
def test_without_removes_points_and_leaves_the_others_as_they_were(labels: str, decode: str) -> None:
    one = distilled(labels, decode, recipe=RECIPE)
    rest = one.without(1, 4)
    left = torch.tensor([0, 2, 3, 5])
    assert len(rest) == 4
    kept = torch.isin(one.decode.origin(one.stored), left)
    torch.testing.assert_close(rest.dataset().images, one.dataset().images[kept])
    assert torch.equal(rest.labels.hard(), one.labels.hard()[left])
    assert (rest.classes, rest.space, rest.recipe, rest.decode) == (
        one.classes,
        one.space,
        one.recipe,
        one.decode,
    )
    assert len(one) == N


def test_keep_follows_the_order_asked() -> None:
    one = distilled()
    kept = one.keep(torch.tensor([5, 0]))
    assert torch.equal(kept.stored["images"], one.stored["images"][[5, 0]])
    assert kept.labels.hard().tolist() == [2, 0]


def test_the_points_that_are_kept_stay_those_that_were_chosen() -> None:
    one = distilled(chosen=CHOSEN)
    assert one.keep(torch.tensor([5, 2, 0])).chosen is not None
    assert one.keep(torch.tensor([5, 2, 0])).chosen.tolist() == [7, 300, 7]  # type: ignore[union-attr]
    assert one.without(1, 4).chosen.tolist() == [7, 300, 12, 7]  # type: ignore[union-attr]
    assert distilled().without(1).chosen is None


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (
            torch.arange(5),
            "chosen images need one index a point; got torch.int64 of shape (5,); expected int64 [6]",
        ),
        (
            torch.zeros(6),
            "chosen images need one index a point; got torch.float32 of shape (6,); expected int64 [6]",
        ),
        (
            torch.zeros(6, 1, dtype=torch.int64),
            "chosen images need one index a point; got torch.int64 of shape (6, 1); expected int64 [6]",
        ),
        (torch.arange(6) - 2, "a chosen image has an index below 0; got -2; expected from 0"),
    ],
)
def test_chosen_images_are_one_index_a_point(chosen: torch.Tensor, said: str) -> None:
    with pytest.raises(UserError) as error:
        distilled(chosen=chosen)
    assert str(error.value) == said


def test_a_part_of_a_set_has_no_donors() -> None:
    assert distilled(donors=DONORS).without(1).donors is None


def test_donors_fit_the_set_that_they_are_of() -> None:
    with pytest.raises(UserError) as error:
        distilled(donors=Donors(torch.zeros(2, 3, 8), torch.zeros(2, 8, dtype=torch.int64)))
    assert str(error.value) == (
        "the record of donors does not fit the set; got 3 points a class in it, 6 points of 3 classes"
    )
    for parts, met in (
        (torch.zeros(2, 2, 7), torch.zeros(2, 8, dtype=torch.int64)),
        (torch.zeros(1, 2, 8), torch.zeros(1, 8, dtype=torch.int64)),
        (torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.int64)),
        (torch.zeros(2, 2, 8), torch.zeros(2, 8)),
        (torch.zeros(2, 2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64)),
    ):
        with pytest.raises(UserError) as error:
            Donors(parts, met)
        assert str(error.value) == (
            "a record of donors needs a number for each point of a class and real image, and a count an image; got "
            f"{parts.dtype} {list(parts.shape)}, {met.dtype} {list(met.shape)}; expected parts [2, p, n] and int64 counts [2, n]"
        )


def test_without_nothing_is_the_same_set() -> None:
    one = distilled(order=ORDER)
    assert one.without().fingerprint == one.fingerprint


def test_without_every_point_nothing_is_left() -> None:
    assert len(distilled(order=ORDER).without(*range(N))) == 0


@pytest.mark.parametrize("points", [[0, 2, 3, 5], [5, 1, 0], [3]])
@pytest.mark.parametrize("decode", STORED)
def test_ordered_steps_still_point_at_the_same_pixels(decode: str, points: list[int]) -> None:
    images = len(STORED[decode][0].origin(STORED[decode][1]()))
    steps = KEY.fold("steps").integers(images + 1, 40, 3) - 1  # -1 is among them
    assert int(steps.min()) == -1
    one = distilled(decode=decode, order=Order(steps, torch.linspace(0.1, 1, 40)))
    kept = one.keep(torch.tensor(points))
    before, after = one.dataset().images, kept.dataset().images
    origin = one.decode.origin(one.stored).tolist()
    assert kept.order is not None
    assert one.order is not None
    assert torch.equal(kept.order.lr, one.order.lr)
    assert torch.equal(one.order.steps, steps)
    for old, new in zip(steps.flatten().tolist(), kept.order.steps.flatten().tolist(), strict=True):
        if old == -1 or origin[old] not in points:
            assert new == -1
        else:
            torch.testing.assert_close(after[new], before[old])


def _changed(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    new = {n: t.clone() for n, t in tensors.items()}
    new[name].view(-1)[0] += 0.01
    return new


@pytest.mark.parametrize(
    "changes",
    [
        {"stored": _changed(STORED["pixels"][1](), "images")},
        {"labels": Hard(torch.tensor([0, 1, 2, 0, 1, 1]))},
        {"classes": ("cat", "dog", "fox")},
        {"space": SPACES["standardised"]},
        {"decode": MultiFormation(2)},
        {"recipe": RECIPE},
        {"order": ORDER},
        {"chosen": CHOSEN},
        {"donors": DONORS},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_fingerprint_changes_with_any_part(changes: dict[str, Any]) -> None:
    assert replace(distilled(), **changes).fingerprint != distilled().fingerprint


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"recipe": RECIPE}, {"recipe": RECIPE.but(lr=0.0124)}),
        ({"order": ORDER}, {"order": Order(ORDER.steps, ORDER.lr + 0.1)}),
        ({"order": ORDER}, {"order": Order(ORDER.steps.flip(1), ORDER.lr)}),
        ({"chosen": CHOSEN}, {"chosen": CHOSEN + 1}),
        ({"donors": DONORS}, {"donors": Donors(DONORS.parts * 2, DONORS.met)}),
        ({"donors": DONORS}, {"donors": Donors(DONORS.parts, DONORS.met + 1)}),
        ({"labels": "probabilities"}, {"labels": Logits(LABELS["probabilities"]().tensors()["values"])}),
        ({"labels": "teacher"}, {"labels": Teacher("abc", KEY.fold("v").normal(2, N, K), 4, 2.5, 1234)}),
    ],
)
def test_the_fingerprint_sees_inside_a_part(first: dict[str, Any], second: dict[str, Any]) -> None:
    prints = set()
    for changes in (first, second):
        known = {n: LABELS[v]() if isinstance(v, str) else v for n, v in changes.items()}
        prints.add(replace(distilled(), **known).fingerprint)
    assert len(prints) == 2


def test_the_fingerprint_leaves_the_provenance_out() -> None:
    assert replace(distilled(), provenance=None).fingerprint == distilled().fingerprint


@pytest.mark.parametrize(
    "extras",
    [{}, {"order": ORDER, "recipe": RECIPE}, {"chosen": CHOSEN}, {"donors": DONORS}],
    ids=["plain", "ordered", "chosen", "donors"],
)
@pytest.mark.parametrize("decode", STORED)
@pytest.mark.parametrize("labels", LABELS)
def test_a_saved_set_comes_back(labels: str, decode: str, extras: dict[str, Any], tmp_path: Path) -> None:
    one = distilled(labels, decode, **extras)
    one.save(tmp_path / "run")
    assert_same(one, DistilledDataset.load(tmp_path / "run"))


@pytest.mark.parametrize("space", SPACES)
def test_the_space_travels_with_the_set(space: str, tmp_path: Path) -> None:
    one = distilled(space=SPACES[space])
    one.save(tmp_path)
    again = DistilledDataset.load(tmp_path)
    assert_same(one, again)
    assert torch.equal(one.dataset().pixels(), again.dataset().pixels())


@pytest.mark.parametrize("labels", LABELS)
def test_the_same_set_saved_twice_is_the_same_bytes(labels: str, tmp_path: Path) -> None:
    for folder in ("first", "second"):
        distilled(labels, order=ORDER, recipe=RECIPE, space=SPACES["zca"]).save(tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == ["data.safetensors", "preview.png", "provenance.json"]
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_loaded_set_saves_to_the_same_bytes(tmp_path: Path) -> None:
    distilled("teacher", order=ORDER, recipe=RECIPE).save(tmp_path / "first")
    DistilledDataset.load(tmp_path / "first").save(tmp_path / "second")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


def test_tensors_that_still_carry_gradients_are_saved(tmp_path: Path) -> None:
    images = STORED["pixels"][1]()["images"].requires_grad_()
    distilled(stored={"images": images}).save(tmp_path)
    assert torch.equal(DistilledDataset.load(tmp_path).stored["images"], images.detach())


def test_views_of_one_memory_are_saved(tmp_path: Path) -> None:
    images = torch.rand(1, *SHAPE, generator=KEY.generator()).expand(N, *SHAPE)
    distilled(stored={"images": images}).save(tmp_path)
    assert torch.equal(DistilledDataset.load(tmp_path).stored["images"], images)


def test_a_set_without_provenance_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a distilled set is saved with its provenance"):
        distilled(provenance=None).save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_provenance_round_trip_and_its_words(tmp_path: Path) -> None:
    distilled().save(tmp_path)
    written = json.loads((tmp_path / "provenance.json").read_text())
    assert Provenance.from_json({k: v for k, v in written.items() if k != "fingerprint"}) == PROVENANCE
    assert written == {
        "method": "dm",
        "settings": {"steps": 3, "net": {"width": 8}},
        "ipc": 2,
        "key": [4, "set", 1],
        "data": "digits",
        "data_fingerprint": "f00d",
        "inputs": {"experts": "beef"},
        "plan": {"threads": 2},
        "versions": {"torch": "2"},
        "fingerprint": distilled().fingerprint,
    }


def test_the_preview_shows_a_row_a_class_in_pixels(tmp_path: Path) -> None:
    images = torch.full((N, *SHAPE), 0.25)
    images[1] = 0.75  # a dog, the first of its row
    space = SPACES["standardised"]
    distilled(stored={"images": space.from_pixels(images)}, space=space).save(tmp_path)
    picture = Image.open(io.BytesIO((tmp_path / "preview.png").read_bytes()))
    zoom = 4 * 8 // 4
    assert picture.size == ((2 * 7 + 1) * zoom, (3 * 5 + 1) * zoom)
    grey = np.asarray(picture.convert("L"))
    centres = [
        [int(grey[(1 + r * 5 + 2) * zoom, (1 + c * 7 + 3) * zoom]) for c in range(2)] for r in range(3)
    ]
    assert centres == [[64, 64], [191, 64], [64, 64]]


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> None:
    """Write data.safetensors again with its tensors or its description changed."""
    tensors, metadata = read_tensors(folder / "data.safetensors")
    about = json.loads(metadata["distillens"])
    change(tensors, about)
    write_tensors(folder / "data.safetensors", tensors, {"distillens": json.dumps(about)})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder that holds a set with all parts."""
    folder = tmp_path / "run"
    distilled("teacher", order=ORDER, recipe=RECIPE, space=SPACES["zca"], chosen=CHOSEN).save(folder)
    return folder


def test_what_was_only_written_again_still_loads(saved: Path) -> None:
    edit(saved, lambda tensors, about: None)
    DistilledDataset.load(saved)


@pytest.mark.parametrize("name", ["stored.images", "labels.views", "order.steps", "order.lr", "chosen"])
def test_tampered_data_is_refused(saved: Path, name: str) -> None:
    def change(tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
        tensors[name].view(-1)[0] += 1

    edit(saved, change)
    with pytest.raises(
        UserError,
        match=r"run was changed after it was made: data.safetensors and provenance.json differ; "
        "make it again, or import the tensors as a new set",
    ):
        DistilledDataset.load(saved)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("classes", 0), "lynx"),
        (("labels", "temperature"), 2.0),
        (("labels", "ref"), "abd"),
        (("recipe", "lr"), 0.5),
        (("recipe",), None),
    ],
)
def test_a_tampered_description_is_refused(saved: Path, path: tuple[Any, ...], value: Any) -> None:
    def change(tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
        place: Any = about
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    edit(saved, change)
    with pytest.raises(UserError, match="was changed after it was made"):
        DistilledDataset.load(saved)


@pytest.mark.parametrize("name", ["space.mean", "space.scale", "space.triangle"])
def test_a_tampered_whitening_is_refused(saved: Path, name: str) -> None:
    def change(tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
        tensors[name].view(-1)[0] += 1

    edit(saved, change)
    with pytest.raises(UserError, match="a whitening matrix differs from the one that was recorded"):
        DistilledDataset.load(saved)


def test_a_whitening_of_an_earlier_version_is_refused(saved: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
        d = len(tensors["space.mean"])
        del tensors["space.triangle"]
        tensors |= {"space.matrix": torch.eye(d), "space.inverse": torch.eye(d)}

    edit(saved, change)
    with pytest.raises(
        UserError, match="a whitened set of an earlier version stores another matrix; make it again"
    ):
        DistilledDataset.load(saved)


def test_another_sets_data_is_refused(saved: Path, tmp_path: Path) -> None:
    distilled().save(tmp_path / "other")
    (tmp_path / "other" / "data.safetensors").replace(saved / "data.safetensors")
    with pytest.raises(UserError, match="was changed after it was made"):
        DistilledDataset.load(saved)


def test_provenance_without_a_fingerprint_is_refused(saved: Path) -> None:
    path = saved / "provenance.json"
    written = json.loads(path.read_text())
    del written["fingerprint"]
    path.write_text(json.dumps(written))
    with pytest.raises(UserError, match="was changed after it was made"):
        DistilledDataset.load(saved)


@pytest.mark.parametrize("share", [0, 4, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved: Path, share: float) -> None:
    path = saved / "data.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share if share >= 1 else share * len(whole))])
    with pytest.raises(
        UserError, match=r"data.safetensors is not a whole safetensors file; got .+; make it again"
    ):
        DistilledDataset.load(saved)


def test_a_file_with_a_damaged_header_is_refused(saved: Path) -> None:
    path = saved / "data.safetensors"
    path.write_bytes(b"\xff" * 200 + path.read_bytes()[200:])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        DistilledDataset.load(saved)


def test_truncated_provenance_is_refused(saved: Path) -> None:
    path = saved / "provenance.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match=r"provenance.json is not valid JSON; got .+; make it again"):
        DistilledDataset.load(saved)


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"method": "dm"}'])
def test_provenance_of_another_form_is_refused(saved: Path, text: str) -> None:
    (saved / "provenance.json").write_text(text)
    with pytest.raises(UserError, match=r"run is not a whole distilled set; got .+; make it again"):
        DistilledDataset.load(saved)


def test_a_missing_folder_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"there is no distilled set in .*nowhere; make one with: distillens distill METHOD",
    ):
        DistilledDataset.load(tmp_path / "nowhere")


def test_missing_data_is_named(saved: Path) -> None:
    (saved / "data.safetensors").unlink()
    with pytest.raises(UserError, match=r"there is no file .*data.safetensors"):
        DistilledDataset.load(saved)


@pytest.mark.parametrize("name", ["stored.images", "labels.views", "order.lr", "space.triangle"])
def test_a_set_with_a_tensor_missing_is_refused(saved: Path, name: str) -> None:
    def change(tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
        del tensors[name]

    edit(saved, change)
    with pytest.raises(
        UserError, match=r"is not a whole distilled set|labels are damaged|do not fit their decoder"
    ):
        DistilledDataset.load(saved)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("labels", None),
        ("space", {"kind": "standardised"}),
        ("space", {"kind": "zca", "shape": [1]}),
        ("decode", {"kind": "multi_formation"}),
        ("decode", {"kind": "bases", "size": [3]}),
        ("classes", None),
    ],
)
def test_a_description_of_another_form_is_refused(saved: Path, name: str, value: Any) -> None:
    def change(tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
        about[name] = value

    edit(saved, change)
    with pytest.raises(UserError):
        DistilledDataset.load(saved)


def test_another_format_is_refused(saved: Path) -> None:
    edit(saved, lambda tensors, about: about.update(format=2))
    with pytest.raises(UserError) as error:
        DistilledDataset.load(saved)
    assert str(error.value) == f"{saved} was written by another version; got format 2; expected 1"


def test_a_file_without_our_description_is_refused(saved: Path) -> None:
    tensors, _ = read_tensors(saved / "data.safetensors")
    write_tensors(saved / "data.safetensors", tensors)
    with pytest.raises(UserError, match="is not a whole distilled set; got KeyError"):
        DistilledDataset.load(saved)


@pytest.mark.parametrize(
    "name",
    [
        "planted_code.Recipe",
        "distillensx.Recipe",
        "os.system",
        "subprocess.Popen",
        "distillens.planted_code.Recipe",
        "distillens.core.recipe.replace",
        "distillens.core.storage.os",
        "planted_code",
        "distillens",
        "",
        "...planted_code.Recipe",
    ],
)
def test_loading_runs_no_code(saved: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("planted_code", "distillensx"):
        (saved / f"{module}.py").write_text(
            "from dataclasses import dataclass\n@dataclass\nclass Recipe:\n    command: str = ''\n"
        )
    monkeypatch.syspath_prepend(str(saved))
    edit(saved, lambda tensors, about: about.update(recipe={"is": name, "command": "true"}))
    with pytest.raises(UserError, match=r"unknown settings; got .*; expected a class of distillens"):
        DistilledDataset.load(saved)
    assert not {"planted_code", "distillensx"} & sys.modules.keys()


def test_a_recipe_with_an_unknown_field_is_refused(saved: Path) -> None:
    edit(saved, lambda tensors, about: about["recipe"].update(stepz=3))
    with pytest.raises(UserError, match="unknown setting of Recipe 'stepz'; Did you mean 'steps'"):
        DistilledDataset.load(saved)


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", [(os, "fsync"), (Path, "replace")], ids=["fsync", "rename"])
def test_a_full_disk_leaves_the_earlier_set_whole(
    saved: Path, where: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(*where, full)
        with pytest.raises(UserError, match=r"cannot write .*data.safetensors; the disk is full"):
            distilled().save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    DistilledDataset.load(saved)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_new_folder_that_was_not_finished_holds_no_set(
    tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, []

    def fsync(number: int) -> None:
        calls.append(number)
        full() if len(calls) > after else real(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match="the disk is full"):
            distilled().save(tmp_path / "run")
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.endswith(".part")]
    with pytest.raises(UserError, match="there is no distilled set in"):
        DistilledDataset.load(tmp_path / "run")


@pytest.mark.parametrize("after", [1, 2])
def test_a_set_that_was_overwritten_by_half_is_refused(
    saved: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, []

    def fsync(number: int) -> None:
        calls.append(number)
        full() if len(calls) > after else real(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match="the disk is full"):
            distilled().save(saved)
    with pytest.raises(UserError, match="was changed after it was made"):
        DistilledDataset.load(saved)


@pytest.mark.parametrize("point", [-1, N])
def test_a_point_that_is_not_there_cannot_be_left_out(point: int) -> None:
    with pytest.raises(UserError, match=f"there is no such point; got {point}; expected 0 to {N - 1}"):
        distilled().without(point)


def test_a_formation_has_at_least_one_patch() -> None:
    with pytest.raises(UserError, match="multi_formation: factor must be at least 1; got 0"):
        MultiFormation(0)
