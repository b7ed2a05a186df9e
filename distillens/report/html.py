"""The summary as one self-contained page."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from distillens.core import palette
from distillens.core.result import Estimate, Table, Verdict
from distillens.report import numerals
from distillens.report.glyph import Axis, Glyph, draw
from distillens.report.summary import VERDICTS, Finding, Picture, Summary, TestedClaim


@dataclass(frozen=True)
class _Row:
    """A finding in the table of claims."""

    anchor: str
    finding: Finding
    glyph: Glyph


@dataclass(frozen=True)
class _Mark:
    """A verdict in the matrix, and the row it comes from."""

    anchor: str
    verdict: Verdict


@dataclass(frozen=True)
class _Matrix:
    """Claims by analysis, against subjects and sizes; a cell has a mark for every run that tested it."""

    subjects: tuple[str, ...]
    ipcs: tuple[float | None, ...]
    groups: tuple[tuple[str, tuple[tuple[str, tuple[tuple[_Mark, ...], ...]], ...]], ...]


def to_html(summary: Summary) -> str:
    """The report as one HTML page that loads nothing: style, script and pictures are inside."""
    environment = Environment(
        loader=PackageLoader("distillens.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    known = {s.name for size in summary.sizes for s in size.sets} | {s.name for s in summary.subjects}
    known |= {"real", "full data"}

    def colour(name: str) -> str:
        """The class of the longest known name that ``name`` begins with; other names stay grey."""
        own = [k for k in known if re.match(rf"{re.escape(k)}(?!\w)", name)]
        return _class(palette.colour(max(own, key=len))) if own else "grey"

    environment.filters |= {
        "colour": colour,
        "number": numerals.number,
        "signed": numerals.signed,
        "value": numerals.value_text,
        "interval": numerals.interval_text,
        "ipc": numerals.ipc_text,
        "duration": numerals.duration,
        "bar": numerals.bar,
        "uri": _uri,
        "pretty": _pretty,
        "slug": lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-"),
        "words": lambda text: text.replace("_", " "),
    }
    environment.tests["estimate"] = lambda value: isinstance(value, Estimate)
    rows = _rows(summary)
    rules = "".join(map(_rule, sorted({palette.colour(name) for name in known})))
    style = _source(environment, "report.css") + Markup(rules)
    script = _source(environment, "report.js")
    return environment.get_template("report.html").render(
        summary=summary,
        several=len(summary.runs) > 1,
        sources=[*dict.fromkeys(r.data.source for r in summary.runs if r.data and r.data.source)],
        rows=rows,
        matrix=_matrix(summary, rows),
        verdicts=VERDICTS,
        replication=_replication,
        numeric=_numeric,
        style=style,
        script=script,
        policy=_policy(style, script),
    )


def _class(colour: str) -> str:
    return f"c-{colour[1:].lower()}"


def _rule(colour: str) -> str:
    """The style of one colour; black is the ink's, which is light on a dark page."""
    return f".{_class(colour)} {{ --own: {'var(--ink)' if colour == '#000000' else colour}; }}\n"


def _rows(summary: Summary) -> dict[TestedClaim, tuple[_Row, ...]]:
    """The rows of every claim; claims of one name share an axis."""
    claims = [claim for subject in summary.subjects for claim in subject.claims]
    named: dict[tuple[str, str], list[TestedClaim]] = {}
    for claim in claims:
        named.setdefault((claim.analysis, claim.name), []).append(claim)
    axes = {name: Axis.over(group) for name, group in named.items()}
    rows = {}
    for i, claim in enumerate(claims, 1):
        axis = axes[claim.analysis, claim.name]
        rows[claim] = tuple(
            _Row(f"claim-{i}-{j}", finding, draw(claim, finding.estimate, axis))
            for j, finding in enumerate(claim.findings, 1)
        )
    return rows


def _matrix(summary: Summary, rows: Mapping[TestedClaim, tuple[_Row, ...]]) -> _Matrix:
    marks: dict[tuple[str, str, str, float | None], tuple[_Mark, ...]] = {}
    names: dict[str, dict[str, None]] = {}
    titles: dict[str, str] = {}
    for question in summary.questions:
        for analysis in question.analyses:
            names[analysis.name] = {}
            titles[analysis.name] = analysis.title
    for claim, its_rows in rows.items():
        names[claim.analysis][claim.name] = None
        for row in its_rows:
            cell = (claim.analysis, claim.name, claim.subject, row.finding.ipc)
            marks[cell] = (*marks.get(cell, ()), _Mark(row.anchor, row.finding.verdict))
    subjects, ipcs = tuple(subject.name for subject in summary.subjects), summary.ipcs
    groups = tuple(
        (
            titles[analysis],
            tuple(
                (name, tuple(marks.get((analysis, name, s, ipc), ()) for s in subjects for ipc in ipcs))
                for name in own
            ),
        )
        for analysis, own in names.items()
        if own
    )
    return _Matrix(subjects, ipcs, groups)


def _replication(table: Table) -> Estimate | None:
    """An estimate that speaks for the n, unit and level of all in the table, where they agree."""
    estimates = [cell for row in table.rows for cell in row if isinstance(cell, Estimate)]
    return estimates[0] if len({(e.n, e.unit, e.level) for e in estimates}) == 1 else None


def _numeric(table: Table, column: int) -> bool:
    """Whether a column holds numbers only; an empty cell says nothing."""
    return all(row[column] == "" or not isinstance(row[column], str) for row in table.rows)


def _uri(picture: Picture) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.data).decode()


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)


def _source(environment: Environment, name: str) -> Markup:
    """A file of ours, put into the page as it is."""
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])


def _policy(style: str, script: str) -> str:
    """A policy under which the page runs our script only and can reach no network."""

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return f"default-src 'none'; img-src data:; style-src 'sha256-{digest(style)}'; script-src 'sha256-{digest(script)}'"
