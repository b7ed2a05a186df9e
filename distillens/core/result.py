"""Figures with their error, claims with their verdict, results that a report can read.

No bare float is reported: an ``Estimate`` carries its interval, its n and its unit of replication.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from distillens.core.checks import UserError
from distillens.core.storage import read_json, read_tensors, write_bytes, write_json, write_tensors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPLICATE = "replicate"
NETWORK = "network (one set: the interval covers training only)"

Verdict = Literal["supported", "not supported", "inconclusive"]


@dataclass(frozen=True)
class Estimate:
    """A figure: value, interval [low, high], n independent units, and what a unit is.

    With one unit the interval is infinite: nothing is known of the error.
    """

    value: float
    low: float
    high: float
    n: int
    unit: str
    level: float = 0.95

    @staticmethod
    def mean(values: Sequence[float], unit: str, level: float = 0.95) -> Estimate:
        """The mean of independent values with Student's t interval (never a bootstrap over few units)."""
        values = [float(v) for v in values]
        n = len(values)
        if not n:
            raise ValueError("an estimate needs at least one value")
        centre = math.fsum(values) / n
        if n == 1:
            return Estimate(centre, -math.inf, math.inf, 1, unit, level)
        spread = math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (n - 1))
        half = t_quantile(level, n - 1) * spread / math.sqrt(n)
        return Estimate(centre, centre - half, centre + half, n, unit, level)

    @staticmethod
    def share(values: Sequence[float], trials: int, unit: str, level: float = 0.95) -> Estimate:
        """The mean of shares in [0, 1], each out of ``trials``, one an independent unit.

        Student's t over the units, cut to [0, 1]. Where all units agree t would claim certainty: the
        interval is then at least Clopper and Pearson's for all trials together. Of a single unit the trials
        are all there is: theirs is the interval, and n counts them.
        """
        plain = Estimate.mean(values, unit, level)
        if min(values) < max(values):
            return Estimate(plain.value, max(plain.low, 0.0), min(plain.high, 1.0), plain.n, unit, level)
        from scipy.stats import binomtest

        total = trials * plain.n
        exact = binomtest(round(plain.value * total), total).proportion_ci(level)
        if plain.n == 1:
            return Estimate(
                plain.value, float(exact.low), float(exact.high), trials, f"image of one {unit}", level
            )
        # The interval itself may be a rounding error wide.
        low, high = min(max(plain.low, 0.0), float(exact.low)), max(min(plain.high, 1.0), float(exact.high))
        return Estimate(plain.value, low, high, plain.n, unit, level)

    @staticmethod
    def components(
        value: float, parts: Mapping[str, Sequence[float]], unit: str, level: float = 0.95
    ) -> Estimate:
        """A mean over a crossed design: the variances of the margins' means add up.

        ``parts`` gives for each crossed factor the marginal means of its levels. Degrees of freedom by
        Welch and Satterthwaite; n is that of the smallest factor. Conservative: interactions count twice.
        """
        variances, freedoms = [], []
        for values in parts.values():
            n = len(values)
            if n < 2:
                return Estimate(value, -math.inf, math.inf, n, unit, level)
            centre = math.fsum(values) / n
            variances.append(math.fsum((v - centre) ** 2 for v in values) / (n - 1) / n)
            freedoms.append(n - 1)
        total = math.fsum(variances)
        freedom = (
            total**2 / math.fsum(v**2 / f for v, f in zip(variances, freedoms, strict=True))
            if total > 0
            else float(min(freedoms))
        )
        half = t_quantile(level, freedom) * math.sqrt(total)
        return Estimate(value, value - half, value + half, min(map(len, parts.values())), unit, level)

    def text(self, digits: int = 3) -> str:
        """``0.683 [0.661, 0.705]``."""
        if math.isinf(self.low) and math.isinf(self.high):
            return f"{self.value:.{digits}f} [no interval: n = {self.n}]"
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"

    def to_json(self) -> dict[str, Any]:
        """The estimate as JSON; infinite ends are text."""
        numbers = {name: _number(getattr(self, name)) for name in ("value", "low", "high", "level")}
        return {**numbers, "n": self.n, "unit": self.unit}


def units(values: Any) -> tuple[list[float], str]:
    """Independent units of values [replicates, networks] and their name.

    Replicates, each the mean of its networks; the networks themselves where there is one replicate.
    """
    if len(values) == 1:
        return values[0].tolist(), NETWORK
    return values.mean(1).tolist(), REPLICATE


def paired(first: Sequence[float], second: Sequence[float], unit: str) -> Estimate:
    """The mean of ``first - second`` over pairs, with Student's t interval."""
    return Estimate.mean([a - b for a, b in zip(first, second, strict=True)], unit)


def weaker(direction: Literal["greater", "less"], first: Estimate, second: Estimate) -> Estimate:
    """Of two contrasts that must both hold the one that says less for the claim.

    The claim is then supported where both are, at the level of each: a test of a union of nulls by the
    intersection of their rejections (Berger 1982) needs no correction.
    """
    if direction == "greater":
        return min(first, second, key=lambda one: (one.low, one.value))
    return max(first, second, key=lambda one: (one.high, one.value))


@cache
def t_quantile(level: float, freedom: float) -> float:
    """How many standard errors Student's interval reaches to either side; kept, for it is asked for the same few again."""
    from scipy.stats import t

    return float(t.ppf(0.5 + level / 2, freedom))


@dataclass(frozen=True)
class Claim:
    """One tested sentence about one subject.

    ``greater``: supported when the whole interval lies above ``smallest_effect``, not supported when it
    lies below, inconclusive between. ``less`` mirrors that. ``same``: supported when the whole interval
    lies within +- ``smallest_effect``, not supported when it lies outside.

    ``null`` says on what data the claim must not be supported, ``plant`` on what it must; the tests hold both.
    """

    name: str
    subject: str
    statement: str
    estimate: Estimate
    direction: Literal["greater", "less", "same"]
    smallest_effect: float
    null: str
    plant: str
    source: str = ""

    @property
    def verdict(self) -> Verdict:
        """Supported, not supported, or inconclusive."""
        low, high, bound = self.estimate.low, self.estimate.high, self.smallest_effect
        if self.direction == "less":
            low, high = -high, -low
        if self.direction == "same":
            if -bound < low and high < bound:
                return "supported"
            return "not supported" if low >= bound or high <= -bound else "inconclusive"
        if low > bound:
            return "supported"
        return "not supported" if high <= bound else "inconclusive"


@dataclass(frozen=True)
class Table:
    """A table of a result: cells are text, whole numbers or estimates."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | Estimate, ...], ...]


class Result(ABC):
    """What an analysis found. Subclasses are frozen dataclasses of plain values, estimates and tensors.

    ``save`` writes the fields, so that ``load`` gives the same object, and beside them what a report
    shows (headline, claims, tables, notes, figures), so that a reader needs none of our code.
    """

    analysis: ClassVar[str]
    title: ClassVar[str]
    question: ClassVar[str]

    @abstractmethod
    def headline(self) -> dict[str, Estimate]:
        """The few figures to quote."""

    @abstractmethod
    def claims(self) -> tuple[Claim, ...]:
        """The tested sentences."""

    @abstractmethod
    def plot(self, ax: Axes) -> None:
        """Draw the main figure."""

    def panels(self) -> dict[str, Callable[[Axes], None]]:
        """All figures, by caption."""
        return {self.title: self.plot}

    def tables(self) -> tuple[Table, ...]:
        """The figures in full."""
        return ()

    def notes(self) -> tuple[str, ...]:
        """What a reader must know before quoting a figure."""
        return ()

    def save(self, folder: Path, context: Mapping[str, Any] | None = None) -> Path:
        """Write ``NAME.json`` (last), tensors and figures into ``folder``; ``context`` is kept with them."""
        stem = self.analysis.replace("/", ".")
        tensors: dict[str, Any] = {}
        described = _encode(self, tensors, "")
        if tensors:
            write_tensors(folder / f"{stem}.safetensors", tensors)
        figures = []
        for i, (caption, draw) in enumerate(self.panels().items()):
            name = f"{stem}.{i}.png" if i else f"{stem}.png"
            write_bytes(folder / "figures" / name, _picture(draw))
            figures.append({"file": f"figures/{name}", "caption": caption})
        path = folder / f"{stem}.json"
        write_json(
            path,
            {
                "analysis": self.analysis,
                "title": self.title,
                "question": self.question,
                "context": dict(context or {}),
                "headline": [{"name": n, **e.to_json()} for n, e in self.headline().items()],
                "claims": [_claim_json(c) for c in self.claims()],
                "tables": [_table_json(t) for t in self.tables()],
                "notes": list(self.notes()),
                "figures": figures,
                "result": described,
            },
        )
        return path

    @classmethod
    def load(cls, path: Path) -> Self:
        """The result that ``save`` wrote.

        Raises:
            UserError: the file is missing, damaged, or of another analysis.
        """
        saved = read_json(path)
        beside = path.with_suffix(".safetensors")
        tensors = read_tensors(beside)[0] if beside.exists() else {}
        try:
            value = _decode(saved["result"], tensors)
        except UserError:
            raise
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not a saved result", got=repr(error), fix="make it again") from error
        if not isinstance(value, cls):
            raise UserError(f"{path} holds another result", got=type(value).__name__, expected=cls.__name__)
        return value


def _picture(draw: Callable[[Axes], None]) -> bytes:
    """A figure as PNG bytes; free of dates, so that the same result gives the same bytes."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None}, bbox_inches="tight", pad_inches=0.08)
    return buffer.getvalue()


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else repr(value)


def _claim_json(c: Claim) -> dict[str, Any]:
    plain = {f.name: getattr(c, f.name) for f in fields(c) if f.name != "estimate"}
    return {**plain, "estimate": c.estimate.to_json(), "verdict": c.verdict}


def _table_json(t: Table) -> dict[str, Any]:
    rows = [[x.to_json() if isinstance(x, Estimate) else x for x in row] for row in t.rows]
    return {"title": t.title, "columns": list(t.columns), "rows": rows}


def _encode(value: Any, tensors: dict[str, Any], place: str) -> Any:
    if hasattr(value, "detach"):
        tensors[place] = value
        return {"tensor": place}
    if isinstance(value, Estimate | Claim | Result):
        kind = type(value)
        names = [f.name for f in fields(cast(Any, value))]
        encoded = {name: _encode(getattr(value, name), tensors, f"{place}.{name}") for name in names}
        return {"is": f"{kind.__module__}.{kind.__qualname__}", **encoded}
    if isinstance(value, Mapping):
        return {"map": [[k, _encode(v, tensors, f"{place}.{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return [_encode(v, tensors, f"{place}.{i}") for i, v in enumerate(value)]
    if isinstance(value, float):
        return _number(value) if math.isfinite(value) else {"float": repr(value)}
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"a result cannot hold a {type(value).__name__} (at {place})")


def _decode(value: Any, tensors: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return tuple(_decode(v, tensors) for v in value)
    if not isinstance(value, dict):
        return value
    if "is" not in value:  # asked first: a field of a result may have any of the names below
        if "tensor" in value:
            return tensors[value["tensor"]]
        if "float" in value:
            return float(value["float"])
        return {k: _decode(v, tensors) for k, v in value["map"]}
    module, _, name = str(value["is"]).rpartition(".")
    if not module.startswith("distillens."):
        raise UserError("unknown result", got=repr(value["is"]), expected="a class of distillens")
    try:
        kind = getattr(import_module(module), name, None)
    except ImportError:
        kind = None
    if not (isinstance(kind, type) and issubclass(kind, Estimate | Claim | Result)):
        raise UserError("unknown result", got=repr(value["is"]), expected="a result of distillens")
    return kind(**{k: _decode(v, tensors) for k, v in value.items() if k != "is"})
