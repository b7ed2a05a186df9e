"""Folders of parquet files as the Hugging Face hub keeps them: encoded images beside class numbers."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distillens.core.checks import UserError
from distillens.core.dataset import Splits
from distillens.core.rng import Key
from distillens.core.space import Space, Standardised
from distillens.core.storage import fingerprint, read_tensors, write_tensors
from distillens.data.tensors import SHARES, Pair, cut, from_tensors, numbered, standardised

# The "old" constants, which the DC and MTT families train and publish with.
CIFAR10 = Standardised((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)

Image = np.ndarray[Any, np.dtype[np.uint8]]  # [h, w] where grey, [h, w, 3] where not

_SPLITS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val", "test": "test"}
_SPLIT_NAME = re.compile(rf"({'|'.join(_SPLITS)})(?=[-_.])")
_SHARDS = re.compile(r"-\d+-of-(\d+)")

# Pillow's modes of eight bits a channel. Others (16 bits, float) would be cut to 0..255 without a word.
_GREY = ("1", "L", "LA")
_COLOUR = ("P", "RGB", "RGBA", "CMYK", "YCbCr")

# What is cached is decoded by the code below: a change of what it gives needs another number.
_FORMAT = 1


def recognises(path: Path) -> bool:
    """Whether ``path`` is a parquet file or a folder that holds some."""
    return (path.is_file() and path.suffix == ".parquet") or any(path.glob("*.parquet"))


def load(path: Path, *, key: Key) -> Splits:
    """Images [n, c, h, w] and labels of a folder of parquet files, standardised.

    Files are told apart by how their names begin: ``train``, ``validation`` (or ``val``, ``valid``, ``dev``)
    and ``test``; others are left alone. A single file is training data, whatever its name. A split that has no
    file is cut from the training data, class by class, at ``key.fold("split")``: 10 % for validation, 20 %
    for testing.

    The image column is named ``image`` or ``img`` or is the only one that holds bytes (plain, or as a
    ``bytes`` field); the label column is named ``label``, ``labels`` or ``fine_label`` or is the only one of whole
    numbers. Class names are those in the files' Hugging Face metadata, else "0" .. "k-1". Images are grey where
    all are, else RGB; transparency is dropped.

    CIFAR-10 gets the constants that the field publishes with, other data the mean and standard deviation of each
    channel of its training split.

    Decoded images are kept under ``$DISTILLENS_CACHE`` or ``~/.cache/distillens``, by the files' contents.

    Raises:
        UserError: pyarrow or Pillow is not installed; training files are missing, damaged or not parquet; a column
            is missing or ambiguous; an image or a label does not fit (the message names file and row).
    """
    files = _files(path)
    decoded = _remembered(files)
    parts = dict(decoded.parts)
    absent = {name: share for name, share in SHARES.items() if name not in parts}
    if absent:
        parts |= cut(*parts["train"], absent, key)
    space = _space(parts["train"][0], decoded.classes)
    return from_tensors(
        *parts["train"], classes=decoded.classes, val=parts["val"], test=parts["test"], space=space
    )


@dataclass(frozen=True, eq=False)
class _Decoded:
    """uint8 images [n, c, h, w] and labels of each split, and the class names."""

    parts: Mapping[str, Pair]
    classes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _File:
    """What one file holds, and the class names that it gives."""

    path: Path
    images: list[Image]
    labels: torch.Tensor
    names: tuple[str, ...] | None


def _files(path: Path) -> dict[str, list[Path]]:
    """The files of each split, sorted by name."""
    if path.is_file():
        return {"train": [path]}
    files: dict[str, list[Path]] = {}
    held = sorted(path.glob("*.parquet"))
    for file in held:
        if match := _SPLIT_NAME.match(file.name.lower()):
            files.setdefault(_SPLITS[match[1]], []).append(file)
    if "train" not in files:
        below = next((file.parent for file in sorted(path.glob("*/train*.parquet"))), None)
        raise UserError(
            f"there are no training files in {path}",
            got=", ".join(file.name for file in held[:3]) or "no parquet files",
            expected="train.parquet, train-00000-of-00002.parquet or the like",
            fix=f"there are some in {below}" if below else "rename the files, or name a single file",
        )
    for split, those in files.items():
        shards = {int(match[1]) if (match := _SHARDS.search(file.name)) else 0 for file in those}
        if shards != {0} and shards != {len(those)}:
            raise UserError(
                f"the {split} files in {path} are not one whole set",
                got=f"{len(those)}: {', '.join(file.name for file in those[:3])}",
                expected=f"{max(shards)} files that count up to {max(shards)}",
                fix="download the missing ones, or remove what does not belong to the set",
            )
    return files


def _space(train: torch.Tensor, classes: tuple[str, ...]) -> Space:
    if tuple(train.shape[1:]) == (3, 32, 32) and classes == CIFAR10_CLASSES:
        return CIFAR10
    return standardised(train, 255)


def _remembered(files: Mapping[str, Sequence[Path]]) -> _Decoded:
    """The decoded files, from the cache where it has them; a cache that cannot be used is done without."""
    try:
        # An empty variable is an unset one; a user without a home folder makes expanduser fail.
        folder = Path(os.environ.get("DISTILLENS_CACHE") or "~/.cache/distillens").expanduser() / "data"
    except RuntimeError:
        return _decode(files)
    cache = folder / f"{_contents(files)}.safetensors"
    try:
        return _recall(cache)
    except (OSError, ValueError, KeyError, TypeError):  # absent, or damaged in whatever way
        decoded = _decode(files)
    tensors = {f"{name}.images": images for name, (images, _) in decoded.parts.items()}
    tensors |= {f"{name}.labels": labels for name, (_, labels) in decoded.parts.items()}
    about = {"classes": decoded.classes, "check": _check(tensors, decoded.classes)}
    with suppress(UserError):  # where it cannot be written, the images are here all the same
        write_tensors(cache, tensors, {"about": json.dumps(about)})
    return decoded


def _recall(cache: Path) -> _Decoded:
    tensors, metadata = read_tensors(cache)
    about = json.loads(metadata["about"])
    classes = tuple(about["classes"])
    if about["check"] != _check(tensors, classes):
        raise ValueError("the cached images are not those that were written")
    parts = {
        name: (tensors[f"{name}.images"], tensors[f"{name}.labels"])
        for name in ("train", "val", "test")
        if f"{name}.images" in tensors
    }
    return _Decoded(parts, classes)


def _check(tensors: Mapping[str, torch.Tensor], classes: tuple[str, ...]) -> str:
    return fingerprint(list(classes), *(part for name in sorted(tensors) for part in (name, tensors[name])))


def _contents(files: Mapping[str, Sequence[Path]]) -> str:
    """A SHA-256 of the files' roles, names, sizes and bytes, and of what decodes them."""
    # Versions of Pillow bring other JPEG decoders, and those differ in the last bit of a pixel.
    try:
        pillow = version("pillow")
    except PackageNotFoundError:
        pillow = ""
    about: list[Any] = [_FORMAT, pillow]
    for split, those in files.items():
        for file in those:
            try:
                with file.open("rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                about.append([split, file.name, file.stat().st_size, digest])
            except OSError as error:
                raise UserError(f"{file} cannot be read", got=error.strerror or str(error)) from error
    return fingerprint(about)


def _decode(files: Mapping[str, Sequence[Path]]) -> _Decoded:
    """The images and labels of all files, checked against one another."""
    read = {split: [_read(file) for file in those] for split, those in files.items()}
    every = [file for those in read.values() for file in those]
    sizes = Counter(image.shape[:2] for file in every for image in file.images)
    if len(sizes) > 1:
        (h, w), count = sizes.most_common(1)[0]
        odd = ((file, row, image) for file in every for row, image in enumerate(file.images))
        file, row, image = next((f, r, i) for f, r, i in odd if i.shape[:2] != (h, w))
        raise UserError(
            f"images differ in size: row {row} of {file.path} is {image.shape[0]} x {image.shape[1]}",
            expected=f"{h} x {w}, as {count} others are",
            fix="resize the images to one size",
        )
    grey = all(image.ndim == 2 for file in every for image in file.images)
    parts: dict[str, Pair] = {}
    for split, those in read.items():
        images = [image if grey else _rgb(image) for file in those for image in file.images]
        if not images:
            raise UserError(f"there are no images in {those[0].path}")
        whole = torch.from_numpy(np.stack(images))
        whole = whole[:, None] if grey else whole.permute(0, 3, 1, 2).contiguous()
        parts[split] = (whole, torch.cat([file.labels for file in those]))
    return _Decoded(parts, _classes(every))


def _rgb(image: Image) -> Image:
    return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)


def _classes(files: Sequence[_File]) -> tuple[str, ...]:
    """The names that the files agree on, or numbers."""
    named = [file for file in files if file.names is not None]
    for file in named:
        if file.names != named[0].names:
            raise UserError(
                "files of one dataset must name the same classes in the same order",
                got=f"{file.names} in {file.path} and {named[0].names} in {named[0].path}",
            )
    names = named[0].names if named else None
    if names is None:
        return numbered(*(file.labels for file in files))
    for file in files:
        beyond = (file.labels >= len(names)).nonzero()
        if len(beyond):
            row = int(beyond[0])
            raise UserError(
                f"row {row} of {file.path} has a label that has no name",
                got=str(int(file.labels[row])),
                expected=f"0 to {len(names) - 1}, for {', '.join(names[:3])} ...",
            )
    return names


def _read(path: Path) -> _File:
    """The images and labels of one file."""
    try:
        import PIL.Image  # noqa: F401  # missed here, not at the first row
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(
            "parquet files need pyarrow and Pillow", got=str(error), fix="pip install 'distillens[parquet]'"
        ) from error
    images: list[Image] = []
    labels: list[int] = []
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            image_column = _column(path, schema, "image", ("image", "img"), _holds_bytes)
            label_column = _column(
                path, schema, "label", ("label", "labels", "fine_label"), pa.types.is_integer
            )
            for batch in file.iter_batches(batch_size=1024, columns=[image_column, label_column]):
                encoded = batch.column(image_column)
                if pa.types.is_struct(encoded.type):
                    encoded = pc.struct_field(encoded, "bytes")
                for data, label in zip(
                    encoded.to_pylist(), batch.column(label_column).to_pylist(), strict=True
                ):
                    where = f"row {len(images)} of {path}"
                    if label is None or label < 0:
                        raise UserError(
                            f"{where} has no label",
                            got=str(label),
                            expected="a class number from 0",
                            fix="leave out files and rows without labels",
                        )
                    # One by one: on images of this size threads take longer (measured, 32 x 32 JPEG).
                    images.append(_pixels(data, where))
                    labels.append(label)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is not a whole parquet file", got=str(error).partition("\n")[0], fix="download it again"
        ) from error
    return _File(path, images, torch.tensor(labels, dtype=torch.int64), _class_names(schema, label_column))


def _column(path: Path, schema: Any, role: str, names: tuple[str, ...], fits: Callable[[Any], bool]) -> str:
    """The column that has one of the names, or else the only one whose type fits."""
    fitting = [field.name for field in schema if fits(field.type)]
    named = [name for name in names if name in schema.names]
    chosen = [name for name in named[:1] if name in fitting] if named else fitting
    if len(chosen) != 1:
        types = {"image": "bytes, or a struct with a field 'bytes'", "label": "whole numbers"}
        raise UserError(
            f"{path} has {'several columns that may be the' if chosen else 'no'} {role} column",
            got=", ".join(f"{field.name}: {field.type}" for field in schema),
            expected=f"one column of {types[role]}",
            fix=f"name the right one {names[0]!r}" if chosen else "",
        )
    return str(chosen[0])


def _holds_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind))


def _class_names(schema: Any, column: str) -> tuple[str, ...] | None:
    """The names in the hub's metadata, where there are some."""
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(str(name) for name in names) if isinstance(names, list) and names else None


def _pixels(data: bytes | None, where: str) -> Image:
    """One decoded image."""
    import PIL.Image

    if data is None:
        raise UserError(
            f"{where} has no image bytes",
            fix="store the images in the file, not only their paths (embed_storage)",
        )
    try:
        with PIL.Image.open(io.BytesIO(data)) as picture:
            mode = picture.mode
            target = "L" if mode in _GREY else "RGB" if mode in _COLOUR else None
            array = np.asarray(picture.convert(target)) if target else None
    except Exception as error:  # Pillow's decoders raise errors of many kinds on damaged bytes
        raise UserError(
            f"{where} is not an image that can be decoded", got=str(error), fix="mend or remove the row"
        ) from error
    if array is None:
        raise UserError(f"{where} is not an image of eight bits a channel", got=f"mode {mode}")
    return array
