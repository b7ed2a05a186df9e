from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from distillens.core.checks import UserError
from distillens.core.dataset import Dataset, Splits, stratified
from distillens.core.rng import Key
from distillens.core.storage import read_tensors, write_tensors
from distillens.data import parquet

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "cifar10"
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
KEY = Key(0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own; the folder does not exist yet."""
    monkeypatch.setenv("DISTILLENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where each image came from that was decoded since the test began."""
    seen: list[str] = []
    real = parquet._pixels

    def counted(data: bytes | None, where: str) -> parquet.Image:
        seen.append(where)
        return real(data, where)

    monkeypatch.setattr(parquet, "_pixels", counted)
    return seen


def pictures(n: int, h: int = 6, w: int = 5, c: int = 1, seed: int = 0) -> np.ndarray:
    """uint8 images [n, h, w] or [n, h, w, 3], all different."""
    shape = (n, h, w) if c == 1 else (n, h, w, c)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(array: np.ndarray, kind: str = "PNG", mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(buffer, kind)
    return buffer.getvalue()


def pngs(arrays: np.ndarray) -> list[bytes | None]:
    return [encoded(array) for array in arrays]


def write(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[int | None] | None = None,
    *,
    names: Sequence[str] | None = None,
    **columns: pa.Array,
) -> Path:
    """A file as the hub has it: ``image`` (a struct), ``label`` (turns of three), and other columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [None if data is None else {"bytes": data, "path": None} for data in images]
    turns = [i % 3 for i in range(len(images))] if labels is None else labels
    table = pa.table({"image": pa.array(rows, STRUCT), "label": pa.array(turns, pa.int64()), **columns})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
        about = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": about})
    pq.write_table(table, path, row_group_size=17, compression="none")
    return path.parent


def levels(data: Dataset) -> torch.Tensor:
    """The images as they were before they were standardised, uint8 [n, c, h, w]."""
    return (data.pixels() * 255).round().to(torch.uint8)


def rows(splits: Splits) -> list[tuple[bytes, int]]:
    """Every image of the three splits with its label, sorted."""
    found = []
    for part in (splits.train, splits.val, splits.test):
        pairs = zip(levels(part).numpy(), part.labels.hard().tolist(), strict=True)
        found += [(image.tobytes(), label) for image, label in pairs]
    return sorted(found)


def expected(arrays: np.ndarray, labels: Sequence[int]) -> list[tuple[bytes, int]]:
    """The same of the arrays that were written."""
    channels_first = arrays if arrays.ndim == 3 else arrays.transpose(0, 3, 1, 2)
    return sorted((image.tobytes(), label) for image, label in zip(channels_first, labels, strict=True))


def test_every_row_arrives_with_its_label(tmp_path: Path) -> None:
    arrays = pictures(60)
    splits = parquet.load(write(tmp_path / "d" / "train.parquet", pngs(arrays)), key=KEY)
    assert splits.train.shape == (1, 6, 5)
    assert splits.train.images.dtype == torch.float32
    assert rows(splits) == expected(arrays, [i % 3 for i in range(60)])


@pytest.mark.parametrize("label_type", [pa.int64(), pa.int8(), pa.uint8(), pa.uint32()])
@pytest.mark.parametrize(
    "image_type", [STRUCT, pa.struct([("bytes", pa.large_binary())]), pa.binary(), pa.large_binary()]
)
def test_columns_of_any_name_and_order_are_found_by_their_type(
    tmp_path: Path, image_type: pa.DataType, label_type: pa.DataType
) -> None:
    arrays = pictures(30)
    data: list[Any] = pngs(arrays)
    if pa.types.is_struct(image_type):
        data = [{"bytes": one} for one in data]
    labels = [i % 2 for i in range(30)]
    table = pa.table(
        {
            "split": pa.array(["a"] * 30),
            "klass": pa.array(labels, label_type),
            "weight": pa.array([0.5] * 30),
            "picture": pa.array(data, image_type),
        }
    )
    (tmp_path / "d").mkdir()
    pq.write_table(table, tmp_path / "d" / "train.parquet")
    assert rows(parquet.load(tmp_path / "d", key=KEY)) == expected(arrays, labels)


def test_named_columns_come_before_others_of_their_type(tmp_path: Path) -> None:
    arrays = pictures(30)
    folder = write(
        tmp_path / "d" / "train.parquet",
        pngs(arrays),
        id=pa.array(range(30), pa.int64()),
        fine_label=pa.array(range(30), pa.int64()),
        mask=pa.array([b"x"] * 30),
    )
    assert rows(parquet.load(folder, key=KEY)) == expected(arrays, [i % 3 for i in range(30)])


def test_of_two_kinds_of_label_the_fine_one_is_taken(tmp_path: Path) -> None:
    arrays = pictures(40)
    fine, coarse = [i % 4 for i in range(40)], [i % 2 for i in range(40)]
    table = pa.table({"img": pngs(arrays), "coarse_label": coarse, "fine_label": fine})
    (tmp_path / "d").mkdir()
    pq.write_table(table, tmp_path / "d" / "train.parquet")
    assert rows(parquet.load(tmp_path / "d", key=KEY)) == expected(arrays, fine)


def test_colour_images_have_three_channels(tmp_path: Path) -> None:
    arrays = pictures(40, c=3)
    splits = parquet.load(write(tmp_path / "d" / "train.parquet", pngs(arrays)), key=KEY)
    assert splits.train.shape == (3, 6, 5)
    assert rows(splits) == expected(arrays, [i % 3 for i in range(40)])


def test_one_colour_image_makes_all_of_them_colour(tmp_path: Path) -> None:
    grey, colour = pictures(39), pictures(1, c=3, seed=1)
    folder = write(tmp_path / "d" / "train.parquet", pngs(grey)[:20])
    write(folder / "test.parquet", [*pngs(grey)[20:], *pngs(colour)])
    splits = parquet.load(folder, key=KEY)
    whole = np.concatenate([np.repeat(grey[:, :, :, None], 3, axis=3), colour])
    assert rows(splits) == expected(whole, [i % 3 for i in range(20)] + [i % 3 for i in range(20)])


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("LA", 1), ("P", 3), ("RGBA", 3), ("CMYK", 3)])
def test_other_eight_bit_modes_become_grey_or_colour(tmp_path: Path, mode: str, channels: int) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    black, white = np.zeros((6, 5, 3), np.uint8), np.full((6, 5, 3), 255, np.uint8)
    images = [encoded((black, white)[i % 2], kind, mode) for i in range(30)]
    splits = parquet.load(
        write(tmp_path / "d" / "train.parquet", images, [i % 2 for i in range(30)]), key=KEY
    )
    assert splits.train.shape == (channels, 6, 5)
    assert torch.equal(levels(splits.train)[:, 0, 0, 0], (splits.train.labels.hard() * 255).to(torch.uint8))


def test_given_splits_are_used_as_they_are_and_shards_are_joined_in_order(tmp_path: Path) -> None:
    arrays = pictures(50)
    folder = tmp_path / "d"
    write(folder / "train-00001-of-00002.parquet", pngs(arrays[20:30]))
    write(folder / "train-00000-of-00002.parquet", pngs(arrays[:20]))
    write(folder / "test-00000-of-00001-0a1b.parquet", pngs(arrays[30:40]))
    write(folder / "validation-00000-of-00001.parquet", pngs(arrays[40:]))
    write(folder / "extra-00000-of-00001.parquet", pngs(pictures(5, seed=9)))
    splits = parquet.load(folder, key=KEY)
    assert torch.equal(levels(splits.train)[:, 0], torch.from_numpy(arrays[:30]))
    assert torch.equal(levels(splits.test)[:, 0], torch.from_numpy(arrays[30:40]))
    assert torch.equal(levels(splits.val)[:, 0], torch.from_numpy(arrays[40:]))
    assert splits.fingerprint == parquet.load(folder, key=Key(1)).fingerprint


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_a_validation_file_has_several_names(tmp_path: Path, name: str) -> None:
    arrays = pictures(6, seed=1)
    folder = write(tmp_path / "d" / "train.parquet", pngs(pictures(30)))
    write(folder / f"{name}.parquet", pngs(arrays))
    assert torch.equal(levels(parquet.load(folder, key=KEY).val)[:, 0], torch.from_numpy(arrays))


def test_validation_is_cut_from_training_by_the_key(tmp_path: Path) -> None:
    arrays, test = pictures(90), pictures(9, seed=1)
    folder = write(tmp_path / "d" / "train.parquet", pngs(arrays))
    write(folder / "test.parquet", pngs(test))
    splits = parquet.load(folder, key=Key(3))
    labels = torch.arange(90) % 3
    val, train = stratified(labels, 3, [100], Key(3).fold("split").permutation(90))
    whole = torch.from_numpy(arrays)
    assert len(val) == 9
    assert torch.equal(levels(splits.val)[:, 0], whole[val])
    assert torch.equal(levels(splits.train)[:, 0], whole[train])
    assert torch.equal(levels(splits.test)[:, 0], torch.from_numpy(test))
    assert parquet.load(folder, key=Key(3)).fingerprint == splits.fingerprint
    assert parquet.load(folder, key=Key(4)).val.fingerprint != splits.val.fingerprint


def test_test_images_are_cut_too_where_there_is_only_training(tmp_path: Path) -> None:
    arrays = pictures(90)
    labels = [0] * 50 + [1] * 30 + [2] * 10
    splits = parquet.load(write(tmp_path / "d" / "train.parquet", pngs(arrays), labels), key=KEY)
    assert rows(splits) == expected(arrays, labels)
    for part, share in ((splits.train, 0.7), (splits.val, 0.1), (splits.test, 0.2)):
        for index, total in zip(part.by_class, (50, 30, 10), strict=True):
            assert abs(len(index) - share * total) <= 1


def test_a_single_file_is_training_data_whatever_its_name(tmp_path: Path) -> None:
    arrays = pictures(60)
    file = write(tmp_path / "d" / "test.parquet", pngs(arrays)) / "test.parquet"
    splits = parquet.load(file, key=KEY)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (42, 6, 12)


def test_classes_have_the_names_of_the_metadata_or_numbers(tmp_path: Path) -> None:
    named = write(tmp_path / "a" / "train.parquet", pngs(pictures(60)), names=("cat", "dog", "eel", "fox"))
    assert parquet.load(named, key=KEY).train.classes == ("cat", "dog", "eel", "fox")
    bare = write(tmp_path / "b" / "train.parquet", pngs(pictures(60)))
    assert parquet.load(bare, key=KEY).train.classes == ("0", "1", "2")


@pytest.mark.parametrize("about", ["{", "[]", '{"info": {"features": {"label": {"_type": "ClassLabel"}}}}'])
def test_metadata_without_names_is_no_metadata(tmp_path: Path, about: str) -> None:
    table = pa.table({"img": pngs(pictures(30)), "label": [i % 2 for i in range(30)]})
    (tmp_path / "d").mkdir()
    pq.write_table(table.replace_schema_metadata({"huggingface": about}), tmp_path / "d" / "train.parquet")
    assert parquet.load(tmp_path / "d", key=KEY).train.classes == ("0", "1")


def test_the_space_is_fitted_on_the_training_split_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "d" / "train.parquet", pngs(pictures(60, c=3)))
    write(folder / "test.parquet", pngs(pictures(12, c=3, seed=1) // 4))
    splits = parquet.load(folder, key=KEY)
    pixels = levels(splits.train).double() / 255
    space = splits.space.describe()
    np.testing.assert_allclose(space["mean"], pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(space["std"], pixels.std((0, 2, 3), correction=0), rtol=1e-12)
    assert float(splits.test.images.mean()) < -0.5


def test_cifar_10_gets_the_constants_of_the_field_and_nothing_else_does(tmp_path: Path) -> None:
    arrays, labels = pictures(100, 32, 32, 3), [i % 10 for i in range(100)]
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    field = {"kind": "standardised", "mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]}
    cifar = write(tmp_path / "a" / "train.parquet", pngs(arrays), labels, names=names)
    assert parquet.load(cifar, key=KEY).space.describe() == field
    other = write(tmp_path / "b" / "train.parquet", pngs(arrays), labels, names=names[::-1])
    assert parquet.load(other, key=KEY).space.describe() != field
    small = write(tmp_path / "c" / "train.parquet", pngs(pictures(100, 16, 16, 3)), labels, names=names)
    assert parquet.load(small, key=KEY).space.describe() != field


def test_the_second_load_decodes_nothing_and_imports_no_extra(
    tmp_path: Path, cache: Path, decodes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "d" / "train.parquet", pngs(pictures(30)), names=("a", "b", "c"))
    first = parquet.load(folder, key=KEY)
    assert len(decodes) == 30
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    second = parquet.load(folder, key=KEY)
    assert len(decodes) == 30
    assert second.fingerprint == first.fingerprint
    assert second.train.classes == ("a", "b", "c")
    assert parquet.load(folder, key=Key(1)).fingerprint != first.fingerprint  # the cut is not cached


def test_the_cache_goes_with_the_contents_not_with_the_place(tmp_path: Path, decodes: list[str]) -> None:
    folder = write(tmp_path / "d" / "train.parquet", pngs(pictures(30)))
    first = parquet.load(folder, key=KEY)
    moved = Path(shutil.move(folder, tmp_path / "moved"))
    assert parquet.load(moved, key=KEY).fingerprint == first.fingerprint
    assert len(decodes) == 30


def test_other_contents_of_the_same_size_are_decoded_again(tmp_path: Path, decodes: list[str]) -> None:
    folder = tmp_path / "d"
    turns = [i % 3 for i in range(30)]
    write(folder / "train.parquet", pngs(pictures(30)), turns)
    size = (folder / "train.parquet").stat().st_size
    first = parquet.load(folder, key=KEY)
    write(folder / "train.parquet", pngs(pictures(30)), turns[::-1])
    assert (folder / "train.parquet").stat().st_size == size
    second = parquet.load(folder, key=KEY)
    assert len(decodes) == 60
    assert second.fingerprint != first.fingerprint


def test_another_decoder_decodes_again(
    tmp_path: Path, decodes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "d" / "train.parquet", pngs(pictures(30)))
    parquet.load(folder, key=KEY)
    monkeypatch.setattr(parquet, "version", lambda name: f"another {name}")
    parquet.load(folder, key=KEY)
    assert len(decodes) == 60


def test_a_file_that_changes_its_split_is_cached_anew(tmp_path: Path) -> None:
    folder = write(tmp_path / "d" / "train.parquet", pngs(pictures(30)))
    write(folder / "test.parquet", pngs(pictures(12, seed=1)))
    assert len(parquet.load(folder, key=KEY).test) == 12
    (folder / "test.parquet").rename(folder / "dev.parquet")  # in the same place of the sorted list
    assert len(parquet.load(folder, key=KEY).val) == 12


def damage_cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def damage_flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-500] ^= 1  # still a safetensors file, of another image
    file.write_bytes(bytes(data))


def damage_empty(file: Path) -> None:
    file.write_bytes(b"")


def damage_metadata(file: Path) -> None:
    write_tensors(file, read_tensors(file)[0])


def damage_names(file: Path) -> None:
    tensors, metadata = read_tensors(file)
    about = json.loads(metadata["about"])
    write_tensors(file, tensors, {"about": json.dumps({**about, "classes": ["b", "a", "c"]})})


@pytest.mark.parametrize("damage", [damage_cut, damage_flip, damage_empty, damage_metadata, damage_names])
def test_a_damaged_cache_is_made_again(
    tmp_path: Path, cache: Path, decodes: list[str], damage: Callable[[Path], None]
) -> None:
    folder = write(tmp_path / "d" / "train.parquet", pngs(pictures(60)))
    first = parquet.load(folder, key=KEY)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    damage(file)
    assert parquet.load(folder, key=KEY).fingerprint == first.fingerprint
    assert len(decodes) == 120
    assert file.read_bytes() == whole
    assert [item.name for item in cache.iterdir()] == [file.name]


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, decodes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "d" / "train.parquet", pngs(pictures(30)))
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DISTILLENS_CACHE", str(tmp_path / "file" / "cache"))
    first = parquet.load(folder, key=KEY)
    assert parquet.load(folder, key=KEY).fingerprint == first.fingerprint
    assert len(decodes) == 60


def test_without_a_variable_the_cache_is_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILLENS_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    parquet.load(write(tmp_path / "d" / "train.parquet", pngs(pictures(30))), key=KEY)
    assert len(list((tmp_path / "home" / ".cache" / "distillens" / "data").glob("*.safetensors"))) == 1


def test_without_a_home_folder_there_is_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    assert len(parquet.load(write(tmp_path / "d" / "train.parquet", pngs(pictures(30))), key=KEY).train) == 21


def test_the_global_generators_are_left_alone(tmp_path: Path) -> None:
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    parquet.load(write(tmp_path / "d" / "train.parquet", pngs(pictures(30))), key=KEY)
    assert torch.equal(before, torch.get_rng_state())
    assert (numpys == np.random.get_state()[1]).all()  # type: ignore[index]


def refused(path: Path, *parts: str) -> None:
    """Assert that loading fails with a message that has these parts, in this order."""
    with pytest.raises(UserError, match=".*".join(re.escape(part) for part in parts)):
        parquet.load(path, key=KEY)


@pytest.mark.parametrize("module", ["pyarrow", "PIL"])
def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    folder = write(tmp_path / "d" / "train.parquet", pngs(pictures(30)))
    monkeypatch.setitem(sys.modules, module, None)
    refused(folder, "parquet files need pyarrow and Pillow; got", module, "pip install 'distillens[parquet]'")


def test_a_folder_without_training_files_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "there are no training files in", "got no parquet files; expected train.parquet")
    write(tmp_path / "test.parquet", pngs(pictures(30)))
    refused(tmp_path, "there are no training files in", "got test.parquet", "rename the files")
    write(tmp_path / "data" / "train-00000-of-00001.parquet", pngs(pictures(30)))
    refused(tmp_path, "there are no training files in", "there are some in", "data")


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "d" / "train-00000-of-00003.parquet", pngs(pictures(30)))
    write(folder / "train-00002-of-00003.parquet", pngs(pictures(30)))
    refused(
        folder, "the train files in", "are not one whole set; got 2: train-00000-of-00003", "expected 3 files"
    )


def test_a_split_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "d" / "train-00000-of-00001.parquet", pngs(pictures(30)))
    write(folder / "train.parquet", pngs(pictures(30)))
    refused(
        folder,
        "the train files in",
        "are not one whole set; got 2: train-00000-of-00001.parquet, train.parquet",
    )


def test_a_file_that_is_not_parquet_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "d" / "train.parquet", pngs(pictures(30)))
    (folder / "test.parquet").write_text("<html>404 not found, and a good deal more of it</html>")
    refused(folder, "test.parquet is not a whole parquet file; got", "download it again")


@pytest.mark.parametrize("keep", [0, 100, -200])
def test_a_file_that_was_cut_is_named(tmp_path: Path, keep: int) -> None:
    folder = write(tmp_path / "d" / "train.parquet", pngs(pictures(30)))
    file = folder / "train.parquet"
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, "train.parquet is not a whole parquet file")


def test_damage_inside_a_file_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "d" / "train.parquet", pngs(pictures(30)))
    file = folder / "train.parquet"
    data = bytearray(file.read_bytes())
    data[4:40] = bytes(36)  # the header of the first page; the footer is whole
    file.write_bytes(bytes(data))
    refused(folder, "train.parquet is not a whole parquet file")


def test_a_folder_in_a_files_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d" / "train.parquet").mkdir(parents=True)
    refused(tmp_path / "d", "train.parquet cannot be read; got")


def shortened(data: bytes | None) -> bytes:
    assert data is not None
    return data[:-30]  # less would take nothing of the pixels


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"not an image",
        b"\x89PNG\r\n\x1a\n",
        shortened(encoded(pictures(1)[0])),
        encoded(pictures(1)[0], "JPEG")[:200],
    ],
)
def test_an_image_that_cannot_be_decoded_is_named_by_file_and_row(tmp_path: Path, broken: bytes) -> None:
    folder = write(tmp_path / "d" / "train.parquet", pngs(pictures(60)))
    images = pngs(pictures(30))
    images[23] = broken
    write(folder / "test.parquet", images)
    refused(
        folder, "row 23 of", "test.parquet is not an image that can be decoded; got", "mend or remove the row"
    )


def test_rows_are_counted_over_batches(tmp_path: Path) -> None:
    images = pngs(pictures(1)) * 1500
    images[1400] = b"broken"
    refused(write(tmp_path / "d" / "train.parquet", images), "row 1400 of", "train.parquet is not an image")


def test_a_row_without_bytes_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "a" / "train.parquet", [*pngs(pictures(5)), None])
    refused(folder, "row 5 of", "train.parquet has no image bytes; store the images in the file")
    only_paths = pa.array([{"bytes": None, "path": f"{i}.png"} for i in range(6)], STRUCT)
    (tmp_path / "b").mkdir()
    pq.write_table(pa.table({"image": only_paths, "label": range(6)}), tmp_path / "b" / "train.parquet")
    refused(tmp_path / "b", "row 0 of", "train.parquet has no image bytes")


def test_sixteen_bits_are_refused_rather_than_cut(tmp_path: Path) -> None:
    deep = encoded(np.full((6, 5), 40000, np.uint16))
    folder = write(tmp_path / "d" / "train.parquet", [*pngs(pictures(5)), deep])
    refused(folder, "row 5 of", "train.parquet is not an image of eight bits a channel; got mode I;16")


@pytest.mark.parametrize("place", [0, 4])
def test_the_image_of_another_size_is_named(tmp_path: Path, place: int) -> None:
    folder = write(tmp_path / "d" / "train.parquet", pngs(pictures(30)))
    images = pngs(pictures(9))
    images[place] = encoded(pictures(1, 7, 4)[0])
    write(folder / "test.parquet", images)
    refused(
        folder,
        f"images differ in size: row {place} of",
        "test.parquet is 7 x 4; expected 6 x 5, as 38 others are",
    )


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "d" / "train.parquet", pngs(pictures(30)))
    write(folder / "test.parquet", [])
    refused(folder, "there are no images in", "test.parquet")


def test_a_missing_label_column_is_named_with_what_is_there(tmp_path: Path) -> None:
    table = pa.table({"image": pngs(pictures(30)), "text": ["a"] * 30})
    (tmp_path / "d").mkdir()
    pq.write_table(table, tmp_path / "d" / "train.parquet")
    refused(
        tmp_path / "d",
        "train.parquet has no label column; got image: binary, text: string; expected one column of whole numbers",
    )


def test_a_label_column_of_words_is_not_replaced_by_another_column(tmp_path: Path) -> None:
    table = pa.table({"image": pngs(pictures(30)), "label": ["a", "b", "c"] * 10, "id": range(30)})
    (tmp_path / "d").mkdir()
    pq.write_table(table, tmp_path / "d" / "train.parquet")
    refused(tmp_path / "d", "train.parquet has no label column; got image: binary, label: string, id: int64")


def test_a_missing_image_column_is_named_with_what_is_there(tmp_path: Path) -> None:
    pq.write_table(pa.table({"label": [0, 1], "path": ["a", "b"]}), tmp_path / "train.parquet")
    refused(
        tmp_path,
        "train.parquet has no image column; got label: int64, path: string; expected one column of bytes",
    )


def test_two_columns_that_may_be_the_one_are_refused(tmp_path: Path) -> None:
    table = pa.table({"a": pngs(pictures(6)), "b": pngs(pictures(6)), "label": range(6)})
    pq.write_table(table, tmp_path / "train.parquet")
    refused(
        tmp_path,
        "train.parquet has several columns that may be the image column",
        "name the right one 'image'",
    )
    table = pa.table({"a": pngs(pictures(6)), "x": range(6), "y": range(6)})
    pq.write_table(table, tmp_path / "train.parquet")
    refused(
        tmp_path,
        "train.parquet has several columns that may be the label column",
        "name the right one 'label'",
    )


@pytest.mark.parametrize(("label", "shown"), [(-1, "-1"), (None, "None")])
def test_a_row_without_a_label_is_named(tmp_path: Path, label: int | None, shown: str) -> None:
    folder = write(tmp_path / "d" / "train.parquet", pngs(pictures(30)))
    write(folder / "test.parquet", pngs(pictures(3)), [0, 1, label])
    refused(
        folder,
        "row 2 of",
        f"test.parquet has no label; got {shown}; expected a class number from 0; leave out",
    )


def test_labels_that_leave_a_number_out_need_names(tmp_path: Path) -> None:
    labels = [1 + i % 2 for i in range(60)]
    folder = write(tmp_path / "a" / "train.parquet", pngs(pictures(60)), labels)
    refused(folder, "class numbers run from 0 without a gap; got 2 different labels, 1 to 2, but no 0")
    named = write(tmp_path / "b" / "train.parquet", pngs(pictures(60)), labels, names=("none", "cat", "dog"))
    assert parquet.load(named, key=KEY).train.classes == ("none", "cat", "dog")


def test_a_label_beyond_the_names_is_named_by_file_and_row(tmp_path: Path) -> None:
    folder = write(tmp_path / "d" / "train.parquet", pngs(pictures(30)), names=("cat", "dog", "eel"))
    write(folder / "test.parquet", pngs(pictures(3)), [0, 7, 9])
    refused(
        folder,
        "row 1 of",
        "test.parquet has a label that has no name; got 7; expected 0 to 2, for cat, dog, eel",
    )


def test_files_that_name_other_classes_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "d" / "train.parquet", pngs(pictures(30)), names=("cat", "dog", "eel"))
    write(folder / "test.parquet", pngs(pictures(9)), names=("dog", "cat", "eel"))
    refused(
        folder,
        "files of one dataset must name the same classes in the same order; got ('cat', 'dog', 'eel') in",
    )


def test_too_few_images_to_cut_from_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "d" / "train.parquet", pngs(pictures(6)))
    refused(folder, "there are too few images a class to cut a val split from; got 6 images")


def test_images_that_are_all_black_cannot_be_standardised(tmp_path: Path) -> None:
    folder = write(tmp_path / "d" / "train.parquet", pngs(pictures(60) * 0))
    refused(folder, "channel 0 has one value in all training images")


@pytest.mark.skipif(not REAL.is_dir(), reason="the real CIFAR-10 is not beside the checkout")
def test_the_real_cifar_10(decodes: list[str]) -> None:
    splits = parquet.load(REAL, key=KEY)
    assert len(decodes) == 60_000
    for part, size in ((splits.train, 4500), (splits.val, 500), (splits.test, 1000)):
        assert part.shape == (3, 32, 32)
        assert [len(index) for index in part.by_class] == [size] * 10
    assert splits.train.classes[6] == "frog"
    assert splits.space == parquet.CIFAR10
    # The means are CIFAR-10's own; its deviations are 0.247, 0.2435 and 0.2616 (less than 1 % below in copies
    # that were kept as JPEG), not the "old" ones.
    images = torch.cat([splits.train.images, splits.val.images]).numpy()
    means = [images[:, c].mean(dtype=np.float64) for c in range(3)]
    stds = [images[:, c].std(dtype=np.float64) for c in range(3)]
    np.testing.assert_allclose(means, 0, atol=1e-3)
    np.testing.assert_allclose(stds, [0.2470 / 0.2023, 0.2435 / 0.1994, 0.2616 / 0.2010], rtol=0.01)
    assert parquet.load(REAL, key=KEY).fingerprint == splits.fingerprint
    assert len(decodes) == 60_000
