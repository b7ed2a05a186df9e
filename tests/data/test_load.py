from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from distillens import data
from distillens.core.checks import UserError
from distillens.core.dataset import Splits
from distillens.core.rng import Key
from distillens.core.space import same_space


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLENS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def toys(tmp_path: Path) -> Path:
    """A folder with 40 images of two classes."""
    noise = np.random.default_rng(0)
    images = []
    for _ in range(40):
        buffer = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (6, 5), dtype=np.uint8)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    folder = tmp_path / "toys"
    folder.mkdir()
    table = pa.table({"image": images, "label": pa.array([i % 2 for i in range(40)], pa.int64())})
    pq.write_table(table, folder / "train.parquet")
    return folder


def test_digits_by_name() -> None:
    splits = data.load("digits", key=Key(4))
    assert splits.source == "digits"
    assert splits.fingerprint == data.load("digits", key=Key(4)).fingerprint
    assert splits.fingerprint != data.load("digits").fingerprint
    assert data.load("digits").fingerprint == data.load("digits", key=Key(0)).fingerprint


def test_a_path_with_its_kind_and_a_bare_path_are_the_same_data(
    toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(toys.parent)
    specs = ("parquet:toys", "parquet:./toys/", "toys", "toys/train.parquet", "parquet:toys/train.parquet")
    loaded = [data.load(spec, key=Key(2)) for spec in specs]
    assert len({splits.fingerprint for splits in loaded}) == 1
    assert tuple(splits.source for splits in loaded) == specs
    assert data.load("toys", key=Key(3)).fingerprint != loaded[0].fingerprint


def test_a_path_may_start_at_home(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(toys.parent))
    assert data.load("parquet:~/toys").fingerprint == data.load("~/toys").fingerprint


def test_a_folder_named_like_a_source_needs_its_kind(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toys.rename(toys.parent / "digits")
    monkeypatch.chdir(toys.parent)
    assert data.load("digits").train.shape == (1, 8, 8)
    assert data.load("./digits").train.shape == (1, 6, 5)


def test_data_comes_in_a_space_by_name() -> None:
    plain = data.load("digits")
    assert data.load("digits", space="standardised").fingerprint == plain.fingerprint
    pixels = torch.cat([part.pixels() for part in (plain.train, plain.val, plain.test)])
    found = set()
    for space in data.SPACES:
        splits = data.load("digits", space=space)
        assert (splits.space.name, splits.source) == (space, "digits")
        assert splits.fingerprint == data.load("digits", space=space).fingerprint
        assert torch.equal(splits.train.labels.hard(), plain.train.labels.hard())
        if splits.space.invertible:
            again = torch.cat([part.pixels() for part in (splits.train, splits.val, splits.test)])
            torch.testing.assert_close(again, pixels, rtol=0, atol=1e-5)
        found.add(splits.fingerprint)
    assert len(found) == len(data.SPACES) == 5


@pytest.mark.parametrize("space", data.WHITENED)
def test_a_whitening_is_fitted_on_the_training_split_alone(space: str) -> None:
    plain = data.load("digits")
    other = Splits(plain.train, plain.test, plain.val.take(torch.arange(50)))
    assert same_space(data.in_space(other, space).space, data.load("digits", space=space).space)
    less = Splits(plain.train.take(torch.arange(500)), plain.val, plain.test)
    assert not same_space(data.in_space(less, space).space, data.load("digits", space=space).space)
    # Every split goes through the same matrix.
    splits = data.load("digits", space=space)
    for part, before in ((splits.val, plain.val), (splits.test, plain.test)):
        torch.testing.assert_close(
            part.images, splits.space.from_pixels(before.pixels()), rtol=1e-4, atol=1e-5
        )


def test_data_that_is_in_the_space_already_stays_as_it_is() -> None:
    for space in data.SPACES:
        splits = data.load("digits", space=space)
        assert data.in_space(splits, space) is splits
        assert data.in_space(splits, "standardised") is splits


def test_what_has_lost_its_pixels_goes_nowhere_else() -> None:
    splits = data.load("digits", space="zca-kip")
    for space in ("pixel", "zca", "zca-frepo"):
        with pytest.raises(
            UserError,
            match="images cannot be brought out of the space zca-kip; got images that have lost their brightness "
            "and contrast; load the real data again, in the space that is wanted",
        ):
            data.in_space(splits, space)


def test_an_unknown_space_is_refused_before_anything_is_read() -> None:
    with pytest.raises(
        UserError,
        match=r"unknown space 'zca-kipp'; Did you mean 'zca-kip'\? Known: pixel, standardised, zca,",
    ):
        data.load("nowhere.parquet", space="zca-kipp")


def test_the_folder_is_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert data.sources() == ["digits", "parquet"]
    (tmp_path / "zebra.py").write_text('"""A source."""\n\n\ndef load(path, *, key):\n    return 1\n')
    (tmp_path / "shared.py").write_text('"""No source."""\n\n\ndef unload():\n    return 1\n')
    monkeypatch.setattr(data, "__file__", str(tmp_path / "__init__.py"))
    assert data.sources() == ["zebra"]


def test_the_room_and_its_list_import_nothing_heavy() -> None:
    script = (
        "import sys; import distillens.data as d; assert d.sources(); "
        "print([m for m in ('torch', 'numpy', 'sklearn', 'pyarrow', 'PIL') if m in sys.modules], "
        "[m for m in sys.modules if m.startswith('distillens.data.')])"
    )
    root = Path(data.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[] []"


def test_loading_leaves_the_global_generator_alone(toys: Path) -> None:
    before = torch.get_rng_state()
    data.load(f"parquet:{toys}")
    data.load(str(toys))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digitz", "unknown data 'digitz'; Did you mean 'digits'? Known: digits, parquet"),
        ("parqet:toys", "unknown data 'parqet'; Did you mean 'parquet'? Known: digits, parquet"),
        ("parqet:toys/train.parquet", "unknown data 'parqet'; Did you mean 'parquet'?"),
        ("tensors", "unknown data 'tensors'"),
        ("", "unknown data ''; Known: digits, parquet"),
        ("digits:toys", "digits takes no path; got 'digits:toys'; write digits"),
        ("parquet", "parquet needs a path; got 'parquet'; write parquet:PATH"),
        ("parquet:", "parquet needs a path; got 'parquet:'; write parquet:PATH"),
        (
            "parquet:tois",
            "there is no data where the path points; got 'tois'; expected a folder or a file; check",
        ),
        ("tois/", "there is no data where the path points; got 'tois/'"),
        ("tois.parquet", "there is no data where the path points; got 'tois.parquet'"),
        (
            "bare",
            "no kind of data fits bare; got a folder with nothing in it; expected files of one of the kinds parquet",
        ),
        ("other", "no kind of data fits other; got a folder with a.txt, b.txt, c.txt; expected"),
        ("other/a.txt", "no kind of data fits other/a.txt; got a file a.txt; expected"),
    ],
)
def test_a_spec_that_leads_nowhere_is_refused(
    spec: str, message: str, toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(toys.parent)
    Path("bare").mkdir()
    Path("other").mkdir()
    for name in "dcba":
        Path("other", f"{name}.txt").write_text("")
    with pytest.raises(UserError, match="^" + re.escape(message)):
        data.load(spec)
