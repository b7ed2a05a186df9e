"""The tables of semantics: what was found, the strongest of it, what could have been found, and the attributes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from distillens.analyses.pointwise._detectable import POWER, detectable
from distillens.core.result import Estimate, Table

if TYPE_CHECKING:
    from distillens.analyses.pointwise.semantics import SemanticsResult

SHARES = (0.05, 0.1, 0.2, 1 / 3, 0.5)  # base shares that the smallest detectable lift is stated for
LISTED = 12  # findings of a table


def counted(result: SemanticsResult) -> Table:
    """Findings of each set, and how they exceed those of shuffled attributes and of real points."""
    rows: list[tuple[str | int | Estimate, ...]] = []
    for name in result.counts:
        of_all, _ = result.found[name]
        null = result.shuffled[name].double()
        beyond = result.beyond_real(name) if name in result.distilled else None
        rows.append(
            (
                name,
                len(of_all),
                int(result.tests[name].tested.sum()),
                int(of_all.sum()),
                _spread(null[:, 0]),
                result.carriers(name),
                _spread(null[:, 1]),
                f"{result.chance(name):.3g}",
                result.beyond_shuffled(name),
                beyond if beyond is not None else "-",
                result.repeats(name) or "no finding",
                _spread(null[:, 2]),
            )
        )
    columns = (
        "set",
        "points",
        "tests",
        "findings",
        "of shuffled attributes",
        "points with one",
        "of shuffled attributes ",
        "p",
        "share of points beyond shuffled",
        "beyond real points",
        "share of findings that repeat",
        "repeated findings of shuffled",
    )
    return Table(f"Findings at a false discovery rate of {result.rate:g}", columns, tuple(rows))


def strongest_findings(result: SemanticsResult, name: str) -> Table | None:
    """The findings of a set with the smallest tails; None without any."""
    of_all, both = result.found[name]
    tail = result.tests[name].tail(result.counts[name][0])
    found = sorted(of_all.nonzero().tolist(), key=lambda at: float(tail[at[0], at[1]]))
    if not found:
        return None
    rows = []
    for point, word in found[:LISTED]:
        c = int(result.labels[name][point])
        rows.append(
            (
                point,
                result.classes[c],
                ": ".join(result.words[word]),
                f"{int(result.counts[name][0, point, word])} of {result.top}",
                f"{int(result.base[c, word])} of {int(result.sizes[c])}",
                result.lift(name, point, word),
                f"{float(tail[point, word]):.2g}",
                "yes" if bool(both[point, word]) else "no",
            )
        )
    columns = ("point", "class", "attribute", "most helped", "class images", "lift", "tail", "repeats")
    more = f" (the first {LISTED} of {len(found)})" if len(found) > LISTED else ""
    return Table(f"{name}: what the images that a point helps most share{more}", columns, tuple(rows))


def power(result: SemanticsResult) -> Table:
    """The smallest lift that would be found, for several shares in the class."""
    sizes = result.sizes.tolist()
    size = sorted(sizes)[len(sizes) // 2]
    tested = max((int(result.tests[name].tested.sum()) for name in result.counts), default=1)
    rows = []
    for share in SHARES:
        alone, among = (
            detectable(size, share, result.top, threshold)
            for threshold in (result.rate / max(tested, 1), result.rate)
        )
        rows.append((f"{share:.2f}", _lift_text(alone), _lift_text(among), f"{1 / share:.1f}"))
    columns = ("share in the class", "as the only finding", "where all are findings", "largest possible")
    title = (
        f"The smallest lift found with probability {POWER:g}: {result.top} of {size} images, {tested} tests"
    )
    return Table(title, columns, tuple(rows))


def attributes(result: SemanticsResult) -> Table:
    """How often the test images have each word."""
    total = result.base.sum(0)
    rows = []
    for place, name in enumerate(dict.fromkeys(attribute for attribute, _ in result.words)):
        shares = [
            f"{word} {float(total[i]) / float(result.sizes.sum()):.2f}"
            for i, (attribute, word) in enumerate(result.words)
            if attribute == name
        ]
        rows.append((name, ", ".join(shares), f"{result.known[place]:.2f}"))
    return Table(
        f"Attributes of the test images ({result.source})",
        ("attribute", "words and their shares", "share known"),
        tuple(rows),
    )


def _spread(values: torch.Tensor) -> str:
    """A mean and the range of the middle 95 % of shuffles, as text: what chance gives is no estimate of a set."""
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return f"{float(values.mean()):.2f} ({low:.0f} to {high:.0f})"


def _lift_text(lift: float) -> str:
    return f"{lift:.2f}" if math.isfinite(lift) else "none"
