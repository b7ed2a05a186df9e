"""Real data by name: one file a source, and the folder is the registry.

A source is a file of this room with a function ``load``. One that reads files takes their path,
``load(path, *, key)``, and has ``recognises(path)``, which says whether a bare path looks like its own;
one that needs no path is ``load(*, key)``. Nothing is imported before it is used.
"""

from __future__ import annotations

import pkgutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from distillens.core.checks import UserError, one_of, unknown
from distillens.core.rng import Key

if TYPE_CHECKING:
    from distillens.core.dataset import Splits
    from distillens.core.space import Kind

WHITENED: dict[str, Kind] = {
    "zca": "kornia",
    "zca-kip": "kip",
    "zca-frepo": "frepo",
}  # the kinds of core.space.Zca by name
SPACES = ("standardised", "pixel", *WHITENED)


def sources() -> list[str]:
    """Names of the sources, sorted; none of them is imported.

    >>> sources()
    ['digits', 'parquet']
    """
    room = Path(__file__).parent
    names = (module.name for module in pkgutil.iter_modules([str(room)]))
    return sorted(
        name for name in names if "\ndef load(" in (room / f"{name}.py").read_text(encoding="utf-8")
    )


def load(spec: str, *, key: Key = Key(0), space: str = "standardised") -> Splits:
    """Real data in three splits, in the space that its source documents, or in another one by name.

    ``spec`` is a source's name (``digits``), ``kind:path`` (``parquet:cifar10/``), or a bare path whose
    kind is detected. What the source has not split itself is cut from the training data by
    ``key.fold("split")``: same key, same cut. ``Splits.source`` is ``spec`` as it was given.
    ``space`` is that of ``in_space``.

    >>> load("digits").train.shape
    (1, 8, 8)

    Raises:
        UserError: there is no such source, path or space, no source fits the path, or the source refuses its files.
    """
    one_of("space", space, SPACES)
    kind, colon, place = spec.partition(":")
    if kind not in sources():
        kind, place = _detect(spec), spec
    source = _module(kind)
    splits: Splits
    if not hasattr(source, "recognises"):
        if colon:
            raise UserError(f"{kind} takes no path", got=repr(spec), fix=f"write {kind}")
        splits = source.load(key=key)
    else:
        if not place:
            raise UserError(f"{kind} needs a path", got=repr(spec), fix=f"write {kind}:PATH")
        path = Path(place).expanduser()
        if not path.exists():
            raise _missing(place)
        splits = source.load(path, key=key)
    return in_space(replace(splits, source=spec), space)


def in_space(splits: Splits, space: str) -> Splits:
    """The same data in a space by name: ``standardised`` (as it is: its source has chosen), ``pixel``, or whitened.

    ``zca`` is the kornia kind of the trajectory methods, ``zca-kip`` and ``zca-frepo`` are those of the kernel methods
    (``core.space.Zca``). It is fitted on the training split alone, and all three splits go through the same matrix.

    Raises:
        UserError: there is no such space, or the data cannot be brought into it.
    """
    one_of("space", space, SPACES)
    if space in ("standardised", splits.space.name):
        return splits
    from distillens.core.space import Pixel, Zca

    if space == "pixel":
        return splits.to_space(Pixel())
    return splits.to_space(Zca.fit(splits.train.exact_pixels(), WHITENED[space]))


def _module(kind: str) -> ModuleType:
    return import_module(f"{__name__}.{kind}")


def _missing(place: str) -> UserError:
    return UserError(
        "there is no data where the path points",
        got=repr(place),
        expected="a folder or a file",
        fix="check the spelling; a relative path starts in the folder where the command runs",
    )


def _detect(spec: str) -> str:
    """The kind of a bare path."""
    path = Path(spec).expanduser()
    if not spec or not path.exists():
        kind, colon, _ = spec.partition(":")
        if not colon and ("/" in spec or path.suffix):  # a path, by its looks
            raise _missing(spec)
        raise unknown("data", kind, sources())
    readers = {kind: module for kind in sources() if hasattr(module := _module(kind), "recognises")}
    for kind, module in readers.items():
        if module.recognises(path):
            return kind
    inside = sorted(item.name for item in path.iterdir())[:3] if path.is_dir() else []
    raise UserError(
        f"no kind of data fits {spec}",
        got=f"a folder with {', '.join(inside) or 'nothing in it'}"
        if path.is_dir()
        else f"a file {path.name}",
        expected=f"files of one of the kinds {', '.join(readers)}",
        fix="a path of another name is written KIND:PATH",
    )
