"""Attributes that somebody has written down."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import torch

from distillens.attributes import MISSING, Attributes, fingerprints
from distillens.core.checks import UserError
from distillens.core.dataset import Dataset

NUMBER, NAME = "image", "fingerprint"
MOST = 50  # words of an attribute: above it a column is taken for a measurement


@dataclass(frozen=True)
class Labels:
    """Given attributes from a CSV file: a row an image, a column an attribute, an empty cell where it is not known.

    One column says which image a row is of: ``image``, its number in the split that is asked about (the test split, from 0), or
    ``fingerprint``, the image's name by ``distillens.attributes.fingerprints``, which is the same in every cut of the
    data. Images without a row have no known attribute. An attribute's words are all that its column has.
    """

    path: str = ""

    def __call__(self, data: Dataset, fit: Dataset) -> Attributes:
        """The attributes of ``data``.

        Raises:
            UserError: the file is missing or no table of attributes, or its rows do not fit the images.
        """
        rows, columns = self._read()
        which = NUMBER if NUMBER in columns else NAME
        names = [name for name in columns if name != which]
        place = {name: [i] for i, name in enumerate(map(str, range(len(data))))}
        if which == NAME:
            place = {}
            for i, name in enumerate(fingerprints(data)):  # one image may be there twice
                place.setdefault(name, []).append(i)
        words = {}
        for name in names:
            words[name] = tuple(sorted({row[name] for row in rows} - {""}))
            if not 2 <= len(words[name]) <= MOST:
                raise UserError(
                    f"{self.path}: the attribute {name!r} has {len(words[name])} words",
                    expected=f"2 to {MOST}",
                    fix="a measurement is cut into words first",
                )
        values = torch.full((len(data), len(names)), MISSING)
        seen: set[str] = set()
        for line, row in enumerate(rows, 2):
            if row[which] in seen or (which == NUMBER and row[which] not in place):
                raise UserError(
                    f"{self.path}, line {line}: "
                    + ("an image has two rows" if row[which] in seen else "there is no such image"),
                    got=repr(row[which]),
                    expected=f"one row an image, 0 to {len(data) - 1}" if which == NUMBER else "",
                )
            seen.add(row[which])
            for i in place.get(row[which], []):
                values[i] = torch.tensor(
                    [words[name].index(row[name]) if row[name] else MISSING for name in names]
                )
        if bool((values == MISSING).all()):
            raise UserError(
                f"{self.path} knows none of the images", got=f"{len(rows)} rows and {len(data)} images"
            )
        return Attributes(words, values)

    def _read(self) -> tuple[list[dict[str, str]], list[str]]:
        if not self.path:
            raise UserError("labels needs a file", fix="set its path: labels(path=attributes.csv)")
        try:
            with Path(self.path).expanduser().open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file, restval="", restkey="")
                rows = [{name: (cell or "").strip() for name, cell in row.items() if name} for row in reader]
                columns = [name for name in reader.fieldnames or [] if name]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{self.path} cannot be read as CSV", got=str(error)) from error
        if (NUMBER in columns) == (NAME in columns) or len(columns) < 2 or len(set(columns)) != len(columns):
            raise UserError(
                f"{self.path} is no table of attributes",
                got=f"columns {', '.join(columns) or '(none)'}",
                expected=f"a column {NUMBER!r} or {NAME!r}, and one an attribute",
            )
        return rows, columns
