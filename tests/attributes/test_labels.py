"""Attributes from a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distillens.attributes import fingerprints
from distillens.attributes.labels import MOST, Labels
from distillens.core.checks import UserError
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Hard
from distillens.core.space import Pixel


@pytest.fixture
def three() -> Dataset:
    images = torch.arange(3.0)[:, None, None, None].expand(3, 1, 4, 4) / 3
    return Dataset(images, Hard(torch.zeros(3, dtype=torch.long)), ("a", "b"), Pixel())


def test_rows_find_their_images_by_number(three: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "attributes.csv"
    path.write_text("image,background,size\n2,sky,big\n0,grass,\n1,,small\n", encoding="utf-8")
    found = Labels(str(path))(three, three)
    assert found.words == {"background": ("grass", "sky"), "size": ("big", "small")}
    assert found.values.tolist() == [[0, -1], [-1, 1], [1, 0]]


def test_rows_find_their_images_by_what_is_on_them(digits: Splits, tmp_path: Path) -> None:
    path = tmp_path / "attributes.csv"
    names = fingerprints(digits.test)
    rows = [f"{name},{'odd' if i % 2 else 'even'}" for i, name in enumerate(names)]
    path.write_text(
        "\n".join(["fingerprint,turn", *reversed(rows), "0123456789abcdef,odd"]), encoding="utf-8"
    )
    order = torch.arange(len(names)).flip(0)
    found = Labels(str(path))(digits.test.take(order), digits.val)
    assert torch.equal(found.values[:, 0], order % 2)


def test_two_equal_images_share_a_row(three: Dataset, tmp_path: Path) -> None:
    twice = three.take(torch.tensor([0, 1, 0]))
    path = tmp_path / "attributes.csv"
    one, other, _ = fingerprints(twice)
    path.write_text(f"fingerprint,a\n{one},x\n{other},y\n", encoding="utf-8")
    assert Labels(str(path))(twice, twice).values.tolist() == [[0], [1], [0]]


def test_a_file_as_spreadsheets_write_it_is_read(three: Dataset, tmp_path: Path) -> None:
    """A byte order mark, spaces around cells, commas too many, a short line."""
    path = tmp_path / "attributes.csv"
    path.write_text("\ufeffimage,a,b,\n0, x ,u,\n1,y,v ,,,\n2,x\n", encoding="utf-8")
    found = Labels(str(path))(three, three)
    assert found.words == {"a": ("x", "y"), "b": ("u", "v")}
    assert found.values.tolist() == [[0, 0], [1, 1], [0, -1]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "is no table of attributes.*expected a column 'image' or 'fingerprint'"),
        ("image,fingerprint,b\n1,2,3\n", "is no table of attributes"),
        ("image\n1\n", "is no table of attributes"),
        ("image,a,a\n1,x,y\n", "is no table of attributes"),
        ("image,a\n7,x\n1,y\n", "line 2: there is no such image; got '7'; expected one row an image, 0 to 2"),
        ("image,a\n1,x\n1,y\n", "line 3: an image has two rows; got '1'"),
        ("image,a\n1,x\n0,x\n", "the attribute 'a' has 1 words"),
        ("fingerprint,a\n0,x\n1,y\n", "knows none of the images"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(three: Dataset, tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "attributes.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        Labels(str(path))(three, three)


def test_a_measurement_is_no_attribute(tmp_path: Path, digits: Splits) -> None:
    path = tmp_path / "attributes.csv"
    path.write_text("image,a\n" + "".join(f"{i},{i / 7}\n" for i in range(MOST + 1)), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"has 51 words.*expected 2 to 50.*a measurement is cut into words first"
    ):
        Labels(str(path))(digits.test, digits.val)


def test_a_missing_file_is_named(three: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"labels needs a file; set its path: labels\(path=attributes.csv\)"):
        Labels()(three, three)
    with pytest.raises(UserError, match="cannot be read as CSV"):
        Labels(str(tmp_path / "nothing.csv"))(three, three)
