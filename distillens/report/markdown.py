"""The summary as Markdown: claims first, tables after, no pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from distillens.core.result import Estimate
from distillens.report.numerals import bar, estimate_text, ipc_text, signed
from distillens.report.summary import Answer, Reproduced, Run, Subject, Summary


def to_markdown(summary: Summary) -> str:
    """The report as Markdown text; words from the run folder are escaped, so that none becomes markup."""
    counts = ", ".join(f"{n} {verdict}" for verdict, n in summary.verdicts.items())
    several = len(summary.runs) > 1
    lines = [f"# {_escape(summary.title)}", "", f"{len(summary.findings)} tested claims: {counts}.", ""]
    if summary.paper:
        lines += ["## The paper, finding by finding", ""]
        for finding in summary.paper:
            lines += _finding(finding)
    if summary.subjects:
        lines += ["## Claims", ""]
        for subject in summary.subjects:
            lines += _claims(subject, several)
    for question in summary.questions:
        lines += [f"## {_escape(question.title)}", ""]
        lines += [_escape(question.sentence), ""] if question.sentence else []
        for analysis in question.analyses:
            lines += [f"### {_escape(analysis.title)}", "", f"*{_escape(analysis.question)}*", ""]
            for answer in analysis.answers:
                lines += _answer(answer, several)
    lines += ["## Provenance", ""]
    for run in summary.runs:
        lines += _provenance(run)
    return "\n".join(lines).rstrip("\n") + "\n"


def _finding(finding: Reproduced) -> Iterator[str]:
    yield from (f"**{_escape(finding.name)}** {_escape(finding.sentence)}", "")
    rows = [
        (
            _escape(row.subject),
            _escape(row.published) if isinstance(row.published, str) else signed(row.published),
            "" if row.estimate is None else f"{estimate_text(row.estimate)}, {_replication(row.estimate)}",
            "" if row.deviation is None else signed(row.deviation),
            row.verdict,
        )
        for row in finding.rows
    ]
    yield from _table(("set", "paper", "ours", "deviation", "verdict"), rows)


def _claims(subject: Subject, several: bool) -> Iterator[str]:
    paper = f" ({_escape(subject.paper)})" if subject.paper else ""
    yield from (f"### {_escape(subject.name)}{paper}", "")
    rows = [
        (
            _escape(claim.statement),
            _escape(_place(finding.ipc, finding.run, several)),
            estimate_text(finding.estimate),
            _replication(finding.estimate),
            bar(claim),
            f"**{finding.verdict}**",
        )
        for claim in subject.claims
        for finding in claim.findings
    ]
    yield from _table(("claim", "size", "estimate", "n", "supported if", "verdict"), rows)


def _answer(answer: Answer, several: bool) -> Iterator[str]:
    yield from (f"#### {_escape(_place(answer.ipc, answer.run, several))}", "")
    if answer.headline:
        rows = [(_escape(name), estimate_text(e), _replication(e)) for name, e in answer.headline]
        yield from _table(("", "estimate", "n"), rows)
    for table in answer.tables:
        yield from (f"**{_escape(table.title)}**", "")
        yield from _table(map(_escape, table.columns), [[_cell(c) for c in row] for row in table.rows])
    for note in answer.notes:
        yield from (f"> {_escape(note)}", "")


def _provenance(run: Run) -> Iterator[str]:
    facts = {
        "run": run.title,
        "command": run.command,
        "data": run.data.source if run.data else "",
        "seed": "" if run.seed is None else str(run.seed),
        "trainings": "" if run.trainings is None else str(run.trainings),
        **run.versions,
    }
    yield from (f"- {_escape(name)}: {_escape(text)}" for name, text in facts.items() if text)
    yield ""


def _place(ipc: float | None, run: str, several: bool) -> str:
    return f"{ipc_text(ipc)}, {run}" if several else ipc_text(ipc)


def _table(columns: Iterable[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    columns = list(columns)
    yield _row(columns)
    yield _row(["---"] * len(columns))
    yield from map(_row, rows)
    yield ""


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: str | int | Estimate) -> str:
    if isinstance(value, Estimate):
        return f"{estimate_text(value)}, {_replication(value)}"
    return _escape(str(value))


def _replication(estimate: Estimate) -> str:
    return f"n = {estimate.n} ({_escape(estimate.unit)})"


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))
