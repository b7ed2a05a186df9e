from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest

from distillens.core.checks import UserError
from distillens.core.result import Claim, Estimate, Result, Table
from distillens.report import summarise, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Coins(Result):
    """A result as an analysis saves it."""

    analysis: ClassVar[str] = "pointwise/coins"
    title: ClassVar[str] = "Coins"
    question: ClassVar[str] = "Is the coin fair?"
    heads: tuple[float, ...]

    def headline(self) -> dict[str, Estimate]:
        return {"heads": Estimate.mean(self.heads, "coin")}

    def claims(self) -> tuple[Claim, ...]:
        share = Estimate.mean(self.heads, "coin")
        return (
            Claim("biased", "dm", "The coin is biased.", share, "greater", 0.5, "a fair coin", "a bent coin"),
        )

    def tables(self) -> tuple[Table, ...]:
        return (Table("Coins", ("coin", "heads"), (("first", Estimate.mean(self.heads, "coin")),)),)

    def plot(self, ax: Axes) -> None:
        ax.plot(self.heads)


def test_a_page_and_its_json_are_written_into_the_folder(run: Path) -> None:
    assert write(run) == run / "report.html"
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert json.loads((run / "report.json").read_text())["title"] == "digits"


def test_the_same_folder_gives_the_same_bytes_wherever_it_lies(run: Path, tmp_path: Path) -> None:
    first = {path.suffix: path.read_bytes() for path in (write(run), run / "report.json")}
    moved = tmp_path / "moved" / "digits"
    shutil.copytree(run, moved, ignore=shutil.ignore_patterns("report.*"))
    second = {path.suffix: path.read_bytes() for path in (write(moved), moved / "report.json")}
    assert first == second
    assert str(tmp_path).encode() not in first[".html"] + first[".json"]


def test_a_report_may_go_elsewhere_and_be_markdown(run: Path, tmp_path: Path) -> None:
    assert write(run, to=tmp_path / "out" / "mine.md").read_text().startswith("# digits\n")
    assert (tmp_path / "out" / "mine.json").is_file()
    assert not (run / "report.html").exists()


def test_another_ending_is_refused(run: Path) -> None:
    with pytest.raises(UserError) as error:
        write(run, to=Path("report.pdf"))
    assert str(error.value) == (
        "a report is a page or Markdown; got report.pdf; expected a name that ends in .html or .md"
    )


def test_an_empty_folder_is_left_empty(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"nothing to report in .*; run this first: distillens study --data digits"
    ):
        write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_an_analysis_saves_is_what_a_report_reads(tmp_path: Path) -> None:
    result = Coins((0.9, 0.8, 0.85, 0.95))
    result.save(tmp_path / "results" / "ipc10", {"ipc": 10})
    summary = summarise(tmp_path)
    (claim,) = summary.subjects[0].claims
    assert claim.findings[0].estimate == result.claims()[0].estimate
    assert claim.findings[0].verdict == result.claims()[0].verdict == "supported"
    answer = summary.questions[0].analyses[0].answers[0]
    assert dict(answer.headline) == result.headline()
    assert answer.tables == result.tables()
    assert answer.figures[0].picture and answer.figures[0].caption == "Coins"
    assert "0.875" in write(tmp_path).read_text()


def test_a_report_needs_neither_torch_nor_matplotlib(run: Path) -> None:
    script = """
import sys
from pathlib import Path
from distillens.report import write
write(Path(sys.argv[1]))
rooms = "torch numpy scipy matplotlib PIL distillens.analyses distillens.distillers distillens.data".split()
print([room for room in rooms if room in sys.modules])
"""
    command = [sys.executable, "-W", "error", "-c", script, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def paper(folder: Path) -> None:
    """What a study of the published preset leaves beside its results."""
    rows = [
        {
            "name": "T4",
            "sentence": "Adding <real> images lowers accuracy.",
            "subject": "dm",
            "published": -0.011,
            "estimate": {
                "value": -0.05,
                "low": -0.08,
                "high": -0.02,
                "n": 3,
                "unit": "replicate",
                "level": 0.95,
            },
            "verdict": "supported",
            "deviation": -0.039,
        },
        {
            "name": "T7",
            "sentence": "Recognised early.",
            "subject": "",
            "published": "1.0 after 100 updates",
            "estimate": None,
            "verdict": "not asked",
            "deviation": None,
        },
    ]
    (folder / "paper.json").write_text(json.dumps({"rows": rows}))


def test_the_papers_findings_come_first_with_their_deviation(run: Path, change) -> None:
    paper(run)
    change(run / "study.json", preset="wddl", scaled=["mixing: recipe.steps=30"], asked=["behaviour/mixing"])
    page = write(run).read_text()
    assert page.index('id="paper"') < page.index('id="overview"')
    assert "Adding &lt;real&gt; images lowers accuracy." in page
    for text in ("−0.011", "−0.039", "Paper: 1.0 after 100 updates", "not asked", "mixing: recipe.steps=30"):
        assert text in page
    # Analyses stand in the order in which they were asked.
    assert page.index('id="behaviour-mixing"') < page.index('id="behaviour-accuracy"')
    text = write(run, to=run / "page.md").read_text()
    assert "| dm | −0.011 | −0.050 [−0.080, −0.020], n = 3 (replicate) | −0.039 | supported |" in text


def test_a_report_of_another_study_says_nothing_of_the_paper(run: Path) -> None:
    assert 'id="paper"' not in write(run).read_text()


def test_a_damaged_comparison_is_named(run: Path) -> None:
    (run / "paper.json").write_text(json.dumps({"rows": [{"name": "T4"}]}))
    with pytest.raises(UserError, match=r"paper\.json has an unknown form"):
        write(run)
