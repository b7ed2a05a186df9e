"""The folder is the registry: a method is a file, found by its name."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from typing import Any, Generic, TypeVar, cast

from distillens.core.checks import unknown

T = TypeVar("T")


@dataclass(frozen=True)
class Room(Generic[T]):
    """A package whose public files each hold one class of the file's name (``random_subset``: RandomSubset).

    Names with a slash are files in folders: ``behaviour/mixing``.
    """

    package: str
    what: str

    def names(self) -> list[str]:
        """What the folder holds, by file name, without importing any of it."""
        root = import_module(self.package)
        found = []
        for module in pkgutil.iter_modules(root.__path__):
            if module.name.startswith("_"):
                continue
            if module.ispkg:
                inner = import_module(f"{self.package}.{module.name}")
                found += [
                    f"{module.name}/{m.name}"
                    for m in pkgutil.iter_modules(inner.__path__)
                    if not m.name.startswith("_")
                ]
            else:
                found.append(module.name)
        return sorted(found)

    def find(self, name: str) -> T:
        """The class in the file ``name``.

        Raises:
            UserError: there is no such file; the nearest name is suggested.
        """
        if name not in self.names():
            raise unknown(self.what, name, self.names())
        module = import_module(f"{self.package}.{name.replace('/', '.')}")
        wanted = name.rpartition("/")[2].replace("_", "")
        candidates: list[Any] = [
            item
            for item in vars(module).values()
            if isinstance(item, type) and item.__module__ == module.__name__ and is_dataclass(item)
        ]
        return cast(T, next(item for item in candidates if item.__name__.lower() == wanted))
