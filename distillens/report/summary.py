"""What a report shows, collected from run folders: saved files in, plain values out.

Nothing is computed here and nothing is drawn: a verdict is the one that was saved with its claim.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from distillens.core.checks import UserError
from distillens.core.result import Estimate, Table, Verdict
from distillens.core.storage import read_json

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

_QUESTIONS = {
    "behaviour": ("Behaviour", "Do distilled images act as real images do?"),
    "representativeness": ("Representativeness", "Which part of learning from real data do they hold?"),
    "pointwise": ("Pointwise information", "What does one distilled image carry?"),
}


@dataclass(frozen=True)
class Picture:
    """A PNG: where it lies in its run folder, its bytes, its size in pixels."""

    file: str
    data: bytes = field(repr=False)
    width: int
    height: int


@dataclass(frozen=True)
class Data:
    """The real data a run started from; what was not saved is empty."""

    source: str
    classes: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)  # train, val, test
    shape: tuple[int, ...] = ()
    fingerprint: str = ""
    space: str = ""


@dataclass(frozen=True)
class Run:
    """How a run was made; what was not saved is empty."""

    title: str
    command: str = ""
    data: Data | None = None
    preset: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None
    plan: Mapping[str, Any] = field(default_factory=dict)
    trainings: int | None = None
    seconds: float | None = None
    scaled: tuple[str, ...] = ()  # settings that are smaller than the preset's


@dataclass(frozen=True)
class Compared:
    """What a paper found of a set beside what this run finds; ``estimate`` is None where it was not asked or not answered."""

    subject: str
    published: float | str
    estimate: Estimate | None
    verdict: Verdict | Literal["not asked", "not answered"]
    deviation: float | None


@dataclass(frozen=True)
class Reproduced:
    """A finding of the paper that a run reproduces, set by set."""

    run: str
    name: str
    sentence: str
    rows: tuple[Compared, ...]


@dataclass(frozen=True)
class Copy:
    """One distilled set on disk: its replicate number, where it lies, how it was made."""

    replicate: int
    folder: str
    command: str
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class DistilledSet:
    """A method's set at one size: the picture of its first replicate, and the record of every one."""

    run: str
    name: str
    ipc: float | None
    family: str
    paper: str
    preview: Picture | None
    initial: Picture | None
    storage: Mapping[str, int]
    copies: tuple[Copy, ...]


@dataclass(frozen=True)
class Size:
    """The sets that have the same number of images a class."""

    ipc: float | None
    sets: tuple[DistilledSet, ...]


@dataclass(frozen=True)
class Finding:
    """What one run at one size says of a claim."""

    run: str
    ipc: float | None
    estimate: Estimate
    verdict: Verdict


@dataclass(frozen=True)
class TestedClaim:
    """A claim about one subject, with a finding for every size it was tested at."""

    subject: str
    analysis: str
    title: str
    name: str
    statement: str
    direction: Literal["greater", "less", "same"]
    smallest_effect: float
    null: str
    plant: str
    source: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Subject:
    """A method and every claim about it."""

    name: str
    family: str
    paper: str
    claims: tuple[TestedClaim, ...]


@dataclass(frozen=True)
class Figure:
    """A figure with its caption; the picture is None where its file is not there."""

    file: str
    caption: str
    picture: Picture | None


@dataclass(frozen=True)
class Answer:
    """What one run at one size answers: figures to quote, to look at, and in full."""

    run: str
    ipc: float | None
    headline: tuple[tuple[str, Estimate], ...]
    figures: tuple[Figure, ...]
    tables: tuple[Table, ...]
    notes: tuple[str, ...]
    context: Mapping[str, Any]


@dataclass(frozen=True)
class Analysis:
    """One analysis with its answers, smallest sets first."""

    name: str
    title: str
    question: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Question:
    """The analyses that belong to one question."""

    name: str
    title: str
    sentence: str
    analyses: tuple[Analysis, ...]


@dataclass(frozen=True)
class Summary:
    """All that a report shows."""

    title: str
    runs: tuple[Run, ...]
    subjects: tuple[Subject, ...]
    sizes: tuple[Size, ...]
    questions: tuple[Question, ...]
    paper: tuple[Reproduced, ...] = ()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Every finding, in the order of the claims."""
        return tuple(f for subject in self.subjects for claim in subject.claims for f in claim.findings)

    @property
    def verdicts(self) -> dict[Verdict, int]:
        """How often each verdict was reached."""
        return {verdict: sum(f.verdict == verdict for f in self.findings) for verdict in VERDICTS}

    @property
    def ipcs(self) -> tuple[float | None, ...]:
        """The sizes that claims were tested at, smallest first."""
        return tuple(sorted({f.ipc for f in self.findings}, key=_by_ipc))


@dataclass(frozen=True)
class _Saved:
    """One results file."""

    analysis: str
    title: str
    question: str
    answer: Answer
    claims: tuple[TestedClaim, ...]


def summarise(*folders: Path) -> Summary:
    """What the run folders hold, ready to be shown; several folders are laid side by side.

    Raises:
        UserError: a folder is not there, holds nothing to report, or a file in it is damaged.
    """
    runs: list[Run] = []
    sets: list[DistilledSet] = []
    saved: list[_Saved] = []
    paper: list[Reproduced] = []
    asked: dict[str, None] = {}  # analyses in the order of the first study that asked them
    for folder in folders:
        run, its_sets, its_results, order = _read_run(folder, [run.title for run in runs])
        runs.append(run)
        sets += its_sets
        saved += its_results
        asked |= dict.fromkeys(order)
        paper += _read_paper(folder, run.title)
    saved.sort(key=lambda s: (_by_question(s.analysis, [*asked]), _by_ipc(s.answer.ipc)))
    return Summary(
        title=", ".join(run.title for run in runs),
        runs=tuple(runs),
        subjects=_subjects([claim for s in saved for claim in s.claims], sets),
        sizes=tuple(
            Size(ipc, tuple(s for s in sets if s.ipc == ipc))
            for ipc in sorted({s.ipc for s in sets}, key=_by_ipc)
        ),
        questions=_questions(saved),
        paper=tuple(paper),
    )


def _by_ipc(ipc: float | None) -> float:
    return -1.0 if ipc is None else ipc


def _by_question(analysis: str, asked: Sequence[str]) -> tuple[int, int, str]:
    known = [*_QUESTIONS]
    question = analysis.partition("/")[0]
    return (
        known.index(question) if question in known else len(known),
        asked.index(analysis) if analysis in asked else len(asked),
        analysis,
    )


def _subjects(claims: Sequence[TestedClaim], sets: Sequence[DistilledSet]) -> tuple[Subject, ...]:
    about = {s.name: s for s in reversed(sets)}
    findings: dict[TestedClaim, list[Finding]] = {}
    for claim in claims:
        findings.setdefault(replace(claim, findings=()), []).extend(claim.findings)
    names = dict.fromkeys([*(s.name for s in sets), *(claim.subject for claim in claims)])
    subjects = []
    for name in names:
        own = tuple(replace(c, findings=tuple(f)) for c, f in findings.items() if c.subject == name)
        if own:
            known = about.get(name)
            subjects.append(Subject(name, known.family if known else "", known.paper if known else "", own))
    return tuple(subjects)


def _questions(saved: Sequence[_Saved]) -> tuple[Question, ...]:
    analyses: dict[str, Analysis] = {}
    for s in saved:
        empty = Analysis(s.analysis, s.title, s.question, ())
        present = analyses.get(s.analysis, empty)
        analyses[s.analysis] = replace(present, answers=(*present.answers, s.answer))
    questions = []
    for name in dict.fromkeys(analysis.partition("/")[0] for analysis in analyses):
        title, sentence = _QUESTIONS.get(name, (name.replace("_", " ").capitalize(), ""))
        own = tuple(a for a in analyses.values() if a.name.partition("/")[0] == name)
        questions.append(Question(name, title, sentence, own))
    return tuple(questions)


def _read_run(folder: Path, taken: Sequence[str]) -> tuple[Run, list[DistilledSet], list[_Saved], list[str]]:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}", fix="give the folder that --to named")
    with _opened(folder / "study.json") as study:
        title = _untaken(str(study.get("title") or folder.resolve().name), taken)
        sets = _read_sets(folder, title, study.get("sets") or _found(folder))
        made = next((copy.provenance for s in sets for copy in s.copies if copy.provenance), {})
        run = _run(title, study, made)
        asked = list(map(str, study.get("asked", ())))
    only = sets[0].ipc if len({s.ipc for s in sets}) == 1 else None
    saved = []
    for path in sorted(folder.glob("results/**/*.json")):
        with _opened(path) as result:
            saved.append(_read_result(folder, title, path, only, result))
    if not sets and not saved:
        raise UserError(
            f"there is nothing to report in {folder}",
            fix=f"run this first: distillens study --data digits --to {folder}",
        )
    return run, sets, saved, asked


def _read_paper(folder: Path, run: str) -> list[Reproduced]:
    """What a study set beside a paper's findings, finding by finding."""
    found: dict[tuple[str, str], list[Compared]] = {}
    with _opened(folder / "paper.json") as saved:
        for row in saved.get("rows", ()):
            if row["verdict"] not in (*VERDICTS, "not asked", "not answered"):
                raise ValueError(f"verdict {row['verdict']!r}")
            published, deviation = row["published"], row["deviation"]
            compared = Compared(
                str(row["subject"]),
                published if isinstance(published, str) else float(published),
                None if row["estimate"] is None else _estimate(row["estimate"]),
                row["verdict"],
                None if deviation is None else float(deviation),
            )
            found.setdefault((str(row["name"]), str(row["sentence"])), []).append(compared)
    return [Reproduced(run, name, sentence, tuple(rows)) for (name, sentence), rows in found.items()]


def _found(folder: Path) -> list[dict[str, Any]]:
    """The sets that lie in a folder whose study was not finished; a set's start is not one of them."""
    written = {*folder.glob("provenance.json"), *folder.glob("sets/**/provenance.json")}
    places = [path.parent for path in written if path.parent.name != "initial"]
    places.sort(key=lambda place: (place.parent, len(place.name), place.name))  # replicate 10 after 9
    return [
        {
            "folder": place.relative_to(folder).as_posix(),
            "replicate": place.name if place.name.isdecimal() else 0,
        }
        for place in places
    ]


def _untaken(title: str, taken: Sequence[str]) -> str:
    """The title, numbered where another run has it."""
    names = [title, *(f"{title} ({n})" for n in range(2, len(taken) + 2))]
    return next(name for name in names if name not in taken)


@contextmanager
def _opened(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON object in ``path``, empty where there is none; whoever trips over its form names the file."""
    try:
        yield dict(read_json(path)) if path.is_file() else {}
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} has an unknown form", got=repr(error), fix="make it again") from error


def _run(title: str, study: Mapping[str, Any], made: Mapping[str, Any]) -> Run:
    """The run as its study says; a lone set says it in its provenance."""
    data = study.get("data") or {
        "source": made.get("data", ""),
        "fingerprint": made.get("data_fingerprint", ""),
    }
    seed = study.get("seed", made["key"][0] if made.get("key") else None)
    return Run(
        title=title,
        command=str(study.get("command", "")),
        data=Data(
            str(data.get("source", "")),
            tuple(map(str, data.get("classes", ()))),
            {name: int(data[name]) for name in ("train", "val", "test") if name in data},
            tuple(map(int, data.get("shape", ()))),
            str(data.get("fingerprint", "")),
            str(data.get("space", "")),
        )
        if any(data.values())
        else None,
        preset=str(study.get("preset") or ""),
        versions={str(k): str(v) for k, v in (study.get("versions") or made.get("versions") or {}).items()},
        seed=None if seed is None else int(seed),
        plan=dict(study.get("plan") or made.get("plan") or {}),
        trainings=None if study.get("trainings") is None else int(study["trainings"]),
        seconds=None if study.get("seconds") is None else float(study["seconds"]),
        scaled=tuple(map(str, study.get("scaled", ()))),
    )


def _read_sets(folder: Path, run: str, entries: Iterable[Mapping[str, Any]]) -> list[DistilledSet]:
    sets: dict[tuple[str, float | None], DistilledSet] = {}
    for entry in entries:
        place = _inside(folder, str(entry["folder"]))
        with _opened(place / "provenance.json") as provenance:
            name = str(entry.get("name") or provenance.get("method") or place.name)
            ipc = _ipc(entry.get("ipc", provenance.get("ipc")), str(entry["folder"]))
        number, command = int(entry.get("replicate", 0)), str(entry.get("command", ""))
        copy = Copy(number, str(entry["folder"]), command, provenance)
        present = sets.get((name, ipc))
        if present:
            sets[name, ipc] = replace(present, copies=(*present.copies, copy))
            continue
        sets[name, ipc] = DistilledSet(
            run,
            name,
            ipc,
            str(entry.get("family") or ""),
            str(entry.get("paper") or ""),
            _picture(folder, place / "preview.png"),
            _picture(folder, place / "initial" / "preview.png"),
            {str(k): int(v) for k, v in (entry.get("storage") or {}).items()},
            (copy,),
        )
    return list(sets.values())


def _read_result(
    folder: Path, run: str, path: Path, fallback: float | None, value: Mapping[str, Any]
) -> _Saved:
    analysis, title = str(value["analysis"]), str(value["title"])
    context = dict(value.get("context") or {})
    found = _ipc(context.get("ipc"), path.parent.name)
    ipc = fallback if found is None else found
    answer = Answer(
        run=run,
        ipc=ipc,
        headline=tuple((str(e["name"]), _estimate(e)) for e in value.get("headline", ())),
        figures=tuple(
            Figure(str(f["file"]), str(f["caption"]), _picture(folder, _inside(path.parent, str(f["file"]))))
            for f in value.get("figures", ())
        ),
        tables=tuple(
            Table(
                str(t["title"]),
                tuple(map(str, t["columns"])),
                tuple(tuple(map(_cell, row)) for row in t["rows"]),
            )
            for t in value.get("tables", ())
        ),
        notes=tuple(map(str, value.get("notes", ()))),
        context=context,
    )
    claims = tuple(_claim(c, run, ipc, analysis, title) for c in value.get("claims", ()))
    return _Saved(analysis, title, str(value.get("question", "")), answer, claims)


def _claim(value: Mapping[str, Any], run: str, ipc: float | None, analysis: str, title: str) -> TestedClaim:
    if value["verdict"] not in VERDICTS or value["direction"] not in ("greater", "less", "same"):
        raise ValueError(f"verdict {value['verdict']!r}, direction {value['direction']!r}")
    return TestedClaim(
        subject=str(value["subject"]),
        analysis=analysis,
        title=title,
        name=str(value["name"]),
        statement=str(value["statement"]),
        direction=value["direction"],
        smallest_effect=float(value["smallest_effect"]),
        null=str(value["null"]),
        plant=str(value["plant"]),
        source=str(value.get("source", "")),
        findings=(Finding(run, ipc, _estimate(value["estimate"]), value["verdict"]),),
    )


def _estimate(value: Mapping[str, Any]) -> Estimate:
    """An estimate; its infinite ends were saved as text, which ``float`` reads."""
    centre, low, high = (float(value[name]) for name in ("value", "low", "high"))
    return Estimate(centre, low, high, int(value["n"]), str(value["unit"]), float(value["level"]))


def _cell(value: Any) -> str | int | Estimate:
    if isinstance(value, dict):
        return _estimate(value)
    return value if isinstance(value, int) else str(value)


def _ipc(given: Any, place: str) -> float | None:
    """The images a class: as written, else as the folder's name says (``ipc10``)."""
    if given is not None:
        return float(given)
    named = re.search(r"(?:^|/)ipc(\d+)(?:/|$)", place)
    return float(named[1]) if named else None


def _inside(folder: Path, name: str) -> Path:
    """A path below ``folder``: a report never shows a file from elsewhere."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"a path in {folder} leads outside of it", got=repr(name), expected="a path below it")
    return folder / path


def _picture(folder: Path, path: Path) -> Picture | None:
    if not path.is_file():
        return None
    data = path.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24:
        raise UserError(f"{path} is not a PNG picture", fix="make it again")
    width, height = struct.unpack(">II", data[16:24])
    return Picture(path.relative_to(folder).as_posix(), data, width, height)
