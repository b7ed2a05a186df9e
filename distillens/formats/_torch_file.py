"""Files of ``torch.save`` as values, of which nothing can run."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.dataset import Splits
from distillens.core.labels import Hard
from distillens.core.space import Standardised, same_space

# The constants of the field's code for CIFAR-10. The std is the mean over images of each image's own std.
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)


def loaded(file: Path, what: str, expected: str, *, allowed: Sequence[Any] = ()) -> Any:
    """What is in a file, its tensors on the CPU, mapped from the disk where the file allows it.

    ``what`` says what it should be and ``expected`` how that looks. ``allowed`` are calls beside torch's own that such
    files make to rebuild plain numbers.

    Raises:
        UserError: there is no such file, it would run code, or it cannot be read.
    """
    if not file.is_file():
        raise UserError(
            f"there is no file {file}",
            fix="check the spelling; a relative path starts in the folder where the command runs",
        )
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(allowed)):
            warnings.simplefilter("ignore")  # about files that are refused anyway
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        called = re.search(r"GLOBAL (\S+)", str(error))
        if called:
            raise UserError(
                f"{file} is refused: reading it would run code from the file",
                got=f"a call of {called[1]}",
                expected=expected,
                fix="use a file from another source, or save its tensors in plain lists where you trust it",
            ) from error
        raise UserError(
            f"{file} is not {what}", got="a file that torch.load cannot read", expected=expected
        ) from error
    except Exception as error:  # bytes of any other kind fail in any way
        first = str(error).partition("\n")[0][:100]
        raise UserError(
            f"{file} is not {what}",
            got=f"a file that torch.load cannot read ({type(error).__name__}: {first})",
            expected=expected,
        ) from error


def distilled(
    file: Path, images: Any, labels: Any, real: Splits, mean: Sequence[float], std: Sequence[float]
) -> DistilledDataset:
    """Images and hard labels from a file as a distilled set in the space of the real data.

    The file's images are pixels minus ``mean`` over ``std``, one of each a channel.

    Raises:
        UserError: kinds, shapes, labels or constants do not fit the data, or a class has no image.
    """
    like = real.train
    _check_plain(file, "images", images)
    _check_plain(file, "labels", labels)
    if images.ndim != 4 or not images.is_floating_point() or tuple(images.shape[1:]) != like.shape:
        raise UserError(
            f"{file}: its images do not fit the data",
            got=f"{images.dtype} of shape {tuple(images.shape)}",
            expected=f"float numbers of shape [n, {', '.join(map(str, like.shape))}]",
            fix="name the data that they were made from with --data",
        )
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.ndim != 1 or not whole or len(labels) != len(images):
        raise UserError(
            f"{file}: its labels do not fit its images",
            got=f"{labels.dtype} of shape {tuple(labels.shape)}",
            expected=f"one whole number an image, [{len(images)}]",
        )
    index = labels.detach().long()
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= like.k):
        raise UserError(
            f"{file}: a label is outside the classes of the data",
            got=f"labels {int(index.min())} to {int(index.max())}",
            expected=f"0 to {like.k - 1}",
            fix="name the data that they were made from with --data",
        )
    counts = index.bincount(minlength=like.k).tolist()
    if 0 in counts:
        raise UserError(
            f"{file}: class {like.classes[counts.index(0)]!r} has no image",
            got=f"{len(index)} images of {sum(map(bool, counts))} classes",
            expected=f"images of all {like.k} classes of the data",
            fix="name the data that they were made from with --data",
        )
    if len(mean) != like.shape[0] or len(std) != like.shape[0]:
        raise UserError(
            f"{file}: the constants do not fit the channels of the data",
            got=f"{len(mean)} means and {len(std)} stds",
            expected=f"{like.shape[0]} of each",
            fix="say how its images were normalised with --set mean=... --set std=..., 0 and 1 for not at all",
        )
    theirs = Standardised(tuple(mean), tuple(std))
    values = images.detach().float()
    if not bool(values.isfinite().all()):
        bad = (~values.isfinite()).flatten(1).any(1).nonzero().flatten()
        raise UserError(
            f"{file}: {len(bad)} images hold numbers that are not finite",
            got=f"image {int(bad[0])}, the first",
        )
    if not same_space(theirs, real.space):
        values = real.space.from_pixels(theirs.to_pixels(values))
    # A file that is mapped may be written over while its numbers are in use.
    return DistilledDataset({"images": values.clone()}, Hard(index.clone()), like.classes, real.space)


def _check_plain(file: Path, what: str, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise UserError(f"{file}: its {what} are not a tensor", got=f"a {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise UserError(
            f"{file}: its {what} are not plain numbers",
            got=f"a tensor of {tensor.dtype}, {tensor.layout} on {tensor.device}",
        )
