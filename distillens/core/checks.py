"""Errors at the boundary: what is wrong, what was got, what was expected, what to do."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can mend. The command prints its one line and exits with code 2."""

    def __init__(self, what: str, *, got: str = "", expected: str = "", fix: str = "") -> None:
        parts = [what]
        if got:
            parts.append(f"got {got}")
        if expected:
            parts.append(f"expected {expected}")
        if fix:
            parts.append(fix)
        super().__init__("; ".join(parts))


class DivergedError(UserError):
    """A computation that left the finite numbers; the state before it is good."""


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not on the list, with the nearest name as a suggestion."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    listed = ", ".join(names) if names else "(nothing)"
    return UserError(f"unknown {what} {name!r}", fix=f"{hint}Known: {listed}")


def positive(owner: str, **values: float) -> None:
    """Refuse numbers that are not finite and above zero."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{owner}: {name} must be above 0", got=f"{value!r}")


def at_least(bound: float, owner: str, **values: float) -> None:
    """Refuse numbers below ``bound`` or not finite."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= bound):
            raise UserError(f"{owner}: {name} must be at least {bound:g}", got=f"{value!r}")


def one_of(what: str, value: str, known: Iterable[str]) -> None:
    """Refuse a name that is not among ``known``."""
    known = tuple(known)
    if value not in known:
        raise unknown(what, value, known)
